// Package bitmap records which blocks of a volume changed. It is pure: the
// bits live in memory, compressed, and their bytes go wherever the caller
// keeps them (the checkpoint, a resync message).
package bitmap

import (
	"errors"
	"fmt"

	"github.com/RoaringBitmap/roaring/v2"
)

const (
	// BlockSize is the unit of one bit, in bytes.
	BlockSize = 4096
	// SizeMax is the largest volume that a bitmap covers: block numbers have 32
	// bits. No volume is made larger; what lies beyond is not marked.
	SizeMax = 1 << 32 * BlockSize
	// BytesMax bounds what Unmarshal takes.
	BytesMax = 64 << 20
	// MarshalMax is what Marshal makes at the most, in bytes. Every second block
	// of 1 TiB would take 32 MiB: beyond the limit the encoding has a coarser
	// grain, and so some blocks more.
	MarshalMax = 16 << 20
	// coarsest is the coarsest grain, in blocks (4 MiB): the largest volume
	// (16 TiB) fits into MarshalMax at it, whatever its pattern.
	coarsest = 1024
)

// ErrCorrupt is returned when bytes are not an encoded bitmap.
var ErrCorrupt = errors.New("bitmap: corrupt encoding")

// Bitmap is a set of blocks. The zero value is not usable; call New. It is not
// safe for concurrent use.
type Bitmap struct{ r *roaring.Bitmap }

// New returns an empty bitmap.
func New() *Bitmap { return &Bitmap{r: roaring.New()} }

// clamp cuts a byte range to what a bitmap covers.
func clamp(off, length uint64) (uint64, uint64) {
	off = min(off, SizeMax)
	return off, min(length, SizeMax-off)
}

// Mark adds every block that the byte range touches.
func (b *Bitmap) Mark(off, length uint64) {
	if off, length = clamp(off, length); length == 0 {
		return
	}
	first, last := off/BlockSize, (off+length-1)/BlockSize
	if first == last {
		b.r.Add(uint32(first))
		return
	}
	b.r.AddRange(first, last+1)
}

// Clear removes every block that lies wholly inside the byte range. The last
// block of a volume that is no multiple of BlockSize is never wholly inside:
// it stays, which costs one block too many.
func (b *Bitmap) Clear(off, length uint64) {
	off, length = clamp(off, length)
	first, end := (off+BlockSize-1)/BlockSize, (off+length)/BlockSize
	if first < end {
		b.r.RemoveRange(first, end)
	}
}

// ClearTouched removes every block that the byte range touches.
func (b *Bitmap) ClearTouched(off, length uint64) {
	if off, length = clamp(off, length); length > 0 {
		b.r.RemoveRange(off/BlockSize, (off+length-1)/BlockSize+1)
	}
}

// Next returns the first run of blocks at or after the byte offset from, as a
// byte range of at most limit bytes (rounded up to a block). ok is false when
// there is none.
func (b *Bitmap) Next(from, limit uint64) (off, length uint64, ok bool) {
	block := from / BlockSize
	if block > 1<<32-1 {
		return 0, 0, false
	}
	it := b.r.Iterator()
	it.AdvanceIfNeeded(uint32(block))
	if !it.HasNext() {
		return 0, 0, false
	}
	first := uint64(it.Next())
	end := first + 1
	most := max((limit+BlockSize-1)/BlockSize, 1)
	for end-first < most && it.HasNext() && uint64(it.PeekNext()) == end {
		it.Next()
		end++
	}
	return first * BlockSize, (end - first) * BlockSize, true
}

// Touches reports whether any block that the byte range touches is in the set.
func (b *Bitmap) Touches(off, length uint64) bool {
	if off, length = clamp(off, length); length == 0 {
		return false
	}
	return b.r.IntersectsWithInterval(off/BlockSize, (off+length-1)/BlockSize+1)
}

// Union adds all of o.
func (b *Bitmap) Union(o *Bitmap) { b.r.Or(o.r) }

// Clone returns a copy.
func (b *Bitmap) Clone() *Bitmap { return &Bitmap{r: b.r.Clone()} }

// Empty reports whether no block is in the set.
func (b *Bitmap) Empty() bool { return b.r.IsEmpty() }

// Blocks returns the number of blocks in the set.
func (b *Bitmap) Blocks() uint64 { return b.r.GetCardinality() }

// Bytes returns the bytes of volume that the set covers.
func (b *Bitmap) Bytes() int64 { return int64(b.r.GetCardinality() * BlockSize) }

// size returns about how many bytes the encoding takes.
func (b *Bitmap) size() int64 { return int64(b.r.GetSerializedSizeInBytes()) }

// Marshal returns the encoding, roaring's portable format, of at most MarshalMax
// bytes. What it is decoded to has every block of b, and, if b takes more than
// that, some more.
func (b *Bitmap) Marshal() ([]byte, error) { return b.marshal(MarshalMax) }

func (b *Bitmap) marshal(limit uint64) ([]byte, error) {
	b.r.RunOptimize()
	r := b.r
	for grain := uint64(16); r.GetSerializedSizeInBytes() > limit && grain <= coarsest; grain *= 4 {
		r = coarser(b.r, grain)
	}
	p, err := r.ToBytes()
	if err != nil {
		return nil, fmt.Errorf("bitmap: encode: %w", err)
	}
	return p, nil
}

// window is the number of blocks (16 GiB) of which coarser makes the result at a
// time, as plain bits: a roaring bitmap takes a range into a container of many
// runs only by copying all of them.
const window = 1 << 22

// coarser returns the groups of grain blocks of which any is in r. A window is a
// whole number of groups.
func coarser(r *roaring.Bitmap, grain uint64) *roaring.Bitmap {
	out := roaring.New()
	dense := make([]uint64, window/64)
	it := r.Iterator()
	for it.HasNext() {
		base := uint64(it.PeekNext()) / window * window
		clear(dense)
		for it.HasNext() && uint64(it.PeekNext()) < base+window {
			first := uint64(it.PeekNext()) / grain * grain
			for at := first; at < first+grain; at += 16 {
				dense[(at-base)/64] |= 0xffff << (at % 64) // a grain is a multiple of 16
			}
			if first+grain > 1<<32-1 {
				it = roaring.New().Iterator()
				break
			}
			it.AdvanceIfNeeded(uint32(first + grain))
		}
		part := roaring.FromDense(dense, true)
		part.RunOptimize()
		out.Or(roaring.AddOffset64(part, int64(base)))
	}
	return out
}

// Unmarshal decodes what Marshal made. It never panics, whatever the bytes.
func Unmarshal(p []byte) (b *Bitmap, err error) {
	if len(p) > BytesMax {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrCorrupt, len(p), BytesMax)
	}
	defer func() {
		if r := recover(); r != nil {
			b, err = nil, fmt.Errorf("%w: %v", ErrCorrupt, r)
		}
	}()
	rb := roaring.New()
	if err := rb.UnmarshalBinary(p); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if err := rb.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return &Bitmap{r: rb}, nil
}
