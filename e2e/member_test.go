package e2e

import (
	"errors"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// ends waits until a daemon ends by itself, and returns its exit code.
func (n *node) ends(limit time.Duration) int {
	n.c.t.Helper()
	eventually(n.c.t, limit, n.name+" ends", func() bool { return !n.running() })
	n.mu.Lock()
	defer n.mu.Unlock()
	var exit *exec.ExitError
	if !errors.As(n.exit, &exit) {
		n.c.t.Fatalf("%s ended with %v", n.name, n.exit)
	}
	return exit.ExitCode()
}

// TestRemovedNode: its daemon ends with a code of its own, after which a unit is
// not restarted, and does so again when it is started all the same.
func TestRemovedNode(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "8MiB", "--replicas", "alpha,beta")
	alpha, gamma := c.node("alpha"), c.node("gamma")
	alpha.cli("node", "remove", "gamma")
	for range 2 {
		if code := gamma.ends(60 * time.Second); code != 3 {
			t.Errorf("the removed node ended with exit code %d, want 3", code)
		}
		if last := gamma.tail(1); !strings.Contains(last, "was removed from cluster e2e") || !strings.Contains(last, "blockstep node add gamma --address") {
			t.Errorf("its last line: %s", last)
		}
		gamma.start()
	}
	gamma.kill()

	// For a supervisor that starts again whatever ends it stays, until it is
	// stopped.
	c.writeConfig(gamma, options{config: map[string]string{"on_removed": "wait"}})
	gamma.start()
	eventually(t, 60*time.Second, "it says that it waits", func() bool {
		return strings.Contains(lastRun(gamma.log()), "waits to be stopped (on_removed: wait)")
	})
	if !gamma.running() {
		t.Errorf("it ended all the same:\n%s", gamma.tail(3))
	}
	gamma.signal(syscall.SIGTERM)
	if code := gamma.ends(20 * time.Second); code != 3 {
		t.Errorf("stopped, it ended with exit code %d, want 3", code)
	}
	c.waitHealthy("db")
}

// TestFailoverTo: --to is a promise, not a wish.
func TestFailoverTo(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{config: map[string]string{"failover.auto": "false"}})
	c.volume("db", "8MiB")
	alpha, beta, gamma := c.node("alpha"), c.node("beta"), c.node("gamma")
	c.makePrimary("db", alpha)
	alpha.kill()
	eventually(t, 20*time.Second, "the primary's loss is seen", func() bool {
		var st clusterStatus
		beta.jsonOf(&st, "status")
		for _, n := range st.Nodes {
			if n.Name == "alpha" {
				return !n.Up && st.Leader != "" && st.Volumes[0].Health == "suspended"
			}
		}
		return false
	})
	beta.cliFails(exitRefused, []string{"alpha is not up", "leave --to out"}, "failover", "db", "--to", "alpha")
	beta.cli("failover", "db", "--to", "gamma")
	if st := beta.status("db"); st.Primary != "gamma" || st.Health != "degraded" {
		t.Errorf("after failover --to gamma: primary %q, %s", st.Primary, st.Health)
	}
	gamma.kill()
	beta.cliFails(exitTimeout, []string{"there is no Raft leader", "blockstep recover"}, "volume", "resize", "db", "16MiB")
}
