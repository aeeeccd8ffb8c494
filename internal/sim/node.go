package sim

import (
	"fmt"
	"slices"

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
		since    core.Instant // when its disk began to hang; 0: it does not
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
	blocksRead []input   // what those that were read showed
	startedAt  ident.Seq // the end of the log when the process started
	resets     int
	logReads   []core.LogRead
	reads      []read
	readID     uint64
	readAt     core.Instant // of the newest read that was served here
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
		UnappliedMax: 256 * 96, UnappliedEntries: s.opt.Entries, DedupMax: s.opt.DedupMax, LagMax: 200 * 96, ResyncChunk: 4 * blockSize, ResyncMax: s.opt.Rate, ResyncMin: s.opt.Rate / 4,
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
	n.startedAt = n.disk.log.last().Seq
	n.inbox = n.inbox[:0]
	n.registering = false
	n.peers = make([]bool, len(s.nodes))
	n.view, n.viewN, n.gate, n.seen = core.View{}, 0, core.Gate{}, ident.Position{}
	n.sync.on, n.sync.again, n.apply.on, n.ckpt.on, n.ckpt.again = false, false, false, false, false
	n.apply.since = 0
	n.blocks, n.blockReads = n.blocks[:0], n.blockReads[:0]
	n.blocksRead = n.blocksRead[:0]
	n.logReads, n.reads, n.drains, n.change = n.logReads[:0], n.reads[:0], n.drains[:0], nil
	n.openTo, n.readAt = 0, 0
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
	case evBlockShown:
		s.put(n, n.blocksRead[0])
		n.blocksRead = slices.Delete(n.blocksRead, 0, 1)
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
		c.ClientAt(n.readAt)
		c.DiskRead(n.oldestRead())
		c.DiskApply(n.apply.since)
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
			if len(n.view.Set) > 1 {
				n.disk.failed = true
				c.Failed(now, "a record of the log does not verify")
				break
			}
			ents, ok = nil, false
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
