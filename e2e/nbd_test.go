package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/nbd/nbdtest"
)

// toolFails runs a client that must fail, and returns what it said.
func toolFails(t *testing.T, name string, args ...string) string {
	t.Helper()
	needTool(t, name)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || ctx.Err() != nil {
		t.Errorf("%s %s: %v, want it to fail\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// unixURI is an export on a unix socket.
func unixURI(socket, export string) string { return "nbd+unix:///" + export + "?socket=" + socket }

// TestListeners gives one node listeners with all the options that there are.
func TestListeners(t *testing.T) {
	t.Parallel()
	certs := t.TempDir()
	if err := nbdtest.WriteCertificates(certs); err != nil {
		t.Fatal(err)
	}
	few, secure := freePort(t), freePort(t)
	at := func(n *node, name string) string { return filepath.Join(filepath.Dir(n.nbdSock), name) }
	c := newCluster(t, options{nodes: []string{"alpha"}, nbd: func(n *node) string {
		return fmt.Sprintf(`  listen:
    - unix://%s
    - {address: "tcp://%s", tls: off}
    - {address: "unix://%s", mode: 0640, group: "0", read_only: true, allow: ["db@*"]}
    - {address: "unix://%s", tls: required}
    - {address: "tcp://%s", tls: off, max_connections: 2, allow: db}
    - {address: "tcp://%s"}
  tls: {cert: %s, key: %s, ca: %s, require: true}
`, n.nbdSock, n.nbdTCP, at(n, "backup.sock"), at(n, "secure.sock"), few, secure,
			filepath.Join(certs, "server-cert.pem"), filepath.Join(certs, "server-key.pem"), filepath.Join(certs, "ca-cert.pem"))
	}})
	n := c.nodes[0]
	c.volume("db", "64MiB")
	c.volume("secret", "4MiB")

	t.Run("read-only with an allow-list", func(t *testing.T) {
		socket := at(n, "backup.sock")
		st, err := os.Stat(socket)
		if err != nil || st.Mode().Perm() != 0o640 {
			t.Errorf("mode of the socket %v, %v; want 0640", st.Mode(), err)
		}
		list := tool(t, "nbdinfo", "--list", unixURI(socket, ""))
		if !strings.Contains(list, `export="db@alpha"`) || strings.Contains(list, `export="db":`) || strings.Contains(list, "secret") || !strings.Contains(list, "is_read_only: true") {
			t.Errorf("an allow-list of db@*:\n%s", list)
		}
		for _, export := range []string{"db", "secret", "secret@alpha"} {
			if out := toolFails(t, "nbdinfo", unixURI(socket, export)); !strings.Contains(out, "No such file") {
				t.Errorf("%s, which is not allowed:\n%s", export, out)
			}
		}
	})
	t.Run("max_connections", func(t *testing.T) {
		var held []net.Conn
		for range 2 {
			conn, err := net.Dial("tcp", few)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.ReadFull(conn, make([]byte, 18)); err != nil {
				t.Fatal(err)
			}
			held = append(held, conn)
		}
		conn, err := net.Dial("tcp", few)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got, _ := io.ReadAll(conn); len(got) != 0 {
			t.Errorf("a third connection is greeted: %q", got)
		}
		tool(t, "nbdinfo", n.uri("db")) // the others do not suffer
		held[0].Close()
		eventually(t, time.Minute, "a place comes free", func() bool {
			d, err := dialAddr("tcp", few, "db")
			if err == nil {
				d.close()
			}
			return err == nil
		})
	})
	t.Run("TLS", func(t *testing.T) { secureClients(t, certs, secure, at(n, "secure.sock"), n.uri("db")) })
	t.Run("no such socket from systemd", func(t *testing.T) {
		file := filepath.Join(c.dir, "fd.yaml")
		text := strings.ReplaceAll(c.config(n, options{nbd: func(*node) string { return "  listen: [\"fd://nosuch\"]\n" }}), n.dataDir, n.dataDir+"2")
		for _, addr := range []string{n.addr, n.metrics} {
			text = strings.ReplaceAll(text, addr, freePort(t))
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		refuses(t, file, "fd://nosuch", "FileDescriptorName")
	})
}

// secureClients uses real clients on listeners that require TLS and a client's
// certificate.
func secureClients(t *testing.T, certs, tcp, socket, plain string) {
	image := makeImage(t, "64M")
	host, port, err := net.SplitHostPort(tcp)
	if err != nil {
		t.Fatal(err)
	}
	creds := "tls-creds-x509,id=t,endpoint=client,dir=" + certs
	opts := fmt.Sprintf("driver=nbd,host=%s,port=%s,export=db,tls-creds=t", host, port)
	tool(t, "qemu-img", "convert", "--object", creds, "-n", "--target-image-opts", "-f", "raw", image, opts)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, plain)

	uri := fmt.Sprintf("nbds://%s/db?tls-certificates=%s", tcp, certs)
	if out := tool(t, "nbdinfo", uri); !strings.Contains(out, "with TLS") {
		t.Errorf("nbdinfo %s:\n%s", uri, out)
	}
	overUnix := fmt.Sprintf("nbds+unix://localhost/db?socket=%s&tls-certificates=%s", socket, certs)
	out := filepath.Join(t.TempDir(), "out")
	tool(t, "nbdcopy", "--connections=4", "--requests=64", overUnix, out)
	tool(t, "cmp", image, out)

	for _, without := range []string{"nbd://" + tcp + "/db", unixURI(socket, "db")} {
		toolFails(t, "nbdinfo", without)
		toolFails(t, "qemu-img", "info", without)
	}
	// Renewed certificates count without a restart: those of another authority are
	// taken, and the old ones are not.
	stale := t.TempDir()
	for _, name := range []string{"ca-cert.pem", "client-cert.pem", "client-key.pem"} {
		tool(t, "cp", filepath.Join(certs, name), filepath.Join(stale, name))
	}
	if err := nbdtest.WriteCertificates(certs); err != nil {
		t.Fatal(err)
	}
	tool(t, "nbdinfo", uri)
	toolFails(t, "nbdinfo", fmt.Sprintf("nbds://%s/db?tls-certificates=%s", tcp, stale))
	// Encryption alone is not enough.
	if err := os.Remove(filepath.Join(certs, "client-cert.pem")); err != nil {
		t.Fatal(err)
	}
	toolFails(t, "nbdinfo", uri)
}

// TestSocketActivation hands listening sockets to the daemon as systemd does.
// Clients may connect before it runs; a stop leaves the sockets open.
func TestSocketActivation(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{nodes: []string{"alpha"}, stopped: true, nbd: func(n *node) string {
		return fmt.Sprintf("  listen: [\"unix://%s\", {address: \"fd://backup\", read_only: true}]\n  handshake_timeout: 2m\n", n.nbdSock)
	}})
	n := c.nodes[0]
	unix, err := net.Listen("unix", n.nbdSock)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	backup, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer backup.Close()
	other, err := net.Listen("tcp", n.nbdTCP) // named by no entry: served as it is
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for _, ln := range []net.Listener{unix, backup, other} {
		f, err := ln.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		n.sockets = append(n.sockets, f)
	}
	n.socketNames = "blockstep.socket:backup:blockstep.socket"

	greeted := func(conn net.Conn) {
		t.Helper()
		_ = conn.SetDeadline(time.Now().Add(time.Minute))
		b := make([]byte, 18)
		if _, err := io.ReadFull(conn, b); err != nil || binary.BigEndian.Uint64(b) != nbdMagic {
			t.Errorf("a client from before the start is not greeted: %x, %v", b, err)
		}
	}
	early := func() net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp", n.nbdTCP)
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	conn := early()
	defer conn.Close()
	n.start()
	greeted(conn)
	c.volume("db", "16MiB")

	for _, at := range [][2]string{{"unix", n.nbdSock}, {"tcp", n.nbdTCP}} {
		d, err := dialAddr(at[0], at[1], "db")
		if err != nil {
			t.Fatalf("%s: %v", at[1], err)
		}
		if err := d.write(fill(1, 4096), 0, true); err != nil {
			t.Errorf("write at %s: %v", at[1], err)
		}
		d.close()
	}
	d, err := dialAddr("tcp", backup.Addr().String(), "db")
	if err != nil {
		t.Fatal(err)
	}
	if d.flags&readOnly == 0 {
		t.Error("the socket that is configured as read-only is not")
	}
	d.close()

	n.stop()
	if _, err := os.Stat(n.nbdSock); err != nil {
		t.Errorf("the daemon removed systemd's socket file: %v", err)
	}
	// A client that comes back at once waits until the node knows the volume
	// again, and is not told that there is none.
	back := make(chan error, 1)
	go func() {
		d, err := dialAddr("tcp", n.nbdTCP, "db")
		if err == nil {
			d.close()
		}
		back <- err
	}()
	n.start()
	if err := <-back; err != nil {
		t.Errorf("a client that connects before the node is up: %v", err)
	}
}

// TestClaims has many clients that claim 32 MiB each and send nothing, and
// measures what the daemon holds for them. Another client is served meanwhile.
func TestClaims(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{nodes: []string{"alpha"}})
	n := c.nodes[0]
	c.volume("db", "64MiB")
	d := mustDial(t, n, "db")
	defer d.close()
	work := func() {
		t.Helper()
		for i := range uint64(200) {
			if err := d.write(fill(i+1, 4096), 4096*i, false); err != nil {
				t.Fatal(err)
			}
		}
	}
	work()
	before := n.rss()
	const clients = 100
	for range clients {
		greedy := mustDial(t, n, "db")
		defer greedy.conn.Close()
		if err := greedy.send(cmdWrite, 0, 0, nbd.PayloadMax, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	work()
	// 1 MiB for each that is admitted, the buffers of the connections, and what
	// the collector has not swept yet.
	grown := n.rss() - before
	t.Logf("%d clients that claim %d MiB in all cost %d MiB", clients, clients*nbd.PayloadMax>>20, grown>>20)
	if most := int64(clients*(1<<20) + 64<<20); grown > most {
		t.Errorf("%d clients that claim 32 MiB and send nothing cost %d MiB, more than %d", clients, grown>>20, most>>20)
	}
}

// rss is the daemon's memory, in bytes.
func (n *node) rss() int64 {
	n.c.t.Helper()
	n.mu.Lock()
	pid := n.proc.Process.Pid
	n.mu.Unlock()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		n.c.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	n.c.t.Fatalf("no VmRSS of process %d", pid)
	return 0
}

// TestWideRequests uses 64-bit lengths on a volume of 64 GiB, at each node.
func TestWideRequests(t *testing.T) {
	t.Parallel()
	const size, gib = 64 << 30, 1 << 30
	c := newCluster(t, options{})
	c.volume("db", "64GiB")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for i, n := range c.nodes {
		k, err := nbdtest.Dial(ctx, "tcp://"+n.nbdTCP, "db", nbdtest.Options{Extended: true, MetaContexts: []string{nbd.AllocationContext}})
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		data := fill(uint64(i+1), 65536)
		for _, off := range []uint64{0, 5 * gib, 63*gib + 4096} {
			if err := k.WriteAt(ctx, data, off); err != nil {
				t.Fatal(err)
			}
		}
		dataBytes := func() (sum uint64) {
			t.Helper()
			for at := uint64(0); at < size; {
				st, err := k.BlockStatus(ctx, at, size-at)
				if err != nil || len(st[nbd.AllocationContext]) == 0 {
					t.Fatalf("block status of %d bytes at %d: %v, %v", size-at, at, st, err)
				}
				for _, e := range st[nbd.AllocationContext] {
					if e.Flags&uint64(nbd.StateZero) == 0 {
						sum += e.Length
					}
					at += e.Length
				}
			}
			return sum
		}
		if got := dataBytes(); got != 3*65536 {
			t.Errorf("%s: %d bytes of data, want %d", n.name, got, 3*65536)
		}
		if err := k.WriteZeroes(ctx, 4*gib, 6*gib); err != nil {
			t.Errorf("%s: zeroes of 6 GiB: %v", n.name, err)
		}
		got := make([]byte, 65536)
		if err := k.ReadAt(ctx, got, 5*gib); err != nil || !bytes.Equal(got, make([]byte, 65536)) {
			t.Errorf("%s: after the zeroes the data below read %x…, %v", n.name, got[:8], err)
		}
		// A range becomes a hole when its entry is applied, which is soon.
		eventually(t, time.Minute, "the zeroes are holes at "+n.name, func() bool { return dataBytes() == 2*65536 })
		if err := k.Trim(ctx, 0, size); err != nil {
			t.Errorf("%s: a trim of all: %v", n.name, err)
		}
		if err := k.ReadAt(ctx, got, 63*gib+4096); err != nil || !bytes.Equal(got, make([]byte, 65536)) {
			t.Errorf("%s: after the trim the last data read %x…, %v", n.name, got[:8], err)
		}
		for what, err := range map[string]error{
			"a trim beyond the end":       k.Trim(ctx, gib, size),
			"zeroes at the end of 2^64":   k.WriteZeroes(ctx, 1<<64-4096, 8192),
			"a status of 2^64-1 bytes":    func() error { _, err := k.BlockStatus(ctx, 0, 1<<64-1); return err }(),
			"a cache of more than is":     k.Cache(ctx, 1, size),
			"an unknown command":          k.Do(ctx, 99, 0, 0, 512, nil),
			"an unknown flag on a trim":   k.Trim(ctx, 0, 512, 1<<14),
			"zeroes with a flag of reads": k.WriteZeroes(ctx, 0, 512, nbdtest.DF),
		} {
			if !errors.Is(err, nbdtest.EINVAL) && !errors.Is(err, nbdtest.ENOSPC) {
				t.Errorf("%s: %s: %v", n.name, what, err)
			}
		}
		eventually(t, time.Minute, "the trimmed are holes at "+n.name, func() bool { return dataBytes() == 0 })
		if err := k.Flush(ctx); err != nil {
			t.Errorf("%s: the connection does not live: %v", n.name, err)
		}
	}
	c.waitHealthy("db")
}
