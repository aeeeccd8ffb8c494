package bitmap

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// plain is a bitmap as simple as can be.
type plain map[uint64]bool

func (p plain) mark(off, n uint64) {
	for b := off / BlockSize; n > 0 && b*BlockSize < off+n; b++ {
		p[b] = true
	}
}

func (p plain) clear(off, n uint64, touched bool) {
	maps.DeleteFunc(p, func(b uint64, _ bool) bool {
		from, to := b*BlockSize, (b+1)*BlockSize
		if touched {
			return n > 0 && from < off+n && to > off
		}
		return from >= off && to <= off+n
	})
}

// blocks lists a bitmap by Next alone.
func blocks(b *Bitmap, limit uint64) []uint64 {
	var out []uint64
	for from := uint64(0); ; {
		off, n, ok := b.Next(from, limit)
		if !ok {
			return out
		}
		for at := off; at < off+n; at += BlockSize {
			out = append(out, at/BlockSize)
		}
		from = off + n
	}
}

func same(t interface{ Fatalf(string, ...any) }, b *Bitmap, p plain, limit uint64) {
	want := slices.Sorted(maps.Keys(p))
	if got := blocks(b, limit); !slices.Equal(got, want) {
		t.Fatalf("blocks %v, want %v", got, want)
	}
	if b.Blocks() != uint64(len(p)) || b.Bytes() != int64(len(p))*BlockSize || b.Empty() != (len(p) == 0) {
		t.Fatalf("%d blocks, %d bytes, empty %v; want %d blocks", b.Blocks(), b.Bytes(), b.Empty(), len(p))
	}
}

// extents are drawn where containers of the bitmap meet: every 65,536 blocks.
func extent(t *rapid.T) (off, n uint64) {
	base := rapid.SampledFrom([]uint64{0, 65530 * BlockSize, 131070 * BlockSize, SizeMax - 200*BlockSize}).Draw(t, "base")
	off = base + rapid.Uint64Range(0, 100*BlockSize).Draw(t, "off")
	n = rapid.Uint64Range(0, 50*BlockSize).Draw(t, "len")
	return off, n
}

func TestBitmapIsASet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b, p := New(), plain{}
		other, q := New(), plain{}
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			off, n := extent(t)
			switch rapid.SampledFrom([]string{"mark", "mark", "clear", "touched", "other", "union", "clone", "code"}).Draw(t, "op") {
			case "mark":
				b.Mark(off, n)
				p.mark(off, n)
			case "clear":
				b.Clear(off, n)
				p.clear(off, n, false)
			case "touched":
				b.ClearTouched(off, n)
				p.clear(off, n, true)
			case "other":
				other.Mark(off, n)
				q.mark(off, n)
			case "union":
				b.Union(other)
				maps.Copy(p, q)
			case "clone":
				c := b.Clone()
				c.Mark(off, n+1) // must not be seen in b
			case "code":
				enc, err := b.Marshal()
				if err != nil {
					t.Fatal(err)
				}
				if b, err = Unmarshal(enc); err != nil {
					t.Fatal(err)
				}
				clear(enc) // must not be seen in b either
			}
			touches := false
			for blk := off / BlockSize; blk*BlockSize < off+n; blk++ {
				touches = touches || p[blk]
			}
			if got := b.Touches(off, n); n > 0 && got != touches {
				t.Fatalf("Touches(%d, %d) = %v", off, n, got)
			}
		}
		same(t, b, p, rapid.Uint64Range(0, 60*BlockSize).Draw(t, "limit"))
	})
}

func TestMarkStopsAtTheLimit(t *testing.T) {
	b := New()
	b.Mark(SizeMax-1, 1)
	if off, n, ok := b.Next(0, 1<<20); !ok || off != SizeMax-BlockSize || n != BlockSize {
		t.Fatalf("last block: %d+%d %v", off, n, ok)
	}
	if _, _, ok := b.Next(SizeMax, 1); ok {
		t.Fatal("a block behind the last one")
	}
	b = New()
	b.Mark(SizeMax, 1)
	b.Mark(^uint64(0), ^uint64(0))
	if !b.Empty() {
		t.Fatal("marked what a bitmap does not cover")
	}
	b.Mark(SizeMax-1, ^uint64(0))
	b.ClearTouched(SizeMax, ^uint64(0))
	if b.Blocks() != 1 || !b.Touches(SizeMax-1, ^uint64(0)) {
		t.Fatalf("%d blocks, want the last one", b.Blocks())
	}
}

// Every prefix and every flipped bit of an encoding is refused or is a bitmap.
func TestUnmarshalDamage(t *testing.T) {
	b := New()
	b.Mark(0, 1<<20)
	for i := uint64(0); i < 9000; i += 2 {
		b.Mark(1<<30+i*BlockSize, 1)
	}
	b.Mark(1<<40, 5)
	enc, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for n := range enc {
		if _, err := Unmarshal(enc[:n]); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("%d bytes of %d: %v", n, len(enc), err)
		}
	}
	for i := range min(len(enc), 600) {
		bad := bytes.Clone(enc)
		bad[i] ^= 1 << (i % 8)
		if c, err := Unmarshal(bad); err == nil {
			c.Mark(0, 1<<30)
			_ = blocks(c, 1<<30)
		}
	}
	if _, err := Unmarshal(make([]byte, BytesMax+1)); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("too long: %v", err)
	}
}

