package vfs

import (
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"syscall"
)

const (
	pageSize   = 4096
	sectorSize = 512
	sectors    = pageSize / sectorSize
)

// memData is a file's content, apart from its names.
type memData struct {
	pages       map[int64]*memPage // by number; a missing one is a hole
	dirty       map[int64]struct{} // the pages with unsynced sectors
	size        int64
	durableSize int64
}

// memPage is 4 KiB of a file, with what the disk has instead.
type memPage struct {
	data  [pageSize]byte
	hole  bool // punched: reads as zeroes, takes no room once it is synced
	dirty uint8
	// before holds the durable content of the sectors in dirty. It was a hole
	// when wasHole.
	before  *[pageSize]byte
	wasHole bool
}

func newMemData() *memData {
	return &memData{pages: map[int64]*memPage{}, dirty: map[int64]struct{}{}}
}

func (d *memData) clone() *memData {
	if d == nil {
		return nil
	}
	c := &memData{pages: make(map[int64]*memPage, len(d.pages)), dirty: maps.Clone(d.dirty), size: d.size, durableSize: d.durableSize}
	for n, p := range d.pages {
		q := *p
		if p.before != nil {
			b := *p.before
			q.before = &b
		}
		c.pages[n] = &q
	}
	return c
}

// touch prepares the sectors of a page that [from, to) meets for a change, and
// returns the page. flip says for a sector that is dirty already whether its
// present content has reached the disk meanwhile.
func (d *memData) touch(n int64, from, to int64, flip func() bool) *memPage {
	p := d.pages[n]
	if p == nil {
		p = &memPage{hole: true}
		d.pages[n] = p
	}
	if p.dirty == 0 {
		p.wasHole = p.hole
		if p.before == nil {
			p.before = new([pageSize]byte)
		}
	}
	for s := from / sectorSize; s*sectorSize < to; s++ {
		bit := uint8(1) << s
		if p.dirty&bit == 0 || flip() {
			copy(p.before[s*sectorSize:(s+1)*sectorSize], p.data[s*sectorSize:])
			p.wasHole = p.wasHole && p.dirty&bit == 0
		}
		p.dirty |= bit
	}
	d.dirty[n] = struct{}{}
	return p
}

// sync makes all durable, and returns how many pages that frees.
func (d *memData) sync() (freed int64) {
	for n := range d.dirty {
		p := d.pages[n]
		p.dirty, p.before = 0, nil
		if p.hole {
			delete(d.pages, n)
			freed++
		}
	}
	clear(d.dirty)
	d.durableSize = d.size
	return freed
}

// crash keeps each group of unsynced sectors with the probability luck.
func (d *memData) crash(rng *rand.Rand, luck float64, group int) {
	for _, n := range slices.Sorted(maps.Keys(d.dirty)) {
		p := d.pages[n]
		kept, lost := uint8(0), uint8(0)
		for s := 0; s < sectors; s += group {
			keep := rng.Float64() < luck
			for i := s; i < s+group; i++ {
				bit := uint8(1) << i
				if p.dirty&bit == 0 {
					continue
				}
				if keep {
					kept |= bit
					continue
				}
				lost |= bit
				copy(p.data[i*sectorSize:(i+1)*sectorSize], p.before[i*sectorSize:])
			}
		}
		switch {
		case kept == 0:
			p.hole = p.wasHole
		case lost != 0:
			p.hole = false
		}
		p.dirty, p.before = 0, nil
		if p.hole {
			delete(d.pages, n)
		}
	}
	clear(d.dirty)
	if d.size != d.durableSize {
		switch low, high := min(d.size, d.durableSize), max(d.size, d.durableSize); rng.IntN(3) {
		case 0:
			d.size = d.durableSize
		case 1:
			// Between two sectors, since a sector is never half written.
			d.size = min((low+rng.Int64N(high-low+1)+sectorSize-1)/sectorSize*sectorSize, high)
		}
		d.dropBeyond(d.size)
	}
	d.durableSize = d.size
}

// dropBeyond forgets what lies beyond the end.
func (d *memData) dropBeyond(size int64) {
	for n, p := range d.pages {
		switch {
		case n*pageSize >= size:
			delete(d.pages, n)
		case (n+1)*pageSize > size:
			clear(p.data[size-n*pageSize:])
		}
	}
}

// memFile is a handle.
type memFile struct {
	m        *Mem
	d        *memData
	path     string
	boot     uint64
	readOnly bool
	closed   bool // guarded by m.mu
}

// enter locks the file system for one call.
func (f *memFile) enter(op string, write bool) error {
	f.m.mu.Lock()
	var err error
	switch {
	case f.closed:
		err = fs.ErrClosed
	case f.boot != f.m.boot:
		err = ErrCrashed
	case write && f.readOnly:
		err = syscall.EBADF
	default:
		return nil
	}
	f.m.mu.Unlock()
	return &fs.PathError{Op: op, Path: f.path, Err: err}
}

