package sim

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// node is a machine with its process.
type node struct {
	i       int
	name    ident.Node
	replica bool
	disk    disk
	// registering: the id of the replica is on its way to the cluster state.
	registering bool

	// The machine.
	drift  int64 // ppm by which its clock is fast
	bootAt int64
	boots  uint64

	// The process. gen rises with each start and death, so that events of a
	// former life are told apart.
	up       bool
	starting bool
	stopped  bool // SIGSTOP
	gen      uint32
	deferred []event
	crashIn  int // steps until a crash between two steps; 0: none
	crashBy  Fault

	core  *core.Core
	eff   core.Effects
	busy  bool
	step  uint8
	inbox []input
	peers []bool // links that the process knows to be up
	view  core.View
	viewN int // newest view handed in, by number
	gate  core.Gate
	seen  ident.Position

	sync struct {
		on, again bool
		seq       ident.Seq
		cuts      uint32
	}
	apply struct {
		on       bool
		to, done ident.Seq
	}
	ckpt struct {
		on    bool
		dirty int
		next  checkpoint
		cuts  uint32 // of the log when it began
		again bool
	}
	blocks     []*wire.Blocks // to be written to the backing store
	blockReads []core.BlockRead
	resets     int
	logReads   []core.LogRead
	reads      []read
	readID     uint64
	drains     []drainCall
	change     *setCommand

	commit   ident.Seq // last seen, for the checker
	sealed   ident.Epoch
	openTo   int64 // real time until which its gate is open; 0: closed
	openIn   ident.Epoch
	ticks    uint64                 // batches, for the background fsync
	sealHook func(ident.SealAnswer) // a scenario's
}

type inputKind uint8

const (
	inTick inputKind = iota
	inMsg
	inPeer
	inView
	inSeal
	inDrain
	inUndrain
	inDoubt
	inPause
	inRequest
	inWritten
	inDurable
	inSyncEnded
	inApplied
	inCkpt
	inLogRead
	inProposed
	inBarrier
	inForget
	inFailed
	inBlocksRead
	inBlocksWritten
)

type input struct {
	kind inputKind
	b    int
	x    uint64
	y    uint64
	msg  wire.Message
	req  *core.Request
	view *core.View
	rd   core.LogRead
	br   core.BlockRead

	block  wire.Block
	resets int
}

type drainCall struct {
	id    uint64
	ctl   int
	epoch ident.Epoch
}

func (s *Sim) newNode(i int, replica bool) *node {
	n := &node{i: i, name: ident.Node(string(rune('a' + i))), replica: replica}
	n.drift = s.rng.Int64N(driftPPM) - driftPPM/2
	n.boots = 1
	n.bootAt = -s.rng.Int64N(1000*s1) - 10*s1
	if replica {
		n.disk = s.newDisk(ident.Replica(100+i), 1)
	}
	return n
}

// clock reads the machine's CLOCK_BOOTTIME.
func (s *Sim) clock(n *node) core.Instant {
	d := s.now - n.bootAt
	return core.Instant(d + d/1e6*n.drift)
}

// real is the inverse of clock, rounded up.
func (s *Sim) real(n *node, t core.Instant) int64 {
	now := s.clock(n)
	d := int64(t - now)
	return s.now + d - d/1e6*n.drift + 1
}

func (s *Sim) config(n *node) core.Config {
	return core.Config{
		Node: n.name, Volume: volumeID, Replica: n.disk.meta.replica, Incarnation: n.disk.meta.incarnation,
		Heartbeat: heartbeat, LeaseFor: leaseFor, LeaseMax: leaseFor, DriftPPM: driftPPM,
		StallTimeout: 2 * leaseFor, RetryAfter: 4 * heartbeat,
		WindowBytes: 64 * 96, AppendBytesMax: 16 * 96, AppendEntriesMax: 16,
		UnappliedMax: 256 * 96, DedupMax: s.opt.DedupMax, LagMax: 200 * 96, ResyncChunk: 4 * blockSize, ResyncMax: s.opt.Rate, ResyncMin: s.opt.Rate / 4,
	}
}

