package state

import (
	"fmt"
	"slices"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
)

// member is one of the things that a member of the in-sync set can be to a
// round of SEAL.
type member struct {
	name string
	pos  ident.Seq // of the usable ones
	make func(rep *Replica, r *Round)
}

func accepted(seq ident.Seq, change func(*ident.SealAnswer)) func(*Replica, *Round) {
	return func(rep *Replica, r *Round) {
		a := ident.SealAnswer{Epoch: r.Epoch, Promised: r.Epoch, Last: ident.Position{Epoch: 1, Seq: seq}, Replica: rep.Replica, Incarnation: 1}
		if change != nil {
			change(&a)
		}
		r.Answers[rep.Node] = a
	}
}

var members = []member{
	{"good1", 1, accepted(1, nil)},
	{"good2", 2, accepted(2, nil)},
	{"amnesiac1", 1, accepted(1, func(a *ident.SealAnswer) { a.Amnesiac = true })},
	{"amnesiac2", 2, accepted(2, func(a *ident.SealAnswer) { a.Amnesiac = true })},
	{"absent", 0, func(*Replica, *Round) {}},
	{"failed-now", 0, accepted(9, func(a *ident.SealAnswer) { a.Refusal = ident.SealFailed })},
	{"failed-known", 0, func(rep *Replica, r *Round) { rep.Failed = true; accepted(9, nil)(rep, r) }},
	{"wiped", 0, accepted(9, func(a *ident.SealAnswer) { a.Replica++ })},
	{"wiped-failed", 0, accepted(9, func(a *ident.SealAnswer) { a.Replica++; a.Refusal = ident.SealFailed })},
	{"unregistered", 0, func(rep *Replica, r *Round) { rep.Replica = 0; accepted(9, nil)(rep, r) }},
	{"inconsistent", 0, accepted(9, func(a *ident.SealAnswer) { a.Inconsistent = true })},
	{"lease", 0, accepted(9, func(a *ident.SealAnswer) { a.Refusal = ident.SealLease; a.WaitNanos = 7 })},
	{"promised", 0, accepted(9, func(a *ident.SealAnswer) { a.Refusal = ident.SealPromised; a.Promised = 8 })},
	{"stale", 0, accepted(9, func(a *ident.SealAnswer) { a.Epoch-- })},
}

// each calls f with every combination of n members.
func each(n int, f func([]member)) {
	pick := make([]member, n)
	var rec func(int)
	rec = func(i int) {
		if i == n {
			f(pick)
			return
		}
		for _, m := range members {
			pick[i] = m
			rec(i + 1)
		}
	}
	rec(0)
}

func roundOf(pick []member) Round {
	v := &Volume{Name: "v", ID: 1, Epoch: 4, Primary: "a"}
	for i := range pick {
		n := ident.Node(string(rune('a' + i)))
		v.Replicas = append(v.Replicas, Replica{Node: n, Replica: ident.Replica(10 + 10*i)})
		v.InSync = append(v.InSync, n)
	}
	r := Round{Volume: v, Epoch: 5, Answers: map[ident.Node]ident.SealAnswer{}, PowerLoss: true}
	for i, m := range pick {
		m.make(&v.Replicas[i], &r)
	}
	return r
}

func count(pick []member, names ...string) int {
	n := 0
	for _, m := range pick {
		if slices.Contains(names, m.name) {
			n++
		}
	}
	return n
}

// TestDecideSealExhaustive holds every combination of one to four members
// against what may have been committed, which is reckoned here from the other
// side: a write at seq 2 was committed only if a majority may have held it.
func TestDecideSealExhaustive(t *testing.T) {
	for n := 1; n <= 4; n++ {
		each(n, func(pick []member) {
			for _, grace := range []bool{false, true} {
				r := roundOf(pick)
				r.GraceOver = grace
				if msg := judge(pick, &r, DecideSeal(r)); msg != "" {
					t.Fatalf("%s: %s: %+v", names(pick), msg, DecideSeal(r))
				}
			}
		})
	}
}

