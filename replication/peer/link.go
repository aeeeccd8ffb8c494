package peer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// link is the two connections between this node and one peer: the one that we
// dialed, which carries what we send, and the one that the peer dialed.
type link struct {
	m    *Manager
	node ident.Node

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // runDialer

	out      atomic.Pointer[stream] // nil while down
	attempts uint64                 // of runDialer alone
	redial   chan struct{}          // the peer has just called us: it is there, do not wait
	in       incoming

	rtt      atomic.Int64
	connects atomic.Uint64
	// Sums of the streams before the present one.
	sentBytes, sentFrames atomic.Uint64

	mu      sync.Mutex
	lastErr string // why it is down
}

func newLink(m *Manager, node ident.Node) *link {
	l := &link{m: m, node: node, redial: make(chan struct{}, 1)}
	l.ctx, l.cancel = context.WithCancel(m.ctx)
	return l
}

// close ends both connections, and waits until Down has been called and no
// more messages are delivered.
func (l *link) close() {
	l.cancel()
	l.in.close()
	l.wg.Wait()
}

// runDialer keeps the outgoing connection: dial, serve until it fails, again.
func (l *link) runDialer() {
	defer l.wg.Done()
	pause := time.Duration(0)
	for l.ctx.Err() == nil {
		begun := time.Now()
		s, err := l.connect()
		if err == nil {
			err = l.serve(s)
		}
		l.report(err)
		if time.Since(begun) > backoffLast {
			pause = 0 // it was up for a while, or the attempt took long enough
		}
		if !l.pause(pause) {
			return
		}
		pause = min(max(2*pause, backoffFirst), backoffLast)
	}
}

// pause waits for about d, or until the peer shows that it is there. It
// returns false when the link closes.
func (l *link) pause(d time.Duration) bool {
	if d == 0 {
		return l.ctx.Err() == nil
	}
	t := time.NewTimer(d/2 + rand.N(d))
	defer t.Stop()
	select {
	case <-t.C:
	case <-l.redial:
	case <-l.ctx.Done():
		return false
	}
	return true
}

// report logs why the link is down, once for each reason.
func (l *link) report(err error) {
	if l.ctx.Err() != nil {
		return
	}
	l.mu.Lock()
	seen := l.lastErr == err.Error()
	l.lastErr = err.Error()
	l.mu.Unlock()
	level := slog.LevelWarn
	if errors.Is(err, errUnjudged) {
		level = slog.LevelInfo // as it is to be, once a cluster is founded
	}
	if !seen {
		l.m.log.Log(l.ctx, level, "link is down, dialing again", "peer", l.node, "err", err)
	}
}

// connect dials and shakes hands.
func (l *link) connect() (*stream, error) {
	ctx, cancel := context.WithTimeout(l.ctx, handshakeTimeout)
	defer cancel()
	conn, err := l.m.opt.Dial(ctx, l.node)
	if err != nil {
		return nil, err
	}
	// Closing is what interrupts a handshake when the link is closed.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	said := *l.m.clusterID.Load()
	answer, err := l.greet(conn)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	w := newWriter(conn)
	w.tune(l.m.opt.Lease)
	s := newStream(conn, w, l.m.opt.Limits, answer.Instance, answer.Version)
	s.said, s.named = said, answer.ClusterID
	return s, nil
}