// start is what blockstepd does when it opens its replica.
func (s *Sim) start(n *node) {
	n.starting = false
	if n.up {
		return
	}
	n.gen++
	n.up, n.stopped, n.busy, n.core = true, false, false, nil
	n.inbox = n.inbox[:0]
	n.registering = false
	n.peers = make([]bool, len(s.nodes))
	n.view, n.viewN, n.gate, n.seen = core.View{}, 0, core.Gate{}, ident.Position{}
	n.sync.on, n.sync.again, n.apply.on, n.ckpt.on, n.ckpt.again = false, false, false, false, false
	n.blocks, n.blockReads = n.blocks[:0], n.blockReads[:0]
	n.logReads, n.reads, n.drains, n.change = n.logReads[:0], n.reads[:0], n.drains[:0], nil
	n.openTo = 0
	if n.replica {
		s.open(n)
	}
	s.note(n.i, "start", "incarnation %d boot %d amnesiac %v log %v promise %d applied %d", n.disk.meta.incarnation, n.boots,
		n.disk.meta.Amnesiac, n.disk.log.last(), n.disk.meta.Promise, n.disk.ckpt.Applied.Seq)
	for j := range s.nodes {
		if j != n.i {
			s.at(s.delay(ms, 30*ms), event{kind: evLinkTry, node: n.i, b: j})
			s.at(s.delay(ms, 30*ms), event{kind: evLinkTry, node: j, b: n.i})
		}
	}
	s.at(s.delay(ms, 50*ms), event{kind: evView, node: n.i, gen: n.gen, x: uint64(len(s.cl.views) - 1)})
	s.at(s.delay(0, heartbeat/2), event{kind: evTick, node: n.i, gen: n.gen})
}

func (s *Sim) open(n *node) {
	m := &n.disk.meta
	fresh := m.incarnation == 0
	if m.bootID != n.boots && !m.clean {
		m.Amnesiac = true
	}
	m.bootID, m.clean = n.boots, false
	m.incarnation++
	if n.disk.log.rotten() {
		n.disk.failed = true
	}
	if n.disk.failed && m.failed == "" {
		m.failed = "the log's fsync failed at start"
		s.markFailed(n, m.failed)
	}
	n.core = core.New(s.config(n), n.disk.start(fresh), s.clock(n))
	n.commit = n.disk.ckpt.Applied.Seq
	n.apply.done, n.apply.to = n.disk.ckpt.Applied.Seq, n.disk.ckpt.Applied.Seq
	s.chk.opened(s, n)
	if s.opt.Manual {
		return
	}
	s.at(s.delay(20*ms, 500*ms), event{kind: evCkpt, node: n.i, gen: n.gen})
}

// put queues an input for the node's loop.
func (s *Sim) put(n *node, in input) {
	in.resets = n.resets
	n.inbox = append(n.inbox, in)
	if len(n.inbox) > 20_000 {
		s.fail("I9", "node %s has %d inputs waiting", n.name, len(n.inbox))
	}
}