func names(pick []member) string {
	var s []string
	for _, m := range pick {
		s = append(s, m.name)
	}
	return fmt.Sprint(s)
}

func judge(pick []member, r *Round, d Verdict) string {
	n, w := len(pick), len(pick)/2+1
	good := count(pick, "good1", "good2")
	amnesiac := count(pick, "amnesiac1", "amnesiac2")
	failed := count(pick, "failed-now", "failed-known")
	need := n - w + 1
	// auto-promote-counts-absent, wiped-replica-answers-seal: neither counts.
	plain := good >= need
	power := !plain && amnesiac+failed >= w && good+amnesiac >= need
	raise := count(pick, "promised") > 0
	switch {
	case raise:
		if d.Kind != VerdictRaise || d.Epoch != 9 {
			return "someone promised 8: ask for 9"
		}
		return ""
	case plain:
		if d.Kind != VerdictPromote || d.Loss != LossNone {
			return "enough whole answers: promote (I8)"
		}
	case power:
		all := good+amnesiac+failed == n
		if all || r.GraceOver {
			if d.Kind != VerdictPromote || d.Loss != LossPower {
				return "power loss, nobody better can come: promote"
			}
		} else if d.Kind != VerdictGrace {
			return "power loss, somebody may still come: wait"
		}
	default:
		if d.Kind == VerdictPromote || d.Kind == VerdictGrace {
			return "too few: it must not guess (I7)"
		}
		if want := count(pick, "lease") > 0; (d.Kind == VerdictLease) != want {
			return "lease is waited for, and nothing else with it"
		}
	}
	if d.Kind != VerdictPromote {
		return ""
	}
	var winner member
	for i := range pick {
		if r.Volume.Replicas[i].Node == d.Node {
			winner = pick[i]
		}
	}
	if winner.pos == 0 || d.Answer.Last.Seq != winner.pos {
		return "the winner has no usable copy"
	}
	// Who cannot have held seq 2 (durably, after a power loss)?
	without := count(pick, "good1")
	if d.Loss == LossPower {
		without += count(pick, "amnesiac1")
	} else if winner.name != "good1" && winner.name != "good2" {
		return "an amnesiac replica was promoted without a power loss"
	}
	if winner.pos == 1 && n-without >= w {
		return "seq 2 may have been committed (I2)"
	}
	return ""
}

func TestDecideSealTies(t *testing.T) {
	pick := []member{members[1], members[1], members[1]}
	for _, tc := range []struct{ prefer, avoid, want ident.Node }{
		{"", "", "a"}, {"c", "", "c"}, {"", "a", "b"}, {"c", "a", "c"}, {"b", "c", "b"},
	} {
		r := roundOf(pick)
		r.Prefer, r.Avoid = tc.prefer, tc.avoid
		if d := DecideSeal(r); d.Node != tc.want {
			t.Errorf("prefer %q avoid %q: %s, want %s", tc.prefer, tc.avoid, d.Node, tc.want)
		}
	}
	// A preference never outweighs a position.
	r := roundOf([]member{members[1], members[0], members[0]})
	r.Prefer, r.Avoid = "c", "a"
	if d := DecideSeal(r); d.Node != "a" {
		t.Errorf("%s was promoted over a higher position", d.Node)
	}
}

// Who is primary of fewer other volumes wins among equals alone: a Position, what was
// asked for, and who is to be avoided go first.
func TestDecideSealSpreads(t *testing.T) {
	for _, tc := range []struct {
		name          string
		b, c          ident.Seq
		prefer, avoid ident.Node
		leaving       bool
		want          ident.Node
	}{
		{name: "equal", want: "c"},
		{name: "b is ahead", b: 1, want: "b"},
		{name: "c is ahead", c: 1, want: "c"},
		{name: "b is asked for", prefer: "b", want: "b"},
		{name: "c is avoided", avoid: "c", want: "b"},
		{name: "c leaves", leaving: true, want: "b"},
	} {
		r := roundOf([]member{{make: func(*Replica, *Round) {}}, {make: accepted(5+tc.b, nil)}, {make: accepted(5+tc.c, nil)}})
		r.Prefer, r.Avoid, r.Has = tc.prefer, tc.avoid, map[ident.Node]int{"b": 2, "c": 1}
		r.Volume.Replica("c").Leaving = tc.leaving
		if v := DecideSeal(r); v.Kind != VerdictPromote || v.Node != tc.want {
			t.Errorf("%s: %v of %s, not of %s", tc.name, v.Kind, v.Node, tc.want)
		}
	}
}

