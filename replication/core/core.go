package core

import (
	"slices"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/invariant"
	"github.com/blockstep/blockstep/replication/bitmap"
	"github.com/blockstep/blockstep/replication/wire"
)

// Core is one replica's state. The zero value is of no use; call New. Nothing
// in it may be called from two goroutines at once.
type Core struct {
	cfg Config
	now Instant

	// What the meta file holds, and whether it must be written.
	promise   ident.Epoch
	amnesiac  bool
	metaDirty bool

	// The own log. base <= checkpoint <= applied <= applyTo <= min(commit,
	// durable); durable <= written <= last; entries up to handed are with the
	// driver.
	base       ident.Position
	last       ident.Position
	hist       history
	handed     ident.Seq
	written    ident.Seq
	durable    ident.Seq
	commit     ident.Seq
	applyTo    ident.Seq
	applied    ident.Seq
	checkpoint ident.Seq
	ahead      ident.Seq // the backing store may show entries up to here: the log's end at the start
	trim       ident.Seq // the trim horizon, as the primary says
	trimmed    ident.Seq // what the driver has been told
	ring       entryRing
	unapplied  extentRing
	changes    *bitmap.Changes
	dedup      dedupRing
	cutPending bool
	cutTo      ident.Seq

	view      View
	haveView  bool
	viewSince Instant
	role      Role
	failed    string
	office    ident.Epoch // newest epoch for which a promotion of ours was judged
	sealed    ident.Epoch // the epoch that we sealed and have seen nothing of since; 0: none

	// Secondary: what the primary of the promised epoch has told us.
	follow struct {
		epoch     ident.Epoch
		from      ident.Node
		stream    uint64
		matched   ident.Seq
		met       bool      // it has said that it has met this incarnation
		metCommit ident.Seq // its commit index when it first said so
		ackDue    bool
		echo      int64 // lease request to grant with the next ack
		syncTo    ident.Seq
		reject    RejectState
	}
	grantUntil  Instant // we have granted a lease until then
	grantEpoch  ident.Epoch
	silentUntil Instant
	reported    [ReportStalled + 1]Instant

	p primary
	t target
	// wantedSet's: no tick allocates them anew.
	fit, live []ident.Node
	// links says to whom a link is up, in every role.
	links map[ident.Node]bool

	queue      []Request // not admitted yet, in order of arrival
	queueAt    []Instant
	answers    []Answer
	barriers   []barrier
	bounced    []uint64
	released   []uint64
	drained    []uint64
	seals      []SealReply
	reports    []Report
	events     []Event
	early      []Out
	send       []Out
	reads      []LogRead
	blockReads []BlockRead
	// Payloads made for one message: lent to the driver with the effects of one
	// Ready, given back at the next. lent are those of the batch being built.
	loans, lent []*buf.Buf
	proposes    []SetProposal

	syncStarted Instant // 0: no fsync of the log is out
	readStarted Instant // 0: no client's read is with the disk
	// applyStarted is 0 when no write of the backing store is with the disk.
	applyStarted Instant
	syncAsked    ident.Seq

	appends slab[wire.Append]
	acks    slab[wire.Ack]
}

// RejectState is why the last Append did not match; zero when it did.
type RejectState struct {
	due    bool
	reason wire.RejectReason
}

type barrier struct {
	id   uint64
	upTo ident.Seq
}

// slab hands out values that live until the effects of the next Ready are
// performed, without allocating in the steady state.
type slab[T any] struct {
	items []*T
	used  int
	spent bool // they were in the effects of a Ready
}

func (s *slab[T]) next() *T {
	if s.spent {
		s.used, s.spent = 0, false
	}
	if s.used == len(s.items) {
		s.items = append(s.items, new(T))
	}
	s.used++
	p := s.items[s.used-1]
	var zero T
	*p = zero
	return p
}