func FuzzUnmarshal(f *testing.F) {
	b := New()
	b.Mark(0, 1<<20)
	b.Mark(1<<40, 5)
	enc, err := b.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(enc)
	f.Fuzz(func(t *testing.T, p []byte) {
		b, err := Unmarshal(p)
		if err != nil {
			return
		}
		n := b.Blocks()
		enc, err := b.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		c, err := Unmarshal(enc)
		if err != nil || c.Blocks() != n {
			t.Fatalf("%d blocks, then %v", n, err)
		}
		c.Union(b)
		c.Mark(12345, 1<<20)
		c.Clear(0, 1<<30)
	})
}

// Since is never less than what changed, exact at a pin, and the same after
// the record was saved and read again.
func TestChangesKnowWhatChanged(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type change struct{ seq, off, n uint64 }
		floor := rapid.Uint64Range(0, 100).Draw(t, "floor")
		c, log := NewChanges(floor), []change{}
		seq := floor
		pins := map[string]uint64{}
		truth := func(after uint64) plain {
			p := plain{}
			for _, e := range log {
				if e.seq > after {
					p.mark(e.off, e.n)
				}
			}
			return p
		}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch op := rapid.SampledFrom([]string{"mark", "mark", "mark", "mark", "pin", "unpin", "merge", "code"}).Draw(t, "op"); op {
			case "mark":
				seq++
				off, n := extent(t)
				c.Mark(seq, off, n)
				log = append(log, change{seq, off, n})
			case "pin", "unpin":
				name := fmt.Sprint(rapid.IntRange(0, 2).Draw(t, "name"))
				if op == "pin" {
					pins[name] = rapid.Uint64Range(floor, seq).Draw(t, "at")
					c.Pin(name, pins[name], rapid.Uint64Range(pins[name], seq).Draw(t, "to"))
				} else {
					delete(pins, name)
					c.Unpin(func(n string) bool { return n == name })
				}
			case "merge":
				c.Merge(rapid.Uint64Range(floor, seq).Draw(t, "horizon"))
			case "code":
				enc, err := c.Marshal()
				if err != nil {
					t.Fatal(err)
				}
				if c, err = UnmarshalChanges(enc); err != nil {
					t.Fatal(err)
				}
			}
			after := rapid.Uint64Range(floor, seq+1).Draw(t, "since")
			got, ok := c.Since(after)
			if !ok {
				t.Fatalf("Since(%d) knows nothing, the floor is %d", after, c.Floor())
			}
			have := map[uint64]bool{}
			for _, b := range blocks(got, 1<<30) {
				have[b] = true
			}
			for b := range truth(after) {
				if !have[b] {
					t.Fatalf("Since(%d) lacks block %d", after, b)
				}
			}
			all := truth(floor)
			for b := range have {
				if !all[b] {
					t.Fatalf("Since(%d) has block %d, which never changed", after, b)
				}
			}
			for name := range pins {
				if !c.Pinned(name) {
					t.Fatalf("pin %s is gone", name)
				}
			}
		}
		if _, ok := c.Since(floor - min(floor, 1)); ok && floor > 0 {
			t.Fatal("knows what was before it began")
		}
	})
}

func FuzzUnmarshalChanges(f *testing.F) {
	c := NewChanges(5)
	for i := range uint64(20) {
		c.Mark(6+i, i<<20, 200<<10)
	}
	c.Pin("gamma", 12, 15)
	enc, err := c.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(enc)
	f.Fuzz(func(t *testing.T, p []byte) {
		c, err := UnmarshalChanges(p)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("an error of no kind: %v", err)
			}
			return
		}
		enc, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := UnmarshalChanges(enc); err != nil {
			t.Fatalf("decoded, encoded, refused: %v", err)
		}
		c.Mark(c.Floor()+1, 0, 4096)
		c.Merge(^uint64(0))
		c.Since(c.Floor())
	})
}

// BenchmarkMergeOfLargeWrites is a volume that is written all over in pieces of 64 KiB:
// the record takes each, and forgets old borders as the horizon follows. (When what is
// large went into what is small, bit by bit, it took a third of a node's time.)
func BenchmarkMergeOfLargeWrites(b *testing.B) {
	const piece, pieces = 64 << 10, 16384 // of 1 GiB
	c := NewChanges(0)
	r := rand.New(rand.NewPCG(1, 1))
	seq := uint64(0)
	for b.Loop() {
		seq++
		c.Mark(seq, uint64(r.IntN(pieces))*piece, piece)
		if c.Segments() > 64 {
			c.Merge(seq &^ 4095) // a checkpoint now and then
		}
	}
}
