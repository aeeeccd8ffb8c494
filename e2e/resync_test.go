package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// dataFile is a replica's backing store.
func (n *node) dataFile() string {
	n.c.t.Helper()
	found, err := filepath.Glob(filepath.Join(n.dataDir, "volumes", "*", "data"))
	if err != nil || len(found) != 1 {
		n.c.t.Fatalf("the backing store of %s: %v (%v)", n.name, found, err)
	}
	return found[0]
}

// writeBlocks writes n MiB of new content at off, 256 KiB at a time.
func (c *cluster) writeBlocks(d *disk, value uint64, off, n int) {
	c.t.Helper()
	const step = 256 << 10
	for at := off; at < off+n; at += step {
		if err := d.write(fill(value+uint64(at), step), uint64(at), false); err != nil {
			c.t.Fatalf("write at %d: %v", at, err)
		}
	}
}

// resyncBytes follows a replica's return by status, and returns the most bytes
// that its resync announced.
func (c *cluster) resyncBytes(volume, node string) (most int64) {
	c.t.Helper()
	asks := c.others(node)[0]
	eventually(c.t, 60*time.Second, node+" is in sync again", func() bool {
		st, ok := asks.tryStatus(volume)
		if !ok {
			return false
		}
		var r struct {
			Total int64 `json:"total_bytes"`
		}
		if json.Unmarshal(st.replica(node).Resync, &r) == nil {
			most = max(most, r.Total)
		}
		return st.Health == "healthy"
	})
	return most
}

// TestLongAbsence: a node that is away while more than the log's retention is
// written gets the blocks that changed, and no others, while clients go on; it
// needs no command.
func TestLongAbsence(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{config: map[string]string{"volume.log_retention": "4MiB", "resync.rate_max": "16MiB"}})
	c.volume("db", "128MiB")
	away := c.others(c.primary("db").name)[0]
	d := mustDial(t, c.primary("db"), "db")
	defer d.close()
	c.writeBlocks(d, 1, 0, 64<<20) // what needs no copying later
	if err := d.flush(); err != nil {
		t.Fatal(err)
	}
	c.waitHealthy("db")
	// No checkpoint is waited for: what its log holds and its backing store may
	// not yet is no part of the resync either.
	away.kill()
	const dirty = 8 << 20
	for round := range uint64(12) { // the same blocks, 96 MiB of log
		c.writeBlocks(d, 1000*(round+1), 8<<20, dirty)
	}
	if err := d.flush(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, away.name+" left the in-sync set", func() bool {
		return len(c.live().status("db").InSync) == 2
	})
	t.Logf("dirty_bytes while %s is away: %d", away.name, c.live().status("db").replica(away.name).DirtyBytes)

	l := startLoad(t, "db", seed(t), loadOptions{nodes: c.others(away.name), registers: 8, firstReg: 1200, small: true})
	began := time.Now()
	away.start()
	moved := c.resyncBytes("db", away.name)
	t.Logf("in sync %v after its start; the resync was of %d bytes", time.Since(began).Round(time.Millisecond), moved)
	// The load's own blocks, and the 64 MiB are no part of it.
	if most := int64(dirty + dirty/20 + 8*4096); moved > most {
		t.Errorf("broke I6: the resync was of %d bytes, and %d were dirty", moved, dirty)
	}
	l.noFailures(l.clients)
	l.finish(c)
	c.replicasEqual("db")
}

// TestLongAbsenceFailover: the primary changes while a replica is away for long:
// the new one knows the dirty blocks too.
func TestLongAbsenceFailover(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{config: map[string]string{"volume.log_retention": "4MiB"}})
	c.volume("db", "64MiB")
	prim := c.primary("db")
	away := c.others(prim.name)[0]
	third := c.others(prim.name, away.name)[0]
	d := mustDial(t, third, "db")
	defer d.close()
	c.writeBlocks(d, 1, 0, 16<<20)
	away.kill()
	c.writeBlocks(d, 7000, 4<<20, 12<<20)
	eventually(t, 20*time.Second, away.name+" left the in-sync set", func() bool {
		return len(third.status("db").InSync) == 2
	})
	third.cli("switchover", "db", "--to", third.name)
	c.writeBlocks(d, 9000, 20<<20, 8<<20)
	away.start()
	third.cli("wait", "db", "--for", "healthy", "--timeout", "60s")
	c.replicasEqual("db")
}