// New opens a replica with what its files held.
func New(cfg Config, start Start, now Instant) *Core {
	c := &Core{
		cfg: cfg, now: now,
		promise: start.Promise, amnesiac: start.Amnesiac, changes: start.Changes,
		base: start.Base, last: start.Last, hist: slices.Clone(history(start.History)),
		handed: start.Last.Seq, written: start.Last.Seq, durable: min(start.Durable, start.Last.Seq),
		commit: start.Applied, applyTo: start.Applied, applied: start.Applied, checkpoint: start.Applied,
		trim: start.Base.Seq, trimmed: start.Base.Seq, ahead: start.Last.Seq,
		failed: start.Failed, links: map[ident.Node]bool{},
	}
	if c.ring.limit = cfg.RingBytes; c.ring.limit == 0 {
		c.ring.limit = 2 * cfg.WindowBytes
	}
	c.dedup = newDedupRing(max(cfg.DedupMax, 1), start.Dedup, start.DedupFloor)
	if len(c.hist) == 0 {
		c.hist = history{{Epoch: start.Base.Epoch, First: start.Base.Seq}}
	}
	if c.changes == nil {
		c.changes = bitmap.NewChanges(uint64(start.Applied))
	}
	if start.Remaining != nil && !start.Remaining.Empty() {
		c.t.remaining = start.Remaining
	}
	for i := range start.Tail {
		e := &start.Tail[i]
		c.unapplied.push(e.Pos.Seq, extent{off: e.Off, len: e.Len, cost: uint32(entryOverhead)})
	}
	if !start.Fresh {
		// Whatever it granted before it restarted has run out by then.
		c.silentUntil = now + Instant(c.lengthen(cfg.LeaseMax))
	}
	if c.failed != "" {
		c.role = RoleFailed
	}
	invariant.Assert(start.Base.Seq <= start.Applied,
		"core: base %v after the applied position %d", start.Base, start.Applied)
	return c
}

// lengthen and shorten allow for a clock that runs DriftPPM faster or slower.
func (c *Core) lengthen(d int64) int64 { return d + c.drift(d) }
func (c *Core) shorten(d int64) int64  { return d - c.drift(d) }

// drift returns how far clocks may come apart in d, rounded up: by whole
// milliseconds, so that no duration overflows.
func (c *Core) drift(d int64) int64 { return (d + 1e6 - 1) / 1e6 * c.cfg.DriftPPM }

func (c *Core) event(e Event) { c.events = append(c.events, e) }

// lend makes a payload for one message of this batch.
func (c *Core) lend(p []byte) *buf.Buf {
	b := bufOf(p)
	c.lent = append(c.lent, b)
	return b
}

// posAt returns the position of seq, which is not below the base.
func (c *Core) posAt(seq ident.Seq) ident.Position {
	if seq == c.base.Seq {
		return c.base
	}
	return ident.Position{Epoch: c.hist.at(seq), Seq: seq}
}

func entryCost(e *wire.Entry) int { return e.PayloadLen() + entryOverhead }

// appendEntry adds e, whose payload reference it takes over, to the own log.
func (c *Core) appendEntry(e wire.Entry) {
	// Asserted behind an if: the arguments would be allocated for each entry.
	if e.Pos.Seq != c.last.Seq+1 || e.Pos.Epoch < c.last.Epoch {
		invariant.Assert(false, "core: entry %v after %v", e.Pos, c.last)
	}
	if c.hist.at(e.Pos.Seq) != e.Pos.Epoch || len(c.hist) == 0 {
		c.hist = append(c.hist, ident.EpochStart{Epoch: e.Pos.Epoch, First: e.Pos.Seq})
	}
	c.last = e.Pos
	c.unapplied.push(e.Pos.Seq, extent{off: e.Off, len: e.Len, cost: uint32(entryCost(&e))})
	if e.Session != 0 || e.Request != 0 {
		c.dedup.push(DedupEntry{Session: e.Session, Request: e.Request, Seq: e.Pos.Seq}, c.hist)
	}
	c.ring.push(e)
}