func (s *Sim) nodeEvent(n *node, e *event) {
	if e.gen != 0 && e.gen != n.gen || !n.up {
		return
	}
	if n.stopped {
		n.deferred = append(n.deferred, *e)
		return
	}
	switch e.kind {
	case evTick:
		s.at(heartbeat/2-s.rng.Int64N(ms), event{kind: evTick, node: n.i, gen: n.gen})
		s.put(n, input{kind: inTick})
	case evStep:
		s.perform(n)
	case evMsg:
		s.receive(n, e)
	case evPeer:
		n.peers[e.b] = e.x == 1
		s.note(n.i, "link", "%s up=%d", s.nodes[e.b].name, e.x)
		s.put(n, input{kind: inPeer, b: e.b, x: e.x})
		if e.x == 0 {
			s.linkLost(n, e.b)
		}
	case evView:
		s.takeView(n, int(e.x))
	case evSync:
		s.syncDone(n)
	case evApply:
		s.applyStep(n)
	case evCkpt:
		s.checkpoint(n, e.x)
	case evRead:
		s.readEnd(n, e.x)
	case evLogRead:
		s.logRead(n)
	case evBlockRead:
		s.blockRead(n)
	case evSeal:
		if n.core != nil {
			s.put(n, input{kind: inSeal, b: e.a, x: e.x})
		}
	case evDrain:
		if n.core != nil {
			n.drains = append(n.drains, drainCall{id: uint64(s.count), ctl: e.a, epoch: ident.Epoch(e.x)})
			s.put(n, input{kind: inDrain, x: uint64(s.count), y: e.x})
			s.at(drainLimit, event{kind: evUndrain, node: n.i, gen: n.gen, x: uint64(s.count)})
		}
	case evUndrain:
		if i := slices.IndexFunc(n.drains, func(d drainCall) bool { return d.id == e.x }); i >= 0 {
			n.drains = slices.Delete(n.drains, i, i+1)
			s.put(n, input{kind: inUndrain})
		}
	case evOutcome:
		s.outcome(n, e)
	}
	s.pump(n)
}

// pump feeds the loop, unless it is still busy performing effects.
func (s *Sim) pump(n *node) {
	for n.up && !n.stopped && !n.busy && len(n.inbox) > 0 {
		if n.core == nil {
			n.inbox = n.inbox[:0]
			return
		}
		batch := n.inbox
		if k := 1 + s.rng.IntN(16); k < len(batch) {
			batch = batch[:k]
		}
		now := s.clock(n)
		for i := range batch {
			s.feed(n, now, &batch[i])
		}
		rest := len(n.inbox) - len(batch)
		copy(n.inbox, n.inbox[len(batch):])
		clear(n.inbox[rest:])
		n.inbox = n.inbox[:rest]
		n.core.Ready(&n.eff)
		n.busy, n.step = true, 0
		s.publish(n)
		s.perform(n)
	}
	// The core may not be called while its effects are being performed.
	if n.up && !n.stopped && !n.busy && n.sync.again && !n.sync.on {
		s.startSync(n)
	}
	if n.up && !n.stopped && !n.busy && n.ckpt.again && !n.ckpt.on && n.core != nil {
		s.beginCheckpoint(n)
	}
}

func (s *Sim) feed(n *node, now core.Instant, in *input) {
	c := n.core
	switch in.kind {
	case inTick:
		c.Tick(now)
	case inMsg:
		c.Message(now, s.nodes[in.b].name, in.msg)
		if a, ok := in.msg.(*wire.Append); ok && !s.opt.Wild {
			s.appends = append(s.appends, a)
		}
	case inPeer:
		if in.x == 1 {
			c.PeerUp(now, s.nodes[in.b].name)
		} else {
			c.PeerDown(now, s.nodes[in.b].name)
		}
	case inView:
		c.View(now, *in.view)
	case inSeal:
		c.Seal(now, uint64(in.b), ident.Epoch(in.x))
	case inDrain:
		c.Drain(now, in.x, ident.Epoch(in.y))
	case inDoubt:
		c.Doubt(now, in.x*blockSize, blockSize)
	case inUndrain:
		c.Undrain(now)
	case inPause:
		c.Pause(now, now+core.Instant(in.x))
	case inRequest:
		c.Request(now, *in.req)
	case inWritten:
		c.Written(now, ident.Seq(in.x))
	case inDurable:
		c.SyncEnded(now)
		if uint32(in.y) == n.disk.log.cuts {
			c.Durable(now, ident.Seq(in.x))
		}
	case inSyncEnded:
		c.SyncEnded(now)
	case inApplied:
		if in.resets == n.resets {
			c.Applied(now, ident.Seq(in.x))
		}
	case inCkpt:
		if in.resets == n.resets {
			c.Checkpointed(now, ident.Seq(in.x))
		}
	case inBlocksRead:
		c.BlocksRead(now, in.br, []wire.Block{in.block}, true)
	case inBlocksWritten:
		if in.resets == n.resets {
			c.BlocksWritten(now, in.x)
		}
	case inLogRead:
		ents, ok := n.readLog(in.rd)
		if n.disk.log.rot >= in.rd.From && n.disk.log.rot < in.rd.From+ident.Seq(len(ents)) {
			n.disk.failed = true
			c.Failed(now, "a record of the log does not verify")
			break
		}
		c.LogRead(now, in.rd, ents, ok)
	case inProposed:
		c.Proposed(now, in.x, in.y == 1)
	case inBarrier:
		c.Barrier(now, in.x, ident.Seq(in.y))
	case inForget:
		c.Forget(in.x)
	case inFailed:
		c.Failed(now, "disk error")
	}
}

