package nbdtest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/blockstep/blockstep/nbd"
)

// memChunkBytes is the unit of allocation, and memBlockBytes that of the dirty
// context, of a MemDevice.
const (
	memChunkBytes = 64 << 10
	memBlockBytes = 4 << 10
)

type memChunk struct {
	data [memChunkBytes]byte
	hole bool // trimmed: reads as zeroes and is reported so
	seq  [memChunkBytes / memBlockBytes]uint64
}

// MemDevice is a sparse device in memory. Each change has a position "1:SEQ",
// so that it can answer blockstep:dirty-since:1:SEQ.
type MemDevice struct {
	mu     sync.RWMutex
	info   nbd.Info
	chunks []*memChunk
	seq    uint64
	forgot uint64 // dirty-since below it is refused
	// flushed is the seq that the last FLUSH or FUA covered.
	flushed uint64
}

// NewMemDevice makes a device of zeroes of the given size in bytes.
func NewMemDevice(size uint64) *MemDevice {
	return &MemDevice{
		info: nbd.Info{
			Size: size, Description: "memory", MultiConn: true, BlockMin: 1, BlockBest: memBlockBytes, BlockMax: nbd.PayloadMax,
			MetaContexts: []string{dirtySince},
		},
		chunks: make([]*memChunk, (size+memChunkBytes-1)/memChunkBytes),
	}
}

const dirtySince = "blockstep:dirty-since:"

// SetInfo replaces what clients are told, except the size.
func (d *MemDevice) SetInfo(info nbd.Info) {
	d.mu.Lock()
	defer d.mu.Unlock()
	info.Size = d.info.Size
	d.info = info
}

// Info returns what clients are told.
func (d *MemDevice) Info() nbd.Info {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.info
}

// Seq returns the number of changes so far, and Flushed how many of them the
// last FLUSH or FUA covered.
func (d *MemDevice) Seq() uint64 { d.mu.RLock(); defer d.mu.RUnlock(); return d.seq }

// Flushed returns how many changes the last FLUSH or FUA covered.
func (d *MemDevice) Flushed() uint64 { d.mu.RLock(); defer d.mu.RUnlock(); return d.flushed }

// Forget makes dirty-since refuse positions below seq.
func (d *MemDevice) Forget(seq uint64) { d.mu.Lock(); defer d.mu.Unlock(); d.forgot = seq }

