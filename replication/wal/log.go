package wal

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/invariant"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/wire"
)

const (
	segmentBytesDefault = 16 << 20
	// segmentBytesMin keeps room for a header and a few records.
	segmentBytesMin       = 4096
	pageBytes             = 4096 // of the page cache, at the least
	retentionBytesDefault = 256 << 20
	spareBytesDefault     = 32 << 20
)

// Log is an open log of one replica. See the package comment for which method
// may be called from where.
type Log struct {
	fs  vfs.FS
	dir string
	o   Options

	spare   atomic.Int64          // Options.SpareBytes, or what SetSpare said since
	failure atomic.Pointer[error] // set once, never cleared
	durable atomic.Uint64         // every entry up to here is fsynced
	syncs   atomic.Uint64         // fsyncs of records so far

	// syncMu is held through every fsync that makes entries durable, so that
	// none that began before a cut can report what the cut took away.
	syncMu  sync.Mutex
	syncing []*segment // scratch of Sync

	// mu guards what readers share with the writer. It is never held through
	// a system call.
	mu       sync.RWMutex
	segments []*segment // rising ordinals, without gaps; the last one is written to
	last     ident.Position
	history  []ident.EpochStart // the first element is Base's
	version  uint64             // rises when entries leave the log: a reader starts over
	dirDirty bool               // a segment file's directory entry may not be durable
	closed   bool

	w writer // owned by the goroutine that changes the log

	house house
}

// segment is one file of the log.
type segment struct {
	file  vfs.File
	name  string
	empty bool // Open found a header of zeroes
	void  bool // that is durable
	spare bool // prepared ahead: it has its room, and its directory entry is durable
	// written is up to where its blocks are known to have been written once, and
	// not only allocated: an fdatasync of them has no metadata to write.
	written int64

	header segmentHeader
	crc    uint32 // of the header

	// Guarded by Log.mu.
	index []uint32 // where entry base+1+i begins, in units of recordAlign
	end   int64    // first byte behind the last record
	dirty bool     // bytes were written since the last fsync began
	out   int64    // write-out has begun up to here
}

// lastSeq returns the seq of the segment's last entry, its base's without one.
func (s *segment) lastSeq() ident.Seq { return s.header.base.Seq + ident.Seq(len(s.index)) }

// offset returns where an entry of the segment begins.
func (s *segment) offset(seq ident.Seq) int64 {
	return int64(s.index[seq-s.header.base.Seq-1]) * recordAlign
}

// stop returns where an entry ends at the latest: where the next one begins.
// A cut record may lie between.
func (s *segment) stop(seq ident.Seq) int64 {
	if seq == s.lastSeq() {
		return s.end
	}
	return s.offset(seq + 1)
}

func (o Options) withDefaults() Options {
	if o.SegmentBytes == 0 {
		o.SegmentBytes = segmentBytesDefault
	}
	o.SegmentBytes = min(max(o.SegmentBytes, segmentBytesMin), segmentSizeMax) &^ (recordAlign - 1)
	switch {
	case o.RetentionBytes == 0:
		o.RetentionBytes = retentionBytesDefault
	case o.RetentionBytes < 0:
		o.RetentionBytes = 0
	}
	if o.SpareBytes == 0 {
		o.SpareBytes = spareBytesDefault
	}
	if o.NewID == nil {
		o.NewID = func() uint64 {
			var b [8]byte
			_, _ = rand.Read(b[:]) // never fails: it stops the process instead
			return binary.LittleEndian.Uint64(b[:])
		}
	}
	return o
}

// Create makes an empty log in dir, which is made when it is not there: its
// first entry will be base.Seq+1. The log is durable when Create returns. A
// Create that a crash cut short may be repeated. It returns ErrExists when
// there is a log.
func Create(fs vfs.FS, dir string, base ident.Position, o Options) (*Log, error) {
	if err := fs.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("wal: make %s: %w", dir, err)
	}
	l := newLog(fs, dir, o)
	found, err := l.openFiles()
	if err != nil {
		return nil, err
	}
	if len(found.live) > 0 {
		found.close()
		return nil, fmt.Errorf("wal: %s: %w", dir, ErrExists)
	}
	err = l.settle(found.free)
	l.house.adopt(found.free)
	if err == nil {
		err = l.begin(base, 1)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	// The first SyncDir is begin's; this one is for the directory itself.
	if err := fs.SyncDir(filepath.Dir(dir)); err != nil {
		return nil, errors.Join(fmt.Errorf("wal: sync %s: %w", filepath.Dir(dir), err), l.Close())
	}
	l.house.start()
	return l, nil
}

