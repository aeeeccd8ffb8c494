package replication

import (
	"hash/crc32"
	"sync"
	"sync/atomic"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// forwarders is what a primary knows of requests that other nodes pass on.
type forwarders struct {
	mu sync.Mutex
	// sessions of other nodes' clients that have sent changes: what waits of
	// them is dropped when the link goes down or the client does.
	sessions map[forwardedSession]struct{}
	inFlight atomic.Int64
	bytes    atomic.Int64 // that those in flight read or write
}

// full reports whether no more requests are taken for now.
func (f *forwarders) full(l *Limits) bool {
	return f.inFlight.Load() >= int64(l.ForwardedMax) || f.bytes.Load() >= l.ForwardedBytes
}

// begin and end count a request in and out.
func (f *forwarders) begin(r *Request) {
	f.inFlight.Add(1)
	f.bytes.Add(r.payloadBytes())
}

func (f *forwarders) end(r *Request) {
	f.inFlight.Add(-1)
	f.bytes.Add(-r.payloadBytes())
}

// payloadBytes returns how much memory a request's data takes.
func (r *Request) payloadBytes() int64 {
	if r.Op == OpRead || r.Op == OpWrite {
		return int64(r.Length)
	}
	return 0
}

type forwardedSession struct {
	node ident.Node
	id   uint64
}

// forwardedSessionsMax bounds the memory of sessions. Beyond it the oldest
// knowledge goes: at worst a write of a client that is gone takes effect late
// when quorum returns.
const forwardedSessionsMax = 1 << 16

// extentBytes is what one extent takes in an answer to OpBlockStatus.
const extentBytes = 12

var forwardedRequests = sync.Pool{New: func() any { return new(Request) }}

func (v *Volume) handle(from ident.Node, env wire.Envelope, b *completions) {
	switch m := env.Msg.(type) {
	case *wire.Forward:
		v.handleForward(from, m)
		env.Free()
	case *wire.Reply:
		v.handleReply(from, m, b)
		env.Free()
	default:
		if v.rep() == nil {
			env.Free() // meant for a replica that this node no longer has
			return
		}
		v.rep().in.message(from, env)
	}
}

// handleForward begins a request of another node's client.
func (v *Volume) handleForward(from ident.Node, m *wire.Forward) {
	rp := v.rep()
	op := opOf(m.Op)
	committed := m.Flags&wire.ForwardReplica != 0
	switch {
	case m.Op == wire.OpForget:
		if rp != nil {
			rp.in.forget(m.Session)
			v.forwarders.drop(forwardedSession{from, m.Session})
		}
		return
	case op == 0 || committed && op.changes():
		v.reply(from, m.ID, wire.StatusUnsupported, ident.Position{}, nil)
		return
	case rp == nil || !committed && !v.primaryHere.Load():
		v.reply(from, m.ID, wire.StatusRetry, ident.Position{}, nil)
		return
	case op.changes() && v.opts.Links.EchoAge(from, m.Echo) > v.opts.Limits.LinkLease:
		// It lay in some buffer for too long: its client may be elsewhere.
		v.reply(from, m.ID, wire.StatusStaleEcho, ident.Position{}, nil)
		return
	case v.forwarders.full(&v.opts.Limits):
		v.reply(from, m.ID, wire.StatusRetry, ident.Position{}, nil)
		return
	}
	if size := v.size.Load(); op != OpFlush && (m.Off > size || m.Len > size-m.Off) {
		// The client's node has judged it by the size that it knows, and no
		// volume shrinks: the news of a larger one is on its way here.
		v.reply(from, m.ID, wire.StatusRetry, ident.Position{}, nil)
		return
	}
	r, _ := forwardedRequests.Get().(*Request)
	extents := r.Extents[:0]
	*r = Request{
		Op: op, Offset: m.Off, Length: m.Len, Extents: extents,
		FUA:        m.Flags&wire.ForwardFUA != 0,
		NoHole:     m.Flags&wire.ForwardNoHole != 0,
		ReqOne:     m.Flags&wire.ForwardReqOne != 0,
		fwd:        fwdOrigin{node: from, id: m.ID},
		session:    m.Session,
		number:     m.Request,
		generation: m.Generation,
		committed:  committed,
		replay:     m.Replay,
		lastSeen:   m.LastSeen,
		crc:        m.PayloadCRC,
	}
	v.forwarders.begin(r)
	if !op.changes() {
		if op == OpRead {
			r.Data = buf.Get(int(m.Len))
		}
		rp.read(r)
		return
	}
	r.Data = m.Payload.Retain()
	v.forwarders.note(forwardedSession{from, m.Session})
	if !rp.in.request(r) {
		v.finishOp(r, wire.StatusRetry, ident.Position{}, nil)
	}
}

// opOf is wireOp the other way round; 0 for what this version does not know.
func opOf(op wire.Op) Op {
	switch op {
	case wire.OpRead:
		return OpRead
	case wire.OpWrite:
		return OpWrite
	case wire.OpFlush:
		return OpFlush
	case wire.OpTrim:
		return OpTrim
	case wire.OpZero:
		return OpZero
	case wire.OpBlockStatus:
		return OpBlockStatus
	case wire.OpForget:
	}
	return 0
}

// reply answers a forwarded request. It takes over a reference of payload.
func (v *Volume) reply(to ident.Node, id uint64, status wire.Status, pos ident.Position, payload *buf.Buf) {
	m := wire.Reply{ID: id, Status: status, Pos: pos, Payload: payload}
	if payload != nil {
		m.PayloadCRC = crc32.Checksum(payload.B, castagnoli)
	}
	v.opts.Links.Send(to, v.opts.Volume, &m)
}

// finishForwarded answers a request of another node's client and takes it back.
func (v *Volume) finishForwarded(r *Request, status wire.Status, pos ident.Position) {
	var payload *buf.Buf
	if status == wire.StatusOK {
		switch r.Op {
		case OpRead:
			payload = r.Data.Retain()
		case OpBlockStatus:
			payload = buf.Get(extentBytes * len(r.Extents))
			payload.B = wire.EncodeExtents(payload.B[:0], r.Extents)
		case OpWrite, OpFlush, OpTrim, OpZero, OpCache:
		}
	}
	v.reply(r.fwd.node, r.fwd.id, status, pos, payload)
	v.forwarders.end(r)
	r.Data.Release()
	r.Data = nil
	forwardedRequests.Put(r)
}

func (f *forwarders) note(s forwardedSession) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.sessions[s]; ok {
		return
	}
	if f.sessions == nil || len(f.sessions) >= forwardedSessionsMax {
		f.sessions = make(map[forwardedSession]struct{})
	}
	f.sessions[s] = struct{}{}
}

func (f *forwarders) drop(s forwardedSession) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.sessions, s)
}

// of takes out the sessions of a node.
func (f *forwarders) of(node ident.Node) []uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	var ids []uint64
	for s := range f.sessions {
		if s.node == node {
			ids = append(ids, s.id)
			delete(f.sessions, s)
		}
	}
	return ids
}

// forgetForwarder drops what waits here of a node's clients: the link is gone,
// so the node will send it again, if its clients are still there.
func (rp *replica) forgetForwarder(node ident.Node) {
	for _, id := range rp.v.forwarders.of(node) {
		rp.in.forget(id)
	}
}
