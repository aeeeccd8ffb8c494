package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// incoming is the receiving end of a link: at most one connection at a time,
// the newest that the peer has opened. Each has a generation, so that nothing
// of an older one is delivered once a newer one has been accepted.
type incoming struct {
	heardClock atomic.Int64 // the peer's, of its last ping; 0: none
	heardAt    atomic.Int64 // ours, when we heard it
	silent     atomic.Int32 // ticks since the last sign of life
	generation atomic.Uint64

	bytes, frames atomic.Uint64

	// deliver is held while the handler has a batch: of two connections, the
	// older one's last batch is done before the newer one's first.
	deliver sync.Mutex

	mu       sync.Mutex
	conn     net.Conn // nil: none
	instance uint64   // of the peer's process that conn belongs to
	attempt  uint64
	closed   bool
}

// hello is ours to node.
func (m *Manager) hello(node ident.Node, attempt uint64) wire.Hello {
	return wire.Hello{
		Min: m.opt.Versions.Min, Max: m.opt.Versions.Max,
		Instance: m.instance, Attempt: attempt,
		Cluster: m.opt.Cluster, ClusterID: *m.clusterID.Load(),
		From: m.opt.Self, To: node,
	}
}

// judge decides whether the sender of h is in our cluster and means us.
func (m *Manager) judge(h wire.Hello) wire.Refusal {
	id := *m.clusterID.Load()
	switch {
	case h.Cluster != m.opt.Cluster, id != "" && h.ClusterID != "" && id != h.ClusterID:
		return wire.RefusedCluster
	case h.To != m.opt.Self:
		return wire.RefusedTarget
	}
	return wire.Accepted
}

// refused makes an error of a refusal, which says what to do next.
func (m *Manager) refused(h wire.Hello) error {
	switch h.Refusal {
	case wire.RefusedCluster:
		return fmt.Errorf("node %s refuses the link: it belongs to cluster %q (id %q), we to %q (id %q): correct `cluster` or the addresses in the configuration",
			h.From, h.Cluster, h.ClusterID, m.opt.Cluster, *m.clusterID.Load())
	case wire.RefusedVersion:
		return fmt.Errorf("%w: node %s refuses the link: it knows versions %d to %d, we %d to %d: upgrade the older node",
			wire.ErrNewer, h.From, h.Min, h.Max, m.opt.Versions.Min, m.opt.Versions.Max)
	case wire.Accepted, wire.RefusedTarget, wire.RefusedUnknown, wire.RefusedBusy, wire.RefusedOlder:
	}
	return fmt.Errorf("node %s refuses the link: %s", h.From, h.Refusal)
}

// Accept takes over a connection that a peer has opened, past the mux preface.
// It returns at once.
func (m *Manager) Accept(conn net.Conn) {
	select {
	case m.handshakes <- struct{}{}:
	default:
		conn.Close()
		return
	}
	if !m.begin() {
		<-m.handshakes
		conn.Close()
		return
	}
	go m.runAccepted(conn)
}

func (m *Manager) runAccepted(conn net.Conn) {
	defer m.wg.Done()
	defer conn.Close()
	l, generation, version, err := m.welcome(conn)
	<-m.handshakes
	if err != nil {
		m.refuse(conn, err)
		return
	}
	err = l.receive(conn, generation, version)
	switch {
	case l.in.generation.Load() != generation || l.ctx.Err() != nil:
	case errors.Is(err, io.EOF):
		m.log.Info("the peer closed its connection", "peer", l.node)
	default:
		m.log.Warn("connection from the peer ended", "peer", l.node, "err", err)
	}
}

// refuse logs why a dialer was turned away: it comes again every second or so,
// so only what is new is worth a warning.
func (m *Manager) refuse(conn net.Conn, err error) {
	m.mu.Lock()
	seen := m.lastRefusal == err.Error()
	m.lastRefusal = err.Error()
	m.mu.Unlock()
	level := slog.LevelWarn
	if seen {
		level = slog.LevelDebug
	}
	m.log.Log(m.ctx, level, "refused a link", "remote", conn.RemoteAddr(), "err", err)
}