func newLog(fs vfs.FS, dir string, o Options) *Log {
	l := &Log{fs: fs, dir: dir, o: o.withDefaults()}
	l.spare.Store(l.o.SpareBytes)
	l.w.init()
	l.house.init(l)
	return l
}

// begin makes a root segment after base the only one, durably.
func (l *Log) begin(base ident.Position, ordinal uint64) error {
	seg, err := l.house.take(l.o.SegmentBytes)
	if err != nil {
		return l.fail("make a segment", err)
	}
	seg.header = segmentHeader{
		id: l.o.NewID(), ordinal: ordinal, volume: l.o.Volume, replica: l.o.Replica,
		base: base, durable: base.Seq, root: true, size: uint64(l.o.SegmentBytes),
	}
	seg.end = segmentHeaderSize
	if err := l.writeRoot(seg); err != nil {
		_ = seg.file.Close() // the log has failed, which is the error to tell
		return l.fail("begin a segment", err)
	}
	l.mu.Lock()
	l.segments = append(l.segments[:0:0], seg)
	l.last = base
	l.history = []ident.EpochStart{{Epoch: base.Epoch, First: base.Seq}}
	l.version++
	l.dirDirty = false
	l.mu.Unlock()
	l.durable.Store(uint64(base.Seq))
	l.w.chain, l.w.gen, l.w.allocated = seg.crc, 0, false
	return nil
}

func (l *Log) writeRoot(seg *segment) error {
	var b [segmentHeaderSize]byte
	seg.crc = seg.header.encode(&b)
	if _, err := seg.file.WriteAt(b[:], 0); err != nil {
		return err
	}
	if err := seg.file.Datasync(); err != nil {
		return err
	}
	return l.fs.SyncDir(l.dir)
}

// fail makes the log failed for ever and returns the error to hand on.
func (l *Log) fail(op string, err error) error {
	err = fmt.Errorf("wal: %s: %w: %s: %w", l.dir, ErrFailed, op, err)
	if !l.failure.CompareAndSwap(nil, &err) {
		return *l.failure.Load()
	}
	return err
}

// usable returns the error that every change ends with once one has failed.
func (l *Log) usable() error {
	if e := l.failure.Load(); e != nil {
		return *e
	}
	return nil
}

// Sync makes every entry that was appended before the call durable and
// returns the highest durable seq. Calls queue behind one another.
func (l *Log) Sync() (ident.Seq, error) {
	l.syncMu.Lock()
	defer l.syncMu.Unlock()
	return l.syncLocked()
}

// syncLocked is Sync for who holds syncMu.
func (l *Log) syncLocked() (ident.Seq, error) {
	if err := l.usable(); err != nil {
		return l.Durable(), err
	}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return l.Durable(), ErrClosed
	}
	target := l.last.Seq
	l.syncing = l.syncing[:0]
	for _, s := range l.segments {
		if s.dirty {
			s.dirty = false
			l.syncing = append(l.syncing, s)
		}
	}
	dirDirty := l.dirDirty
	l.dirDirty = false
	l.mu.Unlock()

	for _, s := range l.syncing {
		if err := s.file.Datasync(); err != nil {
			return l.Durable(), l.fail("sync", err)
		}
	}
	if len(l.syncing) > 0 {
		l.syncs.Add(1)
	}
	clear(l.syncing)
	if dirDirty {
		if err := l.fs.SyncDir(l.dir); err != nil {
			return l.Durable(), l.fail("sync the directory", err)
		}
	}
	invariant.Assert(uint64(target) >= l.durable.Load(), "wal: durable position falls from %d to %d without a cut", l.durable.Load(), target)
	l.durable.Store(uint64(target))
	return target, nil
}

