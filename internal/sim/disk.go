package sim

import (
	"math/rand/v2"
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/bitmap"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// disk is what one replica has on its disk: what the page cache holds survives
// the process, what was fsynced survives the machine.
type disk struct {
	meta  metaFile
	log   logFile
	store storeFile
	ckpt  checkpoint
	// failed: every write and fsync returns an error from now on.
	failed bool
	slowTo int64 // fsyncs that begin before then take long
	hungTo int64 // nothing returns before then
	// storeHungTo is the same for the backing store, on a device of its own.
	storeHungTo int64
}

// metaFile is always written and fsynced as one.
type metaFile struct {
	core.Meta
	replica     ident.Replica
	incarnation ident.Incarnation
	bootID      uint64
	clean       bool
	failed      string
}

// checkpoint is what core.Snapshot says, durable as a whole (two slots).
type checkpoint = core.Snapshot

// logFile is the log: entries base+1 … in the page cache, those up to durable
// on the platter. A cut that no fsync has followed may be undone by a power
// cut: tail then comes back.
type logFile struct {
	base    ident.Position
	ents    []wire.Entry
	durable ident.Seq
	cuts    uint32 // counts cuts, so that an fsync knows of one in between
	tail    []wire.Entry
	tailAt  ident.Seq // tail follows this entry
	// told is the highest durable position that a record names, toldBy that
	// record; rot, if not zero, is a record that does not verify any more.
	told, toldBy, rot ident.Seq
}

// newDisk is an empty disk with a replica that was made on it just now.
func (s *Sim) newDisk(id ident.Replica, bootID uint64) disk {
	d := disk{meta: metaFile{replica: id, bootID: bootID, clean: true}}
	d.store.cur = make([]ident.Position, s.blocksMax())
	d.store.durable = make([]ident.Position, s.blocksMax())
	return d
}

// blocksMax is how many blocks the volume may come to have.
func (s *Sim) blocksMax() int { return s.opt.Blocks + s.opt.Grow }

// holds reports whether the log has, or had and has recycled, the entry p.
func (d *disk) holds(p ident.Position) bool {
	if e := d.log.at(p.Seq); e != nil {
		return e.Pos == p
	}
	if p.Seq >= d.log.base.Seq {
		return p == d.log.base
	}
	return d.epochAt(p.Seq) == p.Epoch
}

// epochAt returns the epoch of an entry below the log's base.
func (d *disk) epochAt(seq ident.Seq) (epoch ident.Epoch) {
	for _, e := range d.ckpt.History {
		if e.First <= seq {
			epoch = e.Epoch
		}
	}
	return epoch
}

// vouched is the highest position of which the disk itself says that it was
// durable: a record at or below it that does not verify is corruption.
func (d *disk) vouched() ident.Seq {
	to := d.ckpt.Applied.Seq
	if d.log.toldBy <= d.log.last().Seq {
		to = max(to, d.log.told)
	}
	return min(to, d.log.last().Seq)
}

// pos returns the position of an entry, if it is here.
func (l *logFile) pos(seq ident.Seq) (ident.Position, bool) {
	if e := l.at(seq); e != nil {
		return e.Pos, true
	}
	return l.base, seq == l.base.Seq
}

// broken: it has failed, whether its replica has noticed or not yet.
func (d *disk) broken() bool { return d.failed || d.meta.failed != "" || d.log.rotten() }

func (l *logFile) rotten() bool { return l.rot > l.base.Seq && l.rot <= l.last().Seq }

func (l *logFile) last() ident.Position {
	if n := len(l.ents); n > 0 {
		return l.ents[n-1].Pos
	}
	return l.base
}

// at returns the entry seq, or nil when it is not here.
func (l *logFile) at(seq ident.Seq) *wire.Entry {
	if seq <= l.base.Seq || seq > l.base.Seq+ident.Seq(len(l.ents)) {
		return nil
	}
	return &l.ents[seq-l.base.Seq-1]
}

// holds reports whether the log has, or had and has recycled, the entry p.
func (l *logFile) holds(p ident.Position) bool {
	if p.Seq <= l.base.Seq {
		return true
	}
	e := l.at(p.Seq)
	return e != nil && e.Pos == p
}

func (l *logFile) append(e wire.Entry) {
	e.Payload.Retain() // ours for good: the pool must not get it back
	if l.durable > l.told || l.toldBy > e.Pos.Seq {
		l.told, l.toldBy = l.durable, e.Pos.Seq
	}
	l.ents = append(l.ents, e)
}

func (l *logFile) cut(to ident.Seq) {
	l.cuts++
	if to < l.durable {
		from := to - l.base.Seq
		old := append([]wire.Entry(nil), l.ents[from:l.durable-l.base.Seq]...)
		l.tail, l.tailAt = append(old, l.tail...), to
		l.durable = to
	}
	l.ents = l.ents[:to-l.base.Seq]
	if l.rot > to {
		l.rot = 0
	}
}

// synced says that an fsync which began at the given state has returned.
func (l *logFile) synced(seq ident.Seq, cuts uint32) bool {
	if cuts != l.cuts {
		return false
	}
	l.durable = max(l.durable, min(seq, l.last().Seq))
	l.tail = nil
	return true
}

// reset begins the log anew after base, durably.
func (l *logFile) reset(base ident.Position) {
	l.cuts++
	l.base, l.ents, l.durable, l.tail = base, nil, base.Seq, nil
	l.told, l.toldBy, l.rot = 0, 0, 0
}

func (l *logFile) trim(to ident.Seq) {
	if to <= l.base.Seq {
		return
	}
	n := to - l.base.Seq
	l.base = l.ents[n-1].Pos
	l.ents = append([]wire.Entry(nil), l.ents[n:]...)
	l.durable = max(l.durable, to)
}

// powerCut keeps what was fsynced and any part of the rest: records chain, so
// what verifies afterwards is a prefix of the new log, or of the old one.
func (l *logFile) powerCut(r *rand.Rand) {
	if len(l.tail) > 0 && r.IntN(2) == 0 {
		k := r.IntN(len(l.tail) + 1)
		l.ents = append(l.ents[:l.tailAt-l.base.Seq:l.tailAt-l.base.Seq], l.tail[:k]...)
	} else if lost := int(l.last().Seq - max(l.durable, l.base.Seq)); lost > 0 {
		keep := 0
		if r.IntN(3) > 0 {
			keep = r.IntN(lost + 1)
		}
		l.ents = l.ents[:len(l.ents)-lost+keep]
	}
	l.tail = nil
	l.durable = l.last().Seq
}

// storeFile is the backing store: for each block the position of the entry
// that wrote it last, and what was written since the last fsync.
type storeFile struct {
	cur     []ident.Position
	durable []ident.Position
	dirty   []blockWrite
	applied ident.Seq // newest entry that was ever applied to cur in full (the checker's, not the replica's)
}

type blockWrite struct {
	block int
	pos   ident.Position
}

func (f *storeFile) write(block int, p ident.Position) {
	f.cur[block] = p
	f.dirty = append(f.dirty, blockWrite{block, p})
}

// synced makes durable what was written before an fsync that began when
// n writes were dirty.
func (f *storeFile) synced(n int) {
	for _, w := range f.dirty[:n] {
		f.durable[w.block] = w.pos
	}
	f.dirty = f.dirty[:copy(f.dirty, f.dirty[n:])]
}

// powerCut keeps any subset of the writes that were not fsynced.
func (f *storeFile) powerCut(r *rand.Rand) {
	copy(f.cur, f.durable)
	for _, w := range f.dirty {
		if r.IntN(2) == 0 {
			f.cur[w.block] = w.pos
		}
	}
	copy(f.durable, f.cur)
	f.dirty = f.dirty[:0]
}

func (d *disk) powerCut(r *rand.Rand) {
	d.log.powerCut(r)
	d.store.powerCut(r)
}

// start is what a replica that opens this disk hands to core.New; the log has
// been fsynced before.
func (d *disk) start(fresh bool) core.Start {
	at := d.ckpt.Applied
	if l := &d.log; at.Seq > l.last().Seq || at.Seq < l.base.Seq || !l.holds(at) {
		// It died between the checkpoint of a resync target and the reset of
		// its log.
		l.reset(at)
	}
	d.log.durable, d.log.tail = d.log.last().Seq, nil
	st := core.Start{
		Promise: d.meta.Promise, Amnesiac: d.meta.Amnesiac,
		Base: d.log.base, Last: d.log.last(), Durable: d.log.durable, Applied: at.Seq,
		Failed: d.meta.failed, Fresh: fresh, Dedup: slices.Clone(d.ckpt.Dedup), DedupFloor: d.ckpt.DedupFloor,
		History: slices.Clone(d.ckpt.History),
	}
	if len(d.ckpt.Changes) > 0 {
		st.Changes = must(bitmap.UnmarshalChanges(d.ckpt.Changes))
	}
	if len(d.ckpt.Remaining) > 0 {
		st.Remaining = must(bitmap.Unmarshal(d.ckpt.Remaining))
	}
	epoch := func(p ident.Position) {
		if n := len(st.History); n == 0 || p.Epoch > st.History[n-1].Epoch {
			st.History = append(st.History, ident.EpochStart{Epoch: p.Epoch, First: p.Seq})
		}
	}
	epoch(d.log.base)
	for i := range d.log.ents {
		e := &d.log.ents[i]
		epoch(e.Pos)
		if e.Pos.Seq <= at.Seq {
			continue
		}
		st.Tail = append(st.Tail, *e)
		if e.Session != 0 {
			st.Dedup = append(st.Dedup, core.DedupEntry{Session: e.Session, Request: e.Request, Seq: e.Pos.Seq})
		}
	}
	return st
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