func (n *node) readLog(q core.LogRead) ([]wire.Entry, bool) {
	l := &n.disk.log
	if q.From <= l.base.Seq {
		return nil, false
	}
	var out []wire.Entry
	for seq, bytes := q.From, 0; bytes < q.Bytes || len(out) == 0; seq++ {
		e := l.at(seq)
		if e == nil {
			break
		}
		out = append(out, *e)
		bytes += 96
	}
	return out, true
}

// publish makes the gate known to readers, and to the checker.
func (s *Sim) publish(n *node) {
	n.gate = n.core.Gate()
	if !n.eff.Cut && n.eff.Reset == nil && n.disk.log.last().Seq >= n.gate.Commit {
		s.chk.committed(s, n)
	}
	n.openTo = 0
	if n.gate.Serving && n.gate.LeaseUntil > s.clock(n) {
		n.openTo, n.openIn = s.real(n, n.gate.LeaseUntil), n.gate.Epoch
		s.chk.gateOpen(s, n)
	}
}

// The steps of performing Effects, in the order of their fields.
const (
	stepEarly uint8 = iota
	stepCut
	stepAppend
	stepMeta
	stepSend
	stepAnswer
	stepRest
	stepEnd
)

// perform does the effects' steps; each may take time, and between any two the
// process may die or stand still.
func (s *Sim) perform(n *node) {
	if !n.busy {
		return
	}
	for n.step < stepEnd {
		if s.crashHere(n) {
			return
		}
		if n.stopped {
			n.deferred = append(n.deferred, event{kind: evStep, node: n.i, gen: n.gen})
			return
		}
		took := s.doStep(n)
		if !n.up {
			return
		}
		n.step++
		if took > 0 {
			s.at(took, event{kind: evStep, node: n.i, gen: n.gen})
			return
		}
	}
	n.busy = false
}

// crashHere is a place between two steps at which the process may die.
func (s *Sim) crashHere(n *node) bool {
	if n.crashIn > 0 {
		if n.crashIn--; n.crashIn == 0 {
			s.die(n, n.crashBy)
			return true
		}
	}
	return false
}

