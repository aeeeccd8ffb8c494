package e2e

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// tool runs a client program; it must succeed.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	needTool(t, name)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// makeImage makes an ext4 image that holds the NBD server with its tests: some
// hundred files, and no matter what has been built beside them.
func makeImage(t *testing.T, size string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	tool(t, "mkfs.ext4", "-q", "-F", "-d", "../nbd", name, size)
	return name
}

// TestRealClients is point 3: the programs that people use, against each of the
// three nodes.
func TestRealClients(t *testing.T) {
	c := newCluster(t, options{})
	c.volume("db", "128MiB")
	alpha, beta, gamma := c.nodes[0], c.nodes[1], c.nodes[2]
	image := makeImage(t, "128M")

	t.Run("qemu-img", func(t *testing.T) {
		for _, n := range c.nodes {
			tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, n.uri("db"))
			tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, n.uri("db"))
		}
		out := filepath.Join(t.TempDir(), "out")
		tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", beta.uri("db"), out)
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, out)
		tool(t, "fsck.ext4", "-fn", out)
		for _, n := range c.nodes {
			tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, n.uri("db@"+n.name))
		}
	})
	t.Run("nbdcopy", func(t *testing.T) {
		noise := filepath.Join(t.TempDir(), "noise")
		if err := os.WriteFile(noise, noiseBytes(128<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		out := filepath.Join(t.TempDir(), "out")
		tool(t, "nbdcopy", "--flush", "--connections=4", "--requests=64", noise, beta.uri("db"))
		tool(t, "nbdcopy", "--connections=4", "--requests=64", gamma.uri("db"), out)
		tool(t, "cmp", noise, out)
		tool(t, "nbdcopy", image, alpha.uri("db"))
		tool(t, "nbdcopy", beta.uri("db"), out)
		tool(t, "cmp", image, out)
	})
	t.Run("nbdinfo", func(t *testing.T) {
		for _, n := range c.nodes {
			checkInfo(t, n)
		}
		if list := tool(t, "nbdinfo", "--list", "nbd://"+alpha.nbdTCP); !strings.Contains(list, "db") {
			t.Errorf("nbdinfo --list does not show db:\n%s", list)
		}
		tool(t, "nbdinfo", "--map", gamma.uri("db"))
	})
	t.Run("qemu-io", func(t *testing.T) {
		for i, n := range c.nodes {
			pattern := []string{"0x5a", "0xa5", "0x3c"}[i]
			out := tool(t, "qemu-io", "-f", "raw", n.uri("db"),
				"-c", "write -P "+pattern+" 1M 3M", "-c", "write -f -P 0x11 2M 64k", "-c", "flush",
				"-c", "read -P "+pattern+" 1M 1M", "-c", "read -P 0x11 2M 64k",
				"-c", "write -z 1M 512k", "-c", "discard 1536k 512k", "-c", "read -P 0 1M 1M",
				"-c", "aio_write -P 0x77 8M 1M", "-c", "aio_write -P 0x78 16M 1M", "-c", "aio_flush",
				"-c", "read -P 0x77 8M 1M", "-c", "read -P 0x78 16M 1M")
			if strings.Contains(out, "verification failed") || strings.Contains(out, "failed:") {
				t.Errorf("qemu-io at %s:\n%s", n.name, out)
			}
		}
	})
	t.Run("fio", func(t *testing.T) {
		for _, n := range c.nodes {
			out := tool(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+n.uri("db"), "--rw=randwrite", "--bs=4k",
				"--size=16M", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0", "--fsync=64")
			if !strings.Contains(out, "err= 0") {
				t.Errorf("fio at %s:\n%s", n.name, out)
			}
		}
	})
	t.Run("nbdfuse", func(t *testing.T) { fuseFilesystem(t, beta.uri("db")) })
	c.waitHealthy("db")
	c.replicasEqual("db")
}

// checkInfo compares what an export announces with what the design says.
func checkInfo(t *testing.T, n *node) {
	t.Helper()
	var info struct {
		Exports []struct {
			Name      string `json:"export-name"`
			Size      int64  `json:"export-size"`
			ReadOnly  bool   `json:"is_read_only"`
			Flush     bool   `json:"can_flush"`
			FUA       bool   `json:"can_fua"`
			Trim      bool   `json:"can_trim"`
			Zero      bool   `json:"can_zero"`
			MultiConn bool   `json:"can_multi_conn"`
		} `json:"exports"`
	}
	for _, export := range []string{"db", "db@" + n.name} {
		out := tool(t, "nbdinfo", "--json", n.uri(export))
		if err := json.Unmarshal([]byte(out), &info); err != nil || len(info.Exports) != 1 {
			t.Fatalf("nbdinfo --json %s: %v\n%s", n.uri(export), err, out)
		}
		e := info.Exports[0]
		if e.Name != export || e.Size != 128<<20 {
			t.Errorf("nbdinfo at %s: %+v", n.name, e)
		}
		writable := export == "db"
		if e.ReadOnly == writable {
			t.Errorf("%s at %s: is_read_only is %v", export, n.name, e.ReadOnly)
		}
		if writable && (!e.Flush || !e.FUA || !e.Trim || !e.Zero || !e.MultiConn) {
			t.Errorf("%s at %s must offer FLUSH, FUA, TRIM, WRITE_ZEROES and multi-conn: %+v", export, n.name, e)
		}
	}
}

// fuseFilesystem makes a filesystem on an nbdfuse file, puts something into it
// and checks it.
func fuseFilesystem(t *testing.T, uri string) {
	needTool(t, "nbdfuse", "fusermount3", "mkfs.ext4", "fsck.ext4")
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mount := func() func() {
		cmd := exec.Command("nbdfuse", file, uri)
		var said strings.Builder
		cmd.Stderr = &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "nbdfuse shows the disk", func() bool {
			st, err := os.Stat(file)
			return err == nil && st.Size() > 0
		})
		return func() {
			tool(t, "fusermount3", "-u", file)
			if err := cmd.Wait(); err != nil {
				t.Errorf("nbdfuse: %v\n%s", err, said.String())
			}
		}
	}
	unmount := mount()
	tool(t, "mkfs.ext4", "-q", "-F", "-d", "../docs", file)
	tool(t, "fsck.ext4", "-fn", file)
	unmount()
	unmount = mount()
	tool(t, "fsck.ext4", "-fn", file)
	unmount()
}

// noiseBytes is content without zero blocks and without repetition.
func noiseBytes(n int) []byte {
	b := make([]byte, n)
	x := uint64(0x9e3779b97f4a7c15)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x >> 32)
	}
	return b
}

// TestDemoStory is point 1: the story runs to its end and holds.
func TestDemoStory(t *testing.T) {
	t.Parallel()
	needTool(t, "mkfs.ext4", "fsck.ext4")
	out, code := blockstep(4*time.Minute, "demo", "--story", "--from", "..")
	t.Logf("blockstep demo --story:\n%s", out)
	if code != exitOK {
		t.Errorf("blockstep demo --story: exit code %d", code)
	}
}
