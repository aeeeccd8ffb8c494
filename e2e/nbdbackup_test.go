package e2e

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestCleanStop ends a daemon by SIGTERM while requests of its clients cannot be
// answered yet, since both other nodes stand still. Once those go on, every
// request is answered, without an error, before the connection ends: at the
// primary and at a node that forwards.
func TestCleanStop(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "16MiB")
	alpha := c.nodes[0]
	for round, role := range []string{"primary", "forwarder"} {
		target := alpha
		if role == "forwarder" {
			target = c.nodes[1]
		}
		c.makePrimary("db", target)
		c.waitHealthy("db")
		d := mustDial(t, alpha, "db")
		defer d.conn.Close()
		if err := d.write(fill(99, 4096), 0, false); err != nil {
			t.Fatal(err)
		}
		for _, n := range c.others(alpha.name) {
			n.pause()
		}
		const writes = 64
		first := d.handle
		for i := range uint64(writes) {
			if err := d.send(cmdWrite, 0, 4096*(i+1), 4096, fill(1000*uint64(round+1)+i, 4096)); err != nil {
				t.Fatal(err)
			}
		}
		// They are in the daemon's hands once it has read them all: its side of the
		// socket is empty then, and a read after them would be answered only later.
		eventually(t, time.Minute, "the daemon has read the requests", func() bool { return unread(t, alpha, d) == 0 })
		stopped := make(chan struct{})
		go func() { defer close(stopped); alpha.stop() }()
		eventually(t, time.Minute, "the daemon stops", func() bool { return strings.Contains(lastRun(alpha.log()), "msg=stopping") })
		for _, n := range c.others(alpha.name) {
			n.resume()
		}
		d.deadline(time.Now().Add(time.Minute))
		seen := map[uint64]bool{}
		for len(seen) < writes {
			var head [16]byte
			if _, err := io.ReadFull(d.conn, head[:]); err != nil {
				t.Fatalf("%s: %d of %d requests were answered: %v", role, len(seen), writes, err)
			}
			cookie, errno := binary.BigEndian.Uint64(head[8:]), binary.BigEndian.Uint32(head[4:])
			if errno != 0 || cookie <= first || cookie > first+writes || seen[cookie] {
				t.Fatalf("%s: reply %x", role, head)
			}
			seen[cookie] = true
		}
		if rest, err := io.ReadAll(d.conn); len(rest) != 0 {
			t.Errorf("%s: after the answers %x, %v", role, rest, err)
		}
		<-stopped
		other := mustDial(t, c.nodes[1], "db")
		for i := range uint64(writes) {
			b := make([]byte, 4096)
			if err := other.read(b, 4096*(i+1)); err != nil {
				t.Fatal(err)
			}
			if v, err := valueOf(b); v != 1000*uint64(round+1)+i || err != nil {
				t.Errorf("broke I2, %s: answered write %d reads as %d, %v", role, i, v, err)
			}
		}
		other.close()
		alpha.start()
		c.waitHealthy("db")
	}
}

func second(_ int, err error) error { return err }

// lastRun is the part of a log since the daemon's last start.
func lastRun(log string) string { return log[strings.LastIndex(log, ": start of "):] }

// unread is how many bytes that a client has sent its daemon has not read yet,
// as the kernel has it in /proc/net/tcp.
func unread(t *testing.T, n *node, d *disk) (bytes int64) {
	t.Helper()
	b, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	port := func(addr string) (p int) {
		fmt.Sscanf(addr[strings.LastIndex(addr, ":")+1:], "%d", &p)
		return p
	}
	here, there := fmt.Sprintf(":%04X", port(n.nbdTCP)), fmt.Sprintf(":%04X", port(d.conn.LocalAddr().String()))
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 5 || !strings.HasSuffix(f[1], here) || !strings.HasSuffix(f[2], there) {
			continue
		}
		var tx, rx int64
		if _, err := fmt.Sscanf(f[4], "%X:%X", &tx, &rx); err != nil {
			t.Fatal(err)
		}
		return rx
	}
	t.Fatalf("no connection from %s in /proc/net/tcp", d.conn.LocalAddr())
	return 0
}