// cutLog drops every entry after seq from the own log.
func (c *Core) cutLog(seq ident.Seq) {
	invariant.Assert(seq >= c.applyTo, "core: cut to %d below applied %d", seq, c.applyTo)
	if seq >= c.last.Seq {
		return
	}
	c.event(Event{Name: "cut", From: c.last.String(), To: c.posAt(seq).String(), Rule: "entries that no newer primary has", Pos: c.last})
	if seq < c.handed {
		if !c.cutPending || seq < c.cutTo {
			c.cutPending, c.cutTo = true, seq
		}
		c.handed = seq
	}
	c.ring.cut(seq)
	c.unapplied.cut(seq)
	c.dedup.cut(seq)
	c.hist = c.hist.cut(seq)
	c.last = c.posAt(seq)
	c.written = min(c.written, seq)
	c.durable = min(c.durable, seq)
	// What is to stand in place of a committed entry, after a loss, is not committed.
	c.commit = min(c.commit, seq)
	c.syncAsked = min(c.syncAsked, seq)
}

// Written says that entries up to seq are in the own log file.
func (c *Core) Written(now Instant, seq ident.Seq) {
	c.advance(now)
	c.written = max(c.written, min(seq, c.handed))
}

// Durable says that an fsync that began after entries up to seq were written
// has returned. After a cut the driver reports only fsyncs that began after it.
func (c *Core) Durable(now Instant, seq ident.Seq) {
	c.advance(now)
	seq = min(seq, c.written)
	if seq <= c.durable {
		return
	}
	c.durable = seq
	if c.follow.syncTo != 0 {
		// Somebody waits: if not for this, then for what came before the newest
		// wish.
		c.follow.ackDue = true
	}
	c.clearAmnesia()
}

// Applied says that entries up to seq are in the backing store.
func (c *Core) Applied(now Instant, seq ident.Seq) {
	c.advance(now)
	if seq > c.applyTo {
		invariant.Assert(false, "core: applied %d beyond %d", seq, c.applyTo)
	}
	c.applied = max(c.applied, seq)
	for {
		x, at, ok := c.unapplied.pop(c.applied)
		if !ok {
			break
		}
		if x.len == 0 {
			continue
		}
		c.changes.Mark(uint64(at), x.off, x.len)
		if c.t.remaining != nil {
			// The live entry has brought the block.
			c.t.remaining.Clear(x.off, x.len)
		}
	}
	if c.changes.Segments() > mergeAbove {
		c.changes.Merge(uint64(c.trim))
	}
}

// Checkpointed says that the backing store and the checkpoint are durable up
// to seq.
func (c *Core) Checkpointed(now Instant, seq ident.Seq) {
	c.advance(now)
	c.checkpoint = max(c.checkpoint, min(seq, c.applied))
	c.targetCheckpointed()
}

// SyncStarted says that an fsync of the log is out.
func (c *Core) SyncStarted(now Instant) {
	c.advance(now)
	c.syncStarted = now
}

// SyncEnded says that it has returned; Durable or Failed says how.
func (c *Core) SyncEnded(now Instant) {
	c.advance(now)
	c.syncStarted = 0
}

// Failed says that a write or an fsync of the log or the backing store failed.
// It is final: the replica takes no further part but to say so.
func (c *Core) Failed(now Instant, reason string) {
	c.advance(now)
	if c.failed != "" {
		return
	}
	c.failed = reason
	c.event(Event{Name: "failed", To: "Failed", Rule: reason, Pos: c.last})
	if c.isPrimary() {
		// It serves nothing from here on: who granted it a lease need not wait
		// for that to run out.
		for _, pr := range c.p.peers {
			c.send = append(c.send, Out{To: pr.node, Msg: &wire.Release{Epoch: c.p.epoch}})
		}
		c.stepDown("own disk failed")
	}
	c.role = RoleFailed
}

// DiskRead says since when a client's read has been with the own disk; 0: none
// is. It is known at the next tick.
func (c *Core) DiskRead(since Instant) { c.readStarted = since }

// DiskApply says since when what is being applied has been with the own disk,
// likewise.
func (c *Core) DiskApply(since Instant) { c.applyStarted = since }

func (c *Core) advance(now Instant) { c.now = max(c.now, now) }

// isPrimary reports whether we hold office, serving or not.
func (c *Core) isPrimary() bool { return c.role == RolePrimary || c.role == RolePrimaryElect }