// WriteOut begins to send to the disk what was appended, without waiting and
// without making anything durable: the next Sync then has little left to wait
// for. The page that is still being filled is left out.
func (l *Log) WriteOut() error {
	type piece struct {
		file    vfs.File
		off, to int64
	}
	var room [4]piece
	pieces := room[:0]
	if err := l.usable(); err != nil {
		return err
	}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return ErrClosed
	}
	for _, s := range l.segments {
		if to := s.end &^ (pageBytes - 1); s.dirty && s.out < to {
			pieces = append(pieces, piece{s.file, s.out, to})
			s.out = to
		}
	}
	l.mu.Unlock()
	for _, p := range pieces {
		// A segment that was cut or trimmed away meanwhile may be closed.
		if err := p.file.WriteOut(p.off, p.to-p.off, false); err != nil && !errors.Is(err, iofs.ErrClosed) {
			return l.fail("write out", err)
		}
	}
	return nil
}

// Truncate drops every entry after the given seq, for good: when it returns,
// no crash and no later append brings any of them back. What remains is
// durable. It returns ErrInvalid for a seq before Base.
func (l *Log) Truncate(after ident.Seq) error {
	if err := l.usable(); err != nil {
		return err
	}
	if after >= l.last.Seq {
		return nil
	}
	if base := l.Base(); after < base.Seq {
		return fmt.Errorf("wal: %w: cut after %d, but the log begins after %s", ErrInvalid, after, base)
	}
	l.syncMu.Lock()
	defer l.syncMu.Unlock()

	k := l.find(after + 1)
	seg := l.segments[k]
	off := seg.offset(after + 1)
	var r record
	if err := l.readHeader(seg, off, &r); err != nil {
		return l.fail("read the record to cut at", err)
	}
	dropped := slices.Clone(l.segments[k+1:])
	l.unpublish(k, after, off)

	// From the newest on, and each durable before the next: at every moment
	// the files hold a log without gaps.
	for i := len(dropped) - 1; i >= 0; i-- {
		if err := dropped[i].makeVoid(); err != nil {
			return l.fail("void a segment that was cut", err)
		}
	}
	if err := l.writeCut(seg, off, r.prev, l.w.gen+1); err != nil {
		return err
	}
	l.w.allocated = true
	if _, err := l.syncLocked(); err != nil {
		return err
	}
	l.house.retire(dropped)
	return nil
}

// unpublish takes the entries after a seq from the readers' sight.
func (l *Log) unpublish(k int, after ident.Seq, off int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	seg := l.segments[k]
	clear(l.segments[k+1:])
	l.segments = l.segments[:k+1]
	seg.index = seg.index[:after-seg.header.base.Seq]
	seg.end, seg.out = off, min(seg.out, off)
	for len(l.history) > 1 && l.history[len(l.history)-1].First > after {
		l.history = l.history[:len(l.history)-1]
	}
	l.last = ident.Position{Epoch: l.history[len(l.history)-1].Epoch, Seq: after}
	l.version++
	if ident.Seq(l.durable.Load()) > after {
		l.durable.Store(uint64(after))
	}
}

// writeCut writes the record after which the log goes on in a new branch.
func (l *Log) writeCut(seg *segment, off int64, prev, gen uint32) error {
	var b [recordHeaderSize]byte
	// Session is a nonce: a branch's chain is like no other's.
	cut := &wire.Entry{Kind: kindCut, Pos: l.last, Session: l.o.NewID()}
	crc := encodeRecord(b[:], cut, 0, ident.Seq(l.durable.Load()), seg.header.id, off, prev, gen)
	if _, err := seg.file.WriteAt(b[:], off); err != nil {
		return l.fail("write a cut", err)
	}
	l.w.chain, l.w.gen = crc, gen
	l.mu.Lock()
	seg.end, seg.dirty = off+recordHeaderSize, true
	l.mu.Unlock()
	return nil
}