func (s *Sim) doStep(n *node) (took int64) {
	e := &n.eff
	switch n.step {
	case stepEarly:
		for i := range e.Early {
			if m, ok := e.Early[i].Msg.(*wire.Blocks); ok {
				s.chk.moves(s, n, e.Early[i].To, m)
			}
			s.send(n, e.Early[i])
		}
	case stepCut:
		if e.Reset != nil {
			s.reset(n, e.Reset)
			if !n.up {
				return 0
			}
		}
		if e.Cut {
			s.chk.cut(s, n, e.CutTo)
			s.note(n.i, "cut", "%v to %d", n.disk.log.last(), e.CutTo)
			n.disk.log.cut(e.CutTo)
		}
	case stepAppend:
		if len(e.Append) == 0 {
			break
		}
		if n.disk.failed {
			s.diskError(n)
			break
		}
		torn := n.crashIn > 0 && s.chance(0.2)
		for i := range e.Append {
			if torn && s.rng.IntN(len(e.Append)) == 0 {
				s.die(n, n.crashBy) // the rest is not in the file, or does not verify
				return 0
			}
			s.chk.append(s, n, &e.Append[i])
			n.disk.log.append(e.Append[i])
		}
		s.put(n, input{kind: inWritten, x: uint64(n.disk.log.last().Seq)})
		if wait := n.disk.hungTo - s.now; wait > 0 && !s.opt.Manual && s.chance(0.3) {
			return wait
		}
		if s.chance(0.2) {
			return s.delay(10*us, 2*ms)
		}
	case stepMeta:
		return s.writeMeta(n)
	case stepSend:
		if e.MetaDirty && n.disk.failed {
			s.diskError(n)
		} else if e.MetaDirty {
			n.disk.meta.Meta = e.Meta // the fsync has returned
			s.chk.meta(s, n)
		}
		s.chk.committed(s, n)
		for i := range e.Send {
			s.chk.sent(s, n, &e.Send[i])
			s.send(n, e.Send[i])
		}
		for i := range e.SealReplies {
			s.sealReply(n, &e.SealReplies[i])
		}
	case stepAnswer:
		for i := range e.Answers {
			s.answer(n, &e.Answers[i])
		}
		for _, id := range e.Released {
			s.readAgain(n, id)
		}
		for _, id := range e.Bounced {
			s.readBounced(n, id)
		}
	case stepRest:
		s.rest(n)
	}
	return 0
}

func (s *Sim) writeMeta(n *node) int64 {
	if !n.eff.MetaDirty {
		return 0
	}
	if n.disk.failed {
		s.diskError(n)
		return 0
	}
	return s.fsyncTime(n)
}

// diskError gives up what rests on a write that failed.
func (s *Sim) diskError(n *node) {
	// The core hears of it before anything else.
	n.inbox = slices.Insert(n.inbox, 0, input{kind: inFailed})
	n.eff.Send, n.eff.SealReplies = n.eff.Send[:0], n.eff.SealReplies[:0]
}

func (s *Sim) fsyncTime(n *node) int64 {
	if wait := n.disk.hungTo - s.now; wait > 0 {
		return wait
	}
	if s.now < n.disk.slowTo {
		return s.delay(20*ms, 400*ms)
	}
	return s.delay(100*us, 10*ms)
}

// unappliedMax bounds the entries that a replica holds in memory because they
// are not applied: the limit for new ones, what is in flight besides, and as
// much again for what a restart or a change of primary brings on top.
const unappliedMax = 3 * (256 + 64 + 16)

