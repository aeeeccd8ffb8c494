package replication

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

const testVolume = ident.Volume(7)

// testClock is the bubble's time, or the machine's outside of one.
type testClock struct{ start time.Time }

func (c testClock) Boot() core.Instant { return core.Instant(time.Since(c.start)) + 1e9 }

// testCluster is some volumes, joined by links in memory, under a cluster state
// that is one struct and a controller that does what the test says.
type testCluster struct {
	t        testing.TB
	size     uint64
	clock    testClock
	smallLog bool

	mu    sync.Mutex
	nodes map[ident.Node]*testNode
	names []ident.Node
	view  core.View
	cut   map[[2]ident.Node]bool
	fails []string
	sends int // messages between nodes
}

type testNode struct {
	c    *testCluster
	name ident.Node
	fs   vfs.FS
	mem  *vfs.Mem
	boot string
	rid  ident.Replica
	vol  *Volume

	mu     sync.Mutex
	queues map[ident.Node]chan wire.Envelope
	wires  map[ident.Node]*testWire
	wg     sync.WaitGroup
	age    time.Duration // what EchoAge answers
}

// testWire is where messages from one node become bytes and messages again.
type testWire struct {
	bytes  bytes.Buffer
	reader *wire.Reader
}

func newTestCluster(t testing.TB, size uint64, replicas int, others ...ident.Node) *testCluster {
	return makeTestCluster(t, false, size, replicas, others...)
}

func makeTestCluster(t testing.TB, smallLog bool, size uint64, replicas int, others ...ident.Node) *testCluster {
	c := &testCluster{
		smallLog: smallLog,
		t:        t, size: size, clock: testClock{start: time.Now()},
		nodes: make(map[ident.Node]*testNode), cut: make(map[[2]ident.Node]bool),
	}
	for i := range replicas {
		c.names = append(c.names, ident.Node(fmt.Sprintf("n%d", i+1)))
	}
	c.view = core.View{Size: size, MinCopies: 1}
	for i, name := range c.names {
		mem := vfs.NewMem(uint64(i) + 1)
		n := &testNode{c: c, name: name, mem: mem, fs: mem, boot: "boot-1"}
		c.nodes[name] = n
		var err error
		n.rid, err = CreateReplica(c.t.Context(), n.options(), size)
		if err != nil {
			t.Fatal(err)
		}
		c.view.Members = append(c.view.Members, core.Member{Node: name, Replica: n.rid})
		c.view.Set = append(c.view.Set, name)
	}
	for _, name := range others {
		c.names = append(c.names, name)
		c.nodes[name] = &testNode{c: c, name: name}
	}
	for _, name := range c.names {
		c.start(name)
	}
	return c
}

func (n *testNode) options() Options {
	o := Options{
		Volume: testVolume, Name: "test", Node: n.name, Links: n, Cluster: n, Clock: n.c.clock,
	}
	if n.fs != nil {
		o.Replica = &ReplicaOptions{FS: n.fs, Dir: "/v", BootID: n.boot}
		if n.c.smallLog {
			// Who is away for a moment is resynced.
			o.Replica.LogSegment, o.Replica.LogRetention, o.Replica.LagMax = 64<<10, -1, 1<<20
			o.Limits.CheckpointAge = 200 * time.Millisecond
		}
	}
	return o
}

// start opens a node's volume and its links.
func (c *testCluster) start(name ident.Node) {
	n := c.nodes[name]
	queues := make(map[ident.Node]chan wire.Envelope)
	for _, from := range c.names {
		queues[from] = make(chan wire.Envelope, 1<<16)
	}
	n.mu.Lock()
	n.queues = queues // the others send to a node that starts
	n.mu.Unlock()
	o := n.options()
	c.mu.Lock()
	view := c.view
	c.mu.Unlock()
	o.View = &view
	v, err := Open(context.Background(), o)
	if err != nil {
		c.t.Fatalf("open %s: %v", name, err)
	}
	n.mu.Lock()
	n.vol = v
	n.mu.Unlock()
	for from, q := range queues {
		n.wg.Add(1)
		go func() {
			defer n.wg.Done()
			for env := range q {
				v.Handle(from, env)
			}
		}()
	}
	for _, peer := range c.names {
		if p := c.nodes[peer]; peer != name && p != nil && p.volume() != nil {
			v.PeerUp(peer)
			p.volume().PeerUp(name)
		}
	}
}

