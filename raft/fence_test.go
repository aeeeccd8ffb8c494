package raft

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// newFenceRig is a rig whose nodes all say that they understand a fence, and whose leases
// run for an hour.
func newFenceRig(t *testing.T, cmds ...state.Command) *rig {
	t.Helper()
	var all []state.Command
	for _, n := range []ident.Node{"a", "b", "c", "d"} {
		all = append(all, state.Started(n, "v2"))
	}
	r := newRig(t, append(all, cmds...)...)
	r.with(func(of map[ident.Node]*fakeReplica) {
		for _, x := range of {
			x.lease = time.Now().Add(time.Hour)
		}
	})
	return r
}

// fences is how often the volume was.
func (r *rig) fences() (n int) {
	for _, e := range r.cluster.State().Events {
		if e.Name == "fenced" {
			n++
		}
	}
	return n
}

func TestFenceKeepsThePrimary(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newFenceRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) { of["a"].delay = 60 * time.Millisecond }) // slow to answer, and still the one
		begin := time.Now()
		res, err := r.c.Fence(t.Context(), 1)
		if err != nil || !res.OK || res.Loss != state.LossNone {
			t.Fatalf("%+v, %v", res, err)
		}
		r.want("a", 2)
		if d := time.Since(begin); d > 100*time.Millisecond {
			t.Errorf("took %v", d)
		}
		if v := r.vol(); v.Generation != 2 || v.LossEpoch != 0 || r.fences() != 1 || r.replicas.drains != 1 {
			t.Errorf("%+v, %d fences, %d drains", v, r.fences(), r.replicas.drains)
		}
		if _, err := r.c.Fence(t.Context(), 1); err != nil || r.vol().Generation != 3 { // who came since ends too
			t.Errorf("again: %v, %+v", err, r.vol())
		}
	})
}

// The primary cannot be reached: as soon as its leases have lapsed another one is
// promoted, by the fence, and no automatic failover goes before it.
func TestFenceWithoutThePrimary(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newFenceRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) {
			of["a"].dead = true
			of["b"].lease, of["c"].lease = time.Now().Add(2*time.Second), time.Now().Add(2*time.Second)
		})
		go r.lapse(10*time.Second, "b", "c")
		res, err := r.c.Fence(t.Context(), 1)
		if err != nil || res.Loss != state.LossNone {
			t.Fatalf("%+v, %v", res, err)
		}
		r.want("b", 2)
		if v := r.vol(); v.Generation != 2 || r.fences() != 1 {
			t.Errorf("%+v, %d fences", v, r.fences())
		}
		time.Sleep(10 * time.Second)
	})
}

// A promotion by somebody else, a leader before for example, comes in between: it is none
// of ours, and the fence goes on in the next epoch.
func TestFenceAfterAnotherPromotion(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newFenceRig(t)
		defer r.stop()
		r.cluster.mu.Lock()
		r.cluster.before = func(state.Command) {
			r.do(state.Command{ID: "late", Promote: &state.Promote{
				Volume: 1, OldEpoch: 1, SetVersion: 1, Epoch: 2, Node: "c", Replica: 30, Incarnation: 1, Heard: []ident.Node{"b", "c"},
			}})
		}
		r.cluster.mu.Unlock()
		if _, err := r.c.Fence(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		r.want("c", 3)
		if v := r.vol(); v.Generation != 2 || r.fences() != 1 {
			t.Errorf("%+v, %d fences", v, r.fences())
		}
	})
}

// The answer to the command is lost: that the generation has risen says that it was done,
// and it is done once.
func TestFenceWhoseAnswerIsLost(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newFenceRig(t)
		defer r.stop()
		r.cluster.mu.Lock()
		r.cluster.drop = true
		r.cluster.mu.Unlock()
		if _, err := r.c.Fence(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		if v := r.vol(); v.Generation != 2 || v.Epoch != 2 || r.fences() != 1 {
			t.Errorf("%+v, %d fences", v, r.fences())
		}
	})
}

