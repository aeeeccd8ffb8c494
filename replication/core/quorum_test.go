package core

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/blockstep/blockstep/internal/ident"
)

// TestKthIsWhatAMajorityReaches compares with counting.
func TestKthIsWhatAMajorityReaches(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		vals := rapid.SliceOfN(rapid.Uint64Range(0, 6), 1, 9).Draw(t, "values")
		var set []ident.Node
		of := map[ident.Node]ident.Seq{}
		for i, v := range vals {
			n := ident.Node(rune('a' + i))
			set = append(set, n)
			of[n] = ident.Seq(v)
		}
		got := kth(set, func(n ident.Node) ident.Seq { return of[n] })
		count := func(least ident.Seq) (k int) {
			for _, v := range of {
				if v >= least {
					k++
				}
			}
			return k
		}
		if w := len(set)/2 + 1; count(got) < w || count(got+1) >= w {
			t.Fatalf("%v: %d", vals, got)
		}
	})
}

func TestKthOfNobodyIsNothing(t *testing.T) {
	if got := kth(nil, func(ident.Node) ident.Seq { return 9 }); got != 0 {
		t.Fatal(got)
	}
}

// TestWaitersStayInOrder pushes out of order, as a replay that found its entry
// does, and pops.
func TestWaitersStayInOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &Core{hist: history{{Epoch: 1, First: 0}}}
		var q waiters
		var want []uint64
		for i, seq := range rapid.SliceOfN(rapid.Uint64Range(1, 20), 0, 30).Draw(t, "seqs") {
			q.push(waiter{seq: ident.Seq(seq), origin: Origin{ID: uint64(i)}})
			want = append(want, seq)
		}
		upTo := rapid.Uint64Range(0, 21).Draw(t, "upTo")
		c.pop(&q, ident.Seq(upTo), 1)
		var got []uint64
		for _, a := range c.answers {
			got = append(got, uint64(a.Pos.Seq))
		}
		want = slices.DeleteFunc(want, func(s uint64) bool { return s > upTo })
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Fatalf("answered %v, want %v", got, want)
		}
		for i := q.head + 1; i < len(q.w); i++ {
			if q.w[i].seq < q.w[i-1].seq {
				t.Fatalf("out of order: %v", q.w[q.head:])
			}
		}
	})
}

// TestLeaseOutlivesNoGrant: the primary's count of a lease, on a clock as slow
// as allowed, ends before the grant does, on a clock as fast as allowed.
func TestLeaseOutlivesNoGrant(t *testing.T) {
	const ppm = 1000
	c := &Core{cfg: Config{DriftPPM: ppm}}
	rapid.Check(t, func(t *rapid.T) {
		d := rapid.Int64Range(1e6, 1e12).Draw(t, "lease")
		apart := rapid.Int64Range(-ppm, ppm).Draw(t, "drift")
		granted := float64(d) / (1 + float64(apart)/1e6) // in the primary's time
		if counted := float64(c.shorten(d)); counted > granted {
			t.Fatalf("lease %d, clocks %d ppm apart: counts %.0f of %.0f", d, apart, counted, granted)
		}
		// Who restarted counts on the clock that it granted by.
		if silent := c.lengthen(d); silent < d {
			t.Fatalf("lease %d: silent for %d", d, silent)
		}
	})
}
