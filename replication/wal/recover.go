package wal

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
)

// files is what a directory holds, after a look at the first sectors.
type files struct {
	live []*segment // rising ordinals, from the newest root (or the oldest) on
	free []*segment // hold no segment, or one that a root has made void
}

func (f *files) close() {
	for _, s := range append(f.live, f.free...) {
		_ = s.file.Close() // nothing was written
	}
}

// openFiles opens all segment files and sorts them.
func (l *Log) openFiles() (found files, err error) {
	names, err := l.fs.List(l.dir)
	if err != nil {
		return found, fmt.Errorf("wal: list %s: %w", l.dir, err)
	}
	defer func() {
		if err != nil {
			found.close()
			found = files{}
		}
	}()
	for _, name := range names {
		if _, ok := fileNumber(name); !ok {
			continue
		}
		if err := l.openFile(name, &found); err != nil {
			return found, fmt.Errorf("wal: open %s: %w", filepath.Join(l.dir, name), err)
		}
	}
	slices.SortFunc(found.live, func(a, b *segment) int { return cmp.Compare(a.header.ordinal, b.header.ordinal) })
	root := 0
	for i, s := range found.live {
		if i > 0 && s.header.ordinal == found.live[i-1].header.ordinal {
			return found, fmt.Errorf("wal: %w: %s and %s both are segment %d", ErrCorrupt, found.live[i-1].name, s.name, s.header.ordinal)
		}
		if s.header.root {
			root = i
		}
	}
	found.free = append(found.free, found.live[:root]...)
	found.live = found.live[root:]
	return found, nil
}