// rest does what needs no order.
func (s *Sim) rest(n *node) {
	e := &n.eff
	if k := n.disk.log.last().Seq - n.apply.done; k > unappliedMax {
		s.fail("I9", "node %s holds %d entries that are not applied", n.name, k)
	}
	if n.ticks++; e.SyncTo > 0 || (n.disk.log.durable < n.disk.log.last().Seq && n.ticks%32 == 0) {
		s.startSync(n)
	}
	if e.ApplyTo > n.apply.to {
		n.apply.to = e.ApplyTo
		if len(n.blocks) > 0 && e.ApplyTo > n.blocks[0].AsOf {
			s.fail("I4", "node %s may apply to %d while blocks as of %d wait", n.name, e.ApplyTo, n.blocks[0].AsOf)
		}
		if !n.apply.on {
			n.apply.on = true
			s.at(s.delay(0, 3*ms), event{kind: evApply, node: n.i, gen: n.gen})
		}
	}
	if e.TrimTo > 0 && (s.opt.Trim || s.chance(0.1)) {
		s.chk.trim(s, n, e.TrimTo)
		n.disk.log.trim(min(e.TrimTo, n.disk.log.last().Seq))
		n.core.Trimmed(n.disk.log.base)
	}
	for _, q := range e.LogReads {
		n.logReads = append(n.logReads, q)
		s.at(s.delay(20*us, 5*ms), event{kind: evLogRead, node: n.i, gen: n.gen})
	}
	for _, q := range e.BlockReads {
		n.blockReads = append(n.blockReads, q)
		s.at(s.delay(20*us, 5*ms), event{kind: evBlockRead, node: n.i, gen: n.gen})
	}
	if len(e.WriteBlocks) > 0 {
		n.blocks = append(n.blocks, e.WriteBlocks...)
		if !n.apply.on {
			n.apply.on = true
			s.at(s.delay(0, 3*ms), event{kind: evApply, node: n.i, gen: n.gen})
		}
	}
	if e.CheckpointNow {
		n.ckpt.again = true
	}
	for i := range e.Propose {
		s.propose(n, &e.Propose[i])
	}
	for _, r := range e.Reports {
		s.report(n, r)
	}
	for _, id := range e.Drained {
		s.drained(n, id)
	}
	for i := range e.Events {
		ev := &e.Events[i]
		if s.tracing() {
			s.note(n.i, ev.Name, "%s -> %s peer %s at %v: %s", ev.From, ev.To, ev.Peer, ev.Pos, ev.Rule)
		}
		if ev.Name == "failed" {
			n.disk.meta.failed = ev.Rule
			s.markFailed(n, ev.Rule)
		}
	}
}

func (s *Sim) startSync(n *node) {
	if n.sync.on {
		n.sync.again = true
		return
	}
	n.sync.on, n.sync.again = true, false
	n.sync.seq, n.sync.cuts = n.disk.log.last().Seq, n.disk.log.cuts
	n.core.SyncStarted(s.clock(n))
	s.at(s.fsyncTime(n), event{kind: evSync, node: n.i, gen: n.gen})
}

func (s *Sim) syncDone(n *node) {
	if wait := n.disk.hungTo - s.now; wait > 0 {
		s.at(wait, event{kind: evSync, node: n.i, gen: n.gen})
		return
	}
	n.sync.on = false
	if n.disk.failed {
		s.put(n, input{kind: inFailed})
		return
	}
	if n.disk.log.synced(n.sync.seq, n.sync.cuts) {
		s.put(n, input{kind: inDurable, x: uint64(n.sync.seq), y: uint64(n.sync.cuts)})
	} else {
		s.put(n, input{kind: inSyncEnded})
		n.sync.again = true
	}
}

// applyStep writes a few entries to the backing store, perhaps half of one.
func (s *Sim) applyStep(n *node) {
	n.apply.on = false
	if n.disk.failed {
		return
	}
	if wait := n.disk.hungTo - s.now; wait > 0 {
		n.apply.on = true
		s.at(wait, event{kind: evApply, node: n.i, gen: n.gen})
		return
	}
	s.writeBlocks(n)
	for k := 1 + s.rng.IntN(8); k > 0 && n.apply.done < n.apply.to; k-- {
		e := n.disk.log.at(n.apply.done + 1)
		if e == nil {
			s.fail("I4", "node %s is to apply %d, its log has %v..%v", n.name, n.apply.done+1, n.disk.log.base, n.disk.log.last())
		}
		s.chk.apply(s, n, e)
		for b := range s.blocksOf(e) {
			n.disk.store.write(b, e.Pos)
		}
		n.apply.done++
		n.disk.store.applied = max(n.disk.store.applied, n.apply.done)
	}
	s.put(n, input{kind: inApplied, x: uint64(n.apply.done)}) // also when only blocks were written
	if n.apply.done < n.apply.to {
		n.apply.on = true
		s.at(s.delay(20*us, 2*ms), event{kind: evApply, node: n.i, gen: n.gen})
	}
}

