package core

import (
	"hash/crc32"
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/invariant"
	"github.com/blockstep/blockstep/replication/wire"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// primary is the state of one reign. It is zero while we hold no office.
type primary struct {
	epoch  ident.Epoch
	marker ident.Seq // the first entry of the epoch
	peers  []*peer

	held   waiters // answered when committed
	synced waiters // answered when durable on a majority as well

	durableCommit ident.Seq // fsynced by a majority of every set in force
	syncTo        ident.Seq // the highest seq that somebody waits to be durable, or soon will
	habit         flushHabit

	askedAt  Instant // when the lease was last asked for, of ourselves too
	askDue   bool
	released bool // the lease is given back: no later grant counts

	draining   bool
	refusedAt  Instant // when a member of the set last said that it has promised a newer epoch
	drainSince Instant
	drains     []uint64
	releasedAt Instant

	change   *setChange
	changeID uint64
	coolOff  Instant // no new set change before

	requestAt   Instant // of the newest request
	pausedUntil Instant // new requests wait until then

	replayed map[uint64]Instant // sessions that replayed lately
	cums     []cumMark
	cum      int64 // bytes appended in this reign
}

// cumMark says how many bytes had been appended before seq, about every MiB.
type cumMark struct {
	seq ident.Seq
	cum int64
}

type waiter struct {
	seq     ident.Seq
	origin  Origin
	session uint64
	at      Instant
}

// waiters is a queue ordered by seq.
type waiters struct {
	w    []waiter
	head int
}

func (q *waiters) empty() bool { return q.head == len(q.w) }

func (q *waiters) push(w waiter) {
	if q.empty() {
		q.w, q.head = q.w[:0], 0
	} else if q.head > 4096 && q.head > len(q.w)/2 {
		n := copy(q.w, q.w[q.head:])
		clear(q.w[n:])
		q.w, q.head = q.w[:n], 0
	}
	q.w = append(q.w, w)
	// Only a replay that found its entry is out of order.
	for i := len(q.w) - 1; i > q.head && q.w[i].seq < q.w[i-1].seq; i-- {
		q.w[i], q.w[i-1] = q.w[i-1], q.w[i]
	}
}

// pop answers every waiter up to seq.
func (c *Core) pop(q *waiters, seq ident.Seq, s wire.Status) {
	for !q.empty() && q.w[q.head].seq <= seq {
		w := &q.w[q.head]
		c.answers = append(c.answers, Answer{Origin: w.origin, Status: s, Pos: c.posAt(max(w.seq, c.base.Seq))})
		*w = waiter{}
		q.head++
	}
}

// dismiss answers the waiters that match with StatusIO. Their entries stay in the
// log, and may be committed yet.
func (c *Core) dismiss(q *waiters, match func(*waiter) bool) {
	keep := q.w[:0]
	for i := range q.w[q.head:] {
		w := q.w[q.head+i]
		if match(&w) {
			c.answers = append(c.answers, Answer{Origin: w.origin, Status: wire.StatusIO, Pos: c.last})
			continue
		}
		keep = append(keep, w)
	}
	clear(q.w[len(keep):])
	q.w, q.head = keep, 0
}

// takeOffice begins a reign: it appends the marker and probes everybody.
func (c *Core) takeOffice() {
	invariant.Assert(c.promise == c.view.Epoch, "core: office in %d with promise %d", c.view.Epoch, c.promise)
	c.role = RolePrimaryElect
	c.p = primary{
		epoch: c.view.Epoch, marker: c.last.Seq + 1, replayed: map[uint64]Instant{},
		changeID: c.p.changeID,
	}
	c.follow.ackDue, c.follow.reject = false, RejectState{}
	c.grantUntil = 0
	c.event(Event{Name: "role", From: "Secondary", To: "PrimaryElect", Rule: "promoted at the sealed position", Pos: c.last})
	c.syncPeers()
	c.ask()
	c.appendMarker(wire.Marker{Type: wire.MarkerEpoch, Node: c.cfg.Node, Replica: c.cfg.Replica})
	c.considerSet()
}

// appendMarker appends what no client asked for.
func (c *Core) appendMarker(m wire.Marker) {
	payload, err := wire.EncodeMarker(nil, m)
	invariant.Assert(err == nil, "core: marker %+v: %v", m, err)
	c.appendOwn(wire.KindMarker, payload, wire.Entry{})
}

// appendOwn appends an entry of our epoch. e brings extent, session and request.
func (c *Core) appendOwn(kind wire.Kind, payload []byte, e wire.Entry) {
	e.Kind = kind
	e.Pos = ident.Position{Epoch: c.p.epoch, Seq: c.last.Seq + 1}
	if payload != nil {
		e.Payload = bufOf(payload)
		e.PayloadCRC = crc32.Checksum(payload, castagnoli)
	}
	if e.Len > 0 {
		c.touched(e.Off, e.Len)
	}
	c.appendEntry(e)
	c.p.cum += int64(entryCost(&e))
	if n := len(c.p.cums); n == 0 || c.p.cum-c.p.cums[n-1].cum > 1<<20 {
		c.p.cums = append(c.p.cums, cumMark{seq: e.Pos.Seq, cum: c.p.cum})
	}
}

// lagBytes estimates, to about a MiB, the bytes of log after seq.
func (c *Core) lagBytes(seq ident.Seq) int64 {
	if seq >= c.last.Seq {
		return 0
	}
	if run := c.ring.from(seq + 1); run != nil && len(run) <= 256 {
		var n int64
		for i := range run {
			n += int64(entryCost(&run[i]))
		}
		return n
	}
	marks := c.p.cums
	i, _ := slices.BinarySearchFunc(marks, seq, func(m cumMark, s ident.Seq) int {
		if m.seq <= s {
			return -1
		}
		return 1
	})
	if i == 0 {
		return c.p.cum
	}
	return c.p.cum - marks[i-1].cum
}

// lagOf is lagBytes of a peer, for the operator: also of one that is behind all that
// is remembered of how much was appended when.
func (c *Core) lagOf(pr *peer) int64 {
	at := max(pr.matched, pr.floor)
	if pr.leftAt.seq == at && pr.leftAt.seq != 0 && len(c.p.cums) > 0 && at < c.p.cums[0].seq {
		return c.p.cum - pr.leftAt.cum
	}
	return c.lagBytes(at)
}

// stepDown ends a reign. Everything that waits is sent back to be tried at the
// next primary, which finds out by session and request what took effect.
func (c *Core) stepDown(rule string) {
	c.event(Event{Name: "role", From: "Primary", To: "Secondary", Rule: rule, Pos: c.last})
	c.role = RoleSecondary
	c.pop(&c.p.held, ^ident.Seq(0), wire.StatusRetry)
	c.pop(&c.p.synced, ^ident.Seq(0), wire.StatusRetry)
	for i := range c.queue {
		c.bounce(&c.queue[i])
	}
	clear(c.queue)
	c.queue, c.queueAt = c.queue[:0], c.queueAt[:0]
	for _, b := range c.barriers {
		c.bounced = append(c.bounced, b.id)
	}
	c.barriers = c.barriers[:0]
	c.drained = append(c.drained, c.p.drains...)
	for _, pr := range c.p.peers {
		pr.run = nil
	}
	c.p = primary{changeID: c.p.changeID}
	c.follow.epoch, c.follow.matched, c.follow.ackDue, c.follow.syncTo = 0, 0, false, 0
	c.syncAsked = c.durable
}

func (c *Core) bounce(r *Request) {
	r.Entry.Payload.Release()
	c.answers = append(c.answers, Answer{Origin: r.Origin, Status: wire.StatusRetry, Pos: c.last})
}

// serving reports whether requests may be answered at all.
func (c *Core) serving() bool {
	return c.role == RolePrimary && !c.p.draining && len(c.view.Set) >= c.view.MinCopies
}

// admitting reports whether a new entry may be appended now.
func (c *Core) admitting() bool {
	return c.serving() && c.now >= c.p.pausedUntil && !c.crowded() && !c.resyncHolds()
}

// crowded reports whether so much is not applied that new entries must wait: for
// the backing store, or for what it waits for.
func (c *Core) crowded() bool {
	return c.unapplied.total >= c.cfg.UnappliedMax || c.cfg.UnappliedEntries > 0 && c.last.Seq-c.applied >= ident.Seq(c.cfg.UnappliedEntries)
}

// Request takes a client's write or flush. The core takes over one reference of
// its payload.
func (c *Core) Request(now Instant, r Request) {
	c.advance(now)
	c.p.requestAt = now
	switch {
	case !c.isPrimary() || len(c.queue) >= queueMax:
		c.bounce(&r)
	case len(c.queue) > 0 || !c.admitting():
		c.queue, c.queueAt = append(c.queue, r), append(c.queueAt, now)
	default:
		c.admit(&r, now)
	}
}

// admit gives a request its place in the log, or its answer.
func (c *Core) admit(r *Request, at Instant) {
	answer := func(s wire.Status) {
		r.Entry.Payload.Release()
		c.answers = append(c.answers, Answer{Origin: r.Origin, Status: s, Pos: c.last})
	}
	if r.Generation != c.view.Generation {
		answer(wire.StatusGeneration)
		return
	}
	if r.Flush {
		// It covers everything appended when it arrives, the inherited included.
		c.p.habit.flushed(c.last.Seq)
		c.await(waiter{seq: c.last.Seq, origin: r.Origin, session: r.Session, at: at}, true)
		return
	}
	if r.Off > c.view.Size || r.Len > c.view.Size-r.Off {
		answer(wire.StatusRange)
		return
	}
	if !r.Replay && r.LastSeen.Epoch < c.p.epoch {
		// It was first sent when another primary was known, and may have been
		// long under way: by now it may have been sent again, as a replay, to
		// one whose reign is over. It is to come again as a replay too.
		c.bounce(r)
		return
	}
	if r.Replay || len(c.p.replayed) > 0 {
		if c.replay(r, at, answer) {
			return
		}
	}
	e := r.Entry
	e.Flags, e.Off, e.Len, e.Session, e.Request = r.Flags, r.Off, r.Len, r.Session, r.Request
	c.appendOwn(r.Kind, nil, e)
	c.await(waiter{seq: c.last.Seq, origin: r.Origin, session: r.Session, at: at}, r.FUA)
	if c.p.habit.expects(c.last.Seq) {
		c.p.syncTo = max(c.p.syncTo, c.last.Seq)
	}
}

// replay deals with a request that may be in the log already. It reports
// whether the request is done with.
func (c *Core) replay(r *Request, at Instant, answer func(wire.Status)) bool {
	if _, ok := c.p.replayed[r.Session]; !ok && !r.Replay {
		return false
	}
	if seq, ok := c.dedup.find(r.Session, r.Request); ok {
		r.Entry.Payload.Release()
		c.await(waiter{seq: seq, origin: r.Origin, session: r.Session, at: at}, r.FUA)
		return true
	}
	if !r.Replay {
		return false
	}
	// By position and by seq: the newest that the forwarder had seen may have
	// been an entry of a newer epoch that came to nothing.
	if r.LastSeen.Less(c.dedup.floor) || r.LastSeen.Seq < c.dedup.floor.Seq {
		answer(wire.StatusTooOld)
		return true
	}
	c.p.replayed[r.Session] = c.now
	return false
}

// await registers an answer that is due once seq is committed, or durable.
func (c *Core) await(w waiter, durable bool) {
	if durable || c.view.Ack == AckDurable {
		c.p.synced.push(w)
		c.p.syncTo = max(c.p.syncTo, w.seq)
		return
	}
	c.p.held.push(w)
}

// quorum returns the highest seq that a majority of every set in force holds,
// by what of gives for each member.
func (c *Core) quorum(of func(ident.Node) ident.Seq) ident.Seq {
	q := kth(c.view.Set, of)
	if c.p.change != nil {
		q = min(q, kth(c.p.change.set, of))
	}
	return q
}

// kth returns the value that a majority of the set reaches.
func kth[T ~uint64 | ~int64](set []ident.Node, of func(ident.Node) T) T {
	var room [16]T
	vals := room[:0]
	for _, n := range set {
		vals = append(vals, of(n))
	}
	if len(vals) == 0 {
		return 0
	}
	slices.Sort(vals)
	// W = floor(n/2)+1 members have at least vals[n-W].
	return vals[len(vals)-(len(vals)/2+1)]
}

func (c *Core) heldBy(n ident.Node) ident.Seq {
	if n == c.cfg.Node {
		return c.written
	}
	if pr := c.peer(n); pr != nil {
		return pr.matched
	}
	return 0
}

func (c *Core) durableBy(n ident.Node) ident.Seq {
	if n == c.cfg.Node {
		return c.durable
	}
	if pr := c.peer(n); pr != nil {
		return pr.durable
	}
	return 0
}

func (c *Core) leaseBy(n ident.Node) Instant {
	if n == c.cfg.Node {
		return c.p.askedAt + Instant(c.shorten(c.cfg.LeaseFor))
	}
	if pr := c.peer(n); pr != nil {
		return pr.grantUntil
	}
	return 0
}

// leaseUntil is until when a majority of every set in force has granted.
func (c *Core) leaseUntil() Instant {
	if c.p.released {
		return 0
	}
	until := kth(c.view.Set, c.leaseBy)
	if c.p.change != nil {
		until = min(until, kth(c.p.change.set, c.leaseBy))
	}
	return until
}

// advanceCommit moves the commit index: only to an entry of our own epoch,
// older ones are committed with it (Raft, figure 8).
func (c *Core) advanceCommit() {
	if q := c.quorum(c.heldBy); q >= c.p.marker && q > c.commit {
		c.spoilCommitted(c.commit, q)
		c.commit = q
	}
	if q := c.quorum(c.durableBy); q > c.p.durableCommit {
		c.p.durableCommit = q
	}
	if c.role == RolePrimaryElect && c.commit >= c.p.marker {
		c.role = RolePrimary
		c.event(Event{Name: "role", From: "PrimaryElect", To: "Primary", Rule: "its marker is committed", Pos: c.last})
		if c.amnesiac {
			c.amnesiac, c.metaDirty = false, true
		}
	}
}

// readyPrimary does what a batch of inputs has made possible.
func (c *Core) readyPrimary() {
	c.advanceCommit()
	c.admitQueue()
	c.advanceCommit() // a set of one commits what it has just appended: not before Written says so
	c.answer()
	c.progressChange()
	c.progressDrain()
	c.moveTrim()
	for _, pr := range c.p.peers {
		c.sendTo(pr)
	}
	c.p.askDue = false
}

func (c *Core) admitQueue() {
	n := 0
	for n < len(c.queue) && c.admitting() {
		c.admit(&c.queue[n], c.queueAt[n])
		n++
	}
	if n > 0 {
		c.queue = slices.Delete(c.queue, 0, n)
		c.queueAt = slices.Delete(c.queueAt, 0, n)
	}
}

// answer completes what the ack mode allows.
func (c *Core) answer() {
	if len(c.view.Set) < c.view.MinCopies {
		return
	}
	held, synced := c.commit, min(c.commit, c.p.durableCommit)
	if c.view.Ack == AckLocal {
		held, synced = c.written, c.durable
	}
	c.pop(&c.p.held, held, wire.StatusOK)
	c.pop(&c.p.synced, synced, wire.StatusOK)
	if len(c.barriers) == 0 || !c.serving() || c.leaseUntil() <= c.now {
		return
	}
	keep := c.barriers[:0]
	for _, b := range c.barriers {
		if b.upTo <= c.Gate().Commit {
			c.released = append(c.released, b.id)
			continue
		}
		keep = append(keep, b)
	}
	c.barriers = keep
}

// askAgain returns when the lease is to be asked for again: in the next heartbeat
// of the clock, and not so long after the last time, so that all volumes of a node
// ask at once and a tick that comes a little early does not skip one.
func (c *Core) askAgain() Instant {
	every := Instant(c.cfg.Heartbeat)
	return c.p.askedAt - c.p.askedAt%every + every
}

// ask asks every peer, and ourselves, for the lease anew.
func (c *Core) ask() {
	if c.p.released || c.stalled() {
		return
	}
	c.p.askedAt, c.p.askDue = c.now, true
}

// stalled reports whether the own disk hangs: an fsync of the log, a client's read,
// or what is applied, once clients wait for that. Checkpoints are not among them: on
// a slow disk one may take minutes.
func (c *Core) stalled() bool {
	if c.cfg.StallTimeout <= 0 {
		return false
	}
	late := func(began Instant) bool { return began != 0 && c.now-began > Instant(c.cfg.StallTimeout) }
	return late(c.syncStarted) || late(c.readStarted) || late(c.applyStarted) && c.crowded()
}

func (c *Core) tickPrimary() {
	if c.stalled() {
		c.report(ReportStalled, c.p.epoch)
	}
	if c.p.released && c.now > c.p.releasedAt+Instant(2*c.cfg.LeaseFor) {
		// Nobody took over: only a new epoch can make this volume serve again.
		c.report(ReportReseal, c.p.epoch)
	}
	if c.now >= c.askAgain() {
		c.ask()
	}
	for _, pr := range c.p.peers {
		c.tickPeer(pr)
	}
	for s, at := range c.p.replayed {
		if c.now > at+replayGuard {
			delete(c.p.replayed, s)
		}
	}
	c.considerSet()
	c.expire()
}

// primaryRests is RestsUntil of a primary: until the lease is to be asked for, if
// all members hold all that there is and know so, and nobody waits.
func (c *Core) primaryRests() Instant {
	p := &c.p
	if c.role != RolePrimary || p.released || p.draining || p.change != nil || !p.held.empty() || !p.synced.empty() ||
		len(c.queue)+len(c.barriers) > 0 || c.commit < c.last.Seq || c.durable < c.last.Seq ||
		c.readStarted != 0 || c.applyStarted != 0 {
		return 0
	}
	until := c.askAgain()
	for _, pr := range p.peers {
		if !c.inSet(pr.node) || pr.state != peerStream || pr.matched < c.last.Seq || pr.sentCommit < c.commit || !c.heard(pr) || c.unfit(pr.node) != "" {
			return 0
		}
		until = min(until, pr.lastHeard+Instant(c.cfg.LeaseFor))
	}
	if set, _, _ := c.wantedSet(); set != nil {
		return 0
	}
	return until
}

// expire fails what has been held for longer than on_no_quorum allows.
func (c *Core) expire() {
	hold := Instant(c.view.HoldNanos)
	if hold <= 0 {
		return
	}
	late := func(at Instant) bool { return c.now > at+hold }
	for _, q := range []*waiters{&c.p.held, &c.p.synced} {
		c.dismiss(q, func(w *waiter) bool { return late(w.at) })
	}
	n := 0
	for n < len(c.queue) && late(c.queueAt[n]) {
		c.queue[n].Entry.Payload.Release()
		c.answers = append(c.answers, Answer{Origin: c.queue[n].Origin, Status: wire.StatusIO, Pos: c.last})
		n++
	}
	c.queue, c.queueAt = slices.Delete(c.queue, 0, n), slices.Delete(c.queueAt, 0, n)
}

// Drain begins a switchover: nothing new is admitted, what is in flight is
// answered, the lease is given back at every granter; then Drained says id. A
// replica that is not the primary of epoch is drained at once.
func (c *Core) Drain(now Instant, id uint64, epoch ident.Epoch) {
	c.advance(now)
	if !c.isPrimary() || epoch != c.p.epoch || c.p.released {
		c.drained = append(c.drained, id)
		return
	}
	if !c.p.draining {
		c.p.draining, c.p.drainSince = true, now
	}
	c.p.drains = append(c.p.drains, id)
}

// Pause holds new requests back until the instant, so that the replicas can be
// compared at one position; an instant that is over ends it.
func (c *Core) Pause(now, until Instant) {
	c.advance(now)
	c.p.pausedUntil = until
}

// Undrain takes a Drain back that could not finish. After the lease has been
// given back it does nothing: then only a new epoch serves.
func (c *Core) Undrain(now Instant) {
	c.advance(now)
	if c.isPrimary() && !c.p.released {
		c.p.draining = false
		c.p.drains = c.p.drains[:0]
	}
}

func (c *Core) progressDrain() {
	if !c.p.draining || c.p.released {
		return
	}
	// A member that has promised a newer epoch takes nothing of ours: what is not
	// committed by now may never be, and those who wait ask the next primary, as
	// they do below min_copies, where nothing is answered.
	refused := c.p.refusedAt != 0 && c.now <= c.p.refusedAt+Instant(c.cfg.RetryAfter) && c.now >= c.p.drainSince+drainSettle
	if c.commit < c.last.Seq && !refused {
		return
	}
	if len(c.view.Set) >= c.view.MinCopies && !refused && (!c.p.held.empty() || !c.p.synced.empty()) {
		return
	}
	if c.now < c.p.drainSince+drainSettle {
		for _, pr := range c.p.peers {
			if c.inSet(pr.node) && c.heard(pr) && pr.matched < c.last.Seq {
				return
			}
		}
	}
	c.p.released, c.p.releasedAt = true, c.now
	for _, pr := range c.p.peers {
		c.send = append(c.send, Out{To: pr.node, Msg: &wire.Release{Epoch: c.p.epoch}})
	}
	c.drained = append(c.drained, c.p.drains...)
	c.p.drains = c.p.drains[:0]
	c.event(Event{Name: "drain", From: "Primary", To: "Drained", Rule: "the lease is given back", Pos: c.last})
}

// moveTrim moves the trim horizon: what every member of the in-sync set has
// durably, and what we have checkpointed, no replica needs again. It does not
// move past a member that has not reported in this epoch.
func (c *Core) moveTrim() {
	to := c.checkpoint
	most := max(c.cfg.TrimLagMax, 2*c.cfg.LagMax)
	for _, pr := range c.p.peers {
		// A member that lags is about to be evicted; until then the horizon
		// waits for it, to a limit.
		within := c.cfg.LagMax <= 0 || c.lagBytes(max(pr.matched, pr.floor)) <= most
		member := c.inSet(pr.node)
		follows := !member && pr.state == peerStream && c.heard(pr) && within
		if member && within || follows {
			to = min(to, max(pr.durable, c.trim))
		}
		if pr.follows && !follows && !member {
			// What it has by now it need not be sent again.
			c.changes.Pin(string(pr.node), uint64(pr.durable), uint64(c.last.Seq))
		}
		pr.follows = follows
	}
	c.trim = max(c.trim, to)
	for len(c.p.cums) > 1 && c.p.cums[1].seq <= c.trim {
		for _, pr := range c.p.peers {
			if at := max(pr.matched, pr.floor); c.p.cums[0].seq <= at && at < c.p.cums[1].seq {
				pr.leftAt = cumMark{seq: at, cum: c.p.cums[0].cum}
			}
		}
		c.p.cums = c.p.cums[1:]
	}
}