func (l *Log) openFile(name string, found *files) error {
	f, err := l.fs.Open(filepath.Join(l.dir, name), 0)
	if err != nil {
		return err
	}
	s := &segment{file: f, name: name, end: segmentHeaderSize}
	found.free = append(found.free, s) // so that it is closed in any case
	var b [segmentHeaderSize]byte
	if _, err := f.ReadAt(b[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	var ok bool
	s.header, s.crc, ok, err = decodeSegmentHeader(&b)
	s.empty = !ok && err == nil
	if err != nil || !ok {
		return err
	}
	if s.header.volume != l.o.Volume || s.header.replica != l.o.Replica {
		return fmt.Errorf("%w: it is of volume %x, replica %x; expected %x, %x",
			ErrForeign, s.header.volume, s.header.replica, l.o.Volume, l.o.Replica)
	}
	found.free = found.free[:len(found.free)-1]
	found.live = append(found.live, s)
	return nil
}

// Open opens a log and recovers it, as docs/format/wal.md says in steps. When
// it returns, all that is in the log is durable. The errors are ErrNoLog,
// ErrCorrupt, ErrNewer, ErrForeign, ErrFailed for a disk that fails now, and
// the file system's own.
func Open(fs vfs.FS, dir string, o Options) (*Log, Recovery, error) {
	l := newLog(fs, dir, o)
	found, err := l.openFiles()
	if err != nil {
		return nil, Recovery{}, err
	}
	if len(found.live) == 0 {
		found.close()
		return nil, Recovery{}, fmt.Errorf("wal: %s: %w", dir, ErrNoLog)
	}
	rec, err := l.recover(found.live)
	if err == nil {
		err = l.settle(found.free)
	}
	if err != nil {
		found.close()
		return nil, Recovery{}, err
	}
	l.house.adopt(found.free)
	for _, s := range found.live {
		l.house.adoptName(s.name)
	}
	l.house.start()
	return l, rec, nil
}

// settle makes durable that files hold no segment. A process that was killed
// may have voided them in the page cache only: after a power cut they would be
// back, behind a log that has been said to end before them.
func (l *Log) settle(free []*segment) error {
	for _, s := range free {
		if err := s.file.Datasync(); err != nil {
			return l.fail("sync a free segment", err)
		}
		s.void = s.empty
	}
	return nil
}

// branch is a place in the log, while it is walked.
type branch struct {
	seg   int // index of the segment
	off   int64
	last  ident.Position
	chain uint32
	gen   uint32
}

// walk is the state of a recovery.
type walk struct {
	l       *Log
	segs    []*segment
	win     window
	at      branch             // behind the last record that verifies
	history []ident.EpochStart // as of at
	durable ident.Seq          // the highest durable position in verified records
	genMax  uint32
	bad     *branch // the first place where a payload does not verify
	badErr  error   // and how
	stop    error   // why the walk ended at at
}

// recover walks the segments and brings log and files to one state.
func (l *Log) recover(segs []*segment) (Recovery, error) {
	first := segs[0].header
	w := &walk{
		l: l, segs: segs,
		at:      branch{off: segmentHeaderSize, last: first.base, chain: segs[0].crc, gen: first.gen},
		history: []ident.EpochStart{{Epoch: first.base.Epoch, First: first.base.Seq}},
		durable: first.durable,
	}
	if err := w.run(); err != nil {
		return Recovery{}, err
	}
	proven, stale, err := w.evidence()
	if err != nil {
		return Recovery{}, err
	}
	proven = max(proven, w.durable, l.o.DurableFloor)
	if w.bad != nil {
		w.stop = w.badErr
		stale += w.cutBack()
	}
	if proven > w.at.last.Seq {
		return Recovery{}, fmt.Errorf("wal: %w: entry %d was durable, but the log ends at %s: %w",
			ErrCorrupt, proven, w.at.last, w.stop)
	}
	kept := segs[:w.at.seg+1]
	l.segments, l.last, l.history = slices.Clone(kept), w.at.last, w.history
	l.w.chain, l.w.gen = w.at.chain, w.at.gen
	if err := w.cut(stale > 0 || len(kept) < len(segs)); err != nil {
		return Recovery{}, err
	}
	size, err := l.active().file.Size()
	if err != nil {
		return Recovery{}, fmt.Errorf("wal: %s: %w", l.active().name, err)
	}
	l.w.allocated = size >= int64(l.active().header.size)
	// What a killed process had written is in the page cache only. Directory
	// entries likewise.
	for _, s := range kept {
		s.dirty, s.written = s.lastSeq() > w.durable || s == l.active(), s.end
	}
	l.dirDirty = true
	if _, err := l.Sync(); err != nil {
		return Recovery{}, err
	}
	return Recovery{
		Base: first.base, Last: l.last, History: l.History(), Durable: min(w.durable, l.last.Seq), CutBytes: stale,
	}, nil
}

// run follows the chain to its end.
func (w *walk) run() error {
	for i, s := range w.segs {
		if i > 0 {
			if w.ends(w.link(s, i)) {
				return nil
			}
		}
		if err := w.segment(s); err != nil {
			return err
		}
	}
	return nil
}

// ends notes why the chain does not go on at a place, if it does not.
func (w *walk) ends(why error) bool {
	if why != nil {
		w.stop = fmt.Errorf("%s at %d: %w", w.segs[w.at.seg].name, w.at.off, why)
	}
	return why != nil
}

// link judges whether a segment goes on where the walk has come to.
func (w *walk) link(s *segment, i int) error {
	before := w.segs[i-1].header
	switch h := s.header; {
	case h.ordinal != before.ordinal+1:
		return fmt.Errorf("segment %d is missing, %d follows", before.ordinal+1, h.ordinal)
	case h.base != w.at.last || h.prev != w.at.chain || h.gen != w.at.gen:
		return fmt.Errorf("segment %d begins after %s (CRC %08x, branch %d), the one before ends at %s (%08x, %d): %w",
			h.ordinal, h.base, h.prev, h.gen, w.at.last, w.at.chain, w.at.gen, w.stop)
	}
	w.durable = max(w.durable, s.header.durable)
	w.at.seg, w.at.off, w.at.chain = i, segmentHeaderSize, s.crc
	return nil
}

// segment follows the chain to the end of one segment.
func (w *walk) segment(s *segment) error {
	size, err := s.file.Size()
	if err != nil {
		return fmt.Errorf("wal: %s: %w", s.name, err)
	}
	w.win.reset(s.file, size)
	for {
		head, err := w.win.at(w.at.off, recordHeaderSize)
		if err != nil {
			return fmt.Errorf("wal: read %s: %w", s.name, err)
		}
		var r record
		if w.ends(w.judge(head, s, size, &r)) {
			s.end = w.at.off
			return nil
		}
		if err := w.payload(s, &r); err != nil {
			return err
		}
		w.accept(s, &r)
	}
}

// judge says whether a header is the next record of the chain.
func (w *walk) judge(head []byte, s *segment, size int64, r *record) error {
	if err := decodeRecord(head, s.header.id, w.at.off, r); err != nil {
		return err
	}
	pos, cut := r.entry.Pos, r.entry.Kind == kindCut
	switch {
	case r.prev != w.at.chain:
		return fmt.Errorf("record is chained to %08x, the one before has %08x", r.prev, w.at.chain)
	case cut && (pos != w.at.last || r.gen <= w.at.gen || r.payloadLen != 0):
		return fmt.Errorf("cut after %s into branch %d follows %s in branch %d", pos, r.gen, w.at.last, w.at.gen)
	case !cut && r.gen != w.at.gen:
		return fmt.Errorf("record of branch %d in branch %d", r.gen, w.at.gen)
	case !cut && (pos.Seq != w.at.last.Seq+1 || pos.Epoch < w.at.last.Epoch):
		return fmt.Errorf("record is %s, the one before is %s", pos, w.at.last)
	case r.durable >= pos.Seq && !cut:
		return fmt.Errorf("record %s says that %d was durable before it", pos, r.durable)
	case w.at.off+r.size() > size:
		return fmt.Errorf("record %s has %d bytes of payload, the file ends before", pos, r.payloadLen)
	}
	return nil
}

// payload verifies a payload. One that does not verify may be a torn tail: the
// walk goes on over the headers, since they may prove that it was durable.
func (w *walk) payload(s *segment, r *record) error {
	if r.payloadLen == 0 || w.bad != nil || r.entry.Pos.Seq <= w.l.o.VerifyAfter {
		return nil
	}
	crc, err := w.win.checksum(w.at.off+recordHeaderSize, int(r.payloadLen))
	if err != nil {
		return fmt.Errorf("wal: read %s: %w", s.name, err)
	}
	if crc != r.entry.PayloadCRC {
		at := w.at
		w.bad = &at
		w.badErr = fmt.Errorf("%s at %d: payload of %s has CRC %08x, expected %08x", s.name, w.at.off, r.entry.Pos, crc, r.entry.PayloadCRC)
	}
	return nil
}

func (w *walk) accept(s *segment, r *record) {
	if r.entry.Kind == kindCut {
		w.at.gen = r.gen
	} else {
		s.index = append(s.index, uint32(w.at.off/recordAlign))
		if e := r.entry.Pos.Epoch; e != w.at.last.Epoch {
			w.history = append(w.history, ident.EpochStart{Epoch: e, First: r.entry.Pos.Seq})
		}
		w.at.last = r.entry.Pos
	}
	w.durable = max(w.durable, r.durable)
	w.at.chain = r.crc
	w.at.off += r.size()
	s.end = w.at.off
}

// evidence looks behind the end of the chain for records that were written in
// this branch or a later one, and returns the highest durable position that
// they name and how many bytes they are. Records of an earlier branch were cut
// on purpose, those of an earlier use of the file have another segment id.
func (w *walk) evidence() (durable ident.Seq, stale int64, err error) {
	w.genMax = w.at.gen
	for i := w.at.seg; i < len(w.segs); i++ {
		s := w.segs[i]
		size, err := s.file.Size()
		if err != nil {
			return 0, 0, fmt.Errorf("wal: %s: %w", s.name, err)
		}
		off := w.at.off
		if i > w.at.seg {
			off = segmentHeaderSize
			durable = max(durable, s.header.durable)
			w.genMax = max(w.genMax, s.header.gen)
		}
		w.win.reset(s.file, size)
		for hole := off; off+recordHeaderSize <= size; off += recordAlign {
			if off >= hole { // most of a segment may never have been written
				if off, hole, err = nextData(s.file, off, size); err != nil {
					return 0, 0, fmt.Errorf("wal: read %s: %w", s.name, err)
				}
			}
			head, err := w.win.at(off, recordHeaderSize)
			if err != nil {
				return 0, 0, fmt.Errorf("wal: read %s: %w", s.name, err)
			}
			var r record
			if !looksLikeRecord(head) || decodeRecord(head, s.header.id, off, &r) != nil || r.gen < w.at.gen {
				continue
			}
			durable = max(durable, r.durable)
			w.genMax = max(w.genMax, r.gen)
			stale += r.size()
		}
	}
	return durable, stale, nil
}

// nextData returns the first place for a record at or behind off that is not in
// a hole, and where the next hole begins. Without any, both are the size.
func nextData(f vfs.File, off, size int64) (data, hole int64, err error) {
	data, err = f.SeekData(off)
	if errors.Is(err, io.EOF) {
		return size, size, nil
	}
	if err != nil {
		return 0, 0, err
	}
	if hole, err = f.SeekHole(data); err != nil {
		return 0, 0, err
	}
	return max(data&^(recordAlign-1), off), hole, nil
}

// cutBack moves the end of the walk to before the record whose payload does
// not verify, and returns how many bytes of records that takes away.
func (w *walk) cutBack() (bytes int64) {
	w.at = *w.bad
	after := w.at.last.Seq
	for _, s := range w.segs[w.at.seg+1:] {
		bytes += s.end - segmentHeaderSize
	}
	s := w.segs[w.at.seg]
	bytes += s.end - w.at.off
	s.index = s.index[:after-s.header.base.Seq]
	s.end = w.at.off
	for len(w.history) > 1 && w.history[len(w.history)-1].First > after {
		w.history = w.history[:len(w.history)-1]
	}
	return bytes
}

// cut makes the end of the walk the end of the log for good: what lies behind
// must not come back when new records fill the gap.
func (w *walk) cut(needed bool) error {
	if !needed {
		return nil
	}
	l := w.l
	dropped := w.segs[w.at.seg+1:]
	for i := len(dropped) - 1; i >= 0; i-- {
		if err := dropped[i].makeVoid(); err != nil {
			return l.fail("void a segment that was cut", err)
		}
	}
	l.house.adopt(slices.Clone(dropped))
	return l.writeCut(l.active(), w.at.off, w.at.chain, w.genMax+1)
}
