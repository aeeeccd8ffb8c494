package core

import (
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// drawLogs makes two logs as epochs of entries that share a prefix and may part
// after it: the epochs of the entries 1 to n.
func drawLogs(t *rapid.T) (a, b []ident.Epoch) {
	grow := func(log []ident.Epoch, from ident.Epoch, label string) []ident.Epoch {
		e := from
		for range rapid.IntRange(0, 12).Draw(t, label+" length") {
			if rapid.IntRange(0, 3).Draw(t, label+" epoch") == 0 {
				e += 2
			}
			log = append(log, e)
		}
		return log
	}
	shared := grow(nil, 2, "shared")
	last := ident.Epoch(2)
	if len(shared) > 0 {
		last = shared[len(shared)-1]
	}
	// An epoch has one primary: where they part, at least one begins a new one.
	a = grow(slices.Clone(shared), last+2*ident.Epoch(rapid.IntRange(0, 1).Draw(t, "a goes on")), "a")
	b = grow(slices.Clone(shared), last+1, "b")
	return a, b
}

func historyOf(log []ident.Epoch) history {
	h := history{{Epoch: 0, First: 0}}
	for i, e := range log {
		if e != h[len(h)-1].Epoch {
			h = append(h, ident.EpochStart{Epoch: e, First: ident.Seq(i + 1)})
		}
	}
	return h
}

func TestDivergenceIsWhereTheLogsPart(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := drawLogs(t)
		want := 0
		for want < len(a) && want < len(b) && a[want] == b[want] {
			want++
		}
		got, ok := divergence(historyOf(a), ident.Seq(len(a)), historyOf(b), ident.Seq(len(b)))
		if !ok || int(got) != want {
			t.Fatalf("%v and %v part after %d, got %d, %v", a, b, want, got, ok)
		}
		back, ok := divergence(historyOf(b), ident.Seq(len(b)), historyOf(a), ident.Seq(len(a)))
		if !ok || back != got {
			t.Fatalf("the other way round: %d, %v", back, ok)
		}
	})
}

func TestDivergenceIsUnknownBelowBothHistories(t *testing.T) {
	a := history{{Epoch: 5, First: 10}}
	b := history{{Epoch: 4, First: 10}}
	if seq, ok := divergence(a, 20, b, 20); ok {
		t.Fatalf("parted after %d, and nobody can know", seq)
	}
}

func TestHistoryCut(t *testing.T) {
	h := history{{Epoch: 1, First: 1}, {Epoch: 3, First: 5}, {Epoch: 4, First: 9}}
	for _, c := range []struct {
		seq  ident.Seq
		want int
	}{{0, 0}, {1, 1}, {4, 1}, {5, 2}, {8, 2}, {9, 3}, {100, 3}} {
		if got := slices.Clone(h).cut(c.seq); len(got) != c.want {
			t.Errorf("cut(%d) leaves %v", c.seq, got)
		}
	}
	if e := h.at(8); e != 3 {
		t.Errorf("entry 8 is of epoch %d", e)
	}
}

// TestExtentRing plays random changes on the ring and on a plain slice.
func TestExtentRing(t *testing.T) {
	type model struct {
		seq ident.Seq
		x   extent
	}
	rapid.Check(t, func(t *rapid.T) {
		var r extentRing
		var m []model
		next := ident.Seq(rapid.IntRange(1, 5).Draw(t, "first"))
		total := func(from, to ident.Seq) (n int) {
			for _, e := range m {
				if e.seq > from && e.seq <= to {
					n += int(e.x.cost)
				}
			}
			return n
		}
		t.Repeat(map[string]func(*rapid.T){
			"push": func(t *rapid.T) {
				x := extent{off: uint64(next), len: 1, cost: uint32(rapid.IntRange(1, 9).Draw(t, "cost"))}
				r.push(next, x)
				m = append(m, model{next, x})
				next++
			},
			"pop": func(t *rapid.T) {
				upTo := ident.Seq(rapid.IntRange(0, int(next)).Draw(t, "upTo"))
				x, seq, ok := r.pop(upTo)
				if want := len(m) > 0 && m[0].seq <= upTo; ok != want || ok && (seq != m[0].seq || x != m[0].x) {
					t.Fatalf("pop(%d) gives %v %d %v of %v", upTo, x, seq, ok, m)
				}
				if ok {
					m = m[1:]
				}
			},
			"cut": func(t *rapid.T) {
				seq := ident.Seq(rapid.IntRange(0, int(next)).Draw(t, "seq"))
				if len(m) > 0 && seq < m[0].seq-1 {
					return // what is applied is never cut
				}
				r.cut(seq)
				for len(m) > 0 && m[len(m)-1].seq > seq {
					m = m[:len(m)-1]
				}
				next = min(next, max(seq+1, 1))
			},
			"": func(t *rapid.T) {
				if want := total(0, next); r.total != want {
					t.Fatalf("total %d, want %d", r.total, want)
				}
				from := ident.Seq(rapid.IntRange(0, int(next)).Draw(t, "from"))
				to := ident.Seq(rapid.IntRange(0, int(next)).Draw(t, "to"))
				if got, want := r.cost(from, to), total(from, to); got != want {
					t.Fatalf("cost(%d, %d) is %d, want %d", from, to, got, want)
				}
				after := 0
				for _, e := range m {
					if e.seq > from {
						after++
					}
				}
				if got := r.after(from); len(got) != after {
					t.Fatalf("after(%d) gives %d, want %d", from, len(got), after)
				}
			},
		})
	})
}

