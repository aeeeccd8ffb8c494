package core

import (
	"hash/crc32"
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/invariant"
	"github.com/blockstep/blockstep/replication/bitmap"
	"github.com/blockstep/blockstep/replication/wire"
)

// resyncRun is what the primary knows of one resync. All of it can be lost: the
// target knows what it lacks.
type resyncRun struct {
	todo      *bitmap.Bitmap // nil until the target has said what it lacks
	askedAt   Instant
	cursor    uint64
	restUntil Instant // no block is asked for before: a read failed
	nextID    uint64  // of reads
	sendID    uint64  // of messages
	reads     []*blockRead
	flight    []blockFlight
	inflight  int64
	lastSent  bool
	since     Instant // for the rate
	credit    int64   // bytes that the rate allows now
	chunk     int     // bytes of the next read
	moved     int64
	total     int64
	// rate is what it moved lately, in bytes a second, for the operator; the
	// sample under way began at rateAt with ratedAt moved.
	rate    float64
	rateAt  Instant
	ratedAt int64
}

type blockRead struct {
	id       uint64
	off, len uint64
	spoiled  bool // an entry that touches it was committed since the read began
	waiting  bool // to be read again
	spoils   int
}

type blockFlight struct{ id, len uint64 }

// tickResync begins a resync, or asks again where an answer is missing.
func (c *Core) tickResync(pr *peer) {
	if !c.heard(pr) || c.inSet(pr.node) || pr.state == peerFailed {
		return
	}
	if ch := c.p.change; ch != nil && slices.Contains(ch.set, pr.node) {
		return // it may be in the set by now: the outcome comes first
	}
	switch {
	case pr.state == peerResync:
		if pr.run == nil || c.now >= pr.run.askedAt+Instant(c.cfg.RetryAfter) {
			c.startResync(pr)
		}
	case pr.state == peerStream && pr.inconsistent:
		if pr.run == nil {
			pr.run = &resyncRun{}
		}
		if pr.run.todo == nil && c.now >= pr.run.askedAt+Instant(c.cfg.RetryAfter) {
			pr.run.askedAt = c.now
			c.early = append(c.early, Out{To: pr.node, Msg: &wire.ResyncStart{Epoch: c.p.epoch, Stream: pr.stream, Continue: true}})
		}
	}
	c.refill(pr)
	if pr.run != nil && pr.run.todo != nil {
		pr.run.measure(c.now)
	}
}

// startResync tells a replica to begin anew at our applied position.
func (c *Core) startResync(pr *peer) {
	dirty, known := c.changes.Since(uint64(pr.since))
	whole := pr.whole || !known
	if whole {
		dirty = bitmap.New()
		dirty.Mark(0, c.view.Size)
	}
	db, err := dirty.Marshal()
	invariant.Assert(err == nil, "core: bitmap: %v", err)
	cb, err := c.changes.Marshal()
	invariant.Assert(err == nil, "core: changes: %v", err)
	if len(db)+len(cb) > resyncDirtyMax {
		cb, err = bitmap.NewChanges(uint64(c.applied)).Marshal()
		invariant.Assert(err == nil, "core: changes: %v", err)
	}
	data := wire.ResyncData{
		Dirty: db, Changes: cb, History: c.hist.cut(c.applied), Dedup: c.dedup.list(c.applied), DedupFloor: c.dedup.floor,
	}
	p := c.lend(data.Encode(nil))
	pr.stream++
	pr.run = &resyncRun{askedAt: c.now}
	pr.resyncBase, pr.owes = c.applied, 0
	c.event(Event{Name: "resync", From: "Absent", To: "Resyncing", Peer: pr.node, Rule: pr.rule, Pos: c.posAt(c.applied)})
	c.early = append(c.early, Out{To: pr.node, Msg: &wire.ResyncStart{
		Epoch: c.p.epoch, Stream: pr.stream, Base: c.posAt(c.applied), Since: pr.since, Whole: whole,
		PayloadCRC: crc32.Checksum(p.B, castagnoli), Payload: p,
	}})
	pr.lastSent = c.now
}

func (c *Core) onResyncState(from ident.Node, m *wire.ResyncState) {
	pr := c.accept(from, m.Epoch, m.Replica, m.Incarnation)
	if pr == nil || m.Stream != pr.stream || pr.run == nil || m.Payload == nil || c.inSet(from) {
		return
	}
	todo, err := bitmap.Unmarshal(m.Payload.B)
	if err != nil {
		return
	}
	if pr.state == peerResync {
		// It has begun anew at the base that this stream named.
		pr.state = peerStream
		pr.matched, pr.durable = pr.resyncBase, pr.resyncBase
		pr.durableAt = max(pr.durableAt, pr.stream)
		pr.next = pr.resyncBase + 1
		pr.flight, pr.inflight, pr.reading = pr.flight[:0], 0, false
		pr.inconsistent = true
	}
	r := pr.run
	for _, x := range c.unapplied.after(max(pr.next, 1) - 1) {
		todo.Clear(x.off, x.len) // a live entry will bring it
	}
	r.todo, r.cursor, r.lastSent = todo, 0, false
	r.reads, r.flight, r.inflight = nil, nil, 0
	r.since = c.now
	r.total = max(r.total, r.moved+todo.Bytes())
}

