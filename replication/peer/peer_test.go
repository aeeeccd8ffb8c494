package peer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

var sizes = []int{1, inlinePayload, inlinePayload + 1, 4096, 64 << 10, 600 << 10, 4096, 3 << 20}

func TestMessagesArriveInOrder(t *testing.T) {
	for _, pipes := range []bool{false, true} {
		t.Run(fmt.Sprintf("pipes=%v", pipes), func(t *testing.T) {
			before := buf.InUse()
			_, a, b, ra, rb := pair(t, pipes)
			for i := 1; i <= 60; i++ {
				a.Send("beta", 7, write(i, sizes[i%len(sizes)]))
				b.Send("alpha", 8, write(i, sizes[(i+1)%len(sizes)]))
				if i%3 == 0 {
					a.Flush()
					b.Flush()
				}
			}
			for i := 1; i <= 60; i++ {
				e := rb.next(t)
				check(t, e, i, sizes[i%len(sizes)])
				if e.Volume != 7 {
					t.Fatalf("volume %d", e.Volume)
				}
				e.Free()
				e = ra.next(t)
				check(t, e, i, sizes[(i+1)%len(sizes)])
				e.Free()
			}
			a.Close()
			b.Close()
			if n := buf.InUse(); n != before {
				t.Errorf("%d bytes of buffers are held, %d before", n, before)
			}
		})
	}
}

// Several volumes at once: each sees its own order, whoever does the writing.
func TestOrderWithManySenders(t *testing.T) {
	_, a, _, _, rb := pair(t, false)
	const volumes, each = 8, 300
	var wg sync.WaitGroup
	for v := range volumes {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 1; i <= each; i++ {
				a.Send("beta", ident.Volume(v), write(i, 1+(v*1000+i*37)%9000))
				a.Flush()
			}
		}()
	}
	seen := [volumes]int{}
	for range volumes * each {
		e := rb.next(t)
		seen[e.Volume]++
		i := seen[e.Volume]
		check(t, e, i, 1+(int(e.Volume)*1000+i*37)%9000)
		e.Free()
	}
	wg.Wait()
}

func TestReconnect(t *testing.T) {
	n, a, b, ra, rb := pair(t, false)
	for i := 1; i <= 5; i++ {
		n.cut()
		ra.want(t, "down beta", "up beta")
		rb.want(t, "down alpha", "up alpha")
		a.Send("beta", 1, write(i, 4096))
		a.Flush()
		e := rb.next(t)
		check(t, e, i, 4096)
		e.Free()
	}
	b.Close()
	rb.want(t, "down alpha")
	ra.want(t, "down beta")
	before := buf.InUse()
	a.Send("beta", 1, write(1, 4096)) // into the void
	a.Send("nobody", 1, write(1, 4096))
	a.Flush()
	if buf.InUse() != before {
		t.Error("a dropped message kept its payload")
	}
	if st := a.Status(); len(st) != 1 || st[0].Connected || st[0].Connects < 6 {
		t.Errorf("%+v", st)
	}
}

func TestSetPeersClosesLinks(t *testing.T) {
	_, a, b, ra, rb := pair(t, false)
	a.SetPeers(nil)
	ra.want(t, "down beta")
	rb.want(t, "down alpha")
	if st := a.Status(); len(st) != 0 {
		t.Errorf("%+v", st)
	}
	a.SetPeers([]ident.Node{"beta"})
	ra.want(t, "up beta")
	rb.want(t, "up alpha")
	b.Send("alpha", 1, write(1, 10))
	b.Flush()
	e := ra.next(t)
	e.Free()
}

// logLines is where a test reads what the links had to say.
type logLines struct {
	mu    sync.Mutex
	lines bytes.Buffer
	wake  chan struct{}
}

func newLog() *logLines { return &logLines{wake: make(chan struct{}, 1)} }

func (l *logLines) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
	return l.lines.Write(p)
}

func (l *logLines) want(t *testing.T, text string) {
	t.Helper()
	end := time.After(patience)
	for {
		l.mu.Lock()
		all := l.lines.String()
		l.mu.Unlock()
		if strings.Contains(all, text) {
			return
		}
		select {
		case <-l.wake:
		case <-end:
			t.Fatalf("no line with %q in:\n%s", text, all)
		}
	}
}

