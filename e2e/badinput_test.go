package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// refuses starts blockstepd with a configuration that it must refuse, and
// returns what it said.
func refuses(t *testing.T, cfgFile string, words ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(binDir, "blockstepd"), "--config", cfgFile).CombinedOutput()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		t.Errorf("it goes on instead of refusing; it said:\n%s", out)
		return
	case err == nil:
		t.Errorf("it ended with 0 instead of refusing; it said:\n%s", out)
		return
	case !errors.As(err, &exit) || exit.ExitCode() < 1:
		t.Errorf("it ended with %v, want an exit code; it said:\n%s", err, out)
	}
	if s := string(out); strings.Contains(s, "panic") || strings.Contains(s, "goroutine ") {
		t.Errorf("it panicked:\n%s", s)
	}
	for _, word := range words {
		if !strings.Contains(string(out), word) {
			t.Errorf("the error does not say %q:\n%s", word, out)
		}
	}
}

// TestBadConfiguration is point 10, the part before the daemon runs: each error
// names the thing.
func TestBadConfiguration(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{stopped: true})
	n := c.nodes[0]
	good := c.config(n, options{})
	replace := func(old, with string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("the configuration has no %q", old)
		}
		return strings.Replace(good, old, with, 1)
	}
	tests := []struct {
		name, text string
		words      []string
	}{
		{"unknown key", good + "replicaz: 3\n", []string{"replicaz"}},
		{"unknown nested key", good + "volume: {log_retentoin: 1GiB}\n", []string{"log_retentoin"}},
		{"bad size", good + "volume: {log_retention: many}\n", []string{"log_retention", "many"}},
		{"bad duration", good + "volume: {lease: soon}\n", []string{"lease", "soon"}},
		{"bad address", replace(n.addr, "127.0.0.1:seven"), []string{"127.0.0.1:seven"}},
		{"address without port", replace(n.addr, "127.0.0.1"), []string{"127.0.0.1"}},
		{"bad listener", replace("tcp://"+n.nbdTCP, "carrier-pigeon://"+n.nbdTCP), []string{"carrier-pigeon"}},
		{"node not in nodes", replace("node: alpha", "node: delta"), []string{"delta", "nodes"}},
		{"no nodes", "cluster: e2e\nnode: alpha\ndata_dir: " + n.dataDir + "\n", []string{"nodes"}},
		{"not YAML", "cluster: [e2e\n", []string{"blockstep.yaml"}},
		{"boot id file missing", replace(n.bootFile, n.bootFile+".nosuch"), []string{"nosuch"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "blockstep.yaml")
			if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			refuses(t, file, tt.words...)
		})
	}
	t.Run("no file", func(t *testing.T) {
		refuses(t, filepath.Join(t.TempDir(), "nosuch.yaml"), "nosuch.yaml")
	})
}

// TestPortInUse: the error names the address, for each of the node's listeners.
func TestPortInUse(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{stopped: true})
	n := c.nodes[0]
	for name, addr := range map[string]string{"node": n.addr, "nbd": n.nbdTCP, "metrics": n.metrics} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			refuses(t, n.cfgFile, addr)
		})
	}
}