// Tick lets time pass: leases, heartbeats, time-outs.
func (c *Core) Tick(now Instant) {
	var before owed
	rests := invariant.Enabled && now < c.RestsUntil()
	if rests {
		before = c.owed()
	}
	c.advance(now)
	if c.isPrimary() {
		c.tickPrimary()
	} else {
		c.tickSecondary()
	}
	if rests && c.owed() != before {
		invariant.Assert(false, "core: a tick at %d, within a rest, made %+v of %+v", now, c.owed(), before)
	}
}

// RestsUntil returns the instant before which ticks do nothing unless there is an
// input; 0 when each has something to look at. Those rest whose primary is heard
// and has nothing under way: they make up most of a node that is idle.
func (c *Core) RestsUntil() Instant {
	if c.isPrimary() {
		return c.primaryRests()
	}
	return c.WakesAt()
}

// WakesAt returns the instant after which a tick should not wait for its turn: a
// secondary reports then that its primary has no lease of it. 0: there is none.
func (c *Core) WakesAt() Instant {
	if c.isPrimary() || !c.guards() {
		return 0
	}
	return c.lapse()
}

// owed is what a tick may add to.
type owed struct {
	sends, reports, answers, proposes int
	ask, change                       bool
	syncTo                            ident.Seq
	due                               int
}

func (c *Core) owed() owed {
	o := owed{
		sends: len(c.send) + len(c.early), reports: len(c.reports), answers: len(c.answers), proposes: len(c.proposes),
		ask: c.p.askDue, change: c.p.change != nil, syncTo: c.p.syncTo,
	}
	for _, pr := range c.p.peers {
		if pr.sendDue {
			o.due++
		}
	}
	return o
}

// View brings the newest cluster state of the volume. Older views are ignored.
func (c *Core) View(now Instant, v View) {
	c.advance(now)
	if c.haveView && (v.Epoch < c.view.Epoch || (v.Epoch == c.view.Epoch && v.SetVersion < c.view.SetVersion)) {
		return
	}
	newEpoch := !c.haveView || v.Epoch > c.view.Epoch
	c.view, c.haveView = v, true
	if newEpoch {
		c.viewSince = now
	}
	if c.isPrimary() && v.Epoch > c.p.epoch {
		c.stepDown("a newer epoch is in the cluster state")
	}
	c.changes.Unpin(func(name string) bool {
		return !slices.ContainsFunc(v.Members, func(m Member) bool { return string(m.Node) == name })
	})
	for _, m := range v.Members {
		// Who is not in the set will ask what changed since its log ended; while
		// it was in, the trim horizon waited for it.
		if slices.Contains(v.Set, m.Node) {
			c.changes.Unpin(func(name string) bool { return name == string(m.Node) })
		} else if !c.changes.Pinned(string(m.Node)) {
			c.changes.Pin(string(m.Node), uint64(c.trim), uint64(c.last.Seq))
		}
		if m.Node == c.cfg.Node && m.Failed && m.Replica == c.cfg.Replica && c.failed == "" {
			c.Failed(now, "the cluster state says that this replica failed")
		}
	}
	if c.isPrimary() {
		c.viewAsPrimary()
		return
	}
	if newEpoch && v.Primary == c.cfg.Node && v.Epoch > c.office {
		c.judgePromotion()
	}
}

// judgePromotion takes the office that the cluster state gives, if we are still
// what the controller saw: the same incarnation at the same position, with
// nothing of the new epoch seen. It is judged once an epoch.
func (c *Core) judgePromotion() {
	v := &c.view
	c.office = v.Epoch
	rule := ""
	switch {
	case c.failed != "":
		rule = "own disk failed"
	case c.inconsistent():
		rule = "resync target"
	case v.Incarnation != c.cfg.Incarnation:
		rule = "restarted since the seal"
	case c.promise > v.Epoch:
		rule = "newer promise"
	case c.sealed != v.Epoch:
		rule = "not sealed for this epoch"
	case v.Position != c.last:
		rule = "not at the position of the seal"
	}
	if rule != "" {
		c.event(Event{Name: "role", From: "Secondary", To: "Secondary", Rule: "promotion refused: " + rule, Pos: c.last})
		c.report(ReportRefused, v.Epoch)
		return
	}
	c.takeOffice()
}

