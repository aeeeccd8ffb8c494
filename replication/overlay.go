package replication

import (
	"slices"
	"sync"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/invariant"
	"github.com/blockstep/blockstep/replication/wire"
)

const (
	// chunkBits is the grain of the overlay's index: most requests fall into
	// one chunk, and a chunk gathers few entries.
	chunkBits = 16
	// bigChunks is the number of chunks beyond which an entry stands in the
	// list of big ones instead.
	bigChunks = 16
	// removedRing is how many of the newest applied entries are remembered, so
	// that a read which began before they were applied can tell whether they
	// touched its bytes.
	removedRing = 1024
	// spareLists bounds the emptied lists that are kept to be used again: as many
	// as small writes at random places have under way before the applier is done
	// with them, at 32 to 40 bytes each.
	spareLists = 16 << 10
)

// overlayEntry is one entry that is in the log and not yet, or not surely, in
// the backing store. Without a payload, a KindData entry is read from the log.
type overlayEntry struct {
	off, end uint64
	session  uint64
	request  uint64
	epoch    ident.Epoch
	crc      uint32
	kind     wire.Kind
	flags    uint8
	payload  *buf.Buf
}

// overlaps reports whether the entry touches the range. Markers never do.
func (e *overlayEntry) overlaps(off, end uint64) bool { return e.off < end && off < e.end }

// patch is one entry as a read saw it: it holds a reference of the payload.
type patch struct {
	seq      ident.Seq
	off, end uint64
	kind     wire.Kind
	noHole   bool // zeroes that keep their room
	payload  *buf.Buf
}

// span is the extent of an entry that has been applied.
type span struct{ off, end uint64 }

// overlay holds the entries behind the applied position in the order of their
// seqs, and finds those that touch a range. The loop adds and cuts at the end,
// the applier removes at the front, readers look.
type overlay struct {
	mu sync.Mutex
	// entries[head:] are the entries from seq first on, without a gap.
	entries []overlayEntry
	head    int
	first   ident.Seq
	chunks  map[uint64]seqList
	spare   []seqList // emptied lists, to be used again
	big     seqList
	bytes   int64 // memory of the payloads that are held
	limit   int64
	loadMax int // bytes of payloads, not held, that one round of the applier takes; 0: no bound

	// applying is the newest seq that the applier has begun to write.
	applying ident.Seq
	// removed remembers the extents of the newest entries that were removed:
	// of seq s at s%removedRing, for s >= removedFrom.
	removed     [removedRing]span
	removedFrom ident.Seq
}

func newOverlay(applied ident.Seq, limit int64) *overlay {
	return &overlay{
		first: applied + 1, applying: applied, removedFrom: applied + 1,
		chunks: make(map[uint64]seqList), limit: limit,
	}
}

// reset empties the overlay: the log begins anew after applied.
func (o *overlay) reset(applied ident.Seq) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := o.head; i < len(o.entries); i++ {
		o.dropLocked(&o.entries[i])
	}
	o.entries, o.head = o.entries[:0], 0
	clear(o.chunks)
	o.big = seqList{}
	o.first, o.applying, o.removedFrom = applied+1, applied, applied+1
}

func (o *overlay) lenLocked() int { return len(o.entries) - o.head }

// nextLocked returns the seq that the next entry must have.
func (o *overlay) nextLocked() ident.Seq { return o.first + ident.Seq(o.lenLocked()) }

func (o *overlay) atLocked(seq ident.Seq) *overlayEntry {
	return &o.entries[o.head+int(seq-o.first)]
}

// add appends entries. It retains the payloads that it keeps; beyond its limit
// it keeps none, and the log is read instead.
func (o *overlay) add(entries []wire.Entry) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range entries {
		o.addLocked(&entries[i], true)
	}
}

// addRef appends an entry whose payload is read from the log when it is needed.
func (o *overlay) addRef(e *wire.Entry) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.addLocked(e, false)
}

func (o *overlay) addLocked(e *wire.Entry, keep bool) {
	if next := o.nextLocked(); e.Pos.Seq != next {
		// Not a plain Assert: its arguments would be allocated for each entry.
		invariant.Assert(false, "overlay: entry %v where %d is next", e.Pos, next)
	}
	if o.head > 1024 && o.head > len(o.entries)/2 {
		n := copy(o.entries, o.entries[o.head:])
		clear(o.entries[n:])
		o.entries, o.head = o.entries[:n], 0
	}
	oe := overlayEntry{
		off: e.Off, end: e.End(), kind: e.Kind, flags: e.Flags, epoch: e.Pos.Epoch,
		session: e.Session, request: e.Request, crc: e.PayloadCRC,
	}
	if e.Kind == wire.KindMarker {
		oe.off, oe.end = 0, 0
	}
	if n := e.Payload.Size(); keep && n > 0 && o.bytes+n <= o.limit {
		oe.payload = e.Payload.Retain()
		o.bytes += n
	}
	o.entries = append(o.entries, oe)
	o.indexLocked(&oe, e.Pos.Seq)
}

