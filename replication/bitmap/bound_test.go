package bitmap

import (
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

// Whatever the pattern, an encoding keeps to its limit, and has every block that
// the bitmap has.
func TestMarshalKeepsToItsLimit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := New()
		for range rapid.IntRange(1, 20).Draw(t, "runs") {
			first := rapid.Uint64Range(0, 1<<20).Draw(t, "first")
			step := rapid.Uint64Range(1, 600).Draw(t, "step")
			for i := range rapid.Uint64Range(1, 3000).Draw(t, "n") {
				b.Mark((first+i*step)*BlockSize, 1)
			}
		}
		b.Mark(SizeMax-1, 1)
		const limit = 40 << 10
		p, err := b.marshal(limit)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Unmarshal(p)
		if err != nil {
			t.Fatal(err)
		}
		all := got.Clone()
		all.Union(b)
		if all.Blocks() != got.Blocks() {
			t.Fatalf("%d blocks of %d are missing", all.Blocks()-got.Blocks(), b.Blocks())
		}
		if whole := b.r.GetSerializedSizeInBytes(); whole <= limit && got.Blocks() != b.Blocks() {
			t.Fatalf("%d blocks for %d, though %d bytes were within the limit", got.Blocks(), b.Blocks(), whole)
		}
		if got.Blocks() > coarsest*b.Blocks() {
			t.Fatalf("%d blocks for %d", got.Blocks(), b.Blocks())
		}
	})
}

// The worst there is, every second block or every second group of blocks, fits:
// here a part of the largest volume, into as much of the limit.
func TestTheWorstBitmapFits(t *testing.T) {
	const part = 256 // of the largest volume
	for _, step := range []uint64{2, 2 * 16, 2 * 64, 2 * 256, 2 * coarsest} {
		b := New()
		for i := uint64(0); i < SizeMax/BlockSize/part; i += step {
			b.r.Add(uint32(i))
		}
		p, err := b.marshal(MarshalMax / part)
		if err != nil || len(p) > MarshalMax/part {
			t.Errorf("a block of %d: %d bytes, at most %d: %v", step, len(p), MarshalMax/part, err)
		}
	}
}

// A record of many segments keeps to the limit too, by merging old ones.
func TestChangesKeepToTheLimit(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	c := NewChanges(0)
	seq := uint64(0)
	for range 20_000 {
		seq++
		c.Mark(seq, rng.Uint64N(64<<30), 1)
	}
	const limit = 1 << 16
	p, err := c.marshal(limit)
	if err != nil || len(p) > limit {
		t.Fatalf("%d bytes: %v", len(p), err)
	}
	got, err := UnmarshalChanges(p)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []uint64{0, seq / 2, seq - 10, seq} {
		want, _ := c.Since(at)
		have, ok := got.Since(at)
		if !ok {
			t.Fatalf("since %d is not known any more", at)
		}
		n := have.Blocks()
		have.Union(want)
		if have.Blocks() != n {
			t.Errorf("since %d: %d blocks are missing", at, have.Blocks()-n)
		}
	}
	if got.Floor() != c.Floor() {
		t.Errorf("the floor is %d, was %d", got.Floor(), c.Floor())
	}
}
