package peer

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blockstep/blockstep/internal/boottime"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// Options are a Manager's.
type Options struct {
	Self    ident.Node
	Cluster string
	// ClusterID is the cluster's random id; "" while it is not known. Two
	// nodes that both know one must agree. See SetClusterID.
	ClusterID string
	// Dial opens a connection to node that is past the mux preface: the next
	// bytes belong to the link. It must heed ctx.
	Dial   func(ctx context.Context, node ident.Node) (net.Conn, error)
	Logger *slog.Logger  // default: none
	Ping   time.Duration // between pings; default 300 ms
	// Lease is the time after which a connection whose data is not
	// acknowledged is given up; default 5 s.
	Lease   time.Duration
	Handler Handler
	Limits  Limits
	// Versions of the frame that are spoken; default those of this build. With
	// each peer it is the newest one that both speak.
	Versions wire.Versions
	Clock    func() int64 // ns; default CLOCK_BOOTTIME
}

// Limits bounds what one link holds. A zero field means its default.
type Limits struct {
	QueueBytes  int // header and payload bytes that wait to be sent to one peer (256 MiB)
	QueueFrames int // messages that wait to be sent to one peer (65536)
}

// Handler is told what the links do. For one peer, calls of Messages come one
// at a time, and calls of Up and Down come one at a time and alternate; the two
// may overlap. A handler may call the Manager's methods except Close, SetPeers.
type Handler interface {
	// Messages delivers what has arrived together from one peer, in order. The
	// handler takes over each message and calls Free on its envelope when done;
	// the slice itself belongs to the link again when Messages returns. It does
	// not block: what takes time waits for Settle.
	Messages(from ident.Node, batch []wire.Envelope)
	// Settle is called after Messages with the volumes that the batch was
	// about, on the goroutine that reads the connection. It may block, on a disk
	// say: after a while another goroutine goes on reading, so that several
	// calls for one peer may be under way.
	Settle(from ident.Node, vols []ident.Volume)
	// Up is called when messages can be sent to node.
	Up(node ident.Node)
	// Down is called when the link to node is lost: what was sent before may
	// not have arrived.
	Down(node ident.Node)
}

// LinkStatus is a picture of one link.
type LinkStatus struct {
	Node        ident.Node    `json:"node"`
	Connected   bool          `json:"connected"` // we can send to it
	Heard       bool          `json:"heard"`     // it has sent a sign of life lately
	RTT         time.Duration `json:"rtt_nanos"` // of the last ping; 0: not known
	QueueBytes  int           `json:"queue_bytes"`
	QueueFrames int           `json:"queue_frames"`
	SentBytes   uint64        `json:"sent_bytes"`
	RecvBytes   uint64        `json:"recv_bytes"`
	SentFrames  uint64        `json:"sent_frames"`
	RecvFrames  uint64        `json:"recv_frames"`
	Connects    uint64        `json:"connects"`        // how often the link has come up
	Error       string        `json:"error,omitempty"` // why it is not connected
}

// Manager keeps the links of one node. Its methods may be called from any
// goroutine.
type Manager struct {
	opt      Options
	log      *slog.Logger
	instance uint64 // random: this process to its peers
	shift    int64  // see now
	started  int64  // now() at the start

	clusterID atomic.Pointer[string]
	// peers is replaced, never changed: Send reads it without a lock.
	peers      atomic.Pointer[peerSet]
	soon       *time.Timer   // of runTicker: a FlushSoon is due
	soonDue    atomic.Bool   // soon is set
	handshakes chan struct{} // one token for each accepted connection that is not done with its handshake

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // runTicker, runAccepted

	change sync.Mutex // serializes SetPeers and Close, which wait with it held

	mu       sync.Mutex
	closed   bool     // no goroutine is added to wg any more
	refusals []string // the last ones that were told of, refusalsMax at the most
}

type peerSet struct {
	byName map[ident.Node]*link
	list   []*link
}