func (o *overlay) indexLocked(e *overlayEntry, seq ident.Seq) {
	if e.off == e.end {
		return
	}
	from, to := e.off>>chunkBits, (e.end-1)>>chunkBits
	if to-from >= bigChunks {
		o.big.push(seq)
		return
	}
	for c := from; c <= to; c++ {
		list, ok := o.chunks[c]
		if !ok && len(o.spare) > 0 {
			list = o.spare[len(o.spare)-1]
			o.spare = o.spare[:len(o.spare)-1]
		}
		list.push(seq)
		o.chunks[c] = list
	}
}

// unindexLocked takes an entry out of the index. It stands at the front of its
// lists when it was applied and at their end when it was cut, so finding it is
// quick either way.
func (o *overlay) unindexLocked(e *overlayEntry, seq ident.Seq) {
	if e.off == e.end {
		return
	}
	from, to := e.off>>chunkBits, (e.end-1)>>chunkBits
	if to-from >= bigChunks {
		o.big.remove(seq)
		return
	}
	for c := from; c <= to; c++ {
		list := o.chunks[c]
		list.remove(seq)
		if len(list.seqs) > list.head {
			o.chunks[c] = list
			continue
		}
		delete(o.chunks, c)
		if len(o.spare) < spareLists {
			o.spare = append(o.spare, list)
		}
	}
}

// seqList is a rising list of seqs that loses its first or its last.
type seqList struct {
	seqs []ident.Seq
	head int
}

func (l *seqList) all() []ident.Seq { return l.seqs[l.head:] }

func (l *seqList) push(seq ident.Seq) {
	if l.head > 64 && l.head > len(l.seqs)/2 {
		n := copy(l.seqs, l.seqs[l.head:])
		l.seqs, l.head = l.seqs[:n], 0
	}
	if l.seqs == nil {
		l.seqs = make([]ident.Seq, 0, 4) // one is seldom all
	}
	l.seqs = append(l.seqs, seq)
}

func (l *seqList) remove(seq ident.Seq) {
	n := len(l.seqs)
	switch {
	case l.head < n && l.seqs[l.head] == seq:
		l.head++
	case l.head < n && l.seqs[n-1] == seq:
		l.seqs = l.seqs[:n-1]
	default:
		invariant.Assert(false, "overlay: entry %d is at neither end of its list", seq)
	}
	if l.head == len(l.seqs) {
		l.seqs, l.head = l.seqs[:0], 0
	}
}

// cut drops every entry after seq.
func (o *overlay) cut(seq ident.Seq) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.lenLocked() > 0 && o.nextLocked()-1 > seq {
		last := o.nextLocked() - 1
		invariant.Assert(last > o.applying, "overlay: entry %d is cut while it is applied", last)
		e := &o.entries[len(o.entries)-1]
		o.unindexLocked(e, last)
		o.dropLocked(e)
		o.entries = o.entries[:len(o.entries)-1]
	}
}

func (o *overlay) dropLocked(e *overlayEntry) {
	if e.payload != nil {
		o.bytes -= e.payload.Size()
		e.payload.Release()
	}
	*e = overlayEntry{}
}

// applyEntry is an entry on its way to the backing store.
type applyEntry struct {
	seq ident.Seq
	overlayEntry
}

// begin marks the next entries, up to to and within the bounds of one round (a
// small one of a calm applier), as being applied, and returns them in order with
// a reference of each payload.
func (o *overlay) begin(to ident.Seq, calm bool, dst []applyEntry) []applyEntry {
	entriesMax, bytesMax := applyBatchEntries, applyBatchBytes
	if calm {
		entriesMax, bytesMax = applyPaceEntries, applyPaceBytes
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	size, load := 0, 0
	for seq := o.first; seq <= to && seq < o.nextLocked(); seq++ {
		e := o.atLocked(seq)
		if e.kind == wire.KindData {
			size += int(e.end - e.off)
			if e.payload == nil {
				load += int(e.end - e.off)
			}
		}
		if len(dst) > 0 && (size > bytesMax || load > o.loadMax && o.loadMax > 0 || len(dst) >= entriesMax) {
			break
		}
		e.payload.Retain()
		dst = append(dst, applyEntry{seq: seq, overlayEntry: *e})
		o.applying = seq
	}
	return dst
}

// read appends the entries from the given seq on to dst, until they change the
// given bytes or more, each with a reference of its payload; as far as
// they are all held: it ends at the first that is not, and at a marker.
func (o *overlay) read(from ident.Seq, bytes int, dst []wire.Entry) []wire.Entry {
	o.mu.Lock()
	defer o.mu.Unlock()
	if from < o.first {
		return dst
	}
	for seq, got := from, 0; seq < o.nextLocked() && got < bytes; seq++ {
		e := o.atLocked(seq)
		if e.kind == wire.KindMarker || e.kind == wire.KindData && e.payload == nil {
			break
		}
		dst = append(dst, wire.Entry{
			Pos: ident.Position{Epoch: e.epoch, Seq: seq}, Kind: e.kind, Flags: e.flags, Off: e.off, Len: e.end - e.off,
			Session: e.session, Request: e.request, PayloadCRC: e.crc, Payload: e.payload.Retain(),
		})
		got += int(e.end-e.off) + entryMemory
	}
	return dst
}

// calm reports whether little waits to be applied.
func (o *overlay) calm() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.lenLocked() <= applyCalmEntries && o.bytes <= applyCalmBytes
}