func TestHandshakeRefusals(t *testing.T) {
	cases := []struct {
		name        string
		alpha, beta func(*Options)
		peers       []ident.Node // of beta
		address     ident.Node   // whose address alpha has for beta
		want        string
	}{
		{name: "cluster", beta: func(o *Options) { o.Cluster = "other" }, peers: []ident.Node{"alpha"}, want: `it belongs to cluster \"other\"`},
		{
			name: "id", alpha: func(o *Options) { o.ClusterID = "x" }, beta: func(o *Options) { o.ClusterID = "y" },
			peers: []ident.Node{"alpha"}, want: "correct `cluster` or the addresses",
		},
		{name: "unknown", peers: nil, want: "the dialing node is no peer"},
		{name: "address", peers: []ident.Node{"alpha"}, beta: func(o *Options) { o.Self = "gamma" }, want: "meant for another node"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			n := newNetwork(t, false)
			log := newLog()
			ra := newRecorder()
			a := n.add("alpha", ra, func(o *Options) {
				o.Logger = log.logger()
				if c.alpha != nil {
					c.alpha(o)
				}
			})
			b := n.add("beta", newRecorder(), c.beta)
			b.SetPeers(c.peers)
			a.SetPeers([]ident.Node{"beta"})
			log.want(t, c.want)
			if st := a.Status(); st[0].Connected || st[0].Error == "" || len(ra.events) != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// An id that only one of the two knows yet does not part them; nor does it when it turns
// out to be the other's. Another one does, at once, and one that neither knew has them
// shake hands again.
func TestClusterIDMayComeLater(t *testing.T) {
	for _, tc := range []struct {
		first, second, later string
		parts, forGood       bool
	}{
		{"x", "", "x", false, false},
		{"x", "", "y", true, true},
		{"", "", "y", true, false},
	} {
		n := newNetwork(t, false)
		ra, rb := newRecorder(), newRecorder()
		a := n.add("alpha", ra, func(o *Options) { o.ClusterID = tc.first })
		b := n.add("beta", rb, func(o *Options) { o.ClusterID = tc.second })
		a.SetPeers([]ident.Node{"beta"})
		b.SetPeers([]ident.Node{"alpha"})
		ra.want(t, "up beta")
		rb.want(t, "up alpha")
		b.SetClusterID(tc.later)
		if tc.parts {
			ra.want(t, "down beta")
			rb.want(t, "down alpha")
		}
		if tc.parts && !tc.forGood {
			ra.want(t, "up beta")
			rb.want(t, "up alpha")
		}
		time.Sleep(50 * time.Millisecond)
		for _, m := range []*Manager{a, b} {
			if st := m.Status(); st[0].Connected == tc.forGood {
				t.Errorf("%+v: %+v", tc, st)
			}
		}
	}
}

// Several who are turned away, each again and again, are told of once.
func TestRefusalsAreToldOnce(t *testing.T) {
	n := newNetwork(t, false)
	log := newLog()
	a := n.add("alpha", newRecorder(), func(o *Options) { o.Logger = log.logger() })
	c, _ := net.Pipe()
	for i := range 3 * refusalsMax {
		a.refuse(c, fmt.Errorf("stranger %d", i%2))
	}
	for i := range 3 * refusalsMax {
		a.refuse(c, fmt.Errorf("other %d", i))
	}
	if got := strings.Count(log.lines.String(), "\n"); got != 2+3*refusalsMax || len(a.refusals) > refusalsMax {
		t.Errorf("%d lines, and %d are remembered:\n%s", got, len(a.refusals), log.lines.String())
	}
}

// shake plays the acceptor of a handshake.
func shake(t testing.TB, c net.Conn, change func(*wire.Hello)) {
	h, err := wire.ReadHello(c)
	if err != nil {
		t.Error(err)
		return
	}
	answer := wire.Hello{Min: 1, Max: 1, Version: 1, Instance: 5, Cluster: h.Cluster, From: h.To, To: h.From}
	if change != nil {
		change(&answer)
	}
	b, err := wire.EncodeHello(nil, answer)
	if err != nil {
		t.Error(err)
	}
	if _, err := c.Write(b); err != nil {
		t.Error(err)
	}
}

func TestNewerPeerIsNotCorrupt(t *testing.T) {
	n := newNetwork(t, false)
	log := newLog()
	a := n.add("alpha", newRecorder(), func(o *Options) { o.Logger = log.logger() })
	n.listen("beta", func(c net.Conn) {
		defer c.Close()
		shake(t, c, func(h *wire.Hello) { h.Refusal, h.Min, h.Max = wire.RefusedVersion, 7, 9 })
	})
	a.SetPeers([]ident.Node{"beta"})
	log.want(t, "it knows versions 7 to 9")
}

// raw opens a connection to a Manager as a peer of that name does.
func raw(t *testing.T, n *network, to ident.Node, from ident.Node, instance, attempt uint64) net.Conn {
	t.Helper()
	c, err := n.dial(context.Background(), to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	b, err := wire.EncodeHello(nil, wire.Hello{Min: 1, Max: 1, Instance: instance, Attempt: attempt, Cluster: "test", From: from, To: to})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if h, err := wire.ReadHello(c); err != nil || h.Refusal != wire.Accepted {
		t.Fatalf("%+v, %v", h, err)
	}
	return c
}

func frame(t *testing.T, m wire.Message) []byte {
	t.Helper()
	b, payloads, err := wire.AppendFrame(nil, nil, 1, m)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range payloads {
		b = append(b, p.B...)
	}
	wire.ReleasePayloads(m)
	return b
}

// Garbage, a flipped bit in a payload, a frame that is cut off: the connection
// ends, what came before it is delivered, and a new connection works.
func TestGarbageEndsTheConnection(t *testing.T) {
	n := newNetwork(t, false)
	ra := newRecorder()
	a := n.add("alpha", ra, nil)
	a.SetPeers([]ident.Node{"beta"})
	before := buf.InUse()
	flipped := frame(t, write(2, 4096))
	flipped[len(flipped)-1] ^= 1
	for i, bad := range [][]byte{bytes.Repeat([]byte{0}, 100), []byte("GET / HTTP/1.1\r\n\r\nand some more to fill a header"), flipped, flipped[:200]} {
		c := raw(t, n, "alpha", "beta", 1, uint64(i+1))
		if _, err := c.Write(append(frame(t, write(1, 4096)), bad...)); err != nil {
			t.Fatal(err)
		}
		if i == 3 {
			c.(*net.TCPConn).CloseWrite()
		}
		e := ra.next(t)
		check(t, e, 1, 4096)
		e.Free()
		if k, err := io.Copy(io.Discard, c); k != 0 || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("case %d: %d bytes, %v: want the end", i, k, err)
		}
	}
	if k := buf.InUse(); k != before {
		t.Errorf("%d bytes of buffers are held, %d before", k, before)
	}
}

// A newer connection of the peer replaces the older one, which is closed; an
// older one of the same process is refused.
func TestNewerConnectionReplaces(t *testing.T) {
	n := newNetwork(t, false)
	ra := newRecorder()
	a := n.add("alpha", ra, nil)
	a.SetPeers([]ident.Node{"beta"})
	first := raw(t, n, "alpha", "beta", 1, 5)
	second := raw(t, n, "alpha", "beta", 1, 6)
	if _, err := io.Copy(io.Discard, first); errors.Is(err, context.DeadlineExceeded) {
		t.Error("the older connection is still open")
	}
	if _, err := second.Write(frame(t, write(1, 10))); err != nil {
		t.Fatal(err)
	}
	e := ra.next(t)
	e.Free()
	late, err := n.dial(t.Context(), "alpha")
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	b, _ := wire.EncodeHello(nil, wire.Hello{Min: 1, Max: 1, Instance: 1, Attempt: 5, Cluster: "test", From: "beta", To: "alpha"})
	if _, err := late.Write(b); err != nil {
		t.Fatal(err)
	}
	if h, err := wire.ReadHello(late); err != nil || h.Refusal != wire.RefusedOlder {
		t.Errorf("%+v, %v", h, err)
	}
	// Another process of the peer has numbers of its own.
	raw(t, n, "alpha", "beta", 2, 1)
}

// What an older connection still has when a newer one is there is dropped.
func TestOldGenerationIsNotDelivered(t *testing.T) {
	r := newRecorder()
	l := newLink(&Manager{opt: Options{Handler: r}, ctx: t.Context()}, "beta")
	c1, c2 := net.Pipe()
	defer c1.Close()
	defer c2.Close()
	g1 := l.in.replace(c1, wire.Hello{Instance: 1, Attempt: 1}, "")
	g2 := l.in.replace(c2, wire.Hello{Instance: 1, Attempt: 2}, "")
	if l.hand([]wire.Envelope{{Msg: &wire.Ack{}}}, g1) {
		t.Error("the older generation was delivered")
	}
	if !l.hand([]wire.Envelope{{Msg: &wire.Ack{}}}, g2) || len(r.got) != 1 {
		t.Error("the newer generation was not delivered")
	}
	l.close()
}

// A peer that comes back as another process is noticed by its call, also when
// the connection to the former one still looks alive.
func TestRestartOfThePeerEndsTheLink(t *testing.T) {
	n := newNetwork(t, false)
	ra := newRecorder()
	a := n.add("alpha", ra, nil)
	var instance atomic.Uint64
	instance.Store(5)
	n.listen("beta", func(c net.Conn) {
		shake(t, c, func(h *wire.Hello) { h.Instance = instance.Load() })
		t.Cleanup(func() { c.Close() })
	})
	a.SetPeers([]ident.Node{"beta"})
	ra.want(t, "up beta")
	instance.Store(6)
	raw(t, n, "alpha", "beta", 6, 1)
	ra.want(t, "down beta", "up beta")
}

// stuck is a peer that shakes hands and then reads nothing until told to.
func stuck(t *testing.T, n *network, node ident.Node) (conns chan net.Conn) {
	conns = make(chan net.Conn, 100)
	n.listen(node, func(c net.Conn) {
		shake(t, c, nil)
		t.Cleanup(func() { c.Close() })
		conns <- c
	})
	return conns
}

func TestOverflowEndsTheLink(t *testing.T) {
	n := newNetwork(t, false)
	ra := newRecorder()
	a := n.add("alpha", ra, func(o *Options) { o.Limits.QueueBytes = 8 << 20 })
	stuck(t, n, "beta")
	before := buf.InUse()
	a.SetPeers([]ident.Node{"beta"})
	ra.want(t, "up beta")
	for i := 1; len(ra.events) == 0; i++ {
		if i > 1000 {
			t.Fatal("1000 MiB were queued for a peer that reads nothing")
		}
		a.Send("beta", 1, write(i, 1<<20))
		a.Flush()
		if st := a.Status()[0]; st.QueueBytes > 10<<20 {
			t.Fatalf("%d bytes are queued", st.QueueBytes)
		}
	}
	ra.want(t, "down beta", "up beta")
	a.Close()
	if k := buf.InUse(); k != before {
		t.Errorf("%d bytes of buffers are held, %d before", k, before)
	}
}

// An ack overtakes the bulk that waits in front of it.
func TestAckOvertakesBulk(t *testing.T) {
	n := newNetwork(t, false)
	ra := newRecorder()
	a := n.add("alpha", ra, nil)
	conns := stuck(t, n, "beta")
	a.SetPeers([]ident.Node{"beta"})
	ra.want(t, "up beta")
	const bulk = 100
	for i := 1; i <= bulk; i++ {
		a.Send("beta", 1, write(i, 1<<20))
		a.Flush()
	}
	a.Send("beta", 2, &wire.Ack{Epoch: 9})
	a.Flush()
	r := wire.NewReader(<-conns)
	acked, seq := -1, 0
	for seq < bulk {
		var e wire.Envelope
		if err := r.Next(&e); err != nil {
			t.Fatal(err)
		}
		switch e.Msg.(type) {
		case *wire.Ack:
			acked = seq
		case *wire.Append:
			seq++
			check(t, e, seq, 1<<20)
		}
		e.Free()
	}
	if acked < 0 || acked > bulk/2 {
		t.Errorf("the ack came after %d of %d MiB", acked, bulk)
	}
}

// A socket that takes little at a time: frames are cut anywhere, and the sender
// takes over from Flush.
func TestSmallSocketBuffers(t *testing.T) {
	n := newNetwork(t, false)
	ra, rb := newRecorder(), newRecorder()
	a := n.add("alpha", ra, func(o *Options) {
		o.Dial = func(ctx context.Context, to ident.Node) (net.Conn, error) {
			c, err := n.dial(ctx, to)
			if err == nil {
				err = c.(*net.TCPConn).SetWriteBuffer(4096)
			}
			return c, err
		}
	})
	b := n.add("beta", rb, nil)
	a.SetPeers([]ident.Node{"beta"})
	b.SetPeers([]ident.Node{"alpha"})
	ra.want(t, "up beta")
	for i := 1; i <= 400; i++ {
		a.Send("beta", 1, write(i, 1+i*i%20000))
		a.Flush()
	}
	for i := 1; i <= 400; i++ {
		e := rb.next(t)
		check(t, e, i, 1+i*i%20000)
		e.Free()
	}
}

func TestEcho(t *testing.T) {
	n := newNetwork(t, false)
	ra, rb := newRecorder(), newRecorder()
	var clock atomic.Int64
	clock.Store(1000)
	a := n.add("alpha", ra, func(o *Options) { o.Clock = clock.Load })
	b := n.add("beta", rb, nil)
	if a.Echo("beta") != 0 || a.EchoAge("beta", 0) != math.MaxInt64 {
		t.Error("an echo without a link")
	}
	a.SetPeers([]ident.Node{"beta"})
	b.SetPeers([]ident.Node{"alpha"})
	var echo int64
	end := time.After(patience)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for echo == 0 {
		select {
		case <-tick.C:
		case <-end:
			t.Fatal("no echo")
		}
		echo = b.Echo("alpha")
	}
	if d := a.EchoAge("beta", echo); d != 0 {
		t.Errorf("%v with a clock that stands still", d)
	}
	clock.Add(int64(time.Minute))
	if d := a.EchoAge("beta", echo); d != time.Minute {
		t.Errorf("%v after a minute", d)
	}
	for _, foreign := range []int64{0, 1000, -1, echo + int64(time.Hour), echo - 1, math.MaxInt64, math.MinInt64} {
		if d := a.EchoAge("beta", foreign); d != math.MaxInt64 {
			t.Errorf("%d has age %v", foreign, d)
		}
	}
	if d := a.EchoAge("nobody", echo); d != math.MaxInt64 {
		t.Errorf("%v from a node that is no peer", d)
	}
}
