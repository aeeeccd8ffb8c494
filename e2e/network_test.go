package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// network is a switch in a network namespace of its own, with one namespace a
// node behind it. Nothing of it is seen by the host. Clients and the CLI use the
// unix sockets, which know no namespaces: so a node can be cut from its peers and
// not from its clients.
type network struct {
	t      *testing.T
	prefix string
	spaces []string // to delete
	host   map[string]string
}

var networks atomic.Int32

// newNetwork makes the switch. It needs root.
func newNetwork(t *testing.T) *network {
	t.Helper()
	needTool(t, "ip")
	if os.Geteuid() != 0 {
		t.Fatal("network namespaces need root: run the end-to-end tests as root")
	}
	w := &network{t: t, prefix: fmt.Sprintf("bs%d-%d", os.Getpid(), networks.Add(1)), host: map[string]string{}}
	w.space("switch")
	w.in("switch", "link", "add", "br0", "type", "bridge")
	w.in("switch", "link", "set", "br0", "up")
	return w
}

func (w *network) name(node string) string { return w.prefix + "-" + node }

func (w *network) space(node string) {
	w.t.Helper()
	w.ip("netns", "add", w.name(node))
	w.spaces = append(w.spaces, w.name(node))
}

func (w *network) ip(args ...string) {
	w.t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		w.t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// in runs ip in a node's namespace.
func (w *network) in(node string, args ...string) {
	w.t.Helper()
	w.ip(append([]string{"-n", w.name(node)}, args...)...)
}

// add plugs a node into the switch and returns its address.
func (w *network) add(node string) string {
	w.t.Helper()
	w.space(node)
	i := len(w.host) + 1
	host := fmt.Sprintf("10.99.0.%d", i)
	w.host[node] = host
	port := fmt.Sprintf("p%d", i)
	w.in(node, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", w.name("switch"))
	w.in("switch", "link", "set", port, "master", "br0", "up")
	w.in(node, "addr", "add", host+"/24", "dev", "eth0")
	w.in(node, "link", "set", "lo", "up")
	w.in(node, "link", "set", "eth0", "up")
	return host
}

// cut loses, silently, everything that one node sends to another: its packets
// go to an address that no card has. The other direction stays.
func (w *network) cut(from, to string) {
	w.t.Helper()
	w.in(from, "neigh", "replace", w.host[to], "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
}

// heal undoes cut.
func (w *network) heal(from, to string) {
	w.t.Helper()
	w.in(from, "neigh", "del", w.host[to], "dev", "eth0")
}

// close deletes the namespaces; the processes in them are gone by then.
func (w *network) close() {
	for _, name := range w.spaces {
		if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
			w.t.Errorf("ip netns del %s: %v\n%s", name, err, out)
		}
	}
}

// link is one direction between two nodes.
type link struct{ from, to string }

// linksOf returns the directions to cut: all of a node, or those between two.
func linksOf(victim string, others []*node, outbound, inbound bool) []link {
	var out []link
	for _, n := range others {
		if outbound {
			out = append(out, link{victim, n.name})
		}
		if inbound {
			out = append(out, link{n.name, victim})
		}
	}
	return out
}

// TestPrimaryIsolated: the primary is cut from its peers and not from its own
// clients. The others go on within the promise; the isolated one completes
// nothing that they do not have, and serves no stale read.
func TestPrimaryIsolated(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{namespaces: true})
	c.volume("db", "32MiB")
	l := startLoad(t, "db", seed(t), loadOptions{nodes: c.nodes, perNode: 2, flushes: 0.03})
	time.Sleep(time.Second)
	for range 2 {
		old := c.primary("db")
		others := c.others(old.name)
		links := linksOf(old.name, others, true, true)
		at := l.now()
		for _, k := range links {
			c.net.cut(k.from, k.to)
		}
		time.Sleep(12 * time.Second)
		gap := pauseOf(l.at(others...), at, l.now())
		st, ok := others[0].tryStatus("db")
		if !ok || st.Primary == "" || st.Primary == old.name {
			t.Errorf("12 s after the primary %s was cut off: %+v", old.name, st)
		}
		t.Logf("%s cut off, %s took over, I/O of the others paused for %v", old.name, st.Primary, gap.Round(time.Millisecond))
		if gap > failoverMax {
			t.Errorf("I/O paused for %v after the primary was cut off, the promise is %v", gap, failoverMax)
		}
		for _, k := range links {
			c.net.heal(k.from, k.to)
		}
		others[0].cli("wait", "db", "--for", "healthy", "--timeout", "60s")
		old.namesDiscarded()
	}
	l.noFailures(l.clients)
	l.finish(c)
	c.replicasEqual("db")
}

// TestPartitions cuts links at random: one of three or all of a node, both ways
// or one way. At most one node at a time is affected, so the volume must serve
// again each time, with no operator, and no client may see an error.
func TestPartitions(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{namespaces: true})
	c.volume("db", "32MiB")
	s := seed(t)
	l := startLoad(t, "db", s, loadOptions{nodes: c.nodes, flushes: 0.03})
	rng := rand.New(rand.NewPCG(s, 5))
	for range 8 {
		victim := c.nodes[rng.IntN(3)]
		others := c.others(victim.name)
		if rng.IntN(2) == 0 {
			others = others[:1] // one link only
		}
		way := rng.IntN(3)
		links := linksOf(victim.name, others, way != 1, way != 2)
		for _, k := range links {
			c.net.cut(k.from, k.to)
		}
		time.Sleep(time.Duration(1000+rng.IntN(5000)) * time.Millisecond)
		for _, k := range links {
			c.net.heal(k.from, k.to)
		}
		c.nodes[0].cli("wait", "db", "--for", "healthy", "--timeout", "60s")
		t.Logf("cut and healed: %v", links)
	}
	l.noFailures(l.clients)
	l.finish(c)
	c.replicasEqual("db")
}

// TestStatusBehindACut: a node that does not reach another one tells what the
// primary, which does, knows of its replica.
func TestStatusBehindACut(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{namespaces: true})
	c.volume("db", "16MiB")
	alpha, beta, gamma := c.node("alpha"), c.node("beta"), c.node("gamma")
	c.makePrimary("db", alpha)
	links := linksOf("beta", []*node{gamma}, true, true)
	for _, k := range links {
		c.net.cut(k.from, k.to)
	}
	eventually(t, 30*time.Second, "gamma sees by alpha that beta is in sync", func() bool {
		st, ok := gamma.tryStatus("db")
		r := st.replica("beta")
		return ok && st.Health == "healthy" && r.State == "InSync" && strings.Contains(r.Reason, "its primary does")
	})
	// One that is down is not taken for one that is only not reached.
	beta.kill()
	for range 3 {
		if st, ok := gamma.tryStatus("db"); ok && st.replica("beta").State == "InSync" {
			t.Errorf("a killed node is said to be in sync: %+v", st.replica("beta"))
		}
	}
	for _, k := range links {
		c.net.heal(k.from, k.to)
	}
	beta.start()
	c.waitHealthy("db")
}