// NewManager returns a Manager without peers. It starts no connection before
// SetPeers.
func NewManager(opt Options) *Manager {
	if opt.Ping == 0 {
		opt.Ping = 300 * time.Millisecond
	}
	if opt.Lease == 0 {
		opt.Lease = 5 * time.Second
	}
	if opt.Limits.QueueBytes == 0 {
		opt.Limits.QueueBytes = queueBytesMax
	}
	if opt.Limits.QueueFrames == 0 {
		opt.Limits.QueueFrames = queueFramesMax
	}
	if opt.Versions == (wire.Versions{}) {
		opt.Versions = wire.Known()
	}
	if opt.Clock == nil {
		opt.Clock = boottime.Now
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	m := &Manager{
		opt:        opt,
		log:        opt.Logger,
		instance:   rand.Uint64(),
		shift:      1<<60 + rand.Int64N(1<<60),
		handshakes: make(chan struct{}, handshakesMax),
		soon:       time.NewTimer(time.Hour),
	}
	m.started = m.now()
	m.clusterID.Store(&opt.ClusterID)
	m.peers.Store(&peerSet{})
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.wg.Add(1)
	go m.runTicker()
	return m
}

// SetPeers says who the peers are: links to new ones are opened, links to
// those that are missing from the list are closed and waited for. Self is
// ignored.
func (m *Manager) SetPeers(nodes []ident.Node) {
	m.change.Lock()
	defer m.change.Unlock()
	if m.ctx.Err() != nil {
		return
	}
	old := m.peers.Load()
	next := &peerSet{byName: make(map[ident.Node]*link, len(nodes))}
	for _, node := range nodes {
		if node == m.opt.Self || next.byName[node] != nil {
			continue
		}
		l := old.byName[node]
		if l == nil {
			l = newLink(m, node)
			l.wg.Add(1)
			go l.runDialer()
		}
		next.byName[node] = l
		next.list = append(next.list, l)
	}
	m.peers.Store(next)
	for _, l := range old.list {
		if next.byName[l.node] == nil {
			l.close()
		}
	}
}

// SetClusterID tells the cluster's id when it becomes known. Connections that were
// made before could not be judged: those whose peer did not name it are made anew.
func (m *Manager) SetClusterID(id string) {
	if *m.clusterID.Load() == id {
		return
	}
	m.clusterID.Store(&id)
	for _, l := range m.peers.Load().list {
		if s := l.out.Load(); s != nil {
			l.judgeAgain(s)
		}
		l.in.judgeAgain(m)
	}
}

func (m *Manager) link(node ident.Node) *link { return m.peers.Load().byName[node] }

// Send queues msg for one peer. It never blocks. It takes over one reference of
// each payload (wire.RetainPayloads first to keep one), and it is done with msg
// and its slices when it returns. A message for a peer whose link is down is
// dropped; when the queue overflows, the link is closed and Down called.
// Messages to one peer about one volume arrive in order, except that Ack, Reject,
// Stale, BlocksAck and ResyncState, in order among themselves, may overtake the
// others. Between volumes there is no order. What was sent waits for Flush.
func (m *Manager) Send(to ident.Node, vol ident.Volume, msg wire.Message) {
	var s *stream
	if l := m.link(to); l != nil {
		s = l.out.Load()
	}
	if s == nil {
		wire.ReleasePayloads(msg)
		return
	}
	if err := s.push(vol, msg); err != nil {
		m.log.Error("a message cannot be sent and is dropped: this is a bug, please report it", "peer", to, "volume", vol, "err", err)
	}
}

// Flush writes what has been queued, as far as the sockets take it at once; the
// rest follows by itself. Every Send is followed by a Flush, best after a batch.
func (m *Manager) Flush() {
	for _, l := range m.peers.Load().list {
		if s := l.out.Load(); s != nil {
			s.flush()
		}
	}
}

// FlushSoon is Flush in soonAfter, once for all who ask until then: the signs of
// life of many idle volumes, which come at the same moment, leave together.
func (m *Manager) FlushSoon() {
	if !m.soonDue.Load() && m.soonDue.CompareAndSwap(false, true) {
		m.soon.Reset(soonAfter)
	}
}

// Status returns a picture of each link, sorted by node.
func (m *Manager) Status() []LinkStatus {
	var list []LinkStatus
	for _, l := range m.peers.Load().list {
		list = append(list, l.status())
	}
	slices.SortFunc(list, func(a, b LinkStatus) int { return strings.Compare(string(a.Node), string(b.Node)) })
	return list
}

// Close closes every link, calls Down for those that were up, and waits for
// all goroutines to end.
func (m *Manager) Close() {
	m.change.Lock()
	defer m.change.Unlock()
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.cancel()
	for _, l := range m.peers.Load().list {
		l.close()
	}
	m.wg.Wait()
}

// begin adds a goroutine to wg; false if the Manager is closed.
func (m *Manager) begin() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return false
	}
	m.wg.Add(1)
	return true
}

// runTicker sends the pings, and ends connections that have been silent for
// too long.
func (m *Manager) runTicker() {
	defer m.wg.Done()
	every := m.opt.Ping / watchesPerPing
	next := func() time.Duration { return every - time.Duration(m.opt.Clock())%every }
	t := time.NewTimer(next())
	defer t.Stop()
	defer m.soon.Stop()
	var last time.Duration // the ping interval of the clock that the last ping was in
	for {
		select {
		case <-t.C:
			t.Reset(next())
			now := time.Duration(m.opt.Clock()) / m.opt.Ping
			for _, l := range m.peers.Load().list {
				l.in.watch(m)
				if now != last {
					l.tick()
				}
			}
			last = now
		case <-m.soon.C:
			m.soonDue.Store(false)
			m.Flush()
		case <-m.ctx.Done():
			return
		}
	}
}
