package sim

import (
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// session is one client at one node: one request at a time, as
// replication.Session sends them (first plainly, then as replays).
type session struct {
	i          int
	node       int
	id         uint64
	generation uint64
	next       uint64
	on         bool
	op         op
	tries      uint64      // events of a former try are told apart
	okSince    [4]int      // requests answered since the healing, by opKind
	last       wire.Status // of the newest request that has ended
}

type opKind uint8

const (
	opWrite opKind = iota
	opFlush
	opRead
)

type op struct {
	on       bool
	kind     opKind
	fua      bool
	block    int
	blocks   int
	request  uint64
	invoked  int64
	flushed  ident.Seq   // what a flush must cover
	floor    []ident.Seq // for a read: what each block must at least show
	sent     bool
	lastSeen ident.Position
	target   int // who has it; -1: nobody
	id       uint64
}

const targetNone = -1

// askAgain is how long a request waits for its reply before it is sent again.
const askAgain = 2 * leaseFor

func (s *Sim) newSession(node int) *session {
	c := &session{i: len(s.cli), node: node}
	c.op.target = targetNone
	s.cli = append(s.cli, c)
	return c
}

// stepSession starts the next request, or tries the present one again.
func (s *Sim) stepSession(c *session, try uint64) {
	n := s.nodes[c.node]
	if try != 0 && try != c.tries {
		return
	}
	if !n.up || n.stopped || n.viewN == 0 && n.view.Epoch == 0 && len(n.view.Set) == 0 {
		if !c.op.on {
			s.at(s.delay(20*ms, 100*ms), event{kind: evOp, a: c.i})
		} else {
			c.tries++
			s.at(20*ms, event{kind: evOp, a: c.i, x: c.tries})
		}
		return
	}
	if c.op.on {
		s.route(c)
		return
	}
	if s.quieting || s.opt.Manual {
		return
	}
	if !c.on || (!s.healed && s.chance(0.01)) {
		s.openSession(c)
	}
	s.begin(c)
	s.route(c)
}

func (s *Sim) openSession(c *session) {
	c.id = uint64(len(s.chk.sessions) + 1)
	c.on, c.next, c.generation = true, 0, s.nodes[c.node].view.Generation
	s.chk.sessions = append(s.chk.sessions, c.generation)
}

// begin draws a request.
func (s *Sim) begin(c *session) {
	c.next++
	o := op{on: true, request: c.next, invoked: s.now, target: targetNone, floor: c.op.floor[:0]}
	size := int(s.nodes[c.node].view.Size / blockSize)
	o.block = s.rng.IntN(size)
	o.blocks = 1 + s.rng.IntN(min(4, size-o.block))
	switch k := s.rng.IntN(20); {
	case k < 10:
		o.kind, o.fua = opWrite, s.rng.IntN(10) == 0
	case k < 12:
		o.kind = opFlush
	default:
		o.kind = opRead
	}
	c.op = o
	s.chk.begin(c)
	if s.tracing() {
		s.note(c.node, "op", "session %d request %d kind %d blocks %d+%d", c.id, o.request, o.kind, o.block, o.blocks)
	}
}

// route sends a request to where the primary is thought to be.
func (s *Sim) route(c *session) {
	n, o := s.nodes[c.node], &c.op
	to := s.index(n.view.Primary)
	c.tries++
	switch {
	case to == n.i && n.core != nil:
		if !o.sent {
			o.lastSeen = s.lastSeen(n)
		}
		o.id = c.tries<<16 | uint64(c.i)
		o.target = to
		replay := o.sent
		o.sent = true
		s.serve(n, n.i, &wire.Forward{
			ID: o.id, Op: wireOp(o.kind), Flags: fua(o), Off: uint64(o.block * blockSize), Len: uint64(o.blocks * blockSize),
			Session: c.id, Request: o.request, Replay: replay, LastSeen: o.lastSeen, Generation: c.generation,
		})
		s.pump(n)
	case to >= 0 && to != n.i && n.peers[to]:
		if !o.sent {
			o.lastSeen = s.lastSeen(n)
		}
		o.id = c.tries<<16 | uint64(c.i)
		o.target = to
		replay := o.sent
		o.sent = true
		s.send(n, core.Out{To: n.view.Primary, Msg: &wire.Forward{
			ID: o.id, Op: wireOp(o.kind), Flags: fua(o), Off: uint64(o.block * blockSize), Len: uint64(o.blocks * blockSize),
			Session: c.id, Request: o.request, Replay: replay, LastSeen: o.lastSeen, Generation: c.generation,
		}})
		// The reply comes over a connection of its own, which may break without
		// a word to us: ask again.
		s.at(askAgain, event{kind: evOp, a: c.i, x: c.tries})
	default:
		s.hold(c)
	}
}

func (s *Sim) hold(c *session) {
	c.op.target = targetNone
	c.tries++
	s.at(s.delay(5*ms, 25*ms), event{kind: evOp, a: c.i, x: c.tries})
}

func wireOp(k opKind) wire.Op {
	switch k {
	case opWrite:
		return wire.OpWrite
	case opFlush:
		return wire.OpFlush
	case opRead:
	}
	return wire.OpRead
}

func fua(o *op) uint8 {
	if o.fua {
		return wire.ForwardFUA
	}
	return 0
}

// seen is the newest position that a node knows of.
func (s *Sim) seen(n *node) ident.Position {
	if n.core != nil && n.seen.Less(n.gate.Last) {
		n.seen = n.gate.Last
	}
	return n.seen
}

// lastSeen is seen, for a request that is first sent now.
func (s *Sim) lastSeen(n *node) ident.Position {
	p := s.seen(n)
	if p.Epoch < n.view.Epoch {
		// What was seen of an older epoch may have been given up.
		p = ident.Position{Epoch: n.view.Epoch, Seq: n.view.Position.Seq}
	}
	return p
}

func (s *Sim) takeForward(n *node, from int, m *wire.Forward) { s.serve(n, from, m) }

// serve is the driver's part at whoever is asked.
func (s *Sim) serve(n *node, from int, m *wire.Forward) {
	if n.core == nil {
		s.reply(n, from, m.ID, wire.StatusRetry, ident.Position{}, nil)
		return
	}
	origin := core.Origin{ID: uint64(from)<<48 | m.ID}
	switch m.Op {
	case wire.OpRead:
		s.readBegin(n, from, m)
	case wire.OpWrite:
		s.put(n, input{kind: inRequest, req: &core.Request{
			Origin: origin, Kind: wire.KindZero, FUA: m.Flags&wire.ForwardFUA != 0, Off: m.Off, Len: m.Len,
			Session: m.Session, Request: m.Request, Replay: m.Replay, LastSeen: m.LastSeen, Generation: m.Generation,
		}})
	case wire.OpFlush:
		s.put(n, input{kind: inRequest, req: &core.Request{
			Origin: origin, Flush: true, Session: m.Session, Request: m.Request, Replay: m.Replay, LastSeen: m.LastSeen, Generation: m.Generation,
		}})
	case wire.OpForget:
		s.put(n, input{kind: inForget, x: m.Session})
	}
}

// answer carries the core's answer to whoever asked.
func (s *Sim) answer(n *node, a *core.Answer) {
	s.reply(n, int(a.Origin.ID>>48), a.Origin.ID&(1<<48-1), a.Status, a.Pos, nil)
}

func (s *Sim) reply(n *node, to int, id uint64, status wire.Status, pos ident.Position, show []ident.Position) {
	if to == n.i {
		s.complete(n.i, id, status, pos, show)
		return
	}
	// What a read showed travels beside the reply: it stands for the payload.
	if show != nil {
		s.chk.shown[id] = append([]ident.Position(nil), show...)
	}
	s.send(n, core.Out{To: s.nodes[to].name, Msg: &wire.Reply{ID: id, Status: status, Pos: pos}})
}

func (s *Sim) takeReply(from int, m *wire.Reply) {
	show := s.chk.shown[m.ID]
	delete(s.chk.shown, m.ID)
	s.complete(from, m.ID, m.Status, m.Pos, show)
}

// complete ends a request, or sends it on.
func (s *Sim) complete(from int, id uint64, status wire.Status, pos ident.Position, show []ident.Position) {
	c := s.cli[id&(1<<16-1)]
	n := s.nodes[c.node]
	if !n.up {
		return
	}
	if n.seen.Less(pos) {
		n.seen = pos
	}
	if !c.op.on || c.op.id != id || c.op.target != from {
		return
	}
	if status == wire.StatusRetry {
		c.op.sent = true
		if to := s.index(n.view.Primary); to != from && to >= 0 {
			s.route(c)
			return
		}
		s.hold(c)
		return
	}
	if s.tracing() {
		s.note(c.node, "done", "session %d request %d kind %d status %d pos %v shows %v", c.id, c.op.request, c.op.kind, status, pos, show)
	}
	c.op.on, c.op.target, c.last = false, targetNone, status
	c.tries++
	if status == wire.StatusOK {
		s.chk.done(s, c, show)
		if s.healed {
			c.okSince[c.op.kind]++
		}
	}
	if status == wire.StatusGeneration || status == wire.StatusTooOld {
		c.on = false
	}
	think := s.delay(ms, 60*ms)
	if s.healed {
		think = s.delay(ms, 200*ms)
	}
	s.at(think, event{kind: evOp, a: c.i, x: c.tries})
}

// rerouteAll sends what went to another primary anew.
func (s *Sim) rerouteAll(n *node) {
	to := s.index(n.view.Primary)
	for _, c := range s.cli {
		if c.node == n.i && c.op.on && c.op.target != targetNone && c.op.target != to && c.op.target != n.i {
			s.hold(c)
		}
	}
}

// linkLost takes back what was under way on a link.
func (s *Sim) linkLost(n *node, peer int) {
	for _, c := range s.cli {
		if c.node == n.i && c.op.on && c.op.target == peer {
			s.hold(c)
		}
	}
}

// sessionsLost ends the sessions of a process that died: what they had under
// way has an unknown end.
func (s *Sim) sessionsLost(n *node) {
	for _, c := range s.cli {
		if c.node != n.i {
			continue
		}
		c.on, c.op.on, c.op.target = false, false, targetNone
		c.tries++
		s.at(s.delay(20*ms, 100*ms), event{kind: evOp, a: c.i, x: c.tries})
	}
}

// endSessions ends the sessions from before data may have been lost.
func (s *Sim) endSessions(n *node, generation uint64) {
	for _, c := range s.cli {
		if c.node == n.i && c.on && c.generation < generation {
			c.on, c.op.on, c.op.target = false, false, targetNone
			c.tries++
			s.at(s.delay(ms, 20*ms), event{kind: evOp, a: c.i, x: c.tries})
		}
	}
}

// read is a read under way at the primary; it does not pass through the core's
// loop (replication/read.go).
type read struct {
	id     uint64
	from   int
	fwd    uint64
	block  int
	blocks int
	gen    uint64 // cache generation of the session
	epoch  ident.Epoch
	busy   bool // bytes are being read; else it waits for a barrier
	since  core.Instant
	show   []ident.Position
	store  []bool    // which blocks the overlay does not have
	newest ident.Seq // the newest entry of the overlay that shows
	from0  ident.Seq // applied when the overlay was looked at
	resets int
}

func (s *Sim) readBegin(n *node, from int, m *wire.Forward) {
	n.readID++
	r := read{
		id: n.readID, from: from, fwd: m.ID, block: int(m.Off / blockSize), blocks: int(m.Len / blockSize), gen: m.Generation,
	}
	n.reads = append(n.reads, r)
	s.readTry(n, &n.reads[len(n.reads)-1])
}

func (s *Sim) findRead(n *node, id uint64) *read {
	for i := range n.reads {
		if n.reads[i].id == id {
			return &n.reads[i]
		}
	}
	return nil
}

func (s *Sim) endRead(n *node, r *read, status wire.Status) {
	from, fwd, show := r.from, r.fwd, r.show
	for i := range n.reads {
		if n.reads[i].id == r.id {
			n.reads = append(n.reads[:i], n.reads[i+1:]...)
			break
		}
	}
	if status != wire.StatusOK {
		show = nil
	}
	s.reply(n, from, fwd, status, n.gate.Last, show)
}

// readTry makes one attempt: gate, overlay, store; readEnd looks again.
func (s *Sim) readTry(n *node, r *read) {
	g := n.gate
	if !g.Serving || s.clock(n) >= g.LeaseUntil {
		s.barrier(n, r, 0)
		return
	}
	if g.Generation != r.gen {
		s.endRead(n, r, wire.StatusGeneration)
		return
	}
	r.epoch, r.show, r.store, r.newest, r.from0, r.resets = g.Epoch, r.show[:0], r.store[:0], 0, n.apply.done, n.resets
	for b := r.block; b < r.block+r.blocks; b++ {
		p, ok := s.overlay(n, b, ^ident.Seq(0))
		r.show, r.store = append(r.show, p), append(r.store, !ok)
		r.newest = max(r.newest, p.Seq)
	}
	if r.newest > g.Commit {
		s.barrier(n, r, r.newest)
		return
	}
	r.busy, r.since = true, s.clock(n)
	n.readAt = r.since
	s.at(s.delay(0, 3*ms), event{kind: evRead, node: n.i, gen: n.gen, x: r.id})
}

// lookup is what a block holds at this replica, overlay first.
// Entries after upTo do not show.
func (s *Sim) lookup(n *node, b int, upTo ident.Seq) ident.Position {
	if p, ok := s.overlay(n, b, upTo); ok {
		return p
	}
	return n.disk.store.cur[b]
}

// overlay is what the entries that are not applied yet say of a block.
func (s *Sim) overlay(n *node, b int, upTo ident.Seq) (ident.Position, bool) {
	l := &n.disk.log
	for seq := min(l.last().Seq, upTo); seq > n.apply.done; seq-- {
		e := l.at(seq)
		if e == nil {
			break
		}
		if e.Kind != wire.KindMarker && uint64(b*blockSize) >= e.Off && uint64(b*blockSize) < e.End() {
			return e.Pos, true
		}
	}
	return ident.Position{}, false
}

// touched reports whether an entry that the overlay did not show has been
// applied under a read.
func (s *Sim) touched(n *node, r *read) bool {
	if r.resets != n.resets {
		return true
	}
	for seq := max(r.from0, r.newest) + 1; seq <= n.apply.done; seq++ {
		e := n.disk.log.at(seq)
		if e == nil || e.Off < uint64((r.block+r.blocks)*blockSize) && uint64(r.block*blockSize) < e.End() {
			return true
		}
	}
	return false
}

func (s *Sim) barrier(n *node, r *read, seq ident.Seq) {
	r.busy = false
	s.put(n, input{kind: inBarrier, x: r.id, y: uint64(seq)})
}

func (s *Sim) readEnd(n *node, id uint64) {
	r := s.findRead(n, id)
	if r == nil || !r.busy {
		return
	}
	if wait := n.disk.storeHangs(s.now); wait > 0 {
		s.at(wait, event{kind: evRead, node: n.i, gen: n.gen, x: id})
		return
	}
	for i := range r.show {
		if r.store[i] {
			r.show[i] = n.disk.store.cur[r.block+i]
		}
	}
	if s.touched(n, r) {
		s.readTry(n, r)
		return
	}
	g := n.gate
	if !g.Serving || s.clock(n) >= g.LeaseUntil {
		s.barrier(n, r, 0)
		return
	}
	if g.Generation != r.gen {
		s.endRead(n, r, wire.StatusGeneration)
		return
	}
	if g.Epoch != r.epoch {
		s.readTry(n, r)
		return
	}
	s.endRead(n, r, wire.StatusOK)
}

// oldestRead is since when a read has been with the disk; 0: none is.
func (n *node) oldestRead() (at core.Instant) {
	for i := range n.reads {
		if r := &n.reads[i]; r.busy && (at == 0 || r.since < at) {
			at = r.since
		}
	}
	return at
}

func (s *Sim) readAgain(n *node, id uint64) {
	if r := s.findRead(n, id); r != nil {
		s.readTry(n, r)
	}
}

func (s *Sim) readBounced(n *node, id uint64) {
	if r := s.findRead(n, id); r != nil {
		s.endRead(n, r, wire.StatusRetry)
	}
}
