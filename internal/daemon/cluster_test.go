package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/nbd/nbdtest"
	"github.com/blockstep/blockstep/raft"
	"github.com/blockstep/blockstep/raft/state"
)

// testNode is one daemon of a test, in this process.
type testNode struct {
	t      *testing.T
	name   string
	dir    string
	file   string // configuration
	client *control.Client
	log    *logBuffer
	level  slog.LevelVar
	faults *faults
	daemon atomic.Pointer[Daemon] // the one that runs

	stop    context.CancelFunc
	done    chan error
	started int
	space   func(dir string) (free, all int64, err error) // nil: the real one
	quiet   time.Duration                                 // from the next start on: how long an idle Raft leader may be silent
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newCluster starts three nodes on loopback; extra is added to their
// configurations.
func newCluster(t *testing.T, extra string, witness ...string) map[string]*testNode {
	t.Helper()
	dir, err := os.MkdirTemp("", "bsd-") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	names := []string{"alpha", "beta", "gamma"}
	var nodes strings.Builder
	for _, n := range names {
		fmt.Fprintf(&nodes, "  %s: {address: %q, witness: %v}\n", n, freeAddress(t), len(witness) > 0 && witness[0] == n)
	}
	out := map[string]*testNode{}
	for _, name := range names {
		n := &testNode{t: t, name: name, dir: filepath.Join(dir, name), log: &logBuffer{}, faults: &faults{}}
		n.file = filepath.Join(dir, name+".yaml")
		text := fmt.Sprintf("cluster: test\nnode: %s\ndata_dir: %s\nnodes:\n%snbd: {listen: [%q]}\nadmin: {listen: %q}\nmetrics: {listen: %q}\n%s",
			name, n.dir, nodes.String(), "unix://"+n.sock("nbd"), "unix://"+n.sock("adm"), freeAddress(t), extra)
		if err := os.WriteFile(n.file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if n.client, err = control.Dial("unix://" + n.sock("adm")); err != nil {
			t.Fatal(err)
		}
		out[name] = n
	}
	t.Cleanup(func() {
		for _, n := range out {
			n.halt()
			if t.Failed() {
				t.Logf("log of %s:\n%s", n.name, n.log)
			}
		}
	})
	for _, n := range out {
		n.start()
	}
	for _, n := range out {
		n.eventually(20*time.Second, "it is a member", func(ctx context.Context) error {
			_, err := n.client.Nodes(ctx)
			return err
		})
	}
	return out
}

// freeAddress returns an address that nobody listens on, and that it has given
// to nobody else: the kernel may offer a port again as soon as it is closed.
func freeAddress(t *testing.T) string {
	t.Helper()
	for {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		address := l.Addr().String()
		l.Close()
		if _, given := givenAddresses.LoadOrStore(address, true); !given {
			return address
		}
	}
}

var givenAddresses sync.Map

func (n *testNode) sock(what string) string { return n.dir + "." + what }

func (n *testNode) config() *config.Config {
	n.t.Helper()
	cfg, err := config.Load(n.file, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	return cfg
}

func (n *testNode) start() {
	n.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	n.stop, n.done = stop, make(chan error, 1)
	n.started++
	cfg := n.config()
	go func() {
		logger := slog.New(slog.NewTextHandler(n.log, &slog.HandlerOptions{Level: &n.level}))
		n.done <- run(ctx, cfg, logger, n.faults.over(vfs.OS()), func(d *Daemon) {
			if n.space != nil {
				d.space = n.space
			}
			d.quiet = n.quiet
			d.hooks = Hooks{Level: &n.level, Load: func() (*config.Config, error) { return config.Load(n.file, nil) }}
			n.daemon.Store(d)
		})
	}()
}

// beside makes the configuration of one more node, which is not started: name is
// its node, and nodes what stands under nodes. Its files are named after dir, or
// after the node.
func (n *testNode) beside(name, nodes string, dir ...string) *testNode {
	n.t.Helper()
	base := filepath.Join(filepath.Dir(n.dir), append(dir, name)[0])
	m := &testNode{t: n.t, name: name, dir: base, file: base + ".yaml", log: &logBuffer{}, faults: &faults{}}
	text := fmt.Sprintf("cluster: test\nnode: %s\ndata_dir: %s\nnodes:\n%snbd: {listen: [%q]}\nadmin: {listen: %q}\n",
		name, m.dir, nodes, "unix://"+m.sock("nbd"), "unix://"+m.sock("adm"))
	if err := os.WriteFile(m.file, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
	var err error
	if m.client, err = control.Dial("unix://" + m.sock("adm")); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		m.halt()
		if n.t.Failed() {
			n.t.Logf("log of %s:\n%s", base, m.log)
		}
	})
	return m
}

// halt stops the node cleanly and waits for it.
func (n *testNode) halt() {
	n.t.Helper()
	if n.stop == nil {
		return
	}
	n.stop()
	n.stop = nil
	n.client.Close()
	select {
	case err := <-n.done:
		if err != nil {
			n.t.Errorf("%s ended with %v", n.name, err)
		}
	case <-time.After(30 * time.Second):
		n.t.Fatalf("%s does not stop", n.name)
	}
}

// eventually asks until it gets nil.
func (n *testNode) eventually(limit time.Duration, what string, ask func(context.Context) error) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), limit)
	defer cancel()
	for {
		err := ask(ctx)
		if err == nil {
			return
		}
		if !pause(ctx, 20*time.Millisecond) {
			n.t.Fatalf("%s: not within %v: %s: %v", n.name, limit, what, err)
		}
	}
}