// TestForeignDataDir: a data directory of another cluster, of another node, or
// in use by another daemon, is refused by name.
func TestForeignDataDir(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "16MiB")
	alpha, beta := c.nodes[0], c.nodes[1]
	other := func(old, with string) string {
		file := filepath.Join(t.TempDir(), "blockstep.yaml")
		text := strings.Replace(c.config(alpha, options{}), old, with, 1)
		// Its own listeners, so that only the directory is wrong.
		for _, addr := range []string{alpha.addr, beta.addr, c.nodes[2].addr, alpha.nbdTCP, alpha.metrics} {
			text = strings.ReplaceAll(text, addr, freePort(t))
		}
		text = strings.ReplaceAll(text, alpha.nbdSock, filepath.Join(c.dir, "x.sock"))
		text = strings.ReplaceAll(text, alpha.admin, filepath.Join(c.dir, "y.sock"))
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	t.Run("in use", func(t *testing.T) {
		refuses(t, other("cluster: e2e", "cluster: e2e"), alpha.dataDir)
	})
	alpha.stop()
	t.Run("of another cluster", func(t *testing.T) {
		refuses(t, other("cluster: e2e", "cluster: foreign"), alpha.dataDir, "e2e", "foreign")
	})
	t.Run("of another node", func(t *testing.T) {
		refuses(t, other("node: alpha", "node: gamma"), alpha.dataDir, "alpha", "gamma")
	})
	t.Run("of another cluster of this name", func(t *testing.T) {
		file := filepath.Join(alpha.dataDir, "cluster.json")
		good, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, id, found := strings.Cut(string(good), `"cluster_id": "`)
		if id, _, _ = strings.Cut(id, `"`); !found || len(id) != 32 {
			t.Fatalf("%s has no cluster_id: %s", file, good)
		}
		swapped := id[16:] + id[:16]
		if err := os.WriteFile(file, []byte(strings.Replace(string(good), id, swapped, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		refuses(t, other("cluster: e2e", "cluster: e2e"), file, id, swapped)
		if err := os.WriteFile(file, good, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	alpha.start()
	beta.waitReady()
	c.waitHealthy("db")
}

// TestBadRequests is point 10, the part of the command line: each error names
// the thing, and the daemon goes on.
func TestBadRequests(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "16MiB")
	n := c.nodes[0]
	n.cliFails(exitRefused, []string{"nosuch"}, "volume", "delete", "nosuch", "--yes")
	n.cliFails(exitRefused, []string{"nosuch"}, "switchover", "nosuch", "--to", "beta")
	n.cliFails(exitRefused, []string{"nosuch"}, "failover", "nosuch")
	n.cliFails(exitRefused, []string{"delta"}, "volume", "create", "v", "--size", "16MiB", "--replicas", "alpha,delta")
	n.cliFails(exitUsage, []string{"sometimes"}, "volume", "create", "v", "--size", "16MiB", "--ack", "sometimes")
	n.cliFails(exitUsage, nil, "volume", "create", "v", "--size", "-5GiB")
	n.cliFails(exitUsage, nil, "volume", "create", "v", "--size", "0")
	n.cliFails(exitUsage, nil, "volume", "create", "a/../b", "--size", "16MiB")
	n.cliFails(exitUsage, nil, "volume", "create", "a@b", "--size", "16MiB")
	n.cliFails(exitUsage, []string{"--to"}, "switchover", "db")
	for _, export := range []string{"nosuch", "db@nosuch", "nosuch@alpha", "", strings.Repeat("x", 4096)} {
		d, err := dial(n, export)
		if err == nil {
			d.close()
			if export != "" { // an empty name may mean the only volume
				t.Errorf("export %q was opened", export)
			}
		}
	}
	d := mustDial(t, n, "db")
	defer d.close()
	for _, bad := range []struct {
		what string
		err  error
	}{
		{"a read at the far end of 64 bits", d.do(cmdRead, 0, 1<<63, 4096, nil, nil)},
		{"a write past the end", d.do(cmdWrite, 0, d.size, 4096, make([]byte, 4096), nil)},
		{"a trim past the end", d.trim(d.size-4096, 8192)},
		{"an unknown command", d.do(77, 0, 0, 0, nil, nil)},
		{"an unknown flag", d.do(cmdRead, 1<<14, 0, 4096, nil, nil)},
	} {
		var answered nbdError
		if !errors.As(bad.err, &answered) {
			t.Errorf("%s: %v, want an error in the reply", bad.what, bad.err)
		}
	}
	if err := d.read(make([]byte, 4096), 0); err != nil {
		t.Errorf("the connection does not go on after errors: %v", err)
	}
}

// TestGarbage is point 10, the sockets: random bytes, broken protocol, and
// connections that say nothing, at every socket of a node. It panics nowhere,
// and the volume goes on.
func TestGarbage(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "16MiB")
	n := c.primary("db")
	rng := rand.New(rand.NewPCG(seed(t), 7))
	pid := n.proc.Process.Pid

	nbdHello := binary.BigEndian.AppendUint32(nil, 1)
	option := func(opt, length uint32) []byte {
		b := binary.BigEndian.AppendUint64(append([]byte(nil), nbdHello...), optMagic)
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, opt), length)
	}
	starts := [][]byte{
		nil,
		nbdHello,
		option(optGo, 0xffffffff),
		option(optGo, 6),
		option(1, 200),
		[]byte("GET /v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"),
		[]byte("POST /v1/volumes HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n{\"name\":"),
		[]byte("blockstep"),
	}
	sockets := map[string][2]string{
		"node": {"tcp", n.addr}, "nbd tcp": {"tcp", n.nbdTCP}, "nbd unix": {"unix", n.nbdSock},
		"admin": {"unix", n.admin}, "metrics": {"tcp", n.metrics},
	}
	var silent []net.Conn
	for name, s := range sockets {
		for i := range 60 {
			conn, err := net.DialTimeout(s[0], s[1], 5*time.Second)
			if err != nil {
				t.Fatalf("connect to %s: %v", name, err)
			}
			if i%6 == 5 {
				silent = append(silent, conn)
				continue
			}
			_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
			junk := make([]byte, rng.IntN(3000))
			for j := range junk {
				junk[j] = byte(rng.Uint32() >> 7)
			}
			_, _ = conn.Write(append(append([]byte(nil), starts[i%len(starts)]...), junk...)) // refused midway is fine
			conn.Close()
		}
	}
	// A client that claims much and sends little.
	greedy := mustDial(t, n, "db")
	_ = greedy.send(cmdWrite, 0, 0, 1<<31, []byte("and no more"))

	if !n.running() || n.proc.Process.Pid != pid {
		t.Fatal("the daemon died of garbage")
	}
	for _, at := range c.nodes {
		d := mustDial(t, at, "db")
		if err := d.write(fill(5, 4096), 0, true); err != nil {
			t.Errorf("write through %s after the garbage: %v", at.name, err)
		}
		d.close()
		at.cli("status")
	}
	for _, conn := range silent {
		conn.Close()
	}
	greedy.conn.Close()
	c.waitHealthy("db")
}