func (c *Core) report(k ReportKind, e ident.Epoch) {
	if t := c.reported[k]; t != 0 && c.now < t+reportEvery {
		return
	}
	c.reported[k] = c.now
	c.reports = append(c.reports, Report{Kind: k, Epoch: e})
}

// Message takes a message from a peer. Its payloads are borrowed: the core
// retains what it keeps.
func (c *Core) Message(now Instant, from ident.Node, m wire.Message) {
	c.advance(now)
	switch m := m.(type) {
	case *wire.Append:
		c.onAppend(from, m)
	case *wire.Ack:
		c.onAck(from, m)
	case *wire.Reject:
		c.onReject(from, m)
	case *wire.Stale:
		c.onStale(from, m)
	case *wire.Release:
		c.onRelease(from, m)
	case *wire.ResyncStart:
		c.onResyncStart(from, m)
	case *wire.Blocks:
		c.onBlocks(from, m)
	case *wire.ResyncState:
		c.onResyncState(from, m)
	case *wire.BlocksAck:
		c.onBlocksAck(from, m)
	case *wire.Released, *wire.Forward, *wire.Reply, *wire.Ping:
		// Released needs no action: a lost release costs one lease time.
	}
}

// Forget answers all that a session has under way with StatusIO: its client is gone.
// What no log holds yet must not take effect later. What is in the log stays there,
// within its limits, and nobody waits for it any more.
func (c *Core) Forget(session uint64) {
	keep, at := c.queue[:0], c.queueAt[:0]
	for i := range c.queue {
		r := &c.queue[i]
		if r.Session == session {
			r.Entry.Payload.Release()
			c.answers = append(c.answers, Answer{Origin: r.Origin, Status: wire.StatusIO, Pos: c.last})
			continue
		}
		keep, at = append(keep, *r), append(at, c.queueAt[i])
	}
	clear(c.queue[len(keep):])
	c.queue, c.queueAt = keep, at
	for _, q := range []*waiters{&c.p.held, &c.p.synced} {
		c.dismiss(q, func(w *waiter) bool { return w.session == session })
	}
}

// Barrier asks to be told (Released) when a read may go on: this replica is the
// serving primary with a valid lease and everything up to upTo is committed. A
// replica that is no primary bounces it.
func (c *Core) Barrier(now Instant, id uint64, upTo ident.Seq) {
	c.advance(now)
	if !c.isPrimary() {
		c.bounced = append(c.bounced, id)
		return
	}
	c.barriers = append(c.barriers, barrier{id: id, upTo: upTo})
}

// Gate returns what readers check outside the loop.
func (c *Core) Gate() Gate {
	// A secondary hears of a commit index together with entries that it covers, and
	// shows them once they are in its log.
	g := Gate{Epoch: c.view.Epoch, Generation: c.view.Generation, Commit: min(c.commit, c.written), Last: c.last}
	if c.role == RolePrimary {
		g.Epoch = c.p.epoch
		g.Serving = c.serving()
		g.LeaseUntil = c.leaseUntil()
		g.Commit = c.commit
		if c.view.Ack == AckLocal {
			g.Commit = c.written
		}
	}
	return g
}

// Snapshot returns what a checkpoint that is begun now must hold. The driver
// fsyncs the backing store after it, writes the checkpoint, then calls
// Checkpointed with Applied.Seq. One checkpoint is made at a time.
func (c *Core) Snapshot() (Snapshot, error) {
	s := Snapshot{
		Applied: c.posAt(c.applied), History: slices.Clone(c.hist.cut(c.applied)),
		Dedup: c.dedup.list(c.applied), DedupFloor: c.dedup.floor, Generation: c.view.Generation,
	}
	var err error
	if s.Changes, err = c.changes.Marshal(); err != nil {
		return s, err
	}
	c.t.snapshotWhole = true
	if c.t.remaining != nil && !c.t.remaining.Empty() {
		c.t.snapshotWhole = false
		s.Remaining, err = c.t.remaining.Marshal()
	}
	return s, err
}