func (n *testNode) create(name string, size int64) control.VolumeStatus {
	n.t.Helper()
	v, err := n.client.CreateVolume(n.t.Context(), control.CreateVolume{Name: name, Size: size})
	if err != nil {
		n.t.Fatal(err)
	}
	return v
}

func (n *testNode) status(name string) control.VolumeStatus {
	n.t.Helper()
	v, err := n.client.VolumeStatus(n.t.Context(), name)
	if err != nil {
		n.t.Fatal(err)
	}
	return v
}

func (n *testNode) healthy(name string) {
	n.t.Helper()
	n.eventually(30*time.Second, name+" is healthy", func(ctx context.Context) error {
		v, err := n.client.VolumeStatus(ctx, name)
		if err == nil && v.Health != control.Healthy {
			err = errors.New(string(v.Health) + ": " + v.Reason)
		}
		return err
	})
}

func (n *testNode) open(export string) *nbdtest.Client {
	n.t.Helper()
	c, err := nbdtest.Dial(n.t.Context(), "unix://"+n.sock("nbd"), export, nbdtest.Options{})
	if err != nil {
		n.t.Fatalf("opening %s at %s: %v", export, n.name, err)
	}
	n.t.Cleanup(func() { c.Close() })
	return c
}

func (n *testNode) read(export string, off uint64, size int) []byte {
	n.t.Helper()
	c := n.open(export)
	p := make([]byte, size)
	if err := c.ReadAt(n.t.Context(), p, off); err != nil {
		n.t.Fatalf("reading %s at %s: %v", export, n.name, err)
	}
	return p
}

// TestTheWholeThing is a day in the life of a volume: created, written through
// one node and read through the others, switched over, resized, listed, its
// nodes stopped and started, deleted.
func TestTheWholeThing(t *testing.T) {
	nodes := newCluster(t, "")
	alpha, beta := nodes["alpha"], nodes["beta"]
	v := alpha.create("db", 16<<20)
	if v.Primary == "" || v.Epoch == 0 {
		t.Errorf("created: %+v", v)
	}
	beta.healthy("db")

	c := beta.open("db")
	want := bytes.Repeat([]byte("blockstep"), 1000)
	if err := c.WriteAt(t.Context(), want, 4097); err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if !bytes.Equal(n.read("db", 4097, len(want)), want) {
			t.Errorf("read through %s differs", n.name)
		}
	}
	for name := range nodes {
		if !bytes.Equal(alpha.read("db@"+name, 4097, len(want)), want) {
			t.Errorf("db@%s, opened after the answer, differs", name)
		}
	}

	for _, to := range []string{"gamma", "beta", "alpha"} {
		v, err := beta.client.Switchover(t.Context(), "db", control.Switchover{To: to})
		if err != nil || v.Primary != to {
			t.Fatalf("switchover to %s: %+v, %v", to, v, err)
		}
		if err := c.WriteAt(t.Context(), []byte(to), 0); err != nil {
			t.Fatalf("after the switchover to %s: %v", to, err)
		}
	}
	if v, err := alpha.client.ResizeVolume(t.Context(), "db", control.Resize{Size: 32 << 20}); err != nil || v.Size != 32<<20 {
		t.Errorf("resize: %+v, %v", v, err)
	}
	if got := beta.open("db").Size(); got != 32<<20 {
		t.Errorf("a new session sees %d bytes", got)
	}

	d := alpha.daemon.Load()
	d.setResync(config.Resync{RateMax: 64 << 20, RateMin: 1 << 20}) // as a configuration read anew does
	alpha.eventually(10*time.Second, "the new rates are in force", func(context.Context) error {
		if r := d.volume(d.state().Volume("db").ID).driver.Status().Core.View.Rates; r.Max != 64<<20 || r.Min != 1<<20 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})

	for _, n := range nodes {
		n.halt()
		n.start()
		alpha.healthy("db")
	}
	if got := beta.read("db", 0, 5); string(got) != "alpha" {
		t.Errorf("after each node was restarted: %q", got)
	}

	var kinds []string
	if err := beta.client.Events(t.Context(), "", false, func(e control.Event) error { kinds = append(kinds, e.Kind); return nil }); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"cluster-founded", "volume-created", "promoted", "volume-resized"} {
		if !strings.Contains(strings.Join(kinds, " "), want) {
			t.Errorf("no %q among the events %v", want, kinds)
		}
	}
	if err := beta.client.DeleteVolume(t.Context(), "db"); err != nil {
		t.Fatal(err)
	}
	var e *control.Error
	if _, err := alpha.client.VolumeStatus(t.Context(), "db"); !errors.As(err, &e) || e.Code != control.CodeNotFound {
		t.Errorf("status of a deleted volume: %v", err)
	}
	alpha.eventually(10*time.Second, "its replica is removed", func(context.Context) error {
		left, err := filepath.Glob(filepath.Join(alpha.dir, volumesDir, "*"))
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("%v", left)
		}
		return err
	})
}

