package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// releaseBefore is what is upgraded from: the newest commit that another release
// was made of. BLOCKSTEP_E2E_FROM names another one.
const releaseBefore = "d57b8aa"

// oldRelease builds the daemon of the release that is upgraded from. A shallow
// clone does not have it: then it is this release's own, and what is shown is that
// a cluster is restarted node by node.
func oldRelease(t *testing.T) (bin string) {
	t.Helper()
	commit, asked := os.LookupEnv("BLOCKSTEP_E2E_FROM")
	if !asked {
		commit = releaseBefore
	}
	if out, err := exec.Command("git", "cat-file", "-e", commit+"^{commit}").CombinedOutput(); err != nil {
		if asked {
			t.Fatalf("BLOCKSTEP_E2E_FROM=%s: %v: %s", commit, err, out)
		}
		t.Logf("this clone does not have release %s (git fetch --unshallow): from this release to itself; %v: %s", commit, err, out)
		return ""
	}
	return buildRelease(t, commit)
}

// buildRelease builds the daemon of a commit of this repository.
func buildRelease(t *testing.T, commit string) (bin string) {
	t.Helper()
	dir := t.TempDir()
	tarball := filepath.Join(dir, "src.tar")
	tool(t, "git", "-C", "..", "archive", "--output", tarball, commit)
	src := filepath.Join(dir, "src")
	if err := os.Mkdir(src, 0o700); err != nil {
		t.Fatal(err)
	}
	tool(t, "tar", "-xf", tarball, "-C", src)
	build := exec.Command("go", "build", "-buildvcs=false", "-o", dir+string(filepath.Separator), "./cmd/blockstepd")
	build.Dir = src
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build release %s: %v\n%s", commit, err, out)
	}
	return dir
}

// TestRollingUpgrade: a cluster of the release before becomes one of this one,
// node by node, under clients at each node; then one node goes back, and forth
// again. The clients of the nodes that stay see no error, all of them one
// linearizable device, and the replicas end equal. On the way, with both
// releases in the cluster, a node joins with a token, leaders and primaries are
// of either release, and each serves under the other.
func TestRollingUpgrade(t *testing.T) {
	t.Parallel()
	old := oldRelease(t)
	c := newCluster(t, options{stopped: true})
	for _, n := range c.nodes {
		n.bin = old
		n.start()
	}
	c.volume("db", "32MiB")
	l := startLoad(t, "db", seed(t), loadOptions{nodes: c.nodes, perNode: 2, flushes: 0.05, fua: 0.05})
	alpha, beta, gamma := c.node("alpha"), c.node("beta"), c.node("gamma")

	for _, n := range c.nodes {
		// What an upgrade of the primary's node is like is seen each time.
		c.makePrimary("db", n)
		c.replaceBinary(l, n, "")
		if n == alpha {
			c.joinsMixed(alpha)
			for _, to := range []*node{alpha, beta, alpha, gamma} {
				c.makePrimarySoon("db", to)
			}
		}
	}
	before := l.now()
	c.replaceBinary(l, beta, old)
	c.makePrimarySoon("db", beta)
	c.makePrimarySoon("db", gamma)
	c.replaceBinary(l, beta, "")
	if n := answered(l.at(alpha, gamma), before, l.now()); n == 0 {
		t.Error("nothing was answered while one node went back")
	}
	l.finish(c)
	c.replicasEqual("db")
}

// makePrimarySoon is makePrimary for a node that has just started: for about a
// lease its replica answers no seal, since it may have granted one before, and the
// switchover then says to try again.
func (c *cluster) makePrimarySoon(name string, n *node) {
	c.t.Helper()
	eventually(c.t, 15*time.Second, n.name+" takes "+name+" over", func() bool {
		out, code := c.live().cliRaw(60*time.Second, "switchover", name, "--to", n.name)
		if code != 0 && !strings.Contains(out, "try again when "+n.name+" has caught up") {
			c.t.Fatalf("switchover to %s: exit code %d: %s", n.name, code, out)
		}
		return code == 0
	})
	c.makePrimary(name, n)
}

// replaceBinary restarts a node with the daemon of another release, as a package
// does it, and waits until the volume is healthy. Only its own clients may lose
// their sessions.
func (c *cluster) replaceBinary(l *load, n *node, bin string) {
	c.t.Helper()
	at := l.now()
	n.stop()
	n.bin = bin
	n.start()
	n.waitReady()
	c.waitHealthy("db")
	others := l.at(c.others(n.name)...)
	for _, f := range failuresSince(others, at) {
		c.t.Errorf("%s got another release: a client of another node failed: %v", n.name, f.err)
	}
	gap := pauseOf(others, at, l.now())
	c.t.Logf("%s got another release within %v; the longest pause of the others was %v", n.name, (l.now() - at).Round(time.Millisecond), gap.Round(time.Millisecond))
	if gap > failoverMax {
		c.t.Errorf("the clients of the other nodes had no answer for %v", gap)
	}
}

// joinsMixed has a node of this release join a cluster of both, with a token,
// and leave it again.
func (c *cluster) joinsMixed(member *node) {
	c.t.Helper()
	n := c.newNode("delta")
	all := *c
	all.nodes = append(c.others(), n)
	file := n.cfgFile + ".token"
	all.writeConfig(n, options{config: map[string]string{"join.token_file": file}})
	var added struct{ Token string }
	member.jsonOf(&added, "node", "add", n.name, "--address", n.addr, "--token")
	if err := os.WriteFile(file, []byte(added.Token), 0o600); err != nil {
		c.t.Fatal(err)
	}
	n.start()
	c.t.Cleanup(n.kill)
	n.waitReady()
	n.cli("wait", "db", "--for", "healthy", "--timeout", "60s")
	member.cli("node", "remove", n.name)
	if code := n.ends(60 * time.Second); code != 3 {
		c.t.Errorf("the removed node ended with exit code %d, want 3", code)
	}
}