// A primary that reaches none of those with whom it would have to commit has the
// longest log, by its own markers. It is passed over as soon as enough others
// have answered, unless it may have answered clients alone.
func TestDecideSealPassesOverACutOffPrimary(t *testing.T) {
	cut := func() Round {
		r := roundOf([]member{members[1], members[0], members[0]})
		a := r.Answers["a"]
		a.Last = ident.Position{Epoch: 4, Seq: 3}
		r.Answers["a"] = a
		return r
	}
	r := cut()
	if d := DecideSeal(r); d.Node != "b" || !slices.Equal(d.Heard, []ident.Node{"b", "c"}) {
		t.Errorf("%s was promoted, heard %v", d.Node, d.Heard)
	}
	delete(r.Answers, "c")
	if d := DecideSeal(r); d.Node != "a" {
		t.Errorf("%s was promoted, and what a and c hold may be committed", d.Node)
	}
	r = cut()
	r.Volume.LocalEpoch = 4
	if d := DecideSeal(r); d.Node != "a" {
		t.Errorf("%s was promoted: with ack local the tail was answered", d.Node)
	}
	r = cut()
	b := r.Answers["b"]
	b.Last = ident.Position{Epoch: 4, Seq: 2}
	r.Answers["b"] = b
	if d := DecideSeal(r); d.Node != "a" {
		t.Errorf("%s was promoted, and b holds entries of a's reign", d.Node)
	}
}

func TestDecideSealWaitMode(t *testing.T) {
	r := roundOf([]member{members[2], members[3], members[4]})
	r.PowerLoss, r.GraceOver = false, true
	if d := DecideSeal(r); d.Kind != VerdictWait {
		t.Errorf("after_power_loss wait: %+v", d)
	}
}

// TestDecideForcedExhaustive: forced takes what it can get, never a failed,
// wiped or inconsistent replica, and never against a lease.
func TestDecideForcedExhaustive(t *testing.T) {
	for n := 1; n <= 3; n++ {
		each(n, func(pick []member) {
			r := roundOf(pick)
			d := DecideForced(r)
			usable := count(pick, "good1", "good2", "amnesiac1", "amnesiac2")
			want := VerdictPromote
			switch {
			case count(pick, "promised") > 0:
				want = VerdictRaise
			case count(pick, "lease") > 0:
				want = VerdictLease
			case usable == 0:
				want = VerdictWait
			}
			if d.Kind != want {
				t.Fatalf("%s: %+v, want %v", names(pick), d, want)
			}
			if d.Kind == VerdictPromote && (d.Loss != LossForced || len(d.Set) != usable || !slices.Contains(d.Set, d.Node)) {
				t.Fatalf("%s: %+v", names(pick), d)
			}
		})
	}
}

func TestDecideForcedOutsideTheSet(t *testing.T) {
	r := roundOf([]member{members[4], members[0], members[1]})
	r.Volume.InSync = []ident.Node{"a"}
	d := DecideForced(r)
	if d.Kind != VerdictPromote || d.Node != "c" || !slices.Equal(d.Set, []ident.Node{"c"}) {
		t.Errorf("the set's only member is gone: %+v", d)
	}
	r = roundOf([]member{members[0], members[1], members[1]})
	r.Volume.InSync = []ident.Node{"a"}
	if d := DecideForced(r); d.Node != "a" || !slices.Equal(d.Set, []ident.Node{"a"}) {
		t.Errorf("a stale replica with a higher seq of its own was taken before the set: %+v", d)
	}
}
