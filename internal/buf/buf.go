// Package buf lends payload buffers that travel from an NBD socket to the log,
// the peers and the backing store without being copied between. A buffer is
// counted: each holder retains it, and the last release returns it to its pool.
package buf

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

const (
	classMin = 9  // 512 B, the smallest buffer that is pooled
	classMax = 25 // 32 MiB, the largest NBD payload that we accept
)

// Buf is a counted buffer. B is the part in use; its capacity belongs to the
// pool. A Buf is made by Get with one reference.
type Buf struct {
	B     []byte
	refs  atomic.Int32
	class int8
}

var (
	pools [classMax + 1]sync.Pool
	// inUse counts the bytes of capacity that are out of the pools: the figure
	// behind the memory limits and the metric.
	inUse atomic.Int64
)

// Get returns a buffer with len(B) == n and one reference. The content is
// undefined. Any n up to 32 MiB is pooled; a larger one is allocated plainly.
func Get(n int) *Buf {
	class := classFor(n)
	if class > classMax {
		b := &Buf{B: make([]byte, n), class: -1}
		b.refs.Store(1)
		inUse.Add(int64(cap(b.B)))
		return b
	}
	b, _ := pools[class].Get().(*Buf)
	if b == nil {
		b = &Buf{B: make([]byte, 1<<class), class: int8(class)}
	}
	b.B = b.B[:n]
	b.refs.Store(1)
	inUse.Add(int64(cap(b.B)))
	return b
}

// Retain adds a reference and returns b. It may be called on nil.
func (b *Buf) Retain() *Buf {
	if b != nil && b.refs.Add(1) <= 1 {
		panic("buf: retained after its last release")
	}
	return b
}

// Release drops a reference; the last one returns the buffer to its pool, and
// the caller must not touch B again. It may be called on nil.
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
	inUse.Add(-int64(cap(b.B)))
	if b.class >= 0 {
		b.B = b.B[:cap(b.B)]
		pools[b.class].Put(b)
	}
}

// InUse returns the bytes of buffer capacity that are held at the moment.
func InUse() int64 { return inUse.Load() }

func classFor(n int) int {
	if n <= 1<<classMin {
		return classMin
	}
	return bits.Len(uint(n - 1))
}