// TestBackupOfCluster runs docs/examples/blockstep-backup against a cluster, as
// docs/backup.md has it: full, incremental through other nodes and past a
// switchover, restore to equality, and full again when the volume is another one.
func TestBackupOfCluster(t *testing.T) {
	t.Parallel()
	needTool(t, "nbdsh", "nbdinfo", "nbdcopy", "qemu-img")
	c := newCluster(t, options{})
	c.volume("db", "64MiB")
	c.volume("restored", "64MiB")
	dir := t.TempDir()
	image := filepath.Join(dir, "db.img")
	type status struct {
		ID       string `json:"id"`
		Position string `json:"position"`
	}
	now := func() (st status) {
		c.nodes[0].jsonOf(&st, "status", "db")
		return st
	}
	position := func() string { return now().Position }
	script := func(n *node) []string {
		at := now()
		return []string{"../docs/examples/blockstep-backup", n.uri("db"), image, "--id", at.ID, "--position", at.Position}
	}
	backup := func(n *node) string {
		t.Helper()
		return tool(t, "/usr/bin/python3", script(n)...)
	}
	same := func() {
		t.Helper()
		for _, n := range c.nodes {
			tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, n.uri("db"))
		}
	}
	tool(t, "nbdcopy", makeImage(t, "64M"), c.nodes[1].uri("db"))
	if out := backup(c.nodes[0]); !strings.HasPrefix(out, "full: ") {
		t.Errorf("the first run says %q", out)
	}
	same()

	since := position()
	d := mustDial(t, c.nodes[2], "db")
	defer d.close()
	for i, err := range []error{
		d.write(fill(1, 4096), 12<<20+100, false), // two blocks
		d.write(fill(2, 65536), 40<<20, true),
		d.zero(20<<20, 1<<20),
		d.trim(24<<20, 1<<20),
	} {
		if err != nil {
			t.Fatalf("change %d: %v", i, err)
		}
	}
	c.makePrimary("db", c.others(c.primary("db").name)[0])
	if err := d.write(fill(3, 4096), 60<<20, false); err != nil {
		t.Fatal(err)
	}
	// Blocks that changed shortly before the position may be named too: what is
	// known is exact to some 256 KiB of changes.
	const changed, most = 2*4096 + 65536 + 2<<20 + 4096, 5 << 20
	for _, n := range c.nodes {
		out := tool(t, "nbdinfo", "--map=blockstep:dirty-since:"+since, n.uri("db"))
		dirty, size := int64(0), int64(0)
		for line := range strings.Lines(out) {
			var off, length, flags int64
			if _, err := fmt.Sscan(line, &off, &length, &flags); err != nil || off != size {
				t.Fatalf("nbdinfo --map at %s: %q\n%s", n.name, line, out)
			}
			size += length
			dirty += length * (flags & 1)
		}
		if dirty < changed || dirty > most || size != 64<<20 {
			t.Errorf("%s: %d of %d bytes changed since %s, want %d to %d:\n%s", n.name, dirty, size, since, changed, most, out)
		}
	}
	var copied int
	if out := backup(c.nodes[1]); second(fmt.Sscanf(out, "since "+since+": %d of", &copied)) != nil || copied < changed || copied > most {
		t.Errorf("the second run says %q, want %d to %d bytes since %s", out, changed, most, since)
	}
	same()
	since = position()
	if out := backup(c.nodes[2]); second(fmt.Sscanf(out, "since "+since+": %d of", &copied)) != nil || copied > most-changed {
		t.Errorf("nothing has changed since %s, and the third run says %q", since, out)
	}
	same()
	tool(t, "nbdcopy", image, c.nodes[2].uri("restored"))
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", c.nodes[0].uri("db"), c.nodes[1].uri("restored"))

	for _, unknown := range []string{"1:999999", "99:1", "0:0x"} {
		if out := toolFails(t, "nbdinfo", "--map=blockstep:dirty-since:"+unknown, c.nodes[0].uri("db")); strings.Contains(out, " 0 ") {
			t.Errorf("a position that the log does not have was mapped:\n%s", out)
		}
	}
	if err := os.WriteFile(image+".position", []byte("1:999999 "+now().ID+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := toolFails(t, "/usr/bin/python3", script(c.nodes[0])...); !strings.Contains(out, "full backup") {
		t.Errorf("the script does not say what to do:\n%s", out)
	}

	// The volume is made anew under its name, and its log knows the position too.
	if err := os.WriteFile(image+".position", []byte("1:1 "+now().ID+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.close()
	c.nodes[0].cli("volume", "delete", "db")
	c.volume("db", "64MiB")
	again := mustDial(t, c.nodes[2], "db")
	defer again.close()
	if err := again.write(fill(4, 4096), 30<<20, true); err != nil {
		t.Fatal(err)
	}
	if out := backup(c.nodes[0]); !strings.HasPrefix(out, "full, since ") {
		t.Errorf("the first run of another volume of the same name says %q", out)
	}
	same()
}