// greet sends our hello and judges the answer.
func (l *link) greet(conn net.Conn) (wire.Hello, error) {
	l.attempts++
	b, err := wire.EncodeHello(nil, l.m.hello(l.node, l.attempts))
	if err != nil {
		return wire.Hello{}, err
	}
	if _, err := conn.Write(b); err != nil {
		return wire.Hello{}, fmt.Errorf("handshake: %w", err)
	}
	answer, err := wire.ReadHello(conn)
	if err != nil {
		return wire.Hello{}, fmt.Errorf("handshake: %w", err)
	}
	if answer.Refusal != wire.Accepted {
		return wire.Hello{}, l.m.refused(answer)
	}
	if why := l.m.judge(answer); why != wire.Accepted {
		return wire.Hello{}, fmt.Errorf("node %s of cluster %q answers as %s of %q: %s", l.node, l.m.opt.Cluster, answer.From, answer.Cluster, why)
	}
	if answer.From != l.node {
		return wire.Hello{}, fmt.Errorf("node %s answers at the address of %s: correct the addresses in the configuration", answer.From, l.node)
	}
	if !l.m.opt.Versions.Has(answer.Version) {
		return wire.Hello{}, fmt.Errorf("%w: node %s chose version %d", wire.ErrNewer, l.node, answer.Version)
	}
	return answer, nil
}

// serve runs a connection until it fails, and says why it did.
func (l *link) serve(s *stream) error {
	var wg sync.WaitGroup
	wg.Add(2)
	go func() { defer wg.Done(); s.runSender() }()
	go func() { defer wg.Done(); s.runWatcher() }()
	stop := context.AfterFunc(l.ctx, func() { s.fail(errClosed) })
	defer stop()

	l.connects.Add(1)
	l.out.Store(s)
	l.judgeAgain(s)
	l.mu.Lock()
	l.lastErr = ""
	l.mu.Unlock()
	l.m.log.Info("link is up", "peer", l.node)
	l.ping(s)
	l.m.opt.Handler.Up(l.node)

	<-s.failed
	l.out.Store(nil)
	wg.Wait()
	l.sentBytes.Add(s.sentBytes.Load())
	l.sentFrames.Add(s.sentFrames.Load())
	l.rtt.Store(0)
	l.m.opt.Handler.Down(l.node)
	return s.reason()
}

// judgeAgain ends a connection if the cluster's id has become known since it was made,
// and the peer did not name it.
func (l *link) judgeAgain(s *stream) {
	if l.m.unjudged(s.said, s.named) {
		s.fail(errUnjudged)
	}
}

// tick is called once every ping interval.
func (l *link) tick() {
	if s := l.out.Load(); s != nil {
		l.ping(s)
	}
	l.in.tick(l.m)
}

// ping sends our clock and the newest that we have heard of the peer's.
func (l *link) ping(s *stream) {
	p := wire.Ping{Clock: l.m.now(), Echo: l.in.heardClock.Load()}
	if p.Echo != 0 {
		p.Held = p.Clock - l.in.heardAt.Load()
	}
	if err := s.push(0, &p); err != nil {
		s.fail(err)
	}
	s.flush()
}

// peerIs is told the instance of the peer's process that has just called us.
// A connection that we still have to an earlier one is dead, though perhaps
// nobody has told us: a host that lost power sends no FIN.
func (l *link) peerIs(instance uint64) {
	if s := l.out.Load(); s != nil && s.instance != instance {
		s.fail(errors.New("the peer was restarted"))
	}
	select {
	case l.redial <- struct{}{}:
	default:
	}
}

func (l *link) status() LinkStatus {
	st := LinkStatus{
		Node:       l.node,
		Heard:      l.in.heard(),
		RTT:        time.Duration(l.rtt.Load()),
		SentBytes:  l.sentBytes.Load(),
		SentFrames: l.sentFrames.Load(),
		RecvBytes:  l.in.bytes.Load(),
		RecvFrames: l.in.frames.Load(),
		Connects:   l.connects.Load(),
	}
	if s := l.out.Load(); s != nil {
		st.Connected = true
		st.QueueBytes, st.QueueFrames = s.queued()
		st.SentBytes += s.sentBytes.Load()
		st.SentFrames += s.sentFrames.Load()
		return st
	}
	l.mu.Lock()
	st.Error = l.lastErr
	l.mu.Unlock()
	if st.Error == "" {
		st.Error = "connecting"
	}
	return st
}