// TrimTo says that nobody needs the entries up to seq any more. Whole segments
// of them are given back, as long as RetentionBytes of log remain. Entries that
// are not durable stay.
func (l *Log) TrimTo(seq ident.Seq) error {
	if err := l.usable(); err != nil {
		return err
	}
	seq = min(seq, l.Durable())
	left := l.Bytes()
	n := 0
	for ; n < len(l.segments)-1; n++ {
		s := l.segments[n]
		left -= s.end
		// The next segment becomes the head: its own header must be durable
		// before this one goes, which an entry of its own proves.
		if s.lastSeq() > seq || s.lastSeq() >= l.Durable() || left < l.o.RetentionBytes {
			break
		}
	}
	if n == 0 {
		return nil
	}
	gone := slices.Clone(l.segments[:n])
	l.mu.Lock()
	l.segments = append(l.segments[:0], l.segments[n:]...)
	clear(l.segments[len(l.segments):cap(l.segments)])
	base := l.segments[0].header.base
	k := 0
	for k+1 < len(l.history) && l.history[k+1].First <= base.Seq {
		k++
	}
	l.history = append([]ident.EpochStart{{Epoch: base.Epoch, First: base.Seq}}, l.history[k+1:]...)
	l.version++
	l.mu.Unlock()
	l.house.retire(gone)
	return l.usable()
}

// Reset empties the log, durably: it will go on after base, as a resync target
// does.
func (l *Log) Reset(base ident.Position) error {
	if err := l.usable(); err != nil {
		return err
	}
	l.syncMu.Lock()
	defer l.syncMu.Unlock()
	old := slices.Clone(l.segments)
	// The root segment voids all before it; that it is durable is the commit
	// point.
	if err := l.begin(base, old[len(old)-1].header.ordinal+1); err != nil {
		return err
	}
	l.house.retire(old)
	return l.usable()
}

// Close ends the housekeeping and closes the files. It syncs nothing.
func (l *Log) Close() error {
	l.house.stop()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	var errs []error
	for _, s := range l.segments {
		errs = append(errs, s.file.Close())
	}
	return errors.Join(errs...)
}

// Base returns the position just before the first entry.
func (l *Log) Base() ident.Position {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.segments[0].header.base
}

// First returns the seq of the first entry in the log, or the one that the
// first entry will have.
func (l *Log) First() ident.Seq { return l.Base().Seq + 1 }

// Last returns the position of the last entry, Base when there is none.
func (l *Log) Last() ident.Position {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.last
}

// Durable returns the highest seq that is fsynced.
func (l *Log) Durable() ident.Seq { return ident.Seq(l.durable.Load()) }

// History returns the epochs of the entries, each with its first seq. The
// first element is the epoch of Base; its First is Base's own seq, since where
// that epoch began the log no longer knows.
func (l *Log) History() []ident.EpochStart {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return slices.Clone(l.history)
}

// EpochAt returns the epoch of an entry in the log, or of Base; false for any
// other seq.
func (l *Log) EpochAt(seq ident.Seq) (ident.Epoch, bool) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if seq < l.segments[0].header.base.Seq || seq > l.last.Seq {
		return 0, false
	}
	i := len(l.history) - 1
	for i > 0 && l.history[i].First > seq {
		i--
	}
	return l.history[i].Epoch, true
}

// Bytes returns the bytes of the log's records and headers.
func (l *Log) Bytes() int64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	var n int64
	for _, s := range l.segments {
		n += s.end
	}
	return n
}

// find returns the segment that holds an entry. mu is held, or the caller is
// the writer.
func (l *Log) find(seq ident.Seq) int {
	i, _ := slices.BinarySearchFunc(l.segments, seq, func(s *segment, seq ident.Seq) int {
		if s.lastSeq() < seq {
			return -1
		}
		return 1
	})
	return i
}

// readHeader reads and verifies one record header.
func (l *Log) readHeader(seg *segment, off int64, r *record) error {
	var b [recordHeaderSize]byte
	if _, err := seg.file.ReadAt(b[:], off); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := decodeRecord(b[:], seg.header.id, off, r); err != nil {
		return fmt.Errorf("%w: %s at %d: %w", ErrCorrupt, seg.name, off, err)
	}
	return nil
}