func (c *Core) onBlocksAck(from ident.Node, m *wire.BlocksAck) {
	pr := c.peer(from)
	if pr == nil || !c.isPrimary() || m.Epoch != c.p.epoch || m.Stream != pr.stream || pr.run == nil {
		return
	}
	r := pr.run
	for len(r.flight) > 0 && r.flight[0].id <= m.ID {
		r.inflight -= int64(r.flight[0].len)
		r.flight = r.flight[1:]
	}
}

// touched tells the resyncs under way that an entry has been appended.
func (c *Core) touched(off, length uint64) {
	for _, pr := range c.p.peers {
		if pr.run == nil || pr.run.todo == nil {
			continue
		}
		if c.view.Ack == AckLocal {
			pr.run.spoil(off, length)
		}
		pr.run.todo.Clear(off, length)
	}
}

// spoilCommitted tells the resyncs under way that the entries after from, up to
// to, are committed: a block read that is out may show them or not.
func (c *Core) spoilCommitted(from, to ident.Seq) {
	for _, pr := range c.p.peers {
		if pr.run == nil || len(pr.run.reads) == 0 {
			continue
		}
		ents := c.unapplied.after(from)
		for i := range ents[:min(len(ents), int(to-from))] {
			pr.run.spoil(ents[i].off, ents[i].len)
		}
	}
}

func (r *resyncRun) spoil(off, length uint64) {
	for _, rd := range r.reads {
		if rd.off < off+length && off < rd.off+rd.len {
			rd.spoiled = true
		}
	}
}

// measure brings the rate up to date, about once a second.
func (r *resyncRun) measure(now Instant) {
	if r.rateAt == 0 {
		r.rateAt, r.ratedAt = now, r.moved
		return
	}
	took := now - r.rateAt
	if took < rateEvery {
		return
	}
	newest := float64(r.moved-r.ratedAt) * 1e9 / float64(took)
	if r.rate == 0 {
		r.rate = newest
	}
	r.rate = 0.5*r.rate + 0.5*newest
	r.rateAt, r.ratedAt = now, r.moved
}

// refill gives a resync what its rate allows: all there is without a ceiling
// and while no client is busy; the floor while one is.
func (c *Core) refill(pr *peer) {
	r := pr.run
	if r == nil {
		return
	}
	rates := c.view.Rates
	if !rates.Set {
		rates = Rates{Max: c.cfg.ResyncMax, Min: c.cfg.ResyncMin}
	}
	rate := rates.Max
	defer func() {
		// A low rate is kept by small steps, not by long pauses.
		r.chunk = c.cfg.ResyncChunk
		if rate > 0 {
			r.chunk = int(min(int64(r.chunk), max(rate/8, resyncChunkMin)))
		}
	}()
	if c.busy() && rates.Min > 0 && (rate == 0 || rates.Min < rate) {
		rate = rates.Min
	}
	if rate == 0 {
		r.credit, r.since = resyncWindow, c.now
		return
	}
	elapsed := int64(c.now - r.since)
	if elapsed <= 0 {
		return
	}
	add := int64(float64(rate) * float64(elapsed) / 1e9)
	if add == 0 {
		return
	}
	r.since = c.now
	r.credit = min(r.credit+add, max(rate/4, resyncChunkMin))
}

// ClientAt says that a client was served at the instant without the core's
// knowing it: reads do not pass through the loop.
func (c *Core) ClientAt(at Instant) { c.p.requestAt = max(c.p.requestAt, at) }

// busy reports whether a client has asked for anything lately.
func (c *Core) busy() bool { return c.p.requestAt != 0 && c.now < c.p.requestAt+busyFor }