// blocksOf yields the blocks that an entry writes.
func (s *Sim) blocksOf(e *wire.Entry) func(func(int) bool) {
	return func(yield func(int) bool) {
		if e.Kind == wire.KindMarker {
			return
		}
		for b := e.Off / blockSize; b < e.End()/blockSize; b++ {
			if !yield(int(b)) {
				return
			}
		}
	}
}

// checkpoint makes the backing store durable and records how far it is: a
// snapshot of the core, an fsync of the store, the snapshot written.
func (s *Sim) checkpoint(n *node, phase uint64) {
	if n.disk.failed {
		return
	}
	again := event{kind: evCkpt, node: n.i, gen: n.gen, x: phase}
	switch phase {
	case 0: // the timer
		s.at(s.delay(50*ms, 800*ms), again)
		s.beginCheckpoint(n)
	case 1: // the store's fsync has returned
		if n.ckpt.cuts == uint32(n.resets) {
			n.disk.store.synced(n.ckpt.dirty)
		}
		again.x = 2
		s.at(s.delay(100*us, 2*ms), again)
	case 2: // the snapshot is on disk
		n.ckpt.on = false
		if n.ckpt.cuts == uint32(n.resets) {
			n.disk.ckpt = n.ckpt.next
			if s.chance(0.2) && len(n.disk.ckpt.Remaining) == 0 {
				s.chk.content(s, n)
			}
			s.put(n, input{kind: inCkpt, x: uint64(n.ckpt.next.Applied.Seq)})
		}
		n.ckpt.next = checkpoint{}
	}
}

// beginCheckpoint takes the snapshot, between two batches.
func (s *Sim) beginCheckpoint(n *node) {
	if n.ckpt.on || n.busy {
		n.ckpt.again = true
		return
	}
	n.ckpt.on, n.ckpt.again = true, false
	n.ckpt.next, n.ckpt.dirty, n.ckpt.cuts = must(n.core.Snapshot()), len(n.disk.store.dirty), uint32(n.resets)
	s.at(s.fsyncTime(n), event{kind: evCkpt, node: n.i, gen: n.gen, x: 1})
}

// reset makes the replica a resync target: checkpoint, then log.
func (s *Sim) reset(n *node, snap *core.Snapshot) {
	s.note(n.i, "reset", "at %v", snap.Applied)
	s.chk.reset(s, n, snap)
	n.resets++
	n.disk.store.synced(len(n.disk.store.dirty))
	n.disk.ckpt = *snap
	if s.crashHere(n) {
		return
	}
	n.disk.log.reset(snap.Applied)
	n.apply.done, n.apply.to, n.apply.on = snap.Applied.Seq, snap.Applied.Seq, false
	n.disk.store.applied = snap.Applied.Seq
	n.commit = snap.Applied.Seq
	n.sync.again = n.sync.on
	n.blocks = n.blocks[:0]
}

// writeBlocks writes blocks of a resync to the backing store.
func (s *Sim) writeBlocks(n *node) {
	for _, m := range n.blocks {
		for i := range m.Blocks {
			b := &m.Blocks[i]
			for k := range int(b.Len / blockSize) {
				n.disk.store.write(int(b.Off/blockSize)+k, content(b, k))
			}
		}
		s.put(n, input{kind: inBlocksWritten, x: m.ID})
	}
	n.blocks = n.blocks[:0]
}

// The payload of a resynced block is the position of its last writer.
func content(b *wire.Block, k int) ident.Position {
	if b.Payload == nil {
		return ident.Position{}
	}
	p := b.Payload.B[k*16:]
	return ident.Position{Epoch: ident.Epoch(binary.LittleEndian.Uint64(p)), Seq: ident.Seq(binary.LittleEndian.Uint64(p[8:]))}
}