func (n *testNode) volume() *Volume {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.vol
}

// end takes a node down; how is Stop or Kill.
func (c *testCluster) end(name ident.Node, how func(*Volume)) {
	n := c.nodes[name]
	v := n.volume()
	n.mu.Lock()
	n.vol = nil
	for _, q := range n.queues {
		close(q)
	}
	n.queues = nil
	n.mu.Unlock()
	n.wg.Wait()
	for _, peer := range c.names {
		if p := c.nodes[peer].volume(); peer != name && p != nil {
			p.PeerDown(name)
		}
	}
	how(v)
}

func (c *testCluster) kill(name ident.Node) { c.end(name, (*Volume).Kill) }

func (c *testCluster) stop(name ident.Node) {
	c.end(name, func(v *Volume) {
		if err := v.Stop(); err != nil {
			c.t.Errorf("stop %s: %v", name, err)
		}
	})
}

// close stops what runs.
func (c *testCluster) close() {
	for _, name := range c.names {
		if c.nodes[name].volume() != nil {
			c.stop(name)
		}
	}
}

// Send implements Links: the message crosses as bytes, as on a socket.
func (n *testNode) Send(to ident.Node, vol ident.Volume, m wire.Message) {
	defer wire.ReleasePayloads(m)
	head, payloads, err := wire.AppendFrame(nil, nil, vol, m)
	if err != nil {
		n.c.t.Errorf("send %T to %s: %v", m, to, err)
		return
	}
	for _, p := range payloads {
		head = append(head, p.B...)
	}
	n.c.mu.Lock()
	lost := n.c.cut[[2]ident.Node{n.name, to}]
	n.c.sends++
	n.c.mu.Unlock()
	if lost {
		return
	}
	p := n.c.nodes[to]
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.wires[n.name]
	if w == nil {
		w = &testWire{}
		w.reader = wire.NewReader(&w.bytes)
		if p.wires == nil {
			p.wires = make(map[ident.Node]*testWire)
		}
		p.wires[n.name] = w
	}
	w.bytes.Write(head)
	var env wire.Envelope
	if err := w.reader.Next(&env); err != nil {
		n.c.t.Errorf("receive %T from %s: %v", m, n.name, err)
		return
	}
	if q := p.queues[n.name]; q != nil {
		q <- env
		return
	}
	env.Free()
}

// Flush, Echo and EchoAge implement Links.
func (n *testNode) Flush()                {}
func (n *testNode) FlushSoon()            {}
func (n *testNode) Echo(ident.Node) int64 { return 1 }
func (n *testNode) EchoAge(ident.Node, int64) time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.age
}
func (n *testNode) Report(ident.Volume, core.Report)   {}
func (n *testNode) Event(_ ident.Volume, e core.Event) { n.c.t.Logf("event at %s %+v", n.name, e) }

// MarkFailed implements Cluster.
func (n *testNode) MarkFailed(_ ident.Volume, r ident.Replica, reason string) {
	c := n.c
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fails = append(c.fails, reason)
	for i := range c.view.Members {
		if c.view.Members[i].Replica == r {
			c.view.Members[i].Failed = true
		}
	}
}

// ProposeSet implements Cluster by the rule of the cluster state.
func (n *testNode) ProposeSet(_ context.Context, _ ident.Volume, p core.SetProposal) (bool, error) {
	c := n.c
	c.mu.Lock()
	if c.offLocked(n.name) {
		c.mu.Unlock()
		return false, errors.New("no leader")
	}
	ok := p.Epoch == c.view.Epoch && p.Version == c.view.SetVersion
	if ok {
		c.view.Set, c.view.SetVersion = slices.Clone(p.Set), p.Version+1
	}
	c.mu.Unlock()
	c.push()
	return ok, nil
}

// offLocked reports whether a node is cut off from the cluster state too.
func (c *testCluster) offLocked(name ident.Node) bool {
	return c.cut[[2]ident.Node{name, "client"}]
}

func (c *testCluster) off(name ident.Node) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.offLocked(name)
}

// push hands the view to everybody who can hear of it.
func (c *testCluster) push() {
	c.mu.Lock()
	view := c.view
	view.Set, view.Members = slices.Clone(view.Set), slices.Clone(view.Members)
	c.mu.Unlock()
	for _, name := range c.names {
		if v := c.nodes[name].volume(); v != nil && !c.off(name) {
			v.SetView(view)
		}
	}
}

