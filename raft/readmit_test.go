package raft

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// failAll marks replicas failed, by their disks and in the cluster state.
func (r *rig) failAll(nodes ...ident.Node) {
	r.t.Helper()
	for _, n := range nodes {
		r.with(func(of map[ident.Node]*fakeReplica) { of[n].failed, of[n].amnesiac = true, true })
		r.do(state.Command{MarkFailed: &state.MarkFailed{Volume: 1, Node: n, Replica: r.vol().Replica(n).Replica, Reason: "no more sectors"}})
	}
}

// With every replica failed nothing moves by itself, and an operator's failover
// is refused with what to type; forced, it takes back the best of those whose
// files open, alone, and the others stay failed.
func TestForcedFailoverToAFailedReplica(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) {
			of["a"].last.Seq, of["b"].last.Seq, of["c"].last.Seq = 14, 12, 11
			of["a"].damaged = true
		})
		r.failAll("a", "b", "c")
		time.Sleep(time.Minute)
		r.want("a", 1)
		_, err := r.c.Failover(t.Context(), 1, "", false)
		if err == nil || !strings.Contains(err.Error(), "'blockstep failover v --force --accept-data-loss'") {
			t.Errorf("not forced: %v", err)
		}
		if _, err := r.c.Failover(t.Context(), 1, "a", true); err == nil || !strings.Contains(err.Error(), "a ("+errCut.Error()+")") {
			t.Errorf("to one whose files do not open: %v", err)
		}
		r.want("a", 1)
		res, err := r.c.Failover(t.Context(), 1, "", true)
		if err != nil || res.Loss != state.LossForced {
			t.Fatalf("%+v, %v", res, err)
		}
		r.want("b", 2)
		v := r.vol()
		if v.Generation != 2 || !slices.Equal(v.InSync, []ident.Node{"b"}) || v.Replica("b").Failed || !v.Replica("a").Failed || !v.Replica("c").Failed {
			t.Errorf("%+v", v)
		}
	})
}

// One that failed is taken back only where it is named, or no member of the set is
// left; the error of a forced failover that finds nobody names it.
func TestForcedFailoverPrefersWholeReplicas(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.failAll("a", "b")
		r.with(func(of map[ident.Node]*fakeReplica) { of["c"].refused = true })
		_, err := r.c.Failover(t.Context(), 1, "", true)
		if err == nil || !strings.Contains(err.Error(), "blockstep failover v --to a --force --accept-data-loss") {
			t.Fatalf("with c away: %v", err)
		}
		r.want("a", 1)
		r.with(func(of map[ident.Node]*fakeReplica) { of["c"].refused = false })
		if res, err := r.c.Failover(t.Context(), 1, "a", true); err != nil {
			t.Fatalf("%+v, %v", res, err)
		}
		r.want("c", 2) // no worse, and it had not failed
		if v := r.vol(); !slices.Equal(v.InSync, []ident.Node{"c"}) || !v.Replica("a").Failed {
			t.Errorf("%+v", v)
		}
		r.failAll("c")
		r.with(func(of map[ident.Node]*fakeReplica) { of["a"].last = ident.Position{Epoch: 1, Seq: 11} })
		if res, err := r.c.Failover(t.Context(), 1, "a", true); err != nil {
			t.Fatalf("%+v, %v", res, err)
		}
		r.want("a", 3)
		if v := r.vol(); !slices.Equal(v.InSync, []ident.Node{"a"}) || v.Replica("a").Failed || !v.Replica("c").Failed {
			t.Errorf("%+v", v)
		}
	})
}