// ReadAt fills p, which must lie within the device.
func (d *MemDevice) ReadAt(p []byte, off int64) (int, error) {
	if uint64(off)+uint64(len(p)) > d.info.Size {
		return 0, nbd.ErrRange
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	d.readLocked(p, uint64(off))
	return len(p), nil
}

// WriteAt stores p, which must lie within the device.
func (d *MemDevice) WriteAt(p []byte, off int64) (int, error) {
	if uint64(off)+uint64(len(p)) > d.info.Size {
		return 0, nbd.ErrRange
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.writeLocked(p, uint64(off))
	return len(p), nil
}

// span cuts an extent at the borders of chunks.
func span(off, length uint64, f func(chunk, at, n uint64)) {
	for length > 0 {
		at := off % memChunkBytes
		n := min(memChunkBytes-at, length)
		f(off/memChunkBytes, at, n)
		off += n
		length -= n
	}
}

func (d *MemDevice) readLocked(p []byte, off uint64) {
	span(off, uint64(len(p)), func(i, at, n uint64) {
		if c := d.chunks[i]; c != nil && !c.hole {
			copy(p[:n], c.data[at:])
		} else {
			clear(p[:n])
		}
		p = p[n:]
	})
}

func (d *MemDevice) writeLocked(p []byte, off uint64) {
	d.seq++
	span(off, uint64(len(p)), func(i, at, n uint64) {
		c := d.chunkLocked(i, at, n)
		copy(c.data[at:at+n], p[:n])
		p = p[n:]
	})
}

// chunkLocked returns chunk i to change [at, at+n), allocated.
func (d *MemDevice) chunkLocked(i, at, n uint64) *memChunk {
	c := d.chunks[i]
	if c == nil {
		c = &memChunk{}
		d.chunks[i] = c
	}
	if c.hole {
		c.data, c.hole = [memChunkBytes]byte{}, false
	}
	for b := at / memBlockBytes; b <= (at+n-1)/memBlockBytes; b++ {
		c.seq[b] = d.seq
	}
	return c
}

func (d *MemDevice) zeroLocked(off, length uint64, punch bool) {
	d.seq++
	span(off, length, func(i, at, n uint64) {
		if punch && d.chunks[i] == nil {
			return // a hole already: nothing changes
		}
		c := d.chunkLocked(i, at, n)
		clear(c.data[at : at+n])
		c.hole = punch && n == memChunkBytes
	})
}

// holesLocked returns the runs of data and of zeroes of an extent.
func (d *MemDevice) holesLocked(off, length uint64) []nbd.Extent {
	var runs []nbd.Extent
	span(off, length, func(i, _, n uint64) {
		flags := uint32(0)
		if c := d.chunks[i]; c == nil || c.hole {
			flags = nbd.StateHole | nbd.StateZero
		}
		if last := len(runs) - 1; last >= 0 && runs[last].Flags == flags {
			runs[last].Length += n
		} else {
			runs = append(runs, nbd.Extent{Length: n, Flags: flags})
		}
	})
	return runs
}

// dirtyLocked returns the runs of blocks that changed after seq.
func (d *MemDevice) dirtyLocked(off, length, since uint64) []nbd.Extent {
	var runs []nbd.Extent
	for end := off + length; off < end; {
		n := min(memBlockBytes-off%memBlockBytes, end-off)
		flags := uint32(0)
		if c := d.chunks[off/memChunkBytes]; c != nil && c.seq[off%memChunkBytes/memBlockBytes] > since {
			flags = 1
		}
		if last := len(runs) - 1; last >= 0 && runs[last].Flags == flags {
			runs[last].Length += n
		} else {
			runs = append(runs, nbd.Extent{Length: n, Flags: flags})
		}
		off += n
	}
	return runs
}

// Exports is a set of devices by name: an nbd.Exports.
type Exports map[string]*MemDevice

// List names the devices in order.
func (e Exports) List() []string {
	var names []string
	for name := range e {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (e Exports) device(name string) (*MemDevice, error) {
	if d := e[name]; d != nil {
		return d, nil
	}
	return nil, fmt.Errorf("%q: %w", name, nbd.ErrNoExport)
}

// Lookup describes a device.
func (e Exports) Lookup(_ context.Context, name string) (nbd.Info, error) {
	d, err := e.device(name)
	if err != nil {
		return nbd.Info{}, err
	}
	return d.Info(), nil
}

// Open begins a session, which completes each request within Submit.
func (e Exports) Open(_ context.Context, name string, c nbd.Client) (nbd.Session, error) {
	d, err := e.device(name)
	if err != nil {
		return nil, err
	}
	return &memSession{d: d, client: c}, nil
}

type memSession struct {
	d      *MemDevice
	client nbd.Client
	since  []uint64 // of context i+1
}

func (s *memSession) Info() nbd.Info { return s.d.Info() }
func (s *memSession) Close()         {}

func (s *memSession) MetaContext(name string) (uint32, error) {
	var epoch, seq uint64
	param, ok := strings.CutPrefix(name, dirtySince)
	if !ok {
		return 0, fmt.Errorf("%w: unknown context %q", nbd.ErrInvalid, name)
	}
	if _, err := fmt.Sscanf(param, "%d:%d", &epoch, &seq); err != nil {
		return 0, fmt.Errorf("%w: position %q: write EPOCH:SEQ", nbd.ErrInvalid, param)
	}
	s.d.mu.RLock()
	defer s.d.mu.RUnlock()
	if epoch != 1 || seq < s.d.forgot || seq > s.d.seq {
		return 0, fmt.Errorf("%w: changes since %s are not known: make a full backup", nbd.ErrInvalid, param)
	}
	s.since = append(s.since, seq)
	return uint32(len(s.since)), nil
}

// Uncork does nothing: Submit has completed the request.
func (s *memSession) Uncork() {}

func (s *memSession) Submit(r *nbd.Request) {
	d := s.d
	switch r.Op {
	case nbd.OpRead:
		d.mu.RLock()
		d.readLocked(r.Data.B, r.Offset)
		if r.Length >= 2*memChunkBytes {
			if runs := d.holesLocked(r.Offset, r.Length); len(runs) > 1 || runs[0].Flags != 0 {
				r.Holes = runs
			}
		}
		d.mu.RUnlock()
	case nbd.OpWrite:
		d.mu.Lock()
		d.writeLocked(r.Data.B, r.Offset)
		d.fuaLocked(r)
		d.mu.Unlock()
	case nbd.OpFlush:
		d.mu.Lock()
		d.flushed = d.seq
		d.mu.Unlock()
	case nbd.OpTrim:
		d.mu.Lock()
		d.zeroLocked(r.Offset, r.Length, true)
		d.fuaLocked(r)
		d.mu.Unlock()
	case nbd.OpZero:
		if r.FastZero && r.NoHole {
			r.Complete(r, nbd.ErrUnsupported)
			return
		}
		d.mu.Lock()
		d.zeroLocked(r.Offset, r.Length, !r.NoHole)
		d.fuaLocked(r)
		d.mu.Unlock()
	case nbd.OpCache:
	case nbd.OpBlockStatus:
		s.blockStatus(r)
	}
	r.Complete(r, nil)
}

func (d *MemDevice) fuaLocked(r *nbd.Request) {
	if r.FUA {
		d.flushed = d.seq
	}
}

func (s *memSession) blockStatus(r *nbd.Request) {
	s.d.mu.RLock()
	defer s.d.mu.RUnlock()
	for _, id := range r.Contexts {
		st := nbd.Status{Context: id}
		if id == nbd.ContextAllocation {
			st.Extents = s.d.holesLocked(r.Offset, r.Length)
		} else {
			st.Extents = s.d.dirtyLocked(r.Offset, r.Length, s.since[id-1])
		}
		r.Status = append(r.Status, st)
	}
}