func entryAt(seq ident.Seq, n int) wire.Entry {
	e := wire.Entry{Pos: ident.Position{Epoch: 1, Seq: seq}, Kind: wire.KindData}
	e.Payload = bufOf(make([]byte, n))
	return e
}

func TestEntryRingKeepsWhatIsNotHandedOver(t *testing.T) {
	r := entryRing{limit: 4000}
	for seq := ident.Seq(1); seq <= 10; seq++ {
		r.push(entryAt(seq, 1000))
	}
	r.shrink(0, 3)
	if r.first() != 4 || r.len() != 7 {
		t.Fatalf("keeps %d from %d on, want 7 from 4", r.len(), r.first())
	}
	r.shrink(0, 10)
	if r.bytes > r.limit || r.from(6) != nil || len(r.from(8)) != 3 {
		t.Fatalf("keeps %d bytes, %d entries", r.bytes, r.len())
	}
	r.cut(8)
	if r.len() != 2 || r.from(9) != nil {
		t.Fatalf("after the cut %d entries from %d", r.len(), r.first())
	}
	r.cut(0)
	if r.len() != 0 || r.bytes != 0 {
		t.Fatalf("after the last cut %d entries, %d bytes", r.len(), r.bytes)
	}
}

// TestEntryRingKeepsWhatPeersWaitFor: what has been sent to all goes, down to a
// short tail; what has not stays, up to the limit.
func TestEntryRingKeepsWhatPeersWaitFor(t *testing.T) {
	r := entryRing{limit: 100 * ringTailShare}
	for seq := ident.Seq(1); seq <= 20; seq++ {
		r.push(entryAt(seq, 100))
	}
	r.shrink(12, 20)
	if r.first() != 13 || r.len() != 8 {
		t.Fatalf("keeps %d from %d on, want 8 from 13", r.len(), r.first())
	}
	r.shrink(30, 18)
	if r.first() != 19 {
		t.Fatalf("begins at %d, want 19: 18 are handed over", r.first())
	}
	r.shrink(30, 30)
	if r.first() != 20 || r.len() != 1 {
		t.Fatalf("keeps %d from %d on, want the last one", r.len(), r.first())
	}
}

func TestDedupRing(t *testing.T) {
	hist := history{{Epoch: 1, First: 1}, {Epoch: 2, First: 4}}
	d := newDedupRing(3, nil, ident.Position{})
	for seq := ident.Seq(1); seq <= 5; seq++ {
		d.push(DedupEntry{Session: 7, Request: uint64(seq), Seq: seq}, hist)
	}
	if d.floor != (ident.Position{Epoch: 1, Seq: 2}) {
		t.Fatalf("the table reaches back to %v", d.floor)
	}
	for request, want := range map[uint64]ident.Seq{2: 0, 3: 3, 5: 5} {
		if seq, ok := d.find(7, request); seq != want || ok != (want != 0) {
			t.Errorf("request %d is at %d, %v", request, seq, ok)
		}
	}
	d.cut(4)
	if _, ok := d.find(7, 5); ok {
		t.Error("a request is found that was cut")
	}
}

// The ring does what a plain list would, whatever it begins with.
func TestDedupRingIsAList(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		limit := 1 + rng.IntN(3000)
		var list []DedupEntry
		seq := ident.Seq(0)
		add := func() DedupEntry {
			seq++
			return DedupEntry{Session: 1, Request: rng.Uint64(), Seq: seq}
		}
		for range rng.IntN(400) { // more than the limit, too
			list = append(list, add())
		}
		d := newDedupRing(limit, list, ident.Position{})
		hist := history{{Epoch: 1, First: 1}}
		floor := ident.Position{}
		for range 5000 {
			switch {
			case rng.IntN(300) == 0:
				seq -= min(seq, ident.Seq(rng.IntN(2*limit)))
				d.cut(seq)
				for len(list) > 0 && list[len(list)-1].Seq > seq {
					list = list[:len(list)-1]
				}
				seq = max(seq, floor.Seq)
			default:
				if len(list) >= limit {
					floor = ident.Position{Epoch: 1, Seq: list[0].Seq}
					list = list[1:]
				}
				e := add()
				list = append(list, e)
				d.push(e, hist)
			}
		}
		if upTo := seq - min(seq, ident.Seq(rng.IntN(10))); !slices.Equal(d.list(upTo), upToSeq(list, upTo)) {
			t.Fatalf("seed %d: the ring lists %d entries up to %d, want %d", seed, len(d.list(upTo)), upTo, len(upToSeq(list, upTo)))
		}
		if d.floor != floor {
			t.Fatalf("seed %d: reaches back to %v, want %v", seed, d.floor, floor)
		}
		if len(list) > 0 {
			e := list[rng.IntN(len(list))]
			if got, ok := d.find(e.Session, e.Request); !ok || got != e.Seq {
				t.Fatalf("seed %d: a request of %d is at %d, %v", seed, e.Seq, got, ok)
			}
		}
	}
}

func upToSeq(list []DedupEntry, seq ident.Seq) []DedupEntry {
	var out []DedupEntry
	for _, e := range list {
		if e.Seq <= seq {
			out = append(out, e)
		}
	}
	return out
}