// readyResync asks for the next blocks of a resync, as far as window and rate
// allow.
func (c *Core) readyResync(pr *peer) {
	r := pr.run
	if r == nil || r.todo == nil || pr.state != peerStream || !c.heard(pr) || c.now < r.restUntil {
		return
	}
	c.refill(pr)
	c.again(pr)
	wrapped := false
	for len(r.reads) < resyncReads && r.inflight < resyncWindow && r.credit > 0 && !r.todo.Empty() {
		off, length, ok := r.todo.Next(r.cursor, uint64(r.chunk))
		if !ok {
			if wrapped {
				break
			}
			r.cursor, wrapped = 0, true
			continue
		}
		r.cursor = off + length
		if off >= c.view.Size {
			r.todo.ClearTouched(off, length)
			continue
		}
		length = min(length, c.view.Size-off)
		if r.readingAt(off, length) {
			continue
		}
		if c.aheadAt(off, length) {
			continue // its turn comes again
		}
		r.nextID++
		r.reads = append(r.reads, &blockRead{id: r.nextID, off: off, len: length})
		r.credit -= int64(length)
		c.blockReads = append(c.blockReads, BlockRead{Peer: pr.node, Stream: pr.stream, ID: r.nextID, Off: off, Len: length})
	}
	if r.todo.Empty() && len(r.reads) == 0 && len(r.flight) == 0 && !r.lastSent && pr.inconsistent && pr.next > c.last.Seq {
		r.lastSent = true
		r.askedAt = c.now
		c.early = append(c.early, Out{To: pr.node, Msg: &wire.Blocks{Epoch: c.p.epoch, Stream: pr.stream, AsOf: pr.next - 1, Last: true}})
	}
	if r.lastSent && c.now >= r.askedAt+Instant(c.cfg.RetryAfter) {
		r.lastSent = false // entries that were to bring blocks may have been under way
	}
}

func (r *resyncRun) readingAt(off, length uint64) bool {
	for _, rd := range r.reads {
		if rd.off < off+length && off < rd.off+rd.len {
			return true
		}
	}
	return false
}

// aheadAt reports whether a read of the range may show an entry that is not
// known to be committed: one that was applied before a restart, or, with ack
// local, any. Then the range is not read yet.
func (c *Core) aheadAt(off, length uint64) bool {
	ents := c.unapplied.after(c.commit)
	if c.view.Ack != AckLocal {
		ents = ents[:min(len(ents), int(max(c.ahead, c.commit)-c.commit))]
	}
	for i := range ents {
		if ents[i].overlaps(off, length) {
			return true
		}
	}
	return false
}

// BlocksRead brings what Ready asked for. The blocks are borrowed until the
// effects of the next Ready are performed. ok is false when the read failed.
func (c *Core) BlocksRead(now Instant, q BlockRead, blocks []wire.Block, ok bool) {
	c.advance(now)
	pr := c.peer(q.Peer)
	if pr == nil || !c.isPrimary() || pr.stream != q.Stream || pr.run == nil {
		return
	}
	r := pr.run
	i := 0
	for i < len(r.reads) && r.reads[i].id != q.ID {
		i++
	}
	if i == len(r.reads) {
		return
	}
	rd := r.reads[i]
	if !ok {
		r.reads = append(r.reads[:i], r.reads[i+1:]...)
		r.restUntil = now + Instant(c.cfg.RetryAfter)
		return // it stays to do
	}
	// It goes out only when all that the read may have seen has been sent, and
	// nothing that was committed while it lasted touches it: so it shows the
	// block as of the commit index. What is not committed may wait for this very
	// target to join; the block does not wait for it.
	if rd.spoiled || pr.next <= c.commit {
		if rd.spoiled {
			rd.spoils++
		}
		rd.spoiled, rd.waiting = false, true
		return
	}
	r.reads = append(r.reads[:i], r.reads[i+1:]...)
	r.todo.ClearTouched(rd.off, rd.len)
	r.sendID++
	r.flight = append(r.flight, blockFlight{id: r.sendID, len: rd.len})
	r.inflight += int64(rd.len)
	r.moved += int64(rd.len)
	for i := range blocks {
		if blocks[i].Payload == nil {
			// Zeroes cost the source a look and the link next to nothing.
			r.credit += int64(blocks[i].Len) / zeroDiscount * (zeroDiscount - 1)
		}
	}
	c.early = append(c.early, Out{To: pr.node, Msg: &wire.Blocks{
		Epoch: c.p.epoch, Stream: pr.stream, ID: r.sendID, AsOf: c.commit, Blocks: blocks,
	}})
}

// again asks anew for the blocks whose read was in vain, once nothing stands in
// the way.
func (c *Core) again(pr *peer) {
	for _, rd := range pr.run.reads {
		if rd.waiting && pr.next > c.commit && !c.aheadAt(rd.off, rd.len) {
			rd.waiting, rd.spoiled = false, false
			c.blockReads = append(c.blockReads, BlockRead{Peer: pr.node, Stream: pr.stream, ID: rd.id, Off: rd.off, Len: rd.len})
		}
	}
}

// resyncHolds reports whether new writes wait for a block that clients keep
// changing while it is read.
func (c *Core) resyncHolds() bool {
	for _, pr := range c.p.peers {
		if pr.run == nil || pr.state != peerStream || !c.heard(pr) || pr.next <= c.commit {
			continue // for a target that takes no entries nobody waits
		}
		for _, rd := range pr.run.reads {
			if rd.spoils >= resyncSpoils {
				return true
			}
		}
	}
	return false
}
