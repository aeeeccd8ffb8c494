package core

import (
	"hash/crc32"
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/invariant"
	"github.com/blockstep/blockstep/replication/bitmap"
	"github.com/blockstep/blockstep/replication/wire"
)

// # Resync
//
// A replica that cannot be streamed to becomes a target. Its log begins anew at
// a position X that the source has applied, and from then on it is an ordinary
// follower of the log. Beside the log it holds "remaining": the blocks whose
// content as of its log it lacks. A replica with remaining blocks is
// inconsistent: it is never promoted, and not in the in-sync set.
//
// remaining is durable in the target's checkpoint, and nobody else needs to
// remember how far a resync came: whoever is primary asks the target.
//
// The source reads a block at a commit index c: AsOf is c, and everything up to
// c has been sent before the block. If an entry that touches it is committed
// while it is read, it is read again. The target writes it when it has applied
// everything up to AsOf and before it applies anything later. So an older entry
// never overwrites the block, and the block never overwrites a newer entry.

// target is the state of a replica that is being resynced.
type target struct {
	remaining *bitmap.Bitmap // nil: it lacks nothing
	reset     *Snapshot      // for the next Ready
	pending   []*wire.Blocks // received, not written; ordered as they came
	writing   int            // how many of pending are with the driver
	ackID     uint64
	ackDue    bool
	stateDue  bool // the primary is owed a ResyncState

	snapshotWhole bool // the checkpoint under way has nothing remaining
	checkpointDue bool
}

func (t *target) syncTo() ident.Seq {
	if len(t.pending) == 0 {
		return 0
	}
	return t.pending[0].AsOf
}

// inconsistent reports whether this replica lacks blocks.
func (c *Core) inconsistent() bool { return c.t.remaining != nil }

// blocksHold returns how far entries may be applied before the next blocks.
func (c *Core) blocksHold() ident.Seq {
	if len(c.t.pending) == 0 {
		return ^ident.Seq(0)
	}
	return max(c.t.pending[0].AsOf, c.applyTo)
}

// onResyncStart makes this replica a target, or has a target say what it lacks.
func (c *Core) onResyncStart(from ident.Node, m *wire.ResyncStart) {
	first := m.Stream > c.follow.stream
	if !c.fromPrimary(from, m.Epoch, m.Stream) || c.failed != "" {
		return
	}
	if m.Continue {
		c.t.stateDue = true
		return
	}
	if !first {
		return // it is what a stream begins with: late, or twice, and by now this replica may be in the set
	}
	c.learnShared(m)
	if m.Payload == nil || c.t.reset != nil || c.t.writing > 0 || c.applied < max(c.applyTo, c.commit) {
		return // the source asks again
	}
	d, err := wire.DecodeResyncData(m.Payload.B)
	if err != nil {
		return
	}
	dirty, err := bitmap.Unmarshal(d.Dirty)
	if err != nil {
		return
	}
	changes, err := bitmap.UnmarshalChanges(d.Changes)
	if err != nil {
		return
	}
	c.dropPending()
	c.event(Event{Name: "resync", From: c.last.String(), To: m.Base.String(), Rule: "this replica is behind the in-sync set: it is the target", Peer: from, Pos: c.last})
	c.t.remaining = c.remainingFor(m, dirty)
	c.changes = changes
	c.base, c.last = m.Base, m.Base
	c.hist = slices.Clone(history(d.History))
	seq := m.Base.Seq
	c.handed, c.written, c.durable, c.commit = seq, seq, seq, seq
	c.applyTo, c.applied, c.checkpoint, c.trim, c.trimmed = seq, seq, seq, seq, seq
	c.cutPending = false
	c.ring.cut(0)
	c.unapplied = extentRing{}
	c.dedup = newDedupRing(c.dedup.max, d.Dedup, d.DedupFloor)
	c.syncAsked = seq
	f := &c.follow
	f.matched, f.syncTo, f.reject = seq, 0, RejectState{}
	snap, err := c.Snapshot()
	invariant.Assert(err == nil, "core: snapshot of a resync target: %v", err)
	c.t.reset = &snap
	c.t.snapshotWhole = false
	c.t.stateDue = true
}