// TestInvalidate: an operator has one replica copied anew, under load.
func TestInvalidate(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "64MiB")
	victim := c.others(c.primary("db").name)[0]
	l := startLoad(t, "db", seed(t), loadOptions{nodes: c.nodes, flushes: 0.03})
	d := mustDial(t, c.primary("db"), "db")
	defer d.close()
	c.writeBlocks(d, 1, 32<<20, 16<<20)
	c.live().cli("invalidate", "db", "--node", victim.name)
	time.Sleep(500 * time.Millisecond)
	c.waitHealthy("db")
	// Its own clients too: they go on by the others.
	l.noFailures(l.clients)
	l.finish(c)
	c.replicasEqual("db")
}

// TestInvalidateWithoutPrimary: what may be the best replica that is left is not
// given up while there is nobody to copy from.
func TestInvalidateWithoutPrimary(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{config: map[string]string{"failover.auto": "false"}})
	c.volume("db", "16MiB")
	alpha, beta := c.node("alpha"), c.node("beta")
	c.makePrimary("db", alpha)
	alpha.kill()
	out := beta.cliFails(exitRefused, nil, "invalidate", "db", "--node", "gamma")
	if !strings.Contains(out, "may be the best that is left") {
		t.Errorf("it says: %s", out)
	}
	if st := beta.status("db").replica("gamma"); st.State == "Failed" {
		t.Errorf("gamma is given up: %+v", st)
	}
	alpha.start()
	c.waitHealthy("db")
	beta.cli("invalidate", "db", "--node", "gamma")
	c.waitHealthy("db")
	c.replicasEqual("db")
}

// TestWipedNode: a node that lost its data directory does not vote and does not
// serve old promises; it is refused until it is replaced, and is copied whole.
func TestWipedNode(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "32MiB")
	d := mustDial(t, c.primary("db"), "db")
	defer d.close()
	c.writeBlocks(d, 1, 0, 8<<20)
	victim := c.others(c.primary("db").name)[0]
	asks := c.others(victim.name)[0]
	victim.kill()
	if err := os.RemoveAll(victim.dataDir); err != nil {
		t.Fatal(err)
	}
	victim.start()
	c.writeBlocks(d, 50, 8<<20, 8<<20)
	time.Sleep(2 * time.Second)
	if st := asks.status("db"); st.Health == "healthy" {
		t.Errorf("with an empty data directory on %s the volume is called healthy: %+v", victim.name, st)
	}
	out := asks.cli("status")
	if !strings.Contains(out, "node replace "+victim.name) {
		t.Errorf("status does not say what to type to have %s back:\n%s", victim.name, out)
	}
	asks.cli("node", "replace", victim.name)
	asks.cli("wait", "db", "--for", "healthy", "--timeout", "60s")
	c.replicasEqual("db")
	// 16 of 32 MiB were written; holes stay holes in the copy.
	if n := allocated(t, victim.dataFile()); n > 17<<20 {
		t.Errorf("the copy on %s takes %d bytes of its disk, and 16 MiB were written", victim.name, n)
	}
}

// verifyTime is how long TestVerify compares under load, at the least three
// times; BLOCKSTEP_E2E_VERIFY=1h is for a long run.
func verifyTime(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("BLOCKSTEP_E2E_VERIFY")
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("BLOCKSTEP_E2E_VERIFY: %v", err)
	}
	return d
}

