package e2e

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// cluster is a set of nodes on loopback, each with its own data directory.
type cluster struct {
	t     *testing.T
	dir   string
	nodes []*node
	net   *network // nil: all on the host's loopback
}

// options change a cluster from the default: three nodes that store.
type options struct {
	nodes   []string           // nil: alpha, beta, gamma
	witness []string           // of nodes
	config  map[string]string  // dotted key → YAML value, for every node
	stopped bool               // do not start the daemons
	nbd     func(*node) string // what stands under nbd:, in the place of the two plain listeners
	// namespaces gives each node a network of its own, which can be cut.
	namespaces bool
	// crashDisks, when not 0, is the seed of disks that lose what was not fsynced
	// when the node's power is cut; each data directory is on one.
	crashDisks uint64
}

// newCluster writes the configurations and starts the daemons. The end of the
// test kills what still runs and prints the logs if it failed.
func newCluster(t *testing.T, o options) *cluster {
	t.Helper()
	// Unix socket paths are short, so not below t.TempDir.
	dir, err := os.MkdirTemp("", "bs-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, dir: dir}
	t.Cleanup(c.close)
	if o.namespaces {
		c.net = newNetwork(t)
	}
	names := o.nodes
	if names == nil {
		names = []string{"alpha", "beta", "gamma"}
	}
	for _, name := range names {
		n := c.newNode(name)
		c.nodes = append(c.nodes, n)
		if o.crashDisks != 0 {
			n.disk = newCrashDisk(t, filepath.Join(dir, name, "disk"), o.crashDisks+uint64(len(c.nodes)))
			n.dataDir = filepath.Join(n.disk.dir, "data")
		}
	}
	for _, n := range c.nodes {
		c.writeConfig(n, o)
	}
	if o.stopped {
		return c
	}
	for _, n := range c.nodes {
		n.start()
	}
	return c
}

func (c *cluster) newNode(name string) *node {
	base := filepath.Join(c.dir, name)
	if err := os.MkdirAll(base, 0o700); err != nil {
		c.t.Fatal(err)
	}
	n := &node{
		c: c, name: name,
		addr:     freePort(c.t),
		nbdTCP:   freePort(c.t),
		metrics:  freePort(c.t),
		nbdSock:  filepath.Join(base, "nbd.sock"),
		admin:    filepath.Join(base, "admin.sock"),
		dataDir:  filepath.Join(base, "data"),
		bootFile: filepath.Join(base, "boot_id"),
		cfgFile:  filepath.Join(base, "blockstep.yaml"),
		logFile:  filepath.Join(base, "log"),
	}
	if c.net != nil {
		n.addr = c.net.add(name) + ":7700"
	}
	n.newBoot()
	return n
}

func (c *cluster) writeConfig(n *node, o options) {
	if err := os.WriteFile(n.cfgFile, []byte(c.config(n, o)), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// config is the file of the design's section 8.
func (c *cluster) config(n *node, o options) string {
	var b strings.Builder
	fmt.Fprintf(&b, "cluster: e2e\nnode: %s\ndata_dir: %s\nnodes:\n", n.name, n.dataDir)
	for _, peer := range c.nodes {
		fmt.Fprintf(&b, "  %s: {address: %q, witness: %v}\n", peer.name, peer.addr, slices.Contains(o.witness, peer.name))
	}
	if o.nbd != nil {
		fmt.Fprintf(&b, "nbd:\n%s", o.nbd(n))
	} else {
		fmt.Fprintf(&b, "nbd:\n  listen: [%q, %q]\n", "unix://"+n.nbdSock, "tcp://"+n.nbdTCP)
	}
	fmt.Fprintf(&b, "admin: {listen: %q}\nmetrics: {listen: %q}\nboot_id_file: %s\n", "unix://"+n.admin, n.metrics, n.bootFile)

	sections := map[string][]string{}
	for _, key := range slices.Sorted(maps.Keys(o.config)) {
		section, name, nested := strings.Cut(key, ".")
		if !nested {
			fmt.Fprintf(&b, "%s: %s\n", key, o.config[key])
			continue
		}
		sections[section] = append(sections[section], fmt.Sprintf("  %s: %s\n", name, o.config[key]))
	}
	for _, section := range slices.Sorted(maps.Keys(sections)) {
		fmt.Fprintf(&b, "%s:\n%s", section, strings.Join(sections[section], ""))
	}
	return b.String()
}

// close ends everything that newCluster started.
func (c *cluster) close() {
	if c.t.Failed() {
		c.report()
	}
	for _, n := range c.nodes {
		n.kill()
	}
	if c.net != nil {
		c.net.close()
	}
	for _, n := range c.nodes {
		n.checkLog(c.t)
		if n.disk != nil {
			n.disk.unmount()
		}
	}
	if os.Getenv("BLOCKSTEP_E2E_KEEP") != "" {
		c.t.Logf("kept: %s", c.dir)
		return
	}
	if err := os.RemoveAll(c.dir); err != nil {
		c.t.Errorf("clean up: %v", err)
	}
}

// report puts into the test's output what is needed to understand a failure.
func (c *cluster) report() {
	for _, n := range c.nodes {
		if n.running() {
			out, code := n.cliRaw(5*time.Second, "status", "--json")
			c.t.Logf("status by %s (exit code %d):\n%s", n.name, code, out)
			out, _ = n.cliRaw(5*time.Second, "events")
			c.t.Logf("events by %s:\n%s", n.name, out)
			break
		}
	}
	for _, n := range c.nodes {
		c.t.Logf("log of %s, its end:\n%s", n.name, n.tail(60))
	}
}

// node finds a node by its name.
func (c *cluster) node(name string) *node {
	for _, n := range c.nodes {
		if n.name == name {
			return n
		}
	}
	c.t.Fatalf("no node %q in this cluster", name)
	return nil
}

// others returns every node but the named ones.
func (c *cluster) others(names ...string) []*node {
	return slices.DeleteFunc(slices.Clone(c.nodes), func(n *node) bool { return slices.Contains(names, n.name) })
}

// live returns the first node that runs.
func (c *cluster) live() *node {
	for _, n := range c.nodes {
		if n.running() {
			return n
		}
	}
	c.t.Fatal("no node runs")
	return nil
}

// volume creates a volume and waits until it is healthy.
func (c *cluster) volume(name, size string, args ...string) {
	c.t.Helper()
	n := c.live()
	n.waitReady()
	n.cli(append([]string{"volume", "create", name, "--size", size}, args...)...)
	c.waitHealthy(name)
}

// waitHealthy waits until every replica of the volume is up and in sync.
func (c *cluster) waitHealthy(name string) {
	c.t.Helper()
	n := c.live()
	n.cli("wait", name, "--for", "healthy", "--timeout", "60s")
}

// primary returns the node that is primary of the volume now, or a moment later.
func (c *cluster) primary(name string) *node {
	c.t.Helper()
	var st volumeStatus
	eventually(c.t, 30*time.Second, "a primary of "+name, func() bool { // there is none for a moment, while one takes over
		st = c.live().status(name)
		return st.Primary != ""
	})
	return c.node(st.Primary)
}

// leader returns the Raft leader.
func (c *cluster) leader() *node {
	c.t.Helper()
	var st clusterStatus
	eventually(c.t, 30*time.Second, "a Raft leader", func() bool {
		st = clusterStatus{}
		c.live().jsonOf(&st, "status")
		return st.Leader != ""
	})
	return c.node(st.Leader)
}

// makePrimary moves the volume to a node, if it is not there.
func (c *cluster) makePrimary(name string, n *node) {
	c.t.Helper()
	if c.primary(name) == n {
		return
	}
	c.live().cli("switchover", name, "--to", n.name)
	if got := c.primary(name); got != n {
		c.t.Fatalf("after the switchover %s is primary, want %s", got.name, n.name)
	}
}

var (
	portMu   sync.Mutex
	portNext = 12000 + rand.IntN(8000)
)

// freePort finds a port below the ephemeral range, so that no outgoing
// connection of another process takes it before the daemon does.
func freePort(t testing.TB) string {
	portMu.Lock()
	defer portMu.Unlock()
	for range 2000 {
		portNext++
		if portNext >= 30000 {
			portNext = 12000
		}
		addr := fmt.Sprintf("127.0.0.1:%d", portNext)
		l, err := net.Listen("tcp", addr)
		if err != nil {
			continue
		}
		l.Close()
		return addr
	}
	t.Fatal("no free port on 127.0.0.1")
	return ""
}

// eventually waits until cond holds; what says what is waited for.
func eventually(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); ; {
		if cond() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