// TestAStoppedNodeHandsOver: SIGTERM of the primary's node costs a switchover,
// and no lapsed lease.
func TestAStoppedNodeHandsOver(t *testing.T) {
	nodes := newCluster(t, "")
	v := nodes["alpha"].create("db", 16<<20)
	nodes["alpha"].healthy("db")
	var via *testNode
	for name, n := range nodes {
		if name != v.Primary {
			via = n
		}
	}
	c := via.open("db")
	ctx, cancel := context.WithCancel(t.Context())
	longest := make(chan time.Duration, 1)
	go func() {
		var slowest time.Duration
		for ctx.Err() == nil {
			began := time.Now()
			if err := c.WriteAt(t.Context(), []byte("x"), 0); err != nil {
				t.Error(err)
				break
			}
			slowest = max(slowest, time.Since(began))
		}
		longest <- slowest
	}()
	nodes[v.Primary].halt()
	cancel()
	if got := <-longest; got > 1400*time.Millisecond {
		t.Errorf("a write waited %v, which is a lapsed lease (1.5s) and no switchover", got)
	}
	if now := via.status("db"); now.Primary == v.Primary || now.Primary == "" {
		t.Errorf("primary is %q", now.Primary)
	}
}

// TestAllStopAtOnce: a primary whose heirs stop too does not try to hand over for all of the
// time that it has for that.
func TestAllStopAtOnce(t *testing.T) {
	nodes := newCluster(t, "")
	nodes["alpha"].create("db", 16<<20)
	nodes["alpha"].healthy("db")
	begin := time.Now()
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(n.halt)
	}
	wg.Wait()
	if took := time.Since(begin); took >= handOverTime {
		t.Errorf("it took %v", took)
	}
}

// TestAWipedReplica: a replica whose files are gone is not made anew behind the
// operator's back; invalidate does it, and it comes back with the content.
func TestAWipedReplica(t *testing.T) {
	nodes := newCluster(t, "")
	v := nodes["alpha"].create("db", 16<<20)
	nodes["alpha"].healthy("db")
	var victim, via *testNode
	for name, n := range nodes {
		if name == v.Primary {
			via = n
		} else {
			victim = n
		}
	}
	want := bytes.Repeat([]byte{7}, 65536)
	if err := via.open("db").WriteAt(t.Context(), want, 1<<20); err != nil {
		t.Fatal(err)
	}
	victim.halt()
	if err := os.RemoveAll(filepath.Join(victim.dir, volumesDir)); err != nil {
		t.Fatal(err)
	}
	victim.start()
	via.eventually(20*time.Second, "it is called wiped", func(context.Context) error {
		for _, r := range via.status("db").Replicas {
			if r.Node == victim.name && r.State == control.Failed && strings.Contains(r.Reason, "gone") {
				return nil
			}
		}
		return fmt.Errorf("%+v", via.status("db"))
	})
	if got := victim.read("db", 1<<20, len(want)); !bytes.Equal(got, want) {
		t.Error("its clients do not read the volume through the others")
	}
	if err := via.client.Invalidate(t.Context(), "db", control.Invalidate{Node: victim.name}); err != nil {
		t.Fatal(err)
	}
	via.healthy("db")
	if got := via.read("db@"+victim.name, 1<<20, len(want)); !bytes.Equal(got, want) {
		t.Error("the replica came back without its content")
	}
}