// blockRead reads committed content for a resync.
func (s *Sim) blockRead(n *node) {
	if len(n.blockReads) == 0 {
		return
	}
	q := n.blockReads[0]
	n.blockReads = append(n.blockReads[:0], n.blockReads[1:]...)
	b := wire.Block{Off: q.Off, Len: q.Len, Payload: buf.Get(int(q.Len / blockSize * 16))}
	for k := range int(q.Len / blockSize) {
		p := s.lookup(n, int(q.Off/blockSize)+k, n.gate.Commit)
		binary.LittleEndian.PutUint64(b.Payload.B[k*16:], uint64(p.Epoch))
		binary.LittleEndian.PutUint64(b.Payload.B[k*16+8:], uint64(p.Seq))
	}
	s.put(n, input{kind: inBlocksRead, br: q, block: b})
}

func (s *Sim) logRead(n *node) {
	if len(n.logReads) == 0 {
		return
	}
	q := n.logReads[0]
	n.logReads = append(n.logReads[:0], n.logReads[1:]...)
	s.put(n, input{kind: inLogRead, rd: q})
}

// die ends the process, or the machine.
func (s *Sim) die(n *node, how Fault) {
	n.crashIn = 0
	if !n.up {
		return
	}
	s.note(n.i, "crash", "%v in step %d (busy %v)", how, n.step, n.busy)
	if how == FaultCleanStop && n.core != nil && !n.disk.failed && !n.busy {
		n.disk.log.synced(n.disk.log.last().Seq, n.disk.log.cuts)
		n.disk.meta.clean = true
	}
	n.up, n.busy, n.stopped, n.core = false, false, false, nil
	n.gen++
	n.openTo = 0
	n.deferred = n.deferred[:0]
	n.inbox = n.inbox[:0]
	s.linksLost(n, how == FaultPower)
	s.sessionsLost(n)
	down := s.delay(5*ms, 2*s1)
	if how == FaultPower || (how == FaultCleanStop && s.chance(0.5)) {
		if n.replica {
			n.disk.powerCut(s.rng)
		}
		n.boots++
		n.bootAt = s.now
		down += 20 * ms
		s.note(n.i, "power", "log is now %v", n.disk.log.last())
	}
	s.chk.held(s, "after a crash")
	if s.healed {
		down = 5 * ms
	}
	if !s.opt.Manual {
		n.starting = true
		s.at(down, event{kind: evStart, node: n.i})
	}
}

func (s *Sim) stop(n *node, d int64) {
	if !n.up || n.stopped {
		return
	}
	s.note(n.i, "stop", "for %s", clock(d))
	n.stopped = true
	for j := range s.nodes {
		if l := s.links[n.i][j]; l != nil {
			s.watch(l)
		}
	}
	s.at(d, event{kind: evCont, node: n.i, gen: n.gen})
}

func (s *Sim) cont(n *node) {
	if !n.stopped {
		return
	}
	s.note(n.i, "cont", "%d events waiting", len(n.deferred))
	n.stopped = false
	todo := n.deferred
	n.deferred = nil
	for i := range todo {
		todo[i].at = s.now
		s.q.push(&todo[i])
	}
}

func (n *node) String() string {
	state := "down"
	if n.up {
		state = "up"
	}
	if n.stopped {
		state = "stopped"
	}
	if n.core == nil {
		return fmt.Sprintf("%s %s log %v base %v durable %d meta %+v", n.name, state, n.disk.log.last(), n.disk.log.base, n.disk.log.durable, n.disk.meta)
	}
	st := n.core.Status(0)
	return fmt.Sprintf("%s %s role %d %s last %v base %v commit %d durable %d applied %d promise %d busy %v/%d view %d.%d failed %v lease %dms waiting %d peers %+v",
		n.name, state, st.Role, st.State, st.Last, n.disk.log.base, st.Commit, st.Durable, st.Applied, st.Promise, n.busy, n.step,
		st.View.Epoch, st.View.SetVersion, n.disk.failed, st.LeaseLeft/1e6, st.Waiting, st.Peers)
}