// Ready fills e with what the driver must do now. What e points to is valid
// until the next call of any method; payloads are borrowed.
func (c *Core) Ready(e *Effects) {
	for _, b := range c.loans {
		b.Release()
	}
	c.loans = c.loans[:0]
	c.loans, c.lent = c.lent, c.loans
	// Only what the driver has had since an earlier batch may go from memory.
	c.ring.shrink(c.sentToAll(), c.handed)
	if c.isPrimary() {
		c.readyPrimary()
	} else {
		c.readySecondary()
		c.sendTarget()
	}
	*e = Effects{
		Append: e.Append[:0], WriteBlocks: e.WriteBlocks[:0], Early: c.early, Reset: c.t.reset, BlockReads: c.blockReads, Send: c.send, SealReplies: c.seals, Answers: c.answers,
		Released: c.released, Bounced: c.bounced, LogReads: c.reads, Propose: c.proposes,
		Reports: c.reports, Drained: c.drained, Events: c.events,
	}
	if c.cutPending {
		e.Cut, e.CutTo, c.cutPending = true, c.cutTo, false
	}
	if c.failed == "" {
		e.Append = append(e.Append, c.ring.from(c.handed+1)...)
		c.handed = c.last.Seq
	}
	if c.metaDirty {
		e.Meta = Meta{Promise: c.promise, Amnesiac: c.amnesiac, Incarnation: c.cfg.Incarnation}
		e.MetaDirty, c.metaDirty = true, false
	}
	c.readyDisk(e)
	c.t.reset = nil
	c.appends.spent, c.acks.spent = true, true
	// The next batch starts with empty lists. The driver is done with these
	// before it calls again, so their room is used again.
	c.early, c.send, c.seals, c.answers = c.early[:0], c.send[:0], c.seals[:0], c.answers[:0]
	c.released, c.bounced, c.reads, c.proposes = c.released[:0], c.bounced[:0], c.reads[:0], c.proposes[:0]
	c.reports, c.drained, c.events = c.reports[:0], c.drained[:0], c.events[:0]
	c.blockReads = c.blockReads[:0]
	if invariant.Enabled {
		c.check()
	}
}

// readyDisk fills what concerns the own disk alone.
func (c *Core) readyDisk(e *Effects) {
	if c.failed != "" {
		return
	}
	want := max(c.follow.syncTo, c.t.syncTo())
	if c.isPrimary() {
		want = c.p.syncTo
	}
	if want = min(want, c.last.Seq); want > c.durable && want > c.syncAsked {
		c.syncAsked = want
		e.SyncTo = want
	}
	// The write-ahead rule: only what is committed and durable here is applied.
	if to := min(c.commit, c.durable, c.blocksHold()); to > c.applyTo {
		c.applyTo = to
	}
	c.readyTarget(e)
	if c.applyTo > c.applied {
		e.ApplyTo = c.applyTo
	}
	if to := min(c.trim, c.checkpoint); to > c.trimmed {
		c.trimmed = to
		e.TrimTo = to
	}
}

// Trimmed says that the log now begins after base. The epoch history stays
// whole, to a limit.
func (c *Core) Trimmed(base ident.Position) {
	if base.Seq <= c.base.Seq || base.Seq > c.applied {
		return
	}
	c.base = base
	if n := len(c.hist) - historyMax; n > 0 {
		c.hist = slices.Clone(c.hist[n:])
	}
}

// check asserts what holds between any two batches.
func (c *Core) check() {
	invariant.Assert(c.applied <= c.applyTo && c.applyTo <= c.commit && c.applyTo <= c.durable,
		"core: applied %d, applyTo %d, commit %d, durable %d", c.applied, c.applyTo, c.commit, c.durable)
	invariant.Assert(c.durable <= c.written && c.written <= c.last.Seq,
		"core: durable %d, written %d, last %v", c.durable, c.written, c.last)
	invariant.Assert(c.promise >= c.last.Epoch, "core: log %v beyond the promise %d", c.last, c.promise)
	if c.isPrimary() {
		invariant.Assert(c.promise == c.p.epoch, "core: primary of %d has promised %d", c.p.epoch, c.promise)
	}
}
