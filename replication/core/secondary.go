package core

import (
	"slices"
	"strconv"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/invariant"
	"github.com/blockstep/blockstep/replication/wire"
)

// onAppend judges an Append by epoch, then by log matching.
func (c *Core) onAppend(from ident.Node, m *wire.Append) {
	if m.Epoch < c.promise {
		c.send = append(c.send, Out{To: from, Msg: &wire.Stale{Epoch: m.Epoch, Promised: c.promise}})
		return
	}
	if c.isPrimary() {
		if m.Epoch == c.p.epoch {
			return // nobody else is primary of our epoch: not a message of this cluster state
		}
		c.stepDown("another primary has a newer epoch")
	}
	if m.Epoch > c.promise {
		c.promise, c.metaDirty = m.Epoch, true
	}
	c.sealed = 0 // something of the promised epoch has been seen
	f := &c.follow
	if f.epoch != m.Epoch {
		f.epoch, f.stream, f.matched, f.syncTo, f.echo = m.Epoch, 0, 0, 0, 0
		f.met, f.metCommit = false, 0
		f.reject = RejectState{}
	}
	f.from = from
	if m.Stream < f.stream {
		return // sent before the primary began anew with us
	}
	// The wish to fsync what has been acked already is answered when that is
	// done: an answer before it would say nothing new.
	later := m.Stream == f.stream && len(m.Entries) == 0 && m.LeaseSent == 0 &&
		f.matched >= m.Prev.Seq && c.durable < min(m.SyncTo, f.matched) && c.failed == ""
	c.follows(m.Stream)
	if m.Met > c.cfg.Incarnation {
		// This disk is an older copy of the one that the primary knows, or an
		// empty one in its place. Under a number that was used before, nothing
		// that it answers would count, or it would count as what it no longer is.
		c.event(Event{
			Name: "incarnation", From: strconv.FormatUint(uint64(c.cfg.Incarnation), 10), To: strconv.FormatUint(uint64(m.Met)+1, 10),
			Rule: "the primary has met a later start of this node's replica", Peer: from, Pos: c.last,
		})
		c.cfg.Incarnation, c.metaDirty = m.Met+1, true
	}
	if !f.met && m.Met == c.cfg.Incarnation {
		f.met, f.metCommit = true, m.Commit
	}
	if c.failed == "" {
		c.grant(m)
	}
	f.ackDue = f.ackDue || !later
	f.reject = RejectState{}
	switch {
	case c.failed != "":
		f.reject = RejectState{due: true, reason: wire.RejectFailed}
		return
	case !c.holds(m.Prev):
		// What it had no room for is asked for again when there is room.
		if f.matched == 0 || !c.full() {
			f.reject = RejectState{due: true, reason: wire.RejectGap}
		}
		return
	}
	taken, ok := c.take(m)
	if !ok {
		return
	}
	f.matched = max(f.matched, m.Prev.Seq+ident.Seq(taken))
	// A commit index counts only up to what has matched with this primary.
	c.commit = max(c.commit, min(m.Commit, f.matched))
	f.syncTo = max(f.syncTo, m.SyncTo)
	c.trim = max(c.trim, min(m.Trim, c.commit))
	c.clearAmnesia()
}

// follows goes on with a stream, which is not older than the present one.
func (c *Core) follows(stream uint64) {
	if stream > c.follow.stream {
		// Blocks are counted anew; those that wait are of positions that a newer
		// primary may have given to other entries.
		c.dropPending()
		c.t.ackID, c.t.ackDue = 0, false
	}
	c.follow.stream = stream
}

// holds reports whether the own log has exactly this entry. What lies below
// the base is committed and cannot be compared any more.
func (c *Core) holds(p ident.Position) bool {
	return p.Seq <= c.last.Seq && p.Seq >= c.base.Seq && c.posAt(p.Seq) == p
}

// full reports whether this replica has no room for more entries: its fsync or
// its backing store does not keep up, and memory is bounded. It acks no more
// than it has taken, so it falls behind and is evicted by and by. What waits for
// a commit alone does not count: only newer entries can bring that.
func (c *Core) full() bool {
	ready := min(c.commit, c.durable)
	// It may hold twice as much as its primary: one that is a little slower is
	// not to lose its place for that.
	if most := ident.Seq(2 * c.cfg.UnappliedEntries); most > 0 && (ready-min(ready, c.applied) > most || c.last.Seq-c.durable > most) {
		return true
	}
	limit := 2 * c.cfg.UnappliedMax
	if c.unapplied.total <= limit {
		return false
	}
	backlog := c.unapplied.cost(c.applied, ready)
	return backlog > limit || c.unapplied.cost(c.durable, c.last.Seq) > limit
}

// take appends the entries that are new, after cutting a tail that differs. It
// returns how many of m's entries are in the log now.
func (c *Core) take(m *wire.Append) (taken int, ok bool) {
	next := m.Prev.Seq + 1
	for i := range m.Entries {
		e := &m.Entries[i]
		if e.Pos.Seq != next || e.Pos.Epoch > m.Epoch {
			return 0, false // not one run: a primary never sends it
		}
		next++
		if e.Pos.Seq <= c.last.Seq {
			if c.posAt(e.Pos.Seq) == e.Pos {
				continue
			}
			if !c.mayCut(e.Pos.Seq-1, m.LossEpoch) {
				return 0, false
			}
			c.cutLog(e.Pos.Seq - 1)
		}
		if c.full() {
			return i, true
		}
		e.Payload.Retain()
		c.appendEntry(*e)
	}
	return len(m.Entries), true
}

