package e2e

import (
	"testing"
	"time"
)

// TestAllKilled: an answered write survives kill -9 of every daemon at once,
// flushed or not.
func TestAllKilled(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "32MiB")
	l := startLoad(t, "db", seed(t), loadOptions{nodes: c.nodes, perNode: 2, writes: 0.8})
	for range 2 {
		time.Sleep(2 * time.Second)
		for _, n := range c.nodes {
			n.kill()
		}
		for _, n := range c.nodes {
			n.start()
		}
		c.nodes[0].waitReady()
		c.waitHealthy("db")
	}
	l.finish(c)
	c.replicasEqual("db")
}

// TestPowerCut: all machines lose power at once. Every flushed write is there;
// of the unflushed ones, those that are there are a prefix of what was written
// (one log orders them); and a session from before ends with an error rather
// than go on as if nothing had happened.
//
// The boot id is what tells the daemon of a machine's crash. The test changes
// it and takes nothing away from the page cache: the rules for a crash are
// followed. TestPowerCutLosesUnsynced has disks that lose what was not fsynced.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{config: map[string]string{"volume.power_loss_grace": "5s"}})
	c.volume("db", "64MiB")
	const block, blocks = 4096, 4096
	d := mustDial(t, c.nodes[0], "db")
	flushed := uint64(0)
	last := uint64(0)
	for v := uint64(1); v <= 3000; v++ {
		if err := d.write(fill(v, block), v%blocks*block, false); err != nil {
			t.Fatal(err)
		}
		last = v
		if v == 2000 {
			if err := d.flush(); err != nil {
				t.Fatal(err)
			}
			flushed = v
		}
	}
	for _, n := range c.nodes {
		n.kill()
	}
	d.close()
	for _, n := range c.nodes {
		n.newBoot()
		n.start()
	}
	c.nodes[0].waitReady()
	c.live().cli("wait", "db", "--for", "healthy", "--timeout", "60s")

	d = mustDial(t, c.nodes[1], "db")
	defer d.close()
	end := uint64(0) // the last value that is there, of an unbroken run
	for v := uint64(1); v <= last; v++ {
		b := make([]byte, block)
		if err := d.read(b, v%blocks*block); err != nil {
			t.Fatal(err)
		}
		got, err := valueOf(b)
		switch {
		case err != nil:
			t.Fatalf("block of write %d: %v", v, err)
		case got == v && end == v-1:
			end = v
		case got == v:
			t.Fatalf("write %d survived and write %d did not: not a prefix of the log", v, end+1)
		case v <= flushed:
			t.Fatalf("broke I2, a flushed write survives a power cut: write %d of %d flushed is gone (found %d)", v, flushed, got)
		}
	}
	t.Logf("written %d, flushed %d, there after the power cut %d", last, flushed, end)
	c.replicasEqual("db")
}

// TestPowerCutOfOne: one machine crashes under load and comes back amnesiac. It
// must not vote before it is caught up, and it is caught up by itself.
func TestPowerCutOfOne(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "32MiB")
	l := startLoad(t, "db", seed(t), loadOptions{nodes: c.nodes, writes: 0.7, flushes: 0.05})
	time.Sleep(time.Second)
	for range 3 {
		victim := c.primary("db")
		victim.kill()
		victim.newBoot()
		time.Sleep(500 * time.Millisecond)
		victim.start()
		c.others(victim.name)[0].cli("wait", "db", "--for", "healthy", "--timeout", "60s")
		time.Sleep(500 * time.Millisecond)
	}
	l.finish(c)
	c.replicasEqual("db")
}

// TestTwoAmnesiac: two of three machines crash. With the third alive, nothing
// answered may be lost: it holds a log that counts, or the volume waits for it.
func TestTwoAmnesiac(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{config: map[string]string{"volume.power_loss_grace": "20s"}})
	c.volume("db", "32MiB")
	d := mustDial(t, c.nodes[0], "db")
	for v := range uint64(500) {
		if err := d.write(fill(v+1, 4096), v*4096, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.flush(); err != nil {
		t.Fatal(err)
	}
	prim := c.primary("db")
	for _, n := range c.others(prim.name) {
		n.kill()
		n.newBoot()
		n.start()
	}
	c.live().cli("wait", "db", "--for", "healthy", "--timeout", "60s")
	d.close()
	d = mustDial(t, c.nodes[2], "db")
	defer d.close()
	for v := range uint64(500) {
		b := make([]byte, 4096)
		if err := d.read(b, v*4096); err != nil {
			t.Fatal(err)
		}
		if got, err := valueOf(b); err != nil || got != v+1 {
			t.Fatalf("block %d: value %d (%v), want %d", v, got, err, v+1)
		}
	}
	c.replicasEqual("db")
}

// TestOldSessionEnds: when unflushed writes may be gone, a session from before
// ends with an error, though its own daemon never stopped; a new one works and
// finds what was flushed.
func TestOldSessionEnds(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{config: map[string]string{"volume.power_loss_grace": "2s"}})
	c.volume("db", "16MiB", "--replicas", "alpha,beta")
	gamma := c.node("gamma")
	d := mustDial(t, gamma, "db")
	defer d.close()
	if err := d.write(fill(1, 4096), 0, true); err != nil {
		t.Fatal(err)
	}
	if err := d.write(fill(2, 4096), 4096, false); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"alpha", "beta"} {
		c.node(name).kill()
		c.node(name).newBoot()
	}
	for _, name := range []string{"alpha", "beta"} {
		c.node(name).start()
	}
	gamma.cli("wait", "db", "--for", "healthy", "--timeout", "60s")
	if err := d.read(make([]byte, 4096), 0); err == nil {
		t.Error("a session from before the loss goes on as if nothing had happened")
	} else {
		t.Logf("the old session: %v", err)
	}
	d2 := mustDial(t, gamma, "db")
	defer d2.close()
	b := make([]byte, 4096)
	if err := d2.read(b, 0); err != nil {
		t.Fatal(err)
	}
	if v, err := valueOf(b); v != 1 || err != nil {
		t.Errorf("broke I2, a flushed write survives a power cut: value %d (%v), want 1", v, err)
	}
}
