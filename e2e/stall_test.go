package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/vfs"
)

// stallFor is how long the disks of these tests hang, and stallGap how long the
// clients of the other nodes may be without an answer: stall_timeout, then an
// election when the Raft leader's own store hangs, then a failover.
const (
	stallFor = 10 * time.Second
	stallGap = 8 * time.Second
)

// hangs are the ways in which a disk stops answering without an error.
var hangs = []struct {
	what string
	when func(vfs.Call) bool
	also bool // a secondary's disk too
}{
	{"the fsyncs of the volume's log hang", func(c vfs.Call) bool {
		return c.Op == vfs.OpSync && strings.Contains(c.Path, "/volumes/")
	}, false},
	{"the writes to the volume's log hang", func(c vfs.Call) bool {
		return c.Op == vfs.OpWrite && strings.Contains(c.Path, "/volumes/") && strings.Contains(c.Path, "/log/")
	}, false},
	{"every write and fsync hangs, the cluster state's too", func(c vfs.Call) bool { return c.Op.Mutates() }, true},
}

// TestStalledDisk: a disk hangs for ten seconds, each in its turn: the
// primary's, which is the Raft leader's as well, then a secondary's. The
// clients of the other nodes go on, and when the disk is back the replica is in
// sync again, by itself.
func TestStalledDisk(t *testing.T) {
	t.Parallel()
	s := seed(t)
	c := newCluster(t, options{crashDisks: s, config: map[string]string{"volume.stall_timeout": "1s"}})
	c.volume("db", "32MiB")
	l := startLoad(t, "db", s, loadOptions{nodes: c.nodes, writes: 0.7, flushes: 0.05, opTimeout: 40 * time.Second})
	at := l.now()
	time.Sleep(3 * time.Second)
	t.Logf("without a stall: no answer for at most %v", pauseOf(l.clients, at, l.now()).Round(time.Millisecond))
	for _, hang := range hangs {
		for _, role := range []string{"primary", "secondary"} {
			if role == "secondary" && !hang.also {
				continue
			}
			victim := c.leader()
			if role == "primary" {
				c.makePrimary("db", victim)
			} else if c.primary("db") == victim {
				victim = c.others(victim.name)[0]
			}
			others := l.at(c.others(victim.name)...)
			at := l.now()
			release := victim.disk.stall(hang.when)
			time.Sleep(stallFor)
			gap := pauseOf(others, at, l.now())
			st, _ := c.others(victim.name)[0].tryStatus("db")
			t.Logf("%s, the %s's (%s): the clients of the others had no answer for %v; then: primary %s, in sync %v", hang.what, role, victim.name,
				gap.Round(time.Millisecond), st.Primary, st.InSync)
			if gap > stallGap {
				t.Errorf("broke I8: %s, the %s's: the clients of the other nodes had no answer for %v", hang.what, role, gap)
			}
			if role == "primary" && st.Primary == victim.name {
				t.Errorf("%s, and %s is primary still", hang.what, victim.name)
			}
			l.noFailures(others)
			release()
			c.others(victim.name)[0].cli("wait", "db", "--for", "healthy", "--timeout", "60s")
			if t.Failed() {
				return
			}
		}
	}
	l.finish(c)
	c.replicasEqual("db")
}
