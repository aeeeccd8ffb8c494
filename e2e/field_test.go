package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestResyncInterrupted: a resync under load is cut off in each way that has
// broken others: its link flaps, its target dies, its target's machine crashes,
// its source dies and another one goes on, and the rate is raised in the middle.
// It needs no command and ends with equal replicas; the clients of the third node notice nothing.
func TestResyncInterrupted(t *testing.T) {
	t.Parallel()
	o := options{namespaces: true, config: map[string]string{
		"volume.log_retention": "4MiB", "resync.rate_max": "256KiB", "resync.rate_min": "256KiB",
	}}
	c := newCluster(t, o)
	c.volume("db", "64MiB")
	source, target, third := c.node("alpha"), c.node("beta"), c.node("gamma")
	c.makePrimary("db", source)
	d := mustDial(t, source, "db")
	defer d.close()
	target.kill()
	for round := range uint64(2) { // far more than the log keeps once a checkpoint is made
		c.writeBlocks(d, 1+round, 8<<20, 48<<20)
	}
	written := time.Now()
	eventually(t, 60*time.Second, source.name+" has made a checkpoint", func() bool {
		files, err := filepath.Glob(filepath.Join(source.dataDir, "volumes", "*", "checkpoint.*"))
		return err == nil && slices.ContainsFunc(files, func(name string) bool {
			st, err := os.Stat(name)
			return err == nil && st.ModTime().After(written)
		})
	})
	eventually(t, 20*time.Second, target.name+" left the in-sync set", func() bool {
		return len(third.status("db").InSync) == 2
	})
	l := startLoad(t, "db", seed(t), loadOptions{nodes: []*node{third}, perNode: 2, think: 5 * time.Millisecond})
	resyncs := func(what string) {
		t.Helper()
		eventually(t, 40*time.Second, "the resync goes on "+what, func() bool {
			st, ok := third.tryStatus("db")
			return ok && st.replica(target.name).State == "Resyncing"
		})
		time.Sleep(1500 * time.Millisecond)
	}
	target.start()
	resyncs("after its start")

	for range 3 {
		links := linksOf(source.name, []*node{target}, true, true)
		for _, k := range links {
			c.net.cut(k.from, k.to)
		}
		time.Sleep(700 * time.Millisecond)
		for _, k := range links {
			c.net.heal(k.from, k.to)
		}
		time.Sleep(700 * time.Millisecond)
	}
	resyncs("after its link flapped")
	target.kill()
	target.start()
	resyncs("after the target died")
	target.kill()
	target.newBoot()
	target.start()
	resyncs("after the target's machine crashed")
	source.kill()
	resyncs("from another source")
	source.start()
	source.waitReady()
	// At the rate so far the rest would take minutes.
	o.config["resync.rate_max"], o.config["resync.rate_min"] = "0", "0"
	for _, n := range c.nodes {
		c.writeConfig(n, o)
		n.cli("reload")
	}
	third.cli("wait", "db", "--for", "healthy", "--timeout", "60s")
	l.noFailures(l.clients)
	l.finish(c)
	c.replicasEqual("db")
}

// TestLaggingReplicaFirst: a replica is away while the others go on; then all
// lose power, and the one that lags comes back first, alone (LINBIT/drbd issue
// 145). It must not be promoted, whoever asks; with the others everything that
// was flushed is there.
func TestLaggingReplicaFirst(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{crashDisks: seed(t), config: map[string]string{"volume.power_loss_grace": "1s"}})
	c.volume("db", "16MiB")
	lags := c.others(c.primary("db").name)[0]
	others := c.others(lags.name)
	d := mustDial(t, others[0], "db")
	c.writeBlocks(d, 1, 0, 4<<20)
	lags.kill()
	eventually(t, 20*time.Second, lags.name+" is missed", func() bool {
		st, ok := others[0].tryStatus("db")
		return ok && st.replica(lags.name).State == "Absent"
	})
	c.writeBlocks(d, 5000, 0, 4<<20)
	if err := d.flush(); err != nil {
		t.Fatal(err)
	}
	d.close()
	powerCut(others...)

	lags.newBoot()
	lags.start()
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if st, ok := lags.tryStatus("db"); ok && st.Primary != "" {
			t.Fatalf("broke I7, it never picks a side: %s, which lags and is alone, is primary: %+v", lags.name, st)
		}
	}
	// With one of the others it could be a majority; it is the other that has all.
	others[1].start()
	others[1].cli("wait", "db", "--for", "primary", "--timeout", "60s")
	if st := others[1].status("db"); st.Primary == lags.name {
		t.Errorf("%s, which lags, is primary: %+v", lags.name, st)
	}
	others[0].start()
	others[0].waitReady()
	c.waitHealthy("db")
	d = mustDial(t, lags, "db")
	defer d.close()
	b := make([]byte, 256<<10)
	for at := 0; at < 4<<20; at += len(b) {
		if err := d.read(b, uint64(at)); err != nil {
			t.Fatal(err)
		}
		if v, err := valueOf(b); err != nil || v != 5000+uint64(at) {
			t.Fatalf("broke I2, a flushed write survives a power cut: at %d value %d (%v)", at, v, err)
		}
	}
	c.replicasEqual("db")
}

// discarded returns what of a node's log was cut and kept.
func (n *node) discarded() []string {
	n.c.t.Helper()
	found, err := filepath.Glob(filepath.Join(n.dataDir, "volumes", "*", "discarded-*"))
	if err != nil {
		n.c.t.Fatal(err)
	}
	return found
}

// namesDiscarded checks that a node whose log was cut has kept the entries, and
// that the cluster's events name the file.
func (n *node) namesDiscarded() {
	t := n.c.t
	t.Helper()
	files := n.discarded()
	if len(files) == 0 {
		t.Errorf("%s had a tail that nobody else has, and kept none of it", n.name)
		return
	}
	if st, err := os.Stat(files[0]); err != nil || st.Size() < 100 {
		t.Errorf("%s: %v (%v)", files[0], st, err)
	}
	eventually(t, 10*time.Second, "the events name "+filepath.Base(files[0]), func() bool {
		out, code := n.c.others(n.name)[0].cliRaw(10*time.Second, "events")
		return code == 0 && strings.Contains(out, filepath.Base(files[0]))
	})
}