// remove drops the entries up to seq, which are in the backing store now.
func (o *overlay) remove(seq ident.Seq) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.lenLocked() > 0 && o.first <= seq {
		e := &o.entries[o.head]
		o.removed[o.first%removedRing] = span{e.off, e.end}
		o.unindexLocked(e, o.first)
		o.dropLocked(e)
		o.head++
		o.first++
		if o.first > removedRing && o.removedFrom < o.first-removedRing {
			o.removedFrom = o.first - removedRing
		}
	}
	if o.head == len(o.entries) {
		o.entries, o.head = o.entries[:0], 0
	}
}

// look appends what overlaps the range to dst, in order of seq, each with a
// reference of its payload; entries above upTo are left out, and so may be
// those that a newer one with data covers. It returns the
// newest seq that it considered: what comes later, a reader checks with
// touched.
func (o *overlay) look(off, end uint64, upTo ident.Seq, dst []patch) ([]patch, ident.Seq) {
	o.mu.Lock()
	defer o.mu.Unlock()
	newest := min(o.nextLocked()-1, upTo)
	if o.lenLocked() == 0 || off >= end {
		return dst, newest
	}
	base := len(dst)
	from, to := off>>chunkBits, (end-1)>>chunkBits
	if to-from >= uint64(len(o.chunks)) && to-from > 4 {
		// A range wider than the index: walk the entries.
		for seq := o.first; seq <= newest; seq++ {
			dst = o.lookOneLocked(seq, off, end, upTo, dst)
		}
		return dst, newest
	}
	if from == to && len(o.big.all()) == 0 {
		chunk := o.chunks[from]
		return o.lookBackLocked(chunk.all(), off, end, upTo, dst), newest
	}
	lists := 0
	if big := o.big.all(); len(big) > 0 {
		lists++
		for _, seq := range big {
			dst = o.lookOneLocked(seq, off, end, upTo, dst)
		}
	}
	for c := from; c <= to; c++ {
		chunk, ok := o.chunks[c]
		if ok {
			lists++
		}
		for _, seq := range chunk.all() {
			// An entry stands in every chunk that it touches: take it in the
			// first of them that the range touches.
			if e := o.atLocked(seq); max(e.off>>chunkBits, from) == c {
				dst = o.lookOneLocked(seq, off, end, upTo, dst)
			}
		}
	}
	if lists > 1 {
		slices.SortFunc(dst[base:], func(a, b patch) int {
			if a.seq < b.seq {
				return -1
			}
			return 1
		})
	}
	return dst, newest
}

// lookBackLocked is look for a range that one list knows all of: from the newest
// entry to one with data that covers the range, behind which nothing can be
// seen. A block that is written over and over is so found in one step.
func (o *overlay) lookBackLocked(seqs []ident.Seq, off, end uint64, upTo ident.Seq, dst []patch) []patch {
	base := len(dst)
	for i := len(seqs) - 1; i >= 0; i-- {
		n := len(dst)
		dst = o.lookOneLocked(seqs[i], off, end, upTo, dst)
		if len(dst) > n && dst[n].kind == wire.KindData && dst[n].off <= off && dst[n].end >= end {
			break
		}
	}
	slices.Reverse(dst[base:])
	return dst
}

func (o *overlay) lookOneLocked(seq ident.Seq, off, end uint64, upTo ident.Seq, dst []patch) []patch {
	e := o.atLocked(seq)
	if seq > upTo || !e.overlaps(off, end) {
		return dst
	}
	return append(dst, patch{seq: seq, off: e.off, end: e.end, kind: e.kind, noHole: e.flags&wire.FlagNoHole != 0, payload: e.payload.Retain()})
}

// touched reports whether an entry after newest, which a reader has not seen,
// may have changed the range in the backing store by now.
func (o *overlay) touched(off, end uint64, newest ident.Seq) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.applying <= newest {
		return false
	}
	if newest+1 < o.removedFrom {
		return true // too long ago to tell
	}
	for seq := newest + 1; seq <= o.applying; seq++ {
		if seq < o.first {
			if s := o.removed[seq%removedRing]; s.off < end && off < s.end {
				return true
			}
			continue
		}
		if o.atLocked(seq).overlaps(off, end) {
			return true
		}
	}
	return false
}

// stats returns the number of entries and the payload bytes in memory.
func (o *overlay) stats() (entries int, bytes int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.lenLocked(), o.bytes
}

// releasePatches gives the references back.
func releasePatches(ps []patch) {
	for i := range ps {
		ps[i].payload.Release()
		ps[i].payload = nil
	}
}