// TestVerify: equal replicas are called equal under load; a flipped byte in any
// replica's backing store is found, and repaired.
func TestVerify(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "32MiB")
	d := mustDial(t, c.nodes[0], "db")
	defer d.close()
	c.writeBlocks(d, 1, 0, 24<<20)
	if err := d.flush(); err != nil {
		t.Fatal(err)
	}
	o := loadOptions{nodes: c.nodes, registers: 16}
	if verifyTime(t) > time.Minute {
		o.think = 5 * time.Millisecond // the history of a long run is kept in memory
	}
	l := startLoad(t, "db", seed(t), o)
	runs := 0
	for end := time.Now().Add(verifyTime(t)); runs < 3 || time.Now().Before(end); runs++ {
		c.nodes[runs%3].cli("verify", "db")
	}
	t.Logf("%d comparisons under load without a report", runs)
	l.noFailures(l.clients)
	l.stop()
	for i, n := range c.nodes {
		off := int64(20<<20 + i*(256<<10) + 777) // no register of the load is there
		eventually(t, 30*time.Second, "the block is in the backing store of "+n.name, func() bool {
			b := readByte(t, n.dataFile(), off)
			return b != 0
		})
		// Nothing of the log may still be on its way to that place.
		time.Sleep(time.Second)
		flipByte(t, n.dataFile(), off)
		out, code := c.nodes[0].cliRaw(time.Minute, "verify", "db")
		if code != exitRefused || !strings.Contains(out, n.name) {
			t.Errorf("verify with a flipped byte at %s: exit code %d:\n%s", n.name, code, out)
		}
		c.nodes[0].cli("verify", "db", "--repair")
		c.nodes[0].cli("verify", "db")
		c.replicasEqual("db")
	}
	b := make([]byte, 256<<10)
	d.deadline(time.Now().Add(time.Minute)) // the one of before may be over
	if err := d.read(b, 20<<20); err != nil {
		t.Fatal(err)
	}
	if v, err := valueOf(b); err != nil || v != 1+20<<20 {
		t.Errorf("after the repairs a block has value %d (%v), want %d", v, err, 1+20<<20)
	}
}

// allocated is what a file takes of its disk, in bytes.
func allocated(t *testing.T, name string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func readByte(t *testing.T, name string, off int64) byte {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off/8*8); err != nil {
		t.Fatal(err)
	}
	return b[0]
}

func flipByte(t *testing.T, name string, off int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x40
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}

// TestResize: larger, online, on all replicas; clients see it when they connect
// again; it survives everything.
func TestResize(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "16MiB")
	l := startLoad(t, "db", seed(t), loadOptions{nodes: c.nodes, registers: 16})
	c.live().cli("volume", "resize", "db", "48MiB")
	l.noFailures(l.clients)
	l.finish(c)
	for _, n := range c.nodes {
		d := mustDial(t, n, "db")
		if d.size != 48<<20 {
			t.Errorf("after the resize %s offers %d bytes, want %d", n.name, d.size, 48<<20)
		}
		if err := d.write(fill(9, 4096), d.size-4096, true); err != nil {
			t.Errorf("write at the new end through %s: %v", n.name, err)
		}
		d.close()
	}
	c.live().cliFails(exitUsage, nil, "volume", "resize", "db", "small")
	c.live().cliFails(exitRefused, nil, "volume", "resize", "db", "8MiB")
	for _, n := range c.nodes {
		n.kill()
	}
	for _, n := range c.nodes {
		n.start()
	}
	c.nodes[0].waitReady()
	c.waitHealthy("db")
	if st := c.live().status("db"); st.Size != 48<<20 {
		t.Errorf("after a restart the size is %d, want %d", st.Size, 48<<20)
	}
	c.replicasEqual("db")
}

// TestFullDisk: the disk of one node fills up. The volume goes on with the
// others, status says why, and when there is room again one command heals.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Fatal("a file system of its own for one node needs root: run the end-to-end tests as root")
	}
	c := newCluster(t, options{stopped: true})
	victim := c.node("beta")
	if err := os.MkdirAll(victim.dataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	tool(t, "mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", victim.dataDir)
	t.Cleanup(func() {
		victim.kill()
		tool(t, "umount", victim.dataDir)
	})
	for _, n := range c.nodes {
		n.start()
	}
	c.volume("db", "128MiB")
	alpha := c.node("alpha")
	c.makePrimary("db", alpha)
	d := mustDial(t, alpha, "db")
	defer d.close()
	c.writeBlocks(d, 1, 0, 96<<20)
	if err := d.flush(); err != nil {
		t.Fatal(err)
	}
	var st volumeStatus
	eventually(t, 60*time.Second, "beta is known to have failed", func() bool {
		var ok bool
		st, ok = alpha.tryStatus("db")
		return ok && st.replica("beta").State == "Failed"
	})
	if out := alpha.cli("status", "db") + alpha.cli("events"); !strings.Contains(out, "space") {
		t.Errorf("neither status nor events say that the disk is full:\n%s", out)
	}
	c.writeBlocks(d, 500, 0, 8<<20) // goes on
	tool(t, "mount", "-o", "remount,size=512m", victim.dataDir)
	alpha.cli("invalidate", "db", "--node", "beta")
	alpha.cli("wait", "db", "--for", "healthy", "--timeout", "60s")
	c.replicasEqual("db")
}