// healthy reports whether the primary serves with a lease that others see too:
// then nobody would accept a seal.
func (c *testCluster) healthy() bool {
	c.mu.Lock()
	p := c.view.Primary
	cut := c.offLocked(p)
	c.mu.Unlock()
	if p == "" || cut || c.nodes[p].volume() == nil {
		return false
	}
	rp := c.nodes[p].volume().rep()
	return gateOpen(rp.gate.load(), c.clock.Boot())
}

// promote does a round of the failover controller: seal, pick the best, and say
// so. It tries until somebody is promoted. prefer wins among equals.
func (c *testCluster) promote(prefer ident.Node) ident.Node {
	c.t.Helper()
	for range 200 {
		if c.healthy() {
			return c.view.Primary
		}
		c.mu.Lock()
		set := slices.Clone(c.view.Set)
		epoch := c.view.Epoch + 1
		c.mu.Unlock()
		var best ident.Node
		var win ident.SealAnswer
		answers := 0
		for _, name := range set {
			v := c.nodes[name].volume()
			if v == nil || c.off(name) {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			a, err := v.Seal(ctx, epoch)
			cancel()
			if err != nil || a.Refusal != ident.SealAccepted || a.Amnesiac {
				if testing.Verbose() {
					c.t.Logf("seal %d at %s: %v %+v", epoch, name, err, a)
				}
				continue
			}
			answers++
			if best == "" || win.Last.Less(a.Last) || win.Last == a.Last && name == prefer {
				best, win = name, a
			}
		}
		if answers >= len(set)-(len(set)/2+1)+1 {
			c.mu.Lock()
			c.view.Epoch, c.view.Primary = epoch, best
			c.view.Incarnation, c.view.Position = win.Incarnation, win.Last
			c.mu.Unlock()
			c.push()
			return best
		}
		time.Sleep(100 * time.Millisecond)
	}
	c.t.Error("nobody could be promoted")
	return ""
}

// session opens a session at a node.
func (c *testCluster) session(name ident.Node) *testSession {
	c.t.Helper()
	ts := &testSession{t: c.t}
	s, err := c.nodes[name].volume().OpenSession(context.Background(), Client{
		Remote: "test", Local: true,
		Gone: func() bool { return ts.gone },
		Kill: func(err error) { ts.killed = err },
	})
	if err != nil {
		c.t.Fatal(err)
	}
	ts.s = s
	return ts
}

type testSession struct {
	t      testing.TB
	s      *Session
	gone   bool
	killed error
}

// start submits a request and returns a channel with its end.
func (ts *testSession) start(r *Request) <-chan error {
	done := make(chan error, 1)
	r.Complete = func(_ *Request, err error) { done <- err }
	ts.s.Submit(r)
	return done
}

func (ts *testSession) write(off uint64, p []byte, fua bool) <-chan error {
	b := buf.Get(len(p))
	copy(b.B, p)
	return ts.start(&Request{Op: OpWrite, Offset: off, Length: uint64(len(p)), Data: b, FUA: fua})
}

func (ts *testSession) mustWrite(off uint64, p []byte) {
	ts.t.Helper()
	ts.must(ts.write(off, p, false))
}

func (ts *testSession) must(done <-chan error) {
	ts.t.Helper()
	select {
	case err := <-done:
		if err != nil {
			ts.t.Fatal(err)
		}
	case <-time.After(30 * time.Second):
		ts.t.Fatal("no answer in 30 s")
	}
}

func (ts *testSession) flush() <-chan error { return ts.start(&Request{Op: OpFlush}) }

func (ts *testSession) read(off uint64, n int) ([]byte, error) {
	b := buf.Get(n)
	clear(b.B)
	r := &Request{Op: OpRead, Offset: off, Length: uint64(n), Data: b}
	select {
	case err := <-ts.start(r):
		return b.B, err
	case <-time.After(30 * time.Second):
		return nil, errors.New("no answer in 30 s")
	}
}

func (ts *testSession) mustRead(off uint64, want []byte) {
	ts.t.Helper()
	got, err := ts.read(off, len(want))
	if err != nil {
		ts.t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		ts.t.Fatalf("read at %d: got % x…, want % x…", off, got[:8], want[:8])
	}
}

// pattern makes n bytes that are told apart by seed.
func pattern(seed byte, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = seed ^ byte(i>>3) | 1
	}
	return p
}