// mayCut judges whether the tail after seq may simply be cut. What is cut was
// never committed and so never applied, unless an epoch since then began by a
// promotion that accepts loss: then the backing store may hold what the log
// loses, and this replica must be resynced.
func (c *Core) mayCut(seq ident.Seq, loss ident.Epoch) bool {
	lossy := loss > c.posAt(seq+1).Epoch
	if seq >= c.applyTo && (!lossy || seq >= min(c.durable, c.written)) {
		return true
	}
	c.follow.reject = RejectState{due: true, reason: wire.RejectResync}
	if lossy {
		return false
	}
	// A committed entry differs from the primary's: never right.
	c.Failed(c.now, "a committed entry differs from the primary's log")
	c.follow.reject = RejectState{due: true, reason: wire.RejectFailed}
	return false
}

// grant promises the primary that we answer no SEAL until the lease has run
// out on our clock.
func (c *Core) grant(m *wire.Append) {
	if m.LeaseSent == 0 || m.LeaseFor <= 0 || m.LeaseFor > c.cfg.LeaseMax {
		return
	}
	c.grantUntil = max(c.grantUntil, c.now+Instant(m.LeaseFor))
	c.grantEpoch = m.Epoch
	c.follow.echo = m.LeaseSent
}

// onRelease takes the lease back: the primary serves no more reads.
func (c *Core) onRelease(from ident.Node, m *wire.Release) {
	if m.Epoch == c.grantEpoch && m.Epoch == c.promise {
		c.grantUntil = 0
	}
	c.send = append(c.send, Out{To: from, Msg: &wire.Released{Epoch: m.Epoch}})
}

// clearAmnesia ends amnesia when this replica holds, durably, the log of the
// primary of the newest epoch that it promised, through that primary's own
// marker and what was committed when it met this incarnation.
func (c *Core) clearAmnesia() {
	if !c.amnesiac || c.isPrimary() || c.follow.epoch != c.promise || !c.follow.met {
		// Until the primary has met this incarnation, an ack of the one before
		// may still commit what this one has lost; and an Append may be one that
		// was sent to the one before.
		return
	}
	held := min(c.follow.matched, c.durable)
	// The marker is the first entry of its epoch, so once the matched prefix
	// reaches into the epoch it holds the marker.
	if held < c.base.Seq || c.hist.at(held) != c.promise || held < c.follow.metCommit {
		return
	}
	c.amnesiac, c.metaDirty = false, true
	c.follow.ackDue = true
	c.event(Event{Name: "amnesia", From: "Amnesiac", To: "InSync", Rule: "holds the primary's log through its marker", Pos: c.last})
}

// tickSecondary reports a volume whose primary nobody can hear of.
func (c *Core) tickSecondary() {
	if c.guards() && c.now > c.lapse() {
		c.report(ReportLapsed, c.view.Epoch)
	}
}

// guards reports whether a primary that has fallen silent is ours to report: a
// member of the in-sync set does that.
func (c *Core) guards() bool {
	return c.haveView && !c.view.Deleted && c.failed == "" && slices.Contains(c.view.Set, c.cfg.Node)
}

// lapse returns the instant after which no primary has a lease that we granted.
func (c *Core) lapse() Instant {
	since := max(c.grantUntil, c.silentUntil)
	if c.view.Epoch > 0 && c.grantEpoch < c.view.Epoch {
		// A new primary gets the time of one lease to make itself heard, unless
		// it was us and we refused.
		if c.office != c.view.Epoch {
			since = max(since, c.viewSince+Instant(c.cfg.LeaseFor))
		}
	}
	return since
}

// readySecondary sends the one answer that this batch owes the primary.
func (c *Core) readySecondary() {
	f := &c.follow
	if !f.ackDue || f.epoch != c.promise {
		f.ackDue = false
		return
	}
	f.ackDue = false
	echo := f.echo
	f.echo = 0
	if c.failed != "" {
		// It failed after it had matched and before it was to write.
		f.reject = RejectState{due: true, reason: wire.RejectFailed}
	}
	if f.reject.due {
		c.send = append(c.send, Out{To: f.from, Msg: &wire.Reject{
			Epoch: f.epoch, Stream: f.stream, Replica: c.cfg.Replica, Incarnation: c.cfg.Incarnation,
			Reason: f.reject.reason, Last: c.last, Base: c.base, Applied: c.applyTo, Durable: c.durable,
			History: slices.Clone(c.hist), Amnesiac: c.amnesiac, LeaseSent: echo,
		}})
		f.reject = RejectState{}
		return
	}
	// The ack goes out after this batch's Append is in the file, so all that
	// is matched is held by then.
	if f.matched > c.last.Seq {
		invariant.Assert(false, "core: matched %d beyond %v", f.matched, c.last)
	}
	// The connection that carries our answers may break while the one that
	// brings the blocks lives on: the last answer is said again.
	c.t.ackDue = c.t.ackDue || (c.t.remaining != nil && c.t.ackID != 0)
	a := c.acks.next()
	*a = wire.Ack{
		Epoch: f.epoch, Stream: f.stream, Replica: c.cfg.Replica, Incarnation: c.cfg.Incarnation,
		Matched: f.matched, Durable: min(c.durable, f.matched), Applied: c.applied,
		LeaseSent: echo, Amnesiac: c.amnesiac, Inconsistent: c.inconsistent(), Checkpoint: c.checkpoint,
	}
	c.send = append(c.send, Out{To: f.from, Msg: a})
	if c.durable >= f.syncTo {
		f.syncTo = 0
	}
}