// learnShared commits what this replica shares with the source: it is applied
// before the log begins anew, or all that was written since the last checkpoint
// would count as missing. The source has applied everything up to m.Base, and
// the two logs hold the same entries up to m.Since (divergence); a replica that
// has just restarted does not know that they are committed.
func (c *Core) learnShared(m *wire.ResyncStart) {
	if !m.Whole {
		c.commit = max(c.commit, min(m.Since, m.Base.Seq, c.last.Seq))
	}
}

// remainingFor returns what this replica lacks when it begins anew at m.Base:
// what the source says, what it lacked before, and what it has applied beyond
// the point of divergence.
func (c *Core) remainingFor(m *wire.ResyncStart, dirty *bitmap.Bitmap) *bitmap.Bitmap {
	if c.t.remaining != nil {
		dirty.Union(c.t.remaining)
	}
	own, ok := c.changes.Since(uint64(m.Since))
	if m.Whole || !ok {
		dirty.Mark(0, c.view.Size)
		return dirty
	}
	dirty.Union(own)
	// The log goes, so what it has not brought to the backing store yet is
	// missing; and entries that wait may have been applied before a crash.
	for _, x := range c.unapplied.after(0) {
		dirty.Mark(x.off, min(x.len, c.view.Size))
	}
	return dirty
}

// fromPrimary judges a message of the primary's ordered stream by epoch and
// stream alone.
func (c *Core) fromPrimary(from ident.Node, epoch ident.Epoch, stream uint64) bool {
	if epoch < c.promise {
		c.send = append(c.send, Out{To: from, Msg: &wire.Stale{Epoch: epoch, Promised: c.promise}})
		return false
	}
	f := &c.follow
	if epoch != c.promise || f.epoch != epoch || c.isPrimary() || stream < f.stream {
		return false
	}
	f.from = from
	c.follows(stream)
	return true
}

func (c *Core) onBlocks(from ident.Node, m *wire.Blocks) {
	if !c.fromPrimary(from, m.Epoch, m.Stream) || c.failed != "" || c.t.remaining == nil {
		return
	}
	if m.Last {
		if m.AsOf > c.follow.matched {
			return // the source asks again
		}
		if c.t.remaining.Empty() {
			c.t.checkpointDue = true
		} else {
			c.t.stateDue = len(c.t.pending) == 0
		}
		return
	}
	if n := len(c.t.pending); m.AsOf > c.follow.matched || m.AsOf < c.applyTo || (n > 0 && m.AsOf < c.t.pending[n-1].AsOf) {
		// There was no room for the entries before it; or later ones are on
		// their way to the backing store, and what it holds may be older than
		// what they write. It stays in remaining, and is asked for again.
		c.t.ackID, c.t.ackDue = max(c.t.ackID, m.ID), true
		return
	}
	wire.RetainPayloads(m)
	k := *m
	k.Blocks = slices.Clone(m.Blocks)
	c.t.queue(&k)
}

// queue adds blocks behind those of the same or an older position. They may
// come in another order than they were sent, and what is held back for their
// sake (blocksHold) is what lies after the oldest: else an entry would be
// applied before a block that is older than it.
func (t *target) queue(b *wire.Blocks) {
	i := len(t.pending)
	for i > t.writing && t.pending[i-1].AsOf > b.AsOf {
		i--
	}
	t.pending = slices.Insert(t.pending, i, b)
}

// dropPending forgets blocks that are not with the driver: what they hold is
// still in remaining.
func (c *Core) dropPending() {
	for _, b := range c.t.pending[c.t.writing:] {
		wire.ReleasePayloads(b)
	}
	c.t.pending = c.t.pending[:c.t.writing]
}

// BlocksWritten says that the blocks handed out up to id are in the backing
// store, not yet durable.
func (c *Core) BlocksWritten(now Instant, id uint64) {
	c.advance(now)
	for c.t.writing > 0 {
		b := c.t.pending[0]
		if c.t.remaining != nil {
			for i := range b.Blocks {
				c.t.remaining.ClearTouched(b.Blocks[i].Off, b.Blocks[i].Len)
			}
		}
		wire.ReleasePayloads(b)
		c.t.pending = c.t.pending[1:]
		c.t.writing--
		c.t.ackID, c.t.ackDue = max(c.t.ackID, b.ID), true
		if b.ID == id {
			break
		}
	}
	if len(c.t.pending) == 0 {
		c.t.pending = nil
	}
}