// welcome shakes hands with a dialer and puts its connection in place. The
// version is what its frames have.
func (m *Manager) welcome(conn net.Conn) (l *link, generation uint64, version uint8, err error) {
	stop := context.AfterFunc(m.ctx, func() { conn.Close() })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return nil, 0, 0, err
	}
	h, err := wire.ReadHello(conn)
	if err != nil {
		return nil, 0, 0, err
	}
	answer := m.hello(h.From, h.Attempt)
	answer.Refusal = m.judge(h)
	version, ok := m.opt.Versions.Pick(h)
	answer.Version = version
	l = m.link(h.From)
	switch {
	case answer.Refusal != wire.Accepted:
	case !ok:
		answer.Refusal = wire.RefusedVersion
	case l == nil:
		answer.Refusal = wire.RefusedUnknown
	default:
		if generation = l.in.replace(conn, h); generation == 0 {
			answer.Refusal = wire.RefusedOlder
		}
	}
	b, err := wire.EncodeHello(nil, answer)
	if err == nil {
		_, err = conn.Write(b)
	}
	if answer.Refusal != wire.Accepted {
		return nil, 0, 0, fmt.Errorf("node %s of cluster %q: %s", h.From, h.Cluster, answer.Refusal)
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		return nil, 0, 0, err
	}
	l.peerIs(h.Instance)
	return l, generation, version, nil
}

// receive delivers what arrives until the connection ends.
func (l *link) receive(conn net.Conn, generation uint64, version uint8) error {
	r := wire.NewReaderOf(conn, wire.Versions{Min: version, Max: version})
	batch := make([]wire.Envelope, 0, batchMax)
	for {
		batch = batch[:0]
		before := r.Bytes()
		var err error
		for more := true; more; more = len(batch) < batchMax && r.Ready() {
			var e wire.Envelope
			if err = r.Next(&e); err != nil {
				break
			}
			l.in.frames.Add(1)
			if p, ok := e.Msg.(*wire.Ping); ok {
				l.pinged(p)
				e.Free()
				continue
			}
			batch = append(batch, e)
		}
		l.in.bytes.Add(r.Bytes() - before)
		l.in.silent.Store(0)
		if !l.hand(batch, generation) {
			return net.ErrClosed
		}
		if err != nil {
			return err
		}
	}
}

// hand gives a batch to the handler; false if the connection has been replaced.
func (l *link) hand(batch []wire.Envelope, generation uint64) bool {
	if len(batch) == 0 {
		return true
	}
	l.in.deliver.Lock()
	defer l.in.deliver.Unlock()
	if l.in.generation.Load() != generation {
		for i := range batch {
			batch[i].Free()
		}
		return false
	}
	l.m.opt.Handler.Messages(l.node, batch)
	clear(batch)
	return true
}

// pinged notes a ping: the peer's clock, and from our own that it echoes, the
// time that a round trip takes.
func (l *link) pinged(p *wire.Ping) {
	l.in.heardAt.Store(l.m.now())
	l.in.heardClock.Store(p.Clock)
	if d, ok := l.m.age(p.Echo); ok && p.Held >= 0 && time.Duration(p.Held) <= d {
		l.rtt.Store(int64(d) - p.Held)
	}
}

// replace makes conn the incoming connection and returns its generation; 0 if
// it is not the newest of its process, or the link is closed.
func (in *incoming) replace(conn net.Conn, h wire.Hello) uint64 {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed || (h.Instance == in.instance && h.Attempt <= in.attempt) {
		return 0
	}
	if in.conn != nil {
		in.conn.Close()
	}
	if h.Instance != in.instance {
		// The clock of another process: what we heard says nothing about it.
		in.heardClock.Store(0)
	}
	in.conn, in.instance, in.attempt = conn, h.Instance, h.Attempt
	in.silent.Store(0)
	return in.generation.Add(1)
}

// tick counts the silence, and ends a connection from which nothing comes.
func (in *incoming) tick(m *Manager) {
	if time.Duration(in.silent.Add(1))*m.opt.Ping > silentLeases*m.opt.Lease {
		in.mu.Lock()
		defer in.mu.Unlock()
		if in.conn != nil {
			in.conn.Close()
		}
	}
}

func (in *incoming) heard() bool {
	return in.generation.Load() > 0 && in.silent.Load() <= heardPings
}

// close ends the connection for good, and waits for the handler.
func (in *incoming) close() {
	in.mu.Lock()
	in.closed = true
	if in.conn != nil {
		in.conn.Close()
	}
	in.generation.Add(1)
	in.mu.Unlock()
	in.deliver.Lock()
	defer in.deliver.Unlock()
}