// A replica that is removed while its node is down, and wanted there again before it is
// back, is registered under its id once more.
func TestAReplicaThatIsWantedAgain(t *testing.T) {
	t.Run("good", func(t *testing.T) { removeAndWant(t, false) })
	// One that had failed is not: it is made anew.
	t.Run("failed", func(t *testing.T) { removeAndWant(t, true) })
}

func removeAndWant(t *testing.T, failed bool) {
	nodes := newCluster(t, "")
	v := nodes["alpha"].create("db", 16<<20)
	nodes["alpha"].healthy("db")
	via, victim := nodes[v.Primary], nodes["alpha"]
	if victim == via {
		victim = nodes["beta"]
	}
	if failed {
		victim.faults.on(syscall.EIO, "/log/", vfs.OpSync)
		c := via.open("db")
		if err := c.WriteAt(t.Context(), make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
		via.sees(victim.name, control.Failed, "input/output error")
		victim.faults.off()
	}
	victim.halt()
	apply := func(c state.Command) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if _, err := via.daemon.Load().applyWhole(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	id := func() ident.Volume {
		for id, sv := range via.daemon.Load().state().Volumes {
			if sv.Name == "db" {
				return id
			}
		}
		t.Fatal("no volume")
		return 0
	}()
	apply(state.Command{RemoveReplica: &state.RemoveReplica{Volume: id, Node: ident.Node(victim.name)}})
	via.eventually(30*time.Second, "it is removed", func(context.Context) error {
		if rep := via.daemon.Load().state().Volumes[id].Replica(ident.Node(victim.name)); rep != nil {
			return fmt.Errorf("%+v", *rep)
		}
		return nil
	})
	apply(state.Command{AddReplica: &state.AddReplica{Volume: id, Node: ident.Node(victim.name)}})
	victim.start()
	via.healthy("db")
}

// TestAnInvalidateThatDoesNotHappen: without a Raft leader it ends in time, says so, and
// leaves nothing behind; nor does one that a crash cut off.
func TestAnInvalidateThatDoesNotHappen(t *testing.T) {
	nodes := newCluster(t, "")
	alpha, beta := nodes["alpha"], nodes["beta"]
	alpha.create("db", 16<<20)
	if _, err := alpha.client.Switchover(t.Context(), "db", control.Switchover{To: "alpha"}); err != nil {
		t.Fatal(err)
	}
	alpha.healthy("db")
	mark := filepath.Join(filepath.Dir(beta.backing()), invalidMark)

	nodes["gamma"].halt()
	if err := beta.daemon.Load().raft.Shutdown(); err != nil {
		t.Fatal(err)
	}
	alpha.eventually(20*time.Second, "there is no Raft leader", func(ctx context.Context) error {
		s, err := alpha.client.Status(ctx)
		if err == nil && s.Leader != "" {
			err = errors.New(s.Leader)
		}
		return err
	})
	var e *control.Error
	if err := alpha.client.Invalidate(t.Context(), "db", control.Invalidate{Node: "beta"}); !errors.As(err, &e) || e.Code != control.CodeTimeout || !strings.Contains(e.Message, "there is no Raft leader") {
		t.Errorf("without a Raft leader: %v", err)
	}
	if _, err := os.Stat(mark); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its mark stays: %v", err)
	}
}

// TestAReplacedNode: an empty data directory under a known name is refused, and
// node replace accepts it.
func TestAReplacedNode(t *testing.T) {
	nodes := newCluster(t, "")
	nodes["alpha"].create("db", 16<<20)
	nodes["alpha"].healthy("db")
	victim, via := nodes["gamma"], nodes["alpha"]
	if err := via.open("db").WriteAt(t.Context(), []byte("precious"), 0); err != nil {
		t.Fatal(err)
	}
	victim.halt()
	if err := os.RemoveAll(victim.dir); err != nil {
		t.Fatal(err)
	}
	victim.start()
	victim.eventually(20*time.Second, "it is refused", func(ctx context.Context) error {
		_, err := victim.client.Nodes(ctx)
		if err != nil && strings.Contains(err.Error(), "node replace gamma") {
			return nil
		}
		return fmt.Errorf("it says %w", err)
	})
	via.eventually(20*time.Second, "node replace", func(ctx context.Context) error {
		_, err := via.client.ChangeNode(ctx, "gamma", "replace")
		return err
	})
	via.healthy("db")
	if got := victim.read("db@gamma", 0, 8); string(got) != "precious" {
		t.Errorf("the replaced replica has %q", got)
	}
	// Nobody is told to do what happens by itself.
	if text := victim.log.String(); strings.Contains(text, "blockstep invalidate db") {
		t.Error("its log tells to invalidate the replica that is made anew")
	}
}

// TestANodeOfAnotherCluster: neither node add nor node replace takes in what is a
// member of another cluster of the same name, not even while that one is down.
func TestANodeOfAnotherCluster(t *testing.T) {
	nodes := newCluster(t, "")
	alpha, gamma := nodes["alpha"], nodes["gamma"]
	address := freeAddress(t)
	delta := alpha.beside("delta", "  delta: {address: "+address+"}\n")
	own := gamma.config().Self().Address
	gamma.halt()
	other := alpha.beside("gamma", "  gamma: {address: "+own+"}\n", "other")
	for _, n := range []*testNode{delta, other} {
		n.start()
		n.eventually(20*time.Second, "it founds its own cluster", func(ctx context.Context) error {
			_, err := n.client.Nodes(ctx)
			return err
		})
	}
	refused := func(what string, err error, says string) {
		t.Helper()
		var e *control.Error
		if !errors.As(err, &e) || e.Code != control.CodeRefused || !strings.Contains(e.Message, says) || !strings.Contains(e.Next, "empty its data_dir first") {
			t.Errorf("%s: %v", what, err)
		}
	}
	id := delta.daemon.Load().state().ClusterID
	_, err := alpha.client.AddNode(t.Context(), control.AddNode{Name: "delta", Address: address})
	refused("node add", err, "delta is a member of another cluster (id "+id+")")
	_, err = alpha.client.ChangeNode(t.Context(), "gamma", "replace")
	refused("node replace", err, "gamma is a member of another cluster (id "+other.daemon.Load().state().ClusterID+")")
	if got, err := delta.client.Nodes(t.Context()); err != nil || len(got) != 1 || id == "" {
		t.Errorf("delta's cluster has %+v, %v", got, err)
	}
	if got, err := alpha.client.Nodes(t.Context()); err != nil || len(got) != 3 {
		t.Errorf("the cluster has %+v, %v", got, err)
	}
}

// TestWhoseNodeItIs: by the id of its cluster, and before it knows that one, by the
// members that it knows.
func TestWhoseNodeItIs(t *testing.T) {
	st := &state.State{ClusterID: "7", Nodes: map[ident.Node]*state.Node{"alpha": {Name: "alpha", RaftID: "alpha/1"}}}
	for _, tc := range []struct {
		info raft.FoundInfo
		want string
	}{
		{raft.FoundInfo{}, ""},
		{raft.FoundInfo{ClusterID: "7", Founded: true, Members: []string{"beta/2"}}, ""},
		{raft.FoundInfo{Founded: true, Members: []string{"beta/2", "alpha/1"}}, ""},
		{raft.FoundInfo{ClusterID: "8", Founded: true, Members: []string{"alpha/1"}}, "is a member of another cluster (id 8)"},
		{raft.FoundInfo{Founded: true, Members: []string{"alpha/2", "beta/1"}}, "is a member of another cluster (its members: alpha/2, beta/1)"},
	} {
		if got := foreignTo(st, tc.info); got != tc.want {
			t.Errorf("%+v: %q", tc.info, got)
		}
	}
}

// TestWitness: two replicas and a witness serve on when a replica's node goes.
func TestWitness(t *testing.T) {
	nodes := newCluster(t, "", "gamma")
	v := nodes["gamma"].create("db", 16<<20)
	if len(v.Replicas) != 2 {
		t.Fatalf("replicas: %+v", v.Replicas)
	}
	nodes["gamma"].healthy("db")
	c := nodes["gamma"].open("db")
	nodes[v.Primary].halt()
	if err := c.WriteAt(t.Context(), []byte("on"), 0); err != nil {
		t.Fatal(err)
	}
	if got := nodes["gamma"].status("db"); got.Health != control.Degraded {
		t.Errorf("health is %s: %s", got.Health, got.Reason)
	}
}

// TestDrain: a fourth node joins, takes the replica of one that is drained, and
// that one can be removed.
func TestDrain(t *testing.T) {
	nodes := newCluster(t, "")
	alpha, gamma := nodes["alpha"], nodes["gamma"]
	alpha.create("db", 16<<20)
	alpha.healthy("db")
	if _, err := alpha.client.Switchover(t.Context(), "db", control.Switchover{To: "gamma"}); err != nil {
		t.Fatal(err)
	}
	if err := gamma.open("db").WriteAt(t.Context(), []byte("moved"), 8192); err != nil {
		t.Fatal(err)
	}
	var e *control.Error
	if _, err := alpha.client.ChangeNode(t.Context(), "gamma", "drain"); !errors.As(err, &e) || !strings.Contains(e.Message, "no other node that is up is without a replica of db") || !strings.Contains(e.Next, "blockstep node remove gamma --force") {
		t.Fatalf("drain with nowhere to go: %v", err)
	}
	if now := alpha.status("db"); now.Primary == "gamma" {
		t.Error("gamma is still primary")
	}

	address := freeAddress(t)
	nodesOf := "  alpha: {address: " + alpha.config().Self().Address + "}\n  delta: {address: " + address + "}\n"
	delta := alpha.beside("delta", nodesOf)
	delta.start()
	alpha.eventually(20*time.Second, "node add", func(ctx context.Context) error {
		_, err := alpha.client.AddNode(ctx, control.AddNode{Name: "delta", Address: address})
		return err
	})
	asked := alpha // a node that hears of the new replica after the Raft leader has added it
	if alpha.daemon.Load().raft.IsLeader() {
		asked = nodes["beta"]
	}
	asked.eventually(20*time.Second, "the link to delta", func(ctx context.Context) error {
		list, err := asked.client.Nodes(ctx)
		for _, n := range list {
			if n.Name == "delta" && n.Up {
				return nil
			}
		}
		return fmt.Errorf("%+v, %w", list, err)
	})
	if _, err := asked.client.ChangeNode(t.Context(), "gamma", "drain"); err != nil {
		t.Fatalf("drain: %v", err)
	}
	alpha.healthy("db")
	if got := delta.read("db@delta", 8192, 5); string(got) != "moved" {
		t.Errorf("the new replica has %q", got)
	}
	if _, err := alpha.client.ChangeNode(t.Context(), "gamma", "remove"); err != nil {
		t.Errorf("remove: %v", err)
	}
	// It stops by itself and says why; so it does when it is started again, when
	// its own copy of the cluster state has it as a member still, or is empty.
	for range 2 {
		select {
		case err := <-gamma.done:
			if !errors.Is(err, ErrRemoved) || !strings.Contains(err.Error(), "was removed from cluster") {
				t.Errorf("the removed node ended with %v", err)
			}
		case <-time.After(60 * time.Second):
			t.Fatal("the removed node goes on")
		}
		gamma.stop()
		gamma.stop = nil
		gamma.client.Close()
		if gamma.started == 1 {
			gamma.start()
		}
	}
}

// TestALostDeleteRace: who deletes a volume that another has just deleted is told
// so by its name, and without the rule, which is for the log.
func TestALostDeleteRace(t *testing.T) {
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	alpha.create("db", 16<<20)
	d := alpha.daemon.Load()
	sv := d.state().Volume("db")
	if err := alpha.client.DeleteVolume(t.Context(), "db"); err != nil {
		t.Fatal(err)
	}
	var e *control.Error
	err := d.applyTo(t.Context(), sv, state.Command{DeleteVolume: &state.DeleteVolume{Volume: sv.ID}})
	if !errors.As(err, &e) || e.Code != control.CodeNotFound || e.Error() != `the volume "db" was deleted meanwhile` {
		t.Errorf("%v", err)
	}
	if !strings.Contains(alpha.log.String(), "rule="+string(state.RuleNoVolume)) {
		t.Error("the log does not have the rule")
	}
	if got := d.plain(fmt.Errorf("changing the nodes: %w", &state.Refusal{Rule: state.RuleNoNode, Reason: "there is no node"})); got != "changing the nodes: there is no node" {
		t.Errorf("a change of the members is refused with %q", got)
	}
}