// readyTarget hands out blocks whose turn has come, and answers the source.
func (c *Core) readyTarget(e *Effects) {
	t := &c.t
	if t.writing == 0 {
		for t.writing < len(t.pending) && t.pending[t.writing].AsOf <= c.applied {
			e.WriteBlocks = append(e.WriteBlocks, t.pending[t.writing])
			t.writing++
		}
	}
	if t.remaining != nil && t.checkpointDue {
		e.CheckpointNow, t.checkpointDue = true, false
	}
}

// sendTarget sends what a target owes the source.
func (c *Core) sendTarget() {
	t, f := &c.t, &c.follow
	if f.epoch != c.promise {
		t.ackDue, t.stateDue = false, false
		return
	}
	if t.ackDue {
		t.ackDue = false
		c.send = append(c.send, Out{To: f.from, Msg: &wire.BlocksAck{Epoch: f.epoch, Stream: f.stream, ID: t.ackID}})
	}
	if !t.stateDue {
		return
	}
	t.stateDue = false
	lacks := t.remaining
	if lacks == nil {
		lacks = bitmap.New()
	}
	p, err := lacks.Marshal()
	invariant.Assert(err == nil, "core: bitmap: %v", err)
	c.send = append(c.send, Out{To: f.from, Msg: &wire.ResyncState{
		Epoch: f.epoch, Stream: f.stream, Replica: c.cfg.Replica, Incarnation: c.cfg.Incarnation,
		PayloadCRC: crc32.Checksum(p, castagnoli), Payload: c.lend(p),
	}})
}

// targetCheckpointed ends a resync once a checkpoint without remaining blocks
// is durable.
func (c *Core) targetCheckpointed() {
	t := &c.t
	if t.remaining == nil || !t.snapshotWhole || !t.remaining.Empty() || len(t.pending) > 0 {
		return
	}
	t.remaining = nil
	c.follow.ackDue = true
	c.event(Event{Name: "resync", From: "Resyncing", To: "CatchingUp", Rule: "every block is here and durable", Pos: c.last})
}

// ChangedSince returns the blocks that changed after seq, as far as entries up
// to the commit index go. ok is false when nobody knows any more.
func (c *Core) ChangedSince(seq ident.Seq) (*bitmap.Bitmap, bool) {
	b, ok := c.changes.Since(uint64(seq))
	if !ok {
		return nil, false
	}
	for _, x := range c.unapplied.after(max(seq, c.applied)) {
		b.Mark(x.off, x.len)
	}
	return b, true
}

// Doubt marks blocks of this replica as ones that it lacks: they are copied
// from the primary anew. The primary refuses: it is who the others follow.
func (c *Core) Doubt(now Instant, off, length uint64) bool {
	c.advance(now)
	if c.isPrimary() || c.failed != "" {
		return false
	}
	if c.t.remaining == nil {
		c.t.remaining = bitmap.New()
	}
	c.t.remaining.Mark(off, length)
	c.t.snapshotWhole = false // a checkpoint under way has not fsynced what is yet to come
	c.t.checkpointDue, c.follow.ackDue = true, true
	c.event(Event{Name: "resync", To: "Resyncing", Rule: "blocks that differ from the majority's are copied anew", Pos: c.last})
	return true
}

// ChangedAfter is ChangedSince for a position: ok is false too when the log that
// position is from is not, or no longer, this one.
func (c *Core) ChangedAfter(p ident.Position) (*bitmap.Bitmap, bool) {
	if p.Seq > c.last.Seq || (p.Seq > 0 && c.hist.at(p.Seq) != p.Epoch) || (len(c.hist) > 0 && p.Seq < c.hist[0].First) {
		return nil, false
	}
	return c.ChangedSince(p.Seq)
}
