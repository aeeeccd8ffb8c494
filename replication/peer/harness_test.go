package peer

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait of a test; none is ever used up when all is well.
const patience = 20 * time.Second

// recorder is a Handler that keeps what it is told.
type recorder struct {
	events chan string // "up NODE", "down NODE"
	got    chan wire.Envelope
}

func newRecorder() *recorder {
	return &recorder{events: make(chan string, 1000), got: make(chan wire.Envelope, 100_000)}
}

func (*recorder) Settle(ident.Node, []ident.Volume) {}

func (r *recorder) Messages(_ ident.Node, batch []wire.Envelope) {
	for _, e := range batch {
		r.got <- e
	}
}
func (r *recorder) Up(n ident.Node)   { r.events <- "up " + string(n) }
func (r *recorder) Down(n ident.Node) { r.events <- "down " + string(n) }

func (r *recorder) want(t testing.TB, events ...string) {
	t.Helper()
	for _, want := range events {
		select {
		case got := <-r.events:
			if got != want {
				t.Fatalf("event %q, want %q", got, want)
			}
		case <-time.After(patience):
			t.Fatalf("no event, want %q", want)
		}
	}
}

func (r *recorder) next(t testing.TB) wire.Envelope {
	t.Helper()
	select {
	case e := <-r.got:
		return e
	case <-time.After(patience):
		t.Fatal("no message")
		return wire.Envelope{}
	}
}

// network connects Managers: over TCP on the loopback, or by net.Pipe.
type network struct {
	t     testing.TB
	pipes bool
	mu    sync.Mutex
	nodes map[ident.Node]*Manager
	addrs map[ident.Node]string
	conns []net.Conn
}

func newNetwork(t testing.TB, pipes bool) *network {
	return &network{t: t, pipes: pipes, nodes: map[ident.Node]*Manager{}, addrs: map[ident.Node]string{}}
}

func (n *network) dial(ctx context.Context, to ident.Node) (net.Conn, error) {
	n.mu.Lock()
	m, addr := n.nodes[to], n.addrs[to]
	n.mu.Unlock()
	if addr == "" && m == nil {
		return nil, fmt.Errorf("no route to %s", to)
	}
	if n.pipes {
		a, b := net.Pipe()
		m.Accept(b)
		n.keep(a)
		return a, nil
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err == nil {
		n.keep(c)
	}
	return c, err
}

func (n *network) keep(c net.Conn) {
	n.mu.Lock()
	n.conns = append(n.conns, c)
	n.mu.Unlock()
}

// cut closes every connection that there is.
func (n *network) cut() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		c.Close()
	}
	n.conns = nil
}

// listen gives node an address, at which accept is handed the connections.
func (n *network) listen(node ident.Node, accept func(net.Conn)) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accept(c)
		}
	}()
	n.t.Cleanup(func() { l.Close(); wg.Wait() })
	n.mu.Lock()
	n.addrs[node] = l.Addr().String()
	n.mu.Unlock()
}

func (n *network) add(node ident.Node, h Handler, change func(*Options)) *Manager {
	opt := Options{Self: node, Cluster: "test", Dial: n.dial, Handler: h, Ping: 20 * time.Millisecond, Lease: time.Minute}
	if change != nil {
		change(&opt)
	}
	m := NewManager(opt)
	n.mu.Lock()
	n.nodes[node] = m
	n.mu.Unlock()
	if !n.pipes {
		n.listen(node, m.Accept)
	}
	n.t.Cleanup(m.Close)
	return m
}

// pair is two nodes with links to each other that are up.
func pair(t testing.TB, pipes bool) (n *network, a, b *Manager, ra, rb *recorder) {
	n = newNetwork(t, pipes)
	ra, rb = newRecorder(), newRecorder()
	a, b = n.add("alpha", ra, nil), n.add("beta", rb, nil)
	a.SetPeers([]ident.Node{"alpha", "beta"})
	b.SetPeers([]ident.Node{"alpha", "beta"})
	ra.want(t, "up beta")
	rb.want(t, "up alpha")
	return n, a, b, ra, rb
}

func write(seq, size int) *wire.Append {
	p := buf.Get(size)
	p.B[0], p.B[size-1] = byte(seq), byte(seq+size-1) // the checksum vouches for the rest
	return &wire.Append{Epoch: 1, Prev: ident.Position{Epoch: 1, Seq: ident.Seq(seq - 1)}, Entries: []wire.Entry{{
		Pos: ident.Position{Epoch: 1, Seq: ident.Seq(seq)}, Kind: wire.KindData, Len: uint64(size), Payload: p, PayloadCRC: wire.Checksum(p.B),
	}}}
}

func check(t testing.TB, e wire.Envelope, seq, size int) {
	t.Helper()
	m, ok := e.Msg.(*wire.Append)
	if !ok || len(m.Entries) != 1 || m.Entries[0].Pos.Seq != ident.Seq(seq) || len(m.Entries[0].Payload.B) != size {
		t.Fatalf("got %+v, want seq %d of %d bytes", e.Msg, seq, size)
	}
	if p := m.Entries[0].Payload.B; p[0] != byte(seq) || p[size-1] != byte(seq+size-1) {
		t.Fatalf("seq %d has other bytes", seq)
	}
}
