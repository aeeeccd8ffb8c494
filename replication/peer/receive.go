package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/sock"
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
	conn     io.Closer  // nil: none
	now      *reception // of conn, past the handshake
	instance uint64     // of the peer's process that conn belongs to
	attempt  uint64
	closed   bool
	// The cluster's id as we knew it before the hellos, and as the peer did; "" while it
	// is not known.
	said, named string
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

// unjudged reports whether the peer of a connection may be of another cluster, for all
// that was known when it was made: what we said then is not what we know now, and it
// did not name that.
func (m *Manager) unjudged(said, named string) bool {
	id := *m.clusterID.Load()
	return said != id && named != id
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
	l, generation, version, err := m.welcome(conn)
	<-m.handshakes
	if err != nil {
		conn.Close()
		m.refuse(conn, err)
		return
	}
	l.begin(conn, generation, version).run()
}

// refuse logs why a dialer was turned away: it comes again every second or so,
// so only what is new is worth a warning.
func (m *Manager) refuse(conn net.Conn, err error) {
	m.mu.Lock()
	seen := slices.Contains(m.refusals, err.Error())
	if !seen {
		m.refusals = append(m.refusals[max(len(m.refusals)-refusalsMax+1, 0):], err.Error())
	}
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
	said := *m.clusterID.Load()
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
		if generation = l.in.replace(conn, h, said); generation == 0 {
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
	l.in.judgeAgain(m)
	l.peerIs(h.Instance)
	return l, generation, version, nil
}

// begin prepares the reading of an accepted connection.
func (l *link) begin(conn net.Conn, generation uint64, version uint8) *reception {
	rc := &reception{l: l, conn: conn, generation: generation}
	if c := sock.Take(conn, sock.Link); c != nil {
		rc.conn = c
	}
	rc.r = wire.NewReaderOf(rc.conn, wire.Versions{Min: version, Max: version})
	in := &l.in
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.generation.Load() == generation && !in.closed {
		in.conn, in.now = rc.conn, rc
	} else {
		rc.conn.Close() // whoever replaced it closed what it was before
	}
	return rc
}

// reception is the reading of one incoming connection.
//
//	reader: Next, Next, … ─► Messages ─► Settle ─► Next …
//
// One goroutine is its reader. While that one is in Settle, which may hang with
// the disk of one volume, nothing that the peer says about other volumes would
// be heard. So the watch (incoming.watch) takes the reading away from a reader
// that stays there, and gives it to a new goroutine; the old one finds that out
// when it returns, and ends. The order of messages stays: Messages has had them
// before.
type reception struct {
	l          *link
	conn       io.ReadCloser
	generation uint64
	r          *wire.Reader // the reader's
	stays      uint64       // of the reader in Settle, so far; the reader's

	settling atomic.Uint64 // the number of the stay that is under way; 0: none
	seen     uint64        // settling at the last watch; the watch's
}

// run is the reader, until the connection ends or the reading is taken away.
func (rc *reception) run() {
	batch := make([]wire.Envelope, 0, batchMax)
	var vols []ident.Volume
	for {
		var err error
		batch, err = rc.next(batch[:0])
		vols = volumesOf(vols[:0], batch)
		if !rc.l.hand(batch, rc.generation) {
			err = net.ErrClosed
		}
		if err != nil {
			// Nobody may go on reading: after an error the stream is done for.
			rc.end(err)
			if len(vols) > 0 {
				rc.l.m.opt.Handler.Settle(rc.l.node, vols)
			}
			return
		}
		if len(vols) > 0 && !rc.settle(vols) {
			return
		}
	}
}

// next waits for messages and returns all that have arrived; with an error,
// those before it.
func (rc *reception) next(batch []wire.Envelope) ([]wire.Envelope, error) {
	l, r := rc.l, rc.r
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
	return batch, err
}

// volumesOf appends each volume that the batch is about.
func volumesOf(vols []ident.Volume, batch []wire.Envelope) []ident.Volume {
	for i := range batch {
		if v := batch[i].Volume; len(vols) == 0 || vols[len(vols)-1] != v && !slices.Contains(vols, v) {
			vols = append(vols, v)
		}
	}
	return vols
}

// settle reports whether the caller is still the reader.
func (rc *reception) settle(vols []ident.Volume) bool {
	rc.stays++
	stay := rc.stays
	rc.settling.Store(stay)
	rc.l.m.opt.Handler.Settle(rc.l.node, vols)
	return rc.settling.CompareAndSwap(stay, 0)
}

// watch gives the reading of the connection to another goroutine if its reader
// has been in one and the same Settle since the last call.
func (in *incoming) watch(m *Manager) {
	in.mu.Lock()
	rc := in.now
	in.mu.Unlock()
	if rc == nil {
		return
	}
	stay := rc.settling.Load()
	if stay == 0 || stay != rc.seen {
		rc.seen = stay
		return
	}
	if !m.begin() {
		return
	}
	if !rc.settling.CompareAndSwap(stay, 0) {
		m.wg.Done()
		return
	}
	go func() {
		defer m.wg.Done()
		rc.run()
	}()
}

// end closes the connection, and says why it ended.
func (rc *reception) end(err error) {
	rc.conn.Close()
	l := rc.l
	l.in.mu.Lock()
	if l.in.now == rc {
		l.in.now = nil
	}
	l.in.mu.Unlock()
	switch {
	case l.in.generation.Load() != rc.generation || l.ctx.Err() != nil:
	case errors.Is(err, io.EOF):
		l.m.log.Info("the peer closed its connection", "peer", l.node)
	default:
		l.m.log.Warn("connection from the peer ended", "peer", l.node, "err", err)
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
func (in *incoming) replace(conn net.Conn, h wire.Hello, said string) uint64 {
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
	in.said, in.named = said, h.ClusterID
	in.silent.Store(0)
	return in.generation.Add(1)
}

// judgeAgain ends the connection if the cluster's id has become known since it was
// made, and the peer did not name it. Nothing that it has brought is delivered then.
func (in *incoming) judgeAgain(m *Manager) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.conn != nil && m.unjudged(in.said, in.named) {
		in.conn.Close()
		in.generation.Add(1)
		in.said = *m.clusterID.Load() // once
	}
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