func (f *memFile) leave() { f.m.mu.Unlock() }

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.enter("read", false); err != nil {
		return 0, err
	}
	defer f.leave()
	if off < 0 {
		return 0, &fs.PathError{Op: "read", Path: f.path, Err: syscall.EINVAL}
	}
	n := int(max(min(int64(len(p)), f.d.size-off), 0))
	for done := 0; done < n; {
		at := off + int64(done)
		in := at % pageSize
		part := p[done:min(n, done+int(pageSize-in))]
		if pg := f.d.pages[at/pageSize]; pg != nil {
			copy(part, pg.data[in:])
		} else {
			clear(part)
		}
		done += len(part)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// ReadAtNoWait finds everything in memory.
func (f *memFile) ReadAtNoWait(p []byte, off int64) (int, error) {
	n, err := f.ReadAt(p, off)
	if err == io.EOF { //nolint:errorlint // ReadAt returns it bare
		return 0, ErrWouldBlock
	}
	return n, err
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	return f.WritevAt([][]byte{p}, off)
}

func (f *memFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	if err := f.enter("write", true); err != nil {
		return 0, err
	}
	defer f.leave()
	done := 0
	for _, b := range bufs {
		for len(b) > 0 {
			at := off + int64(done)
			in := at % pageSize
			n := int(min(int64(len(b)), pageSize-in))
			if !f.roomFor(at / pageSize) {
				return done, &fs.PathError{Op: "write", Path: f.path, Err: syscall.ENOSPC}
			}
			pg := f.d.touch(at/pageSize, in, in+int64(n), f.flip)
			pg.hole = false
			copy(pg.data[in:], b[:n])
			b, done = b[n:], done+n
			f.d.size = max(f.d.size, at+int64(n))
		}
	}
	return done, nil
}

// roomFor reports whether a page is there or may be made, and counts it.
func (f *memFile) roomFor(page int64) bool {
	if f.d.pages[page] != nil {
		return true
	}
	if f.m.capacity > 0 && (f.m.pages+1)*pageSize > f.m.capacity {
		return false
	}
	f.m.pages++
	return true
}

func (f *memFile) flip() bool { return f.m.rng.IntN(4) == 0 }

func (f *memFile) Datasync() error { return f.Sync() }

func (f *memFile) Sync() error {
	if err := f.enter("sync", false); err != nil {
		return err
	}
	defer f.leave()
	f.m.pages -= f.d.sync()
	return nil
}

// WriteOut does nothing: what is not fsynced is lost or kept at random anyway.
func (f *memFile) WriteOut(int64, int64, bool) error {
	if err := f.enter("write out", false); err != nil {
		return err
	}
	f.leave()
	return nil
}

func (f *memFile) Truncate(size int64) error {
	if err := f.enter("truncate", true); err != nil {
		return err
	}
	defer f.leave()
	if size < f.d.size {
		f.zero(size, f.d.size-size, true)
	}
	f.d.size = size
	return nil
}

// Allocate reserves nothing: what was never written is a hole here.
func (f *memFile) Allocate(off, n int64) error {
	if err := f.enter("allocate", true); err != nil {
		return err
	}
	defer f.leave()
	if f.m.capacity > 0 && f.m.pages*pageSize+n > f.m.capacity {
		return &fs.PathError{Op: "allocate", Path: f.path, Err: syscall.ENOSPC}
	}
	f.d.size = max(f.d.size, off+n)
	return nil
}

func (f *memFile) PunchHole(off, n int64) error { return f.zeroRange("punch hole", off, n, true) }
func (f *memFile) ZeroRange(off, n int64) error { return f.zeroRange("zero range", off, n, false) }

func (f *memFile) zeroRange(op string, off, n int64, punch bool) error {
	if err := f.enter(op, true); err != nil {
		return err
	}
	defer f.leave()
	f.zero(off, min(n, f.d.size-off), punch)
	return nil
}

// zero makes a range read as zeroes; whole pages become holes with punch.
func (f *memFile) zero(off, n int64, punch bool) {
	for end := off + n; off < end; {
		in := off % pageSize
		k := min(end-off, pageSize-in)
		if f.d.pages[off/pageSize] != nil || !punch {
			if f.d.pages[off/pageSize] == nil {
				f.m.pages++ // beyond the capacity at most by this: fallocate had room
			}
			pg := f.d.touch(off/pageSize, in, in+k, f.flip)
			clear(pg.data[in : in+k])
			pg.hole = punch && (pg.hole || k == pageSize)
		}
		off += k
	}
}

func (f *memFile) SeekData(off int64) (int64, error) { return f.seek(off, true) }
func (f *memFile) SeekHole(off int64) (int64, error) { return f.seek(off, false) }

// Unwritten finds nothing: what has room here is data.
func (f *memFile) Unwritten(int64, int64) (at, length int64, err error) { return 0, 0, nil }

func (f *memFile) seek(off int64, data bool) (int64, error) {
	if err := f.enter("seek", false); err != nil {
		return 0, err
	}
	defer f.leave()
	for off < f.d.size {
		pg := f.d.pages[off/pageSize]
		if (pg != nil && !pg.hole) == data {
			return off, nil
		}
		if data {
			next, ok := f.d.nextData(off/pageSize + 1)
			if !ok {
				break
			}
			off = next * pageSize
			continue
		}
		off = (off/pageSize + 1) * pageSize
	}
	if data {
		return 0, io.EOF
	}
	return max(off, f.d.size), nil
}

// nextData returns the first page with data, from a page on. It looks at all
// pages rather than at all numbers: files are sparse.
func (d *memData) nextData(from int64) (int64, bool) {
	best, ok := int64(0), false
	for n, p := range d.pages {
		if n >= from && !p.hole && (!ok || n < best) {
			best, ok = n, true
		}
	}
	return best, ok && best*pageSize < d.size
}

func (f *memFile) Size() (int64, error) {
	if err := f.enter("size", false); err != nil {
		return 0, err
	}
	defer f.leave()
	return f.d.size, nil
}

func (f *memFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return &fs.PathError{Op: "close", Path: f.path, Err: fs.ErrClosed}
	}
	f.closed = true
	return nil
}