// Sessions end with a failover that lost something too: nothing is left to be done.
func TestFenceByALoss(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newFenceRig(t)
		defer r.stop()
		r.cluster.mu.Lock()
		r.cluster.before = func(state.Command) {
			r.do(state.Command{ID: "forced", Promote: &state.Promote{
				Volume: 1, OldEpoch: 1, SetVersion: 1, Epoch: 2, Node: "c", Replica: 30, Incarnation: 1, Heard: []ident.Node{"c"},
				Loss: state.LossForced, Set: []ident.Node{"c"},
			}})
		}
		r.cluster.mu.Unlock()
		if _, err := r.c.Fence(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		r.want("c", 2)
		if v := r.vol(); v.Generation != 2 || r.fences() != 0 {
			t.Errorf("%+v, %d fences", v, r.fences())
		}
	})
}

// Too few answer: it says that it is not in force, and what had to stop for it gets an
// epoch all the same, without a fence.
func TestFenceThatIsNotInForce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newFenceRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) { of["b"].dead, of["c"].dead = true, true })
		begin := time.Now()
		_, err := r.c.Fence(t.Context(), 1)
		if err == nil || !strings.Contains(err.Error(), "not in force") || !strings.Contains(err.Error(), "missing: b (no answer), c (no answer)") {
			t.Fatalf("%v", err)
		}
		if d := time.Since(begin); d < fenceWait || d > fenceWait+5*time.Second {
			t.Errorf("took %v", d)
		}
		r.with(func(of map[ident.Node]*fakeReplica) { of["b"].dead, of["b"].lease = false, time.Time{} })
		until(t, "a new epoch", func() bool { return r.vol().Epoch > 1 })
		if v := r.vol(); v.Generation != 1 || r.fences() != 0 {
			t.Errorf("%+v, %d fences", v, r.fences())
		}
		if _, err := r.c.Fence(t.Context(), 1); err != nil || r.vol().Generation != 2 {
			t.Errorf("again: %v, %+v", err, r.vol())
		}
	})
}

func TestFencesAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newFenceRig(t)
		defer r.stop()
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, err := r.c.Fence(t.Context(), 1); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if v := r.vol(); v.Generation != 4 || v.Primary != "a" || r.fences() != 3 {
			t.Errorf("%+v, %d fences", v, r.fences())
		}
	})
}

func TestFenceAndTheLeaderChanges(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newFenceRig(t)
		r.with(func(of map[ident.Node]*fakeReplica) {
			of["a"].delay, of["b"].delay, of["c"].delay = 500*time.Millisecond, 500*time.Millisecond, 500*time.Millisecond
		})
		var err error
		done := make(chan struct{})
		go func() { defer close(done); _, err = r.c.Fence(t.Context(), 1) }()
		time.Sleep(100 * time.Millisecond) // it has drained
		r.cluster.setLeader(false)
		<-done
		if !errors.Is(err, ErrStopped) || r.vol().Generation != 1 {
			t.Errorf("%v, %+v", err, r.vol())
		}
		if _, err := r.c.Fence(t.Context(), 1); !errors.Is(err, ErrNotLeader) {
			t.Errorf("%v", err)
		}
		r.stop()
		r.cluster.setLeader(true)
		r.run()
		defer r.stop()
		if _, err := r.c.Fence(t.Context(), 1); err != nil || r.vol().Generation != 2 {
			t.Errorf("%v, %+v", err, r.vol())
		}
	})
}

// Nothing is begun where a node may not understand it.
func TestFenceIsUnderstoodByAll(t *testing.T) {
	bubble(t, func(t *testing.T) {
		old := state.Command{AddEvent: &state.AddEvent{Event: state.Event{Name: "node-started", Node: "c", Text: "node c started, blockstep v1"}}}
		r := newFenceRig(t, old)
		defer r.stop()
		_, err := r.c.Fence(t.Context(), 1)
		var lacking *LackingError
		if !errors.As(err, &lacking) || !slices.Equal(lacking.Nodes, []ident.Node{"c"}) {
			t.Errorf("%v", err)
		}
		if v := r.vol(); v.Epoch != 1 || r.replicas.drains != 0 {
			t.Errorf("%+v, %d drains", v, r.replicas.drains)
		}
	})
}

func TestCallerGoesAwayDuringAFence(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newFenceRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) {
			of["b"].delay, of["c"].delay = 100*time.Millisecond, 100*time.Millisecond
		})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if _, err := r.c.Fence(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		time.Sleep(time.Second)
		r.want("a", 2)
		if r.fences() != 1 {
			t.Errorf("%d fences", r.fences())
		}
	})
}
