package wal

import (
	"fmt"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

const (
	// groupMax is how many entries go into one write: with a header, a payload and
	// padding each they stay below the kernel's limit of 1024 buffers.
	groupMax = 256
	// aheadBytes is how many blocks of a new segment are written, as zeroes, ahead
	// of the records while fsyncs are frequent: else each of them would have to
	// commit the file system's journal (some 250 µs), since blocks that are only
	// allocated became written ones.
	aheadBytes = 256 << 10
	// oftenBytes is how much is appended between two looks at how many fsyncs
	// there were, and oftenSyncs how many of them are frequent.
	oftenBytes = 128 << 10
	oftenSyncs = 4
)

// writer is what the goroutine that changes the log needs between calls.
type writer struct {
	chain     uint32 // CRC of the last record, or of the segment header
	gen       uint32 // number of the branch
	allocated bool   // the active segment has its room
	often     bool   // fsyncs are frequent
	looked    int64  // bytes appended since that was judged
	syncs     uint64 // Log.syncs then

	slab    []byte   // record headers of one group
	iov     [][]byte // reused; emptied after each write, so that it keeps no payload alive
	offsets []uint32 // of the group's entries
	start   int64    // where the group begins in the active segment
	at      int64    // where it ends
	header  [segmentHeaderSize]byte
}

// padding is never written to, so that it takes no memory.
var padding [aheadBytes + pageBytes]byte

func (w *writer) init() {
	w.slab = make([]byte, 0, groupMax*recordHeaderSize)
	w.iov = make([][]byte, 0, 3*groupMax+2)
	w.offsets = make([]uint32, 0, groupMax)
}

// Append writes entries to the log file, in one system call for each segment
// that they touch; it does not sync. durable is the caller's durable position,
// which the records carry as evidence for recovery. The payloads are not
// copied and not kept, and their CRCs are taken as given.
//
// The first entry's seq must follow the log's last one, and no epoch may fall:
// otherwise it returns ErrInvalid and writes nothing.
func (l *Log) Append(entries []wire.Entry, durable ident.Seq) error {
	if err := l.usable(); err != nil {
		return err
	}
	if err := l.judge(entries); err != nil {
		return err
	}
	durable = min(durable, l.Durable())
	w := &l.w
	seg := l.active()
	w.start, w.at = seg.end, seg.end
	first := 0
	for i := range entries {
		e := &entries[i]
		size := recordSize(e.PayloadLen())
		fits := w.at+size <= int64(seg.header.size)
		if !fits || len(w.offsets) == groupMax {
			if err := l.flush(seg, entries[first:i]); err != nil {
				return err
			}
			first = i
		}
		if !fits {
			next, err := l.roll(seg, size, durable)
			if err != nil {
				return err
			}
			seg = next
		}
		w.add(e, durable, seg.header.id, size)
	}
	return l.flush(seg, entries[first:])
}

// judge refuses entries that would break the log.
func (l *Log) judge(entries []wire.Entry) error {
	last := l.last // the writer alone changes it
	for i := range entries {
		e := &entries[i]
		if e.Pos.Seq != last.Seq+1 || e.Pos.Epoch < last.Epoch {
			return fmt.Errorf("wal: %w: entry %s does not follow %s", ErrInvalid, e.Pos, last)
		}
		if n := e.PayloadLen(); n > payloadMax {
			return fmt.Errorf("wal: %w: entry %s has %d bytes of payload, the limit is %d", ErrInvalid, e.Pos, n, payloadMax)
		}
		if e.Kind == kindCut {
			return fmt.Errorf("wal: %w: entry %s has kind %d", ErrInvalid, e.Pos, e.Kind)
		}
		last = e.Pos
	}
	return nil
}

func (l *Log) active() *segment { return l.segments[len(l.segments)-1] }

// add puts one record behind the group.
func (w *writer) add(e *wire.Entry, durable ident.Seq, id uint64, size int64) {
	n := len(w.slab)
	w.slab = w.slab[:n+recordHeaderSize]
	h := w.slab[n:]
	payload := e.PayloadLen()
	w.chain = encodeRecord(h, e, payload, durable, id, w.at, w.chain, w.gen)
	w.iov = append(w.iov, h)
	if payload > 0 {
		w.iov = append(w.iov, e.Payload.B)
		if pad := size - recordHeaderSize - int64(payload); pad > 0 {
			w.iov = append(w.iov, padding[:pad])
		}
	}
	w.offsets = append(w.offsets, uint32(w.at/recordAlign))
	w.at += size
}

// flush writes the group and shows its entries to the readers.
func (l *Log) flush(seg *segment, entries []wire.Entry) error {
	w := &l.w
	if len(w.iov) == 0 {
		return nil
	}
	if !w.allocated {
		// Lazily, so that a volume without writes takes no room.
		if err := seg.file.Allocate(0, int64(seg.header.size)); err != nil {
			return l.fail("allocate a segment", err)
		}
		w.allocated = true
	}
	// Up to the end of its page: the page of a segment that is used again may
	// have left the page cache, and a part of it alone would have to wait for the
	// rest to be read from the disk. Where the group begins, the one before it
	// has done so.
	pad := -w.at & (pageBytes - 1)
	if w.judgeSyncs(l.syncs.Load()); w.often && w.at+pad > seg.written {
		pad += aheadBytes
	}
	if pad = min(pad, int64(seg.header.size)-w.at); pad > 0 {
		w.iov = append(w.iov, padding[:pad])
	}
	if _, err := seg.file.WritevAt(w.iov, w.start); err != nil {
		return l.fail("append", err)
	}
	seg.written = max(seg.written, w.at+pad)
	l.mu.Lock()
	seg.index = append(seg.index, w.offsets...)
	seg.end, seg.dirty = w.at, true
	for i := range entries {
		pos := entries[i].Pos
		if pos.Epoch != l.last.Epoch {
			l.history = append(l.history, ident.EpochStart{Epoch: pos.Epoch, First: pos.Seq})
		}
		l.last = pos
	}
	l.mu.Unlock()
	clear(w.iov)
	w.slab, w.iov, w.offsets, w.start = w.slab[:0], w.iov[:0], w.offsets[:0], w.at
	if w.at > int64(seg.header.size)/2 {
		l.house.want()
	}
	return nil
}

// judgeSyncs sees, with each group, whether fsyncs are frequent.
func (w *writer) judgeSyncs(syncs uint64) {
	if w.looked += w.at - w.start; w.looked >= oftenBytes {
		w.often, w.looked, w.syncs = syncs-w.syncs >= oftenSyncs, 0, syncs
	}
}

// roll begins the next segment, for an entry of the given record size. Its
// header is written together with its first records.
func (l *Log) roll(old *segment, size int64, durable ident.Seq) (*segment, error) {
	w := &l.w
	room := max(l.o.SegmentBytes, segmentHeaderSize+size)
	seg, err := l.house.take(room)
	if err != nil {
		return nil, l.fail("make a segment", err)
	}
	base := l.last
	seg.header = segmentHeader{
		id: l.o.NewID(), ordinal: old.header.ordinal + 1, volume: l.o.Volume, replica: l.o.Replica,
		base: base, durable: durable, prev: w.chain, gen: w.gen, size: uint64(room),
	}
	seg.crc = seg.header.encode(&w.header)
	seg.end = segmentHeaderSize
	w.iov = append(w.iov, w.header[:])
	w.chain, w.start, w.at, w.allocated = seg.crc, 0, segmentHeaderSize, seg.spare
	l.mu.Lock()
	l.segments = append(l.segments, seg)
	l.dirDirty = l.dirDirty || !seg.spare
	l.mu.Unlock()
	return seg, nil
}
