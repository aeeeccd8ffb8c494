package replication

import (
	"bytes"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// TestOverlayAgainstModel drives the overlay and an applier that is one array
// through any order of appends, cuts, rounds of applying and looks, and compares
// each look with the array that has every entry in order.
func TestOverlayAgainstModel(t *testing.T) {
	const size = 4 << 20
	rapid.Check(t, func(rt *rapid.T) {
		var (
			o     = newOverlay(0, 1<<20)
			base  = make([]byte, size) // what is applied
			log   []wire.Entry         // all entries, seq 1 first
			held  int                  // applied entries
			shown = make([]byte, size)
		)
		content := func(upTo int) []byte {
			copy(shown, base)
			for i := held; i < upTo; i++ {
				apply(shown, &log[i])
			}
			return shown
		}
		rt.Repeat(map[string]func(*rapid.T){
			"append": func(rt *rapid.T) {
				e := drawEntry(rt, ident.Seq(len(log)+1), size)
				log = append(log, e)
				o.add(log[len(log)-1:])
			},
			"read": func(rt *rapid.T) {
				from := rapid.IntRange(1, len(log)+1).Draw(rt, "from")
				got := o.read(ident.Seq(from), rapid.IntRange(1, 64<<10).Draw(rt, "bytes"), nil)
				if len(got) > 0 && from <= held {
					rt.Fatalf("entry %d is applied, and is read", from)
				}
				for i := range got {
					e, want := &got[i], &log[from-1+i]
					if e.Pos != want.Pos || e.Kind != want.Kind || e.Off != want.Off || e.Len != want.Len || e.Payload != want.Payload {
						rt.Fatalf("read %+v, want %+v", e, want)
					}
					e.Payload.Release()
				}
			},
			"cut": func(rt *rapid.T) {
				n := rapid.IntRange(held, len(log)).Draw(rt, "to")
				o.cut(ident.Seq(n))
				log = log[:n]
			},
			"apply": func(rt *rapid.T) {
				if held == len(log) {
					return
				}
				to := rapid.IntRange(held+1, len(log)).Draw(rt, "to")
				batch := o.begin(ident.Seq(to), false, nil)
				last := batch[len(batch)-1].seq
				for held < int(last) {
					apply(base, &log[held])
					held++
				}
				for i := range batch {
					batch[i].payload.Release()
				}
				o.remove(last)
			},
			"look": func(rt *rapid.T) {
				off := uint64(rapid.IntRange(0, size/512-1).Draw(rt, "off")) * 512
				end := min(off+uint64(rapid.IntRange(1, 1024).Draw(rt, "n"))*512, size)
				upTo := rapid.IntRange(held, len(log)).Draw(rt, "upTo")
				ps, newest := o.look(off, end, ident.Seq(upTo), nil)
				if newest != ident.Seq(upTo) {
					rt.Fatalf("newest %d of %d", newest, upTo)
				}
				got := bytes.Clone(base[off:end])
				for i := range ps {
					p := &ps[i]
					if i > 0 && ps[i-1].seq >= p.seq {
						rt.Fatal("out of order, or twice")
					}
					from, to := max(p.off, off), min(p.end, end)
					dst := got[from-off : to-off]
					src := log[p.seq-1]
					switch {
					case p.kind != wire.KindData:
						clear(dst)
					case p.payload != nil:
						copy(dst, p.payload.B[from-p.off:])
					default:
						copy(dst, src.Payload.B[from-p.off:]) // as from the log
					}
				}
				releasePatches(ps)
				if !bytes.Equal(got, content(upTo)[off:end]) {
					rt.Fatalf("content of [%d, %d) as of %d differs", off, end, upTo)
				}
				if o.touched(off, end, ident.Seq(len(log))) {
					rt.Fatal("touched by what it has shown")
				}
			},
			"touched": func(rt *rapid.T) {
				off := uint64(rapid.IntRange(0, size/512-1).Draw(rt, "off")) * 512
				end := min(off+4096, size)
				since := rapid.IntRange(0, len(log)).Draw(rt, "since")
				want := false
				for i := since; i < held; i++ {
					want = want || log[i].Off < end && off < log[i].End()
				}
				if got := o.touched(off, end, ident.Seq(since)); want && !got {
					rt.Fatalf("entries after %d touched [%d, %d)", since, off, end)
				}
			},
		})
		if n, _ := o.stats(); n != len(log)-held {
			rt.Fatalf("%d entries, want %d", n, len(log)-held)
		}
	})
}

func drawEntry(rt *rapid.T, seq ident.Seq, size uint64) wire.Entry {
	e := wire.Entry{Pos: ident.Position{Epoch: 1, Seq: seq}, Kind: wire.KindMarker}
	switch rapid.IntRange(0, 9).Draw(rt, "kind") {
	case 0:
		return e
	case 1, 2:
		e.Kind = wire.KindTrim
	default:
		e.Kind = wire.KindData
	}
	sectors := rapid.OneOf(rapid.IntRange(1, 16), rapid.IntRange(1, 4000)).Draw(rt, "sectors")
	e.Off = uint64(rapid.IntRange(0, int(size)/512-1).Draw(rt, "off")) * 512
	e.Len = min(uint64(sectors)*512, size-e.Off)
	if e.Kind == wire.KindData {
		e.Payload = buf.Get(int(e.Len))
		for i := range e.Payload.B {
			e.Payload.B[i] = byte(seq)
		}
	}
	return e
}

// apply is the model's: entry by entry.
func apply(p []byte, e *wire.Entry) {
	switch e.Kind {
	case wire.KindData:
		copy(p[e.Off:], e.Payload.B)
	case wire.KindZero, wire.KindTrim:
		clear(p[e.Off:e.End()])
	case wire.KindMarker:
	}
}

// TestApplyPlanLeavesWhatTheOrderLeaves checks that a round whose entries are
// laid over one another, newest first, leaves the bytes of applying them one by
// one, and writes no byte twice.
func TestApplyPlanLeavesWhatTheOrderLeaves(t *testing.T) {
	const size = 256 << 10
	rapid.Check(t, func(rt *rapid.T) {
		w := &applyWork{}
		want, got, times := make([]byte, size), make([]byte, size), make([]byte, size)
		for i := range want {
			want[i], got[i] = 0xff, 0xff
		}
		for seq := range rapid.IntRange(1, 40).Draw(rt, "entries") {
			e := drawEntry(rt, ident.Seq(seq+1), size)
			apply(want, &e)
			a := applyEntry{seq: e.Pos.Seq}
			if e.Kind != wire.KindMarker {
				a.off, a.end = e.Off, e.End()
			}
			a.kind, a.payload = e.Kind, e.Payload
			w.batch = append(w.batch, a)
		}
		w.plan()
		for i := range w.pieces {
			p := &w.pieces[i]
			if i > 0 && w.pieces[i-1].end > p.off {
				rt.Fatal("pieces overlap or are out of order")
			}
			if p.kind == wire.KindData {
				copy(got[p.off:p.end], p.data)
			} else {
				clear(got[p.off:p.end])
			}
			for j := p.off; j < p.end; j++ {
				times[j]++
			}
		}
		if !bytes.Equal(want, got) {
			rt.Fatal("the round leaves other bytes than its entries in order")
		}
		if bytes.IndexByte(times, 2) >= 0 {
			rt.Fatal("a byte is written twice")
		}
	})
}

// TestOverlayShowsTheNewestOfMany: a block that was written over and over is one
// patch to a reader, however long the backlog; what covers a part is not enough.
func TestOverlayShowsTheNewestOfMany(t *testing.T) {
	o := newOverlay(0, 1<<20)
	add := func(seq ident.Seq, kind wire.Kind, off, n uint64) {
		o.addRef(&wire.Entry{Pos: ident.Position{Epoch: 1, Seq: seq}, Kind: kind, Off: off, Len: n})
	}
	seqs := func(off, end uint64, upTo ident.Seq) (list []ident.Seq) {
		ps, _ := o.look(off, end, upTo, nil)
		for _, p := range ps {
			list = append(list, p.seq)
		}
		return list
	}
	for seq := ident.Seq(1); seq <= 100; seq++ {
		add(seq, wire.KindData, 8192, 4096)
	}
	add(101, wire.KindData, 8192, 512)
	add(102, wire.KindZero, 8192, 4096)
	for _, c := range []struct {
		off, end uint64
		upTo     ident.Seq
		want     []ident.Seq
	}{
		{8192, 12288, 100, []ident.Seq{100}},
		{8192, 12288, 50, []ident.Seq{50}},
		{8192, 12288, 101, []ident.Seq{100, 101}},
		{8192, 8704, 101, []ident.Seq{101}},
		// Zeroes hide nothing: BlockStatus is to see the data below.
		{8192, 12288, 102, []ident.Seq{100, 101, 102}},
		{12288, 16384, 102, nil},
	} {
		if got := seqs(c.off, c.end, c.upTo); !slices.Equal(got, c.want) {
			t.Errorf("[%d, %d) as of %d: entries %v, want %v", c.off, c.end, c.upTo, got, c.want)
		}
	}
}
