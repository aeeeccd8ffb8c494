// Package buf lends payload buffers that travel from an NBD socket to the log,
// the peers and the backing store without being copied between. A buffer is
// counted: each holder retains it, and the last release makes it free, to be
// lent again.
//
// Free buffers are not left to the garbage collector, as a sync.Pool would: one
// that comes back after each collection is zeroed and faulted in anew, and the
// garbage of the one before doubles the heap. They are kept to a limit (SetKeep)
// and let go when nobody has needed them for a while (Trim).
package buf

import (
	"math/bits"
	"sync/atomic"
)

const (
	classMin = 9  // 512 B, the smallest buffer that is kept
	classMax = 25 // 32 MiB, the largest NBD payload that we accept
	// keepDefault is the limit of bytes, in use and free, up to which free
	// buffers are kept, until SetKeep says better.
	keepDefault = 64 << 20
	// slotsMax bounds the free buffers of a class: 64 MiB of 4 KiB.
	slotsMax = 16 << 10
)

// Buf is a counted buffer. B is the part in use; its capacity belongs to the
// package. A Buf is made by Get with one reference.
type Buf struct {
	B     []byte
	refs  atomic.Int32
	class int8
}

var (
	free [classMax + 1]stack
	// inUse counts the bytes of capacity that are lent: the figure behind the
	// memory limits and the metric. idle counts those that are free.
	inUse, idle, keep atomic.Int64
)

func init() {
	keep.Store(keepDefault)
	for c := classMin; c <= classMax; c++ {
		free[c].slots = make([]atomic.Pointer[Buf], min(slotsMax, max(4, 256<<20>>c)))
	}
}

// stack keeps free buffers of one class, the last that came on top: it is still
// in the processor's cache. It takes no lock. top is only a hint: between the
// change of top and that of the slot another goroutine may find a slot full that
// should be empty, or empty that should be full, and then treats the stack as
// full, or empty. That leaves empty slots below top and full ones above it: Trim
// looks at both. A buffer is in one slot at most, and whoever swaps it out has it
// for himself.
type stack struct {
	top atomic.Int64
	// low is the least that top has been since the last Trim.
	low   atomic.Int64
	slots []atomic.Pointer[Buf]
}

func (s *stack) push(b *Buf) bool {
	i := s.top.Add(1) - 1
	if i >= 0 && i < int64(len(s.slots)) && s.slots[i].CompareAndSwap(nil, b) {
		return true
	}
	if i >= int64(len(s.slots)) {
		s.top.Add(-1)
	}
	return false
}

func (s *stack) pop() *Buf {
	if s.top.Load() <= 0 {
		if s.low.Load() != 0 {
			s.low.Store(0)
		}
		return nil
	}
	i := s.top.Add(-1)
	if i < s.low.Load() {
		s.low.Store(max(i, 0))
	}
	if i < 0 {
		s.top.Add(1)
		return nil
	}
	if i >= int64(len(s.slots)) {
		return nil
	}
	return s.slots[i].Swap(nil)
}

// Get returns a buffer with len(B) == n and one reference. The content is
// undefined. Any n up to 32 MiB may be one that was lent before; a larger one is
// allocated plainly.
func Get(n int) *Buf {
	class := classFor(n)
	if class > classMax {
		b := &Buf{B: make([]byte, n), class: -1}
		b.refs.Store(1)
		inUse.Add(int64(cap(b.B)))
		return b
	}
	b := free[class].pop()
	if b == nil {
		b = &Buf{B: make([]byte, 1<<class), class: int8(class)}
	} else {
		idle.Add(-1 << class)
	}
	b.B = b.B[:n]
	b.refs.Store(1)
	inUse.Add(1 << class)
	return b
}

// Retain adds a reference and returns b. It may be called on nil.
func (b *Buf) Retain() *Buf {
	if b != nil && b.refs.Add(1) <= 1 {
		panic("buf: retained after its last release")
	}
	return b
}

// Release drops a reference; after the last one the buffer is free, and the
// caller must not touch B again. It may be called on nil.
func (b *Buf) Release() {
	if b == nil {
		return
	}
	switch n := b.refs.Add(-1); {
	case n > 0:
		return
	case n < 0:
		panic("buf: released more often than retained")
	}
	size := int64(cap(b.B))
	used := inUse.Add(-size)
	if b.class < 0 || used+idle.Load()+size > keep.Load() {
		return
	}
	b.B = b.B[:cap(b.B)]
	idle.Add(size)
	if !free[b.class].push(b) {
		idle.Add(-size)
	}
}

// Size returns the bytes of memory that b takes, which may be more than it
// shows; 0 for nil.
func (b *Buf) Size() int64 {
	if b == nil {
		return 0
	}
	return int64(cap(b.B))
}

// InUse returns the bytes of buffer capacity that are lent at the moment.
func InUse() int64 { return inUse.Load() }

// Idle returns the bytes of free buffers that are kept.
func Idle() int64 { return idle.Load() }

// SetKeep sets up to how many bytes, those in use included, free buffers are
// kept. It does not bound what may be in use.
func SetKeep(n int64) { keep.Store(n) }

// Trim lets those free buffers go that nobody has needed since the last Trim, and
// returns their bytes.
func Trim() int64 {
	var n int64
	drop := func(b *Buf) {
		if b != nil {
			idle.Add(-int64(cap(b.B)))
			n += int64(cap(b.B))
		}
	}
	for c := classMin; c <= classMax; c++ {
		s := &free[c]
		for range min(s.low.Load(), s.top.Load()) {
			drop(s.pop())
		}
		top := max(0, s.top.Load())
		for i := top; i < int64(len(s.slots)); i++ {
			if s.slots[i].Load() != nil {
				drop(s.slots[i].Swap(nil))
			}
		}
		s.low.Store(top)
	}
	return n
}

func classFor(n int) int {
	if n <= 1<<classMin {
		return classMin
	}
	return bits.Len(uint(n - 1))
}
