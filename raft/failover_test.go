package raft

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// fakeCluster is the cluster state without Raft.
type fakeCluster struct {
	mu     sync.Mutex
	s      *state.State
	leader bool
	watch  watchers
	before func(c state.Command) // called without the lock before a command is applied
	drop   bool                  // commands are applied and their answers lost
}

func (f *fakeCluster) State() *state.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.s
}

func (f *fakeCluster) Apply(_ context.Context, c state.Command) (state.Result, error) {
	f.mu.Lock()
	before := f.before
	f.before = nil
	f.mu.Unlock()
	if before != nil {
		before(c)
	}
	f.mu.Lock()
	defer f.watch.wake()
	defer f.mu.Unlock()
	if !f.leader {
		return state.Result{}, &NotLeaderError{}
	}
	s, r := f.s.Apply(c)
	f.s = s
	if f.drop {
		return state.Result{}, ErrUnknownOutcome
	}
	return r, nil
}

func (f *fakeCluster) Barrier(context.Context) error    { return nil }
func (f *fakeCluster) Leader() (ident.Node, string)     { return "a", "a:1" }
func (f *fakeCluster) Watch() (<-chan struct{}, func()) { return f.watch.add() }

func (f *fakeCluster) IsLeader() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.leader
}

func (f *fakeCluster) setLeader(yes bool) {
	f.mu.Lock()
	f.leader = yes
	f.mu.Unlock()
	f.watch.wake()
}

// fakeReplica answers SEAL as the design says.
type fakeReplica struct {
	id       ident.Replica
	promised ident.Epoch
	last     ident.Position
	lease    time.Time // until then it declines
	silent   time.Time // likewise, since it restarted
	amnesiac bool
	dead     bool // hangs
	refused  bool // refuses connections: an error at once
	failed   bool // until it is opened again
	damaged  bool // and that is refused
	delay    time.Duration
	seals    int
}

// fakeReplicas are the replicas of volume 1.
type fakeReplicas struct {
	mu     sync.Mutex
	of     map[ident.Node]*fakeReplica
	drains int
	drain  func(node ident.Node) error // nil: all leases are given back
}

func (f *fakeReplicas) Seal(ctx context.Context, node ident.Node, _ ident.Volume, epoch ident.Epoch) (ident.SealAnswer, error) {
	f.mu.Lock()
	r := *f.of[node]
	f.of[node].seals++
	f.mu.Unlock()
	if r.refused {
		return ident.SealAnswer{}, errCut
	}
	if r.dead {
		<-ctx.Done()
		return ident.SealAnswer{}, ctx.Err()
	}
	if r.delay > 0 && !pause(ctx, r.delay) {
		return ident.SealAnswer{}, ctx.Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.of[node]
	a := ident.SealAnswer{Epoch: epoch, Promised: p.promised, Last: p.last, Replica: p.id, Incarnation: 1, Amnesiac: p.amnesiac}
	switch left := time.Until(p.lease); {
	case p.failed:
		a.Refusal = ident.SealFailed
	case left > 0:
		a.Refusal, a.WaitNanos = ident.SealLease, left.Nanoseconds()
	case time.Until(p.silent) > 0:
		a.Refusal, a.WaitNanos = ident.SealSilent, time.Until(p.silent).Nanoseconds()
	case epoch < p.promised:
		a.Refusal = ident.SealPromised
	default:
		p.promised, a.Promised = epoch, epoch
	}
	return a, nil
}

func (f *fakeReplicas) Drain(_ context.Context, node ident.Node, _ ident.Volume, _ ident.Epoch) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.drains++
	if f.drain != nil {
		return f.drain(node)
	}
	if f.of[node].refused || f.of[node].dead {
		return errCut
	}
	for _, r := range f.of {
		r.lease = time.Time{}
	}
	return nil
}

func (f *fakeReplicas) Readmit(_ context.Context, node ident.Node, _ ident.Volume, _ ident.Epoch) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.of[node]; r.refused || r.damaged {
		return errCut
	}
	f.of[node].failed = false
	return nil
}

// rig is a controller on a volume with replicas a, b, c; a is primary of epoch 1.
type rig struct {
	t        *testing.T
	cluster  *fakeCluster
	replicas *fakeReplicas
	c        *Controller
	stop     func()
	wg       sync.WaitGroup
}

func ptr[T any](v T) *T { return &v }

func newRig(t *testing.T, cmds ...state.Command) *rig {
	t.Helper()
	init := &state.InitCluster{Cluster: "prod", ClusterID: "x"}
	for _, n := range []ident.Node{"a", "b", "c", "d"} {
		init.Nodes = append(init.Nodes, state.Node{Name: n, Address: string(n) + ":1", RaftID: string(n) + "/1"})
	}
	vol := &state.CreateVolume{Name: "v", ID: 1, Size: 1 << 20, Replicas: []state.Replica{{Node: "a"}, {Node: "b"}, {Node: "c"}}}
	r := &rig{t: t, cluster: &fakeCluster{s: state.New(), leader: true}, replicas: &fakeReplicas{of: map[ident.Node]*fakeReplica{}}}
	r.do(state.Command{InitCluster: init})
	r.do(state.Command{CreateVolume: vol})
	for i, n := range []ident.Node{"a", "b", "c"} {
		id := ident.Replica(10 * (i + 1))
		r.do(state.Command{RegisterReplica: &state.RegisterReplica{Volume: 1, Node: n, Replica: id}})
		r.replicas.of[n] = &fakeReplica{id: id, promised: 1, last: ident.Position{Epoch: 1, Seq: 10}}
	}
	r.do(state.Command{Promote: &state.Promote{Volume: 1, SetVersion: 1, Epoch: 1, Node: "a", Replica: 10, Incarnation: 1, Heard: []ident.Node{"a", "b", "c"}}})
	for _, c := range cmds {
		r.do(c)
	}
	r.run()
	return r
}

func (r *rig) do(c state.Command) {
	r.t.Helper()
	res, err := r.cluster.Apply(r.t.Context(), c)
	if err != nil || !res.OK {
		r.t.Fatalf("%s: %v %+v", c.Kind(), err, res)
	}
}

func (r *rig) run() {
	r.c = NewController(ControllerOptions{Cluster: r.cluster, Replicas: r.replicas, Logger: testLogger(r.t)})
	ctx, cancel := context.WithCancel(r.t.Context())
	r.stop = func() { cancel(); r.wg.Wait() }
	r.wg.Go(func() { _ = r.c.Run(ctx) })
	synctest.Wait()
}

func (r *rig) vol() *state.Volume { return r.cluster.State().Volumes[1] }

// with changes replicas under their lock.
func (r *rig) with(f func(of map[ident.Node]*fakeReplica)) {
	r.replicas.mu.Lock()
	defer r.replicas.mu.Unlock()
	f(r.replicas.of)
}

// lapse lets nodes report until the epoch moves or d is over; it returns how
// long that took.
func (r *rig) lapse(d time.Duration, nodes ...ident.Node) time.Duration {
	begin, epoch := time.Now(), r.vol().Epoch
	for time.Since(begin) < d && r.vol().Epoch == epoch {
		if time.Since(begin)%(200*time.Millisecond) == 0 {
			for _, n := range nodes {
				r.c.Report(1, n, ReportLapsed, epoch)
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(begin)
}

func (r *rig) want(primary ident.Node, epoch ident.Epoch) {
	r.t.Helper()
	synctest.Wait()
	if v := r.vol(); v.Primary != primary || v.Epoch != epoch {
		r.t.Fatalf("primary %s in epoch %d, want %s in %d; waiting for %q", v.Primary, v.Epoch, primary, epoch, r.c.Waiting(1))
	}
}

// bubble runs a test with its rig in virtual time.
func bubble(t *testing.T, f func(t *testing.T)) { t.Helper(); synctest.Test(t, f) }

// Reports come one by one, and the one that makes them enough is acted on at once.
func TestReportsOneByOne(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) { of["a"].dead = true })
		r.c.Report(1, "b", ReportLapsed, 1)
		synctest.Wait()
		time.Sleep(10 * time.Millisecond)
		if d := r.lapse(10*time.Second, "c"); d > 50*time.Millisecond {
			t.Errorf("took %v", d)
		}
		r.want("b", 2)
	})
}

func TestFailoverOfADeadPrimary(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) { of["a"].dead = true; of["c"].last.Seq = 12 })
		if d := r.lapse(10*time.Second, "b", "c"); d > 100*time.Millisecond {
			t.Errorf("took %v", d)
		}
		r.want("c", 2) // the highest position
		if v := r.vol(); v.Generation != 1 || v.PrimaryPosition.Seq != 12 || v.PrimaryIncarnation != 1 {
			t.Errorf("%+v", v)
		}
	})
}

// One replica has lost its link to a primary that lives with the other: nobody
// is sealed, whatever it reports (seal-ignores-grant, and half-sealed members).
func TestOneLostLinkDisturbsNobody(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) {
			of["a"].lease, of["b"].lease = time.Now().Add(time.Hour), time.Now().Add(time.Hour)
		})
		r.lapse(20*time.Second, "c")
		r.want("a", 1)
		r.with(func(of map[ident.Node]*fakeReplica) {
			if of["c"].promised != 1 {
				t.Errorf("c has promised %d: it is lost to the primary", of["c"].promised)
			}
		})
		if r.replicas.drains != 0 || r.c.Waiting(1) != "" {
			t.Errorf("%d drains, waiting for %q", r.replicas.drains, r.c.Waiting(1))
		}
	})
}

// The other secondary's reports are lost, and it is asked.
func TestTooFewReportsAreProbed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) { of["a"].refused = true })
		if d := r.lapse(10*time.Second, "c"); d > time.Second {
			t.Errorf("took %v", d)
		}
		r.want("b", 2)
	})
}

// Leases end one after the other: the round goes on until they have.
func TestLeasesAreWaitedFor(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) {
			of["a"].dead = true
			of["c"].lease = time.Now().Add(90 * time.Millisecond)
		})
		if d := r.lapse(10*time.Second, "b", "c"); d < 90*time.Millisecond || d > 500*time.Millisecond { // it may take the next report
			t.Errorf("took %v", d)
		}
		r.want("b", 2)
	})
}

// half-sealed-member-stuck: one has promised more, and the primary says so.
func TestResealDrainsAndKeepsThePrimary(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) {
			of["c"].promised = 7
			of["a"].lease, of["b"].lease = time.Now().Add(time.Hour), time.Now().Add(time.Hour)
		})
		begin := time.Now()
		r.c.Report(1, "a", ReportReseal, 1)
		until(t, "a new epoch", func() bool { return r.vol().Epoch > 1 })
		r.want("a", 8)
		if d := time.Since(begin); d > 100*time.Millisecond {
			t.Errorf("took %v", d)
		}
		if r.replicas.drains != 1 {
			t.Errorf("%d drains", r.replicas.drains)
		}
	})
}

// A round that was cut short has sealed one; the primary lives and holds its
// lease with the other: it is drained, and someone gets an epoch above all.
func TestHalfSealedIsEnded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) {
			of["a"].lease = time.Now().Add(time.Hour)
			of["b"].dead = true
		})
		r.lapse(10*time.Second, "b", "c") // b's report came before it hung
		if v := r.vol(); v.Epoch < 2 {
			t.Fatalf("nobody was promoted; waiting for %q", r.c.Waiting(1))
		}
		if r.replicas.drains == 0 {
			t.Error("the primary was never drained")
		}
	})
}

func TestPromotedReplicaRefuses(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.c.Report(1, "a", ReportRefused, 1)
		until(t, "a new epoch", func() bool { return r.vol().Epoch > 1 })
		r.want("b", 2)
		r.c.Report(1, "b", ReportRefused, 1) // late, of an old epoch
		time.Sleep(5 * time.Second)
		r.want("b", 2)
	})
}

func TestStalledPrimaryHandsOver(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) {
			of["a"].dead = true // its promise hangs with its disk
			of["b"].lease, of["c"].lease = time.Now().Add(2*time.Second), time.Now().Add(2*time.Second)
		})
		begin := time.Now()
		r.c.Report(1, "a", ReportStalled, 1)
		until(t, "a new epoch", func() bool { return r.vol().Epoch > 1 })
		r.want("b", 2)
		if d := time.Since(begin); d > 2500*time.Millisecond {
			t.Errorf("took %v, of which 2 s were the leases", d)
		}
	})
}

func TestFailedPrimaryIsReplaced(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.do(state.Command{MarkFailed: &state.MarkFailed{Volume: 1, Node: "a", Replica: 10, Reason: "EIO"}})
		until(t, "a new epoch", func() bool { return r.vol().Epoch > 1 })
		r.want("b", 2)
	})
}

func TestPowerLossWaitsForTheBetterCopy(t *testing.T) {
	for _, comes := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			r := newRig(t)
			defer r.stop()
			r.with(func(of map[ident.Node]*fakeReplica) {
				of["a"].amnesiac, of["b"].amnesiac = true, true
				of["b"].last.Seq = 11
				of["c"].refused = true
				of["c"].last.Seq, of["c"].amnesiac = 15, true
			})
			r.lapse(30*time.Second, "a", "b")
			r.want("a", 1)
			if w := r.c.Waiting(1); !strings.Contains(w, "c (no answer)") || !strings.Contains(w, "power loss") {
				t.Errorf("waiting for %q", w)
			}
			if comes {
				r.with(func(of map[ident.Node]*fakeReplica) { of["c"].refused = false })
				r.lapse(3*time.Second, "a", "b", "c")
				r.want("c", 2)
			} else {
				r.lapse(40*time.Second, "a", "b")
				r.want("b", 2)
			}
			if v := r.vol(); v.Generation != 2 || v.LossEpoch != 2 {
				t.Errorf("%+v", v)
			}
		})
	}
}

// auto-promote-counts-absent: one amnesiac, one gone for good, one whole.
func TestTooFewAmnesiacWaitsForever(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) {
			of["a"].refused = true
			of["b"].amnesiac = true
		})
		r.lapse(10*time.Minute, "b", "c")
		r.want("a", 1)
		if w := r.c.Waiting(1); !strings.Contains(w, "a (no answer)") {
			t.Errorf("waiting for %q", w)
		}
		_, err := r.c.Failover(t.Context(), 1, "", false)
		if err == nil || !strings.Contains(err.Error(), "--force --accept-data-loss") {
			t.Errorf("an operator is told nothing useful: %v", err)
		}
		r.with(func(of map[ident.Node]*fakeReplica) { of["a"].refused = false })
		r.lapse(5*time.Second, "b", "c")
		r.want("a", 2)
	})
}

func TestPowerLossByOperator(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, state.Command{SetOptions: &state.SetOptions{Volume: 1, AfterPowerLoss: ptr(state.PowerLossWait)}})
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) {
			for _, x := range of {
				x.amnesiac = true
			}
		})
		r.lapse(5*time.Minute, "a", "b", "c")
		r.want("a", 1)
		res, err := r.c.Failover(t.Context(), 1, "", false)
		if err != nil || res.Loss != state.LossPower {
			t.Errorf("%+v, %v", res, err)
		}
		r.want("a", 2)
	})
}

// wiped-replica-answers-seal.
func TestWipedReplicaDoesNotCount(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) { of["a"].refused = true; of["b"].id = 99 })
		r.lapse(2*time.Minute, "b", "c")
		r.want("a", 1)
	})
}

// The set changes between the answers and the command: the comparison fails,
// and the next round is of the new set.
func TestSetChangesUnderTheRound(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.cluster.mu.Lock()
		r.cluster.before = func(state.Command) {
			r.do(state.Command{ChangeSet: &state.ChangeSet{Volume: 1, Epoch: 1, Version: 1, Set: []ident.Node{"a", "c"}}})
		}
		r.cluster.mu.Unlock()
		r.with(func(of map[ident.Node]*fakeReplica) { of["a"].dead = true; of["b"].last.Seq = 20 })
		r.lapse(10*time.Second, "b", "c")
		r.want("c", 2)
		if v := r.vol(); !slices.Equal(v.InSync, []ident.Node{"a", "c"}) {
			t.Errorf("in sync: %v", v.InSync)
		}
	})
}

// The answer to the promote command is lost: the epoch says that it was done.
func TestLostAnswerMakesNoSecondPrimary(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.cluster.mu.Lock()
		r.cluster.drop = true
		r.cluster.mu.Unlock()
		r.lapse(10*time.Second, "b", "c")
		time.Sleep(10 * time.Second)
		r.want("a", 2)
	})
}

func TestLeaderChangesInTheMiddle(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		r.with(func(of map[ident.Node]*fakeReplica) { of["a"].dead = true; of["c"].delay = 500 * time.Millisecond })
		r.c.Report(1, "b", ReportLapsed, 1)
		r.c.Report(1, "c", ReportLapsed, 1)
		time.Sleep(100 * time.Millisecond) // b has promised 2, c has not answered
		r.cluster.setLeader(false)
		time.Sleep(time.Second)
		r.want("a", 1)
		r.c.Report(1, "b", ReportLapsed, 1) // nobody leads here
		if _, err := r.c.Failover(t.Context(), 1, "", false); !errors.Is(err, ErrNotLeader) {
			t.Errorf("%v", err)
		}
		r.stop()
		r.cluster.setLeader(true)
		r.run() // the next leader's controller knows nothing of the round
		defer r.stop()
		r.lapse(10*time.Second, "b", "c")
		r.want("b", 2)
	})
}

func TestSwitchover(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) {
			for _, x := range of {
				x.lease = time.Now().Add(time.Hour)
			}
			of["c"].delay = 60 * time.Millisecond // slow to answer, and still the one
		})
		begin := time.Now()
		if err := r.c.Switchover(t.Context(), 1, "c"); err != nil {
			t.Fatal(err)
		}
		r.want("c", 2)
		if d := time.Since(begin); d > 200*time.Millisecond {
			t.Errorf("took %v", d)
		}
		if err := r.c.Switchover(t.Context(), 1, "c"); err != nil || r.vol().Epoch != 2 {
			t.Errorf("to whom has it: %v, epoch %d", err, r.vol().Epoch)
		}
		for to, say := range map[ident.Node]string{"d": "has no replica", "z": "has no replica"} {
			if err := r.c.Switchover(t.Context(), 1, to); err == nil || !strings.Contains(err.Error(), say) {
				t.Errorf("to %s: %v", to, err)
			}
		}
	})
}

// The target lacks what the primary has sent last: the best replica is
// promoted, and the switchover is tried again.
func TestSwitchoverToOneThatLags(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) { of["c"].last.Seq = 9 })
		r.cluster.mu.Lock()
		r.cluster.before = func(state.Command) { // in the new epoch it catches up
			r.with(func(of map[ident.Node]*fakeReplica) {
				for _, x := range of {
					x.last = ident.Position{Epoch: 2, Seq: 12}
				}
			})
		}
		r.cluster.mu.Unlock()
		// The first promotion is of a or b at 10; then all are at 2:12.
		if err := r.c.Switchover(t.Context(), 1, "c"); err != nil {
			t.Fatal(err)
		}
		r.want("c", 3)
	})
}

// The target has just started, and declines until every lease that it may have
// granted before has lapsed: the switchover waits for that.
func TestSwitchoverToOneThatIsSilent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) { of["c"].silent = time.Now().Add(2 * time.Second) })
		if err := r.c.Switchover(t.Context(), 1, "c"); err != nil {
			t.Fatal(err)
		}
		if v := r.vol(); v.Primary != "c" {
			t.Errorf("%+v", v)
		}
	})
}

func TestSwitchoverNeverCatchesUp(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) { of["c"].last.Seq = 9 })
		err := r.c.Switchover(t.Context(), 1, "c")
		if err == nil || !strings.Contains(err.Error(), "was behind") {
			t.Errorf("%v", err)
		}
		if v := r.vol(); v.Primary == "c" || v.Epoch < 2 {
			t.Errorf("%+v", v)
		}
	})
}

// The primary drains and dies: somebody must have an epoch, and soon.
func TestPrimaryDiesAfterTheDrain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.replicas.drain = func(ident.Node) error {
			r.replicas.of["a"].refused = true
			return errCut
		}
		r.with(func(of map[ident.Node]*fakeReplica) {
			of["b"].lease, of["c"].lease = time.Now().Add(3*time.Second), time.Now().Add(3*time.Second)
		})
		begin := time.Now()
		if err := r.c.Switchover(t.Context(), 1, "c"); err != nil {
			t.Fatal(err)
		}
		r.want("c", 2)
		if d := time.Since(begin); d > 3500*time.Millisecond {
			t.Errorf("took %v, of which 3 s were the leases", d)
		}
	})
}

func TestCallerGoesAwayDuringASwitchover(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) {
			of["b"].delay, of["c"].delay = 100*time.Millisecond, 100*time.Millisecond
		})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if err := r.c.Switchover(ctx, 1, "b"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		time.Sleep(time.Second)
		r.want("b", 2)
	})
}

func TestForcedFailover(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) { of["a"].refused, of["b"].refused = true, true })
		r.lapse(20*time.Second, "c")
		r.want("a", 1)
		res, err := r.c.Failover(t.Context(), 1, "", true)
		if err != nil || res.Loss != state.LossForced {
			t.Fatalf("%+v, %v", res, err)
		}
		r.want("c", 2)
		if v := r.vol(); v.Generation != 2 || v.LossEpoch != 2 || !slices.Equal(v.InSync, []ident.Node{"c"}) {
			t.Errorf("%+v", v)
		}
	})
}

// Not even force takes the volume from a primary that lives.
func TestForceAgainstALivePrimary(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		stopped := false
		r.with(func(of map[ident.Node]*fakeReplica) {
			for _, x := range of {
				x.lease = time.Now().Add(time.Hour)
			}
		})
		_, err := r.c.Failover(t.Context(), 1, "b", true)
		if err == nil || !strings.Contains(err.Error(), "switchover") || stopped {
			t.Errorf("%v", err)
		}
		r.want("a", 1)
	})
}

func TestManualFailover(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, state.Command{SetSettings: &state.SetSettings{ManualFailover: ptr(true)}})
		defer r.stop()
		r.with(func(of map[ident.Node]*fakeReplica) { of["a"].refused = true })
		r.lapse(10*time.Second, "b", "c")
		r.want("a", 1)
		if w := r.c.Waiting(1); !strings.Contains(w, "blockstep failover v") {
			t.Errorf("waiting for %q", w)
		}
		if _, err := r.c.Failover(t.Context(), 1, "c", false); err != nil {
			t.Fatal(err)
		}
		r.want("c", 2)
		if w := r.c.Waiting(1); w != "" {
			t.Errorf("still waiting for %q", w)
		}
	})
}

func TestLocalFailoverRaisesTheGeneration(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, state.Command{SetOptions: &state.SetOptions{Volume: 1, Ack: ptr(state.AckLocal)}})
		defer r.stop()
		if err := r.c.Switchover(t.Context(), 1, "b"); err != nil || r.vol().Generation != 1 {
			t.Fatalf("planned: %v, %+v", err, r.vol())
		}
		r.with(func(of map[ident.Node]*fakeReplica) { of["b"].refused = true })
		r.lapse(10*time.Second, "a", "c")
		r.want("a", 3)
		if v := r.vol(); v.Generation != 2 || v.LossEpoch != 3 {
			t.Errorf("%+v", v)
		}
	})
}

func TestNewVolumeGetsItsFirstPrimary(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		vol := &state.CreateVolume{Name: "w", ID: 2, Size: 1 << 20, Replicas: []state.Replica{{Node: "a"}, {Node: "b"}, {Node: "c"}}}
		r.do(state.Command{CreateVolume: vol})
		time.Sleep(time.Second)
		if w := r.c.Waiting(2); w == "" {
			t.Error("it waits for nothing")
		}
		r.with(func(of map[ident.Node]*fakeReplica) {
			for i, n := range []ident.Node{"a", "b", "c"} {
				of[n] = &fakeReplica{id: ident.Replica(100 + i)}
			}
			of["a"].refused = true
		})
		for i, n := range []ident.Node{"a", "b", "c"} {
			if w := r.cluster.State().Volumes[2]; i < 2 && w.Epoch != 0 {
				t.Fatalf("promoted with %d registered", i)
			}
			r.do(state.Command{RegisterReplica: &state.RegisterReplica{Volume: 2, Node: n, Replica: ident.Replica(100 + i)}})
			time.Sleep(3 * time.Second)
		}
		if v := r.cluster.State().Volumes[2]; v.Primary != "b" || v.Epoch != 1 {
			t.Errorf("%+v, waiting for %q", v, r.c.Waiting(2))
		}
	})
}

// Several operators and reports at once end in one primary an epoch.
func TestManyAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		defer r.stop()
		var wg sync.WaitGroup
		for i := range 12 {
			to := []ident.Node{"a", "b", "c"}[i%3]
			wg.Go(func() {
				if i%4 == 3 {
					r.c.Report(1, to, ReportLapsed, r.vol().Epoch)
					return
				}
				if err := r.c.Switchover(t.Context(), 1, to); err != nil {
					t.Errorf("to %s: %v", to, err)
				}
			})
		}
		wg.Wait()
		seen := map[string]string{}
		e, _ := r.cluster.State().EventsSince(0)
		for _, x := range e {
			if x.Name != "promoted" {
				continue
			}
			if was, ok := seen[x.Fields["epoch"]]; ok {
				t.Errorf("epoch %s has %s and %s", x.Fields["epoch"], was, x.Fields["to"])
			}
			seen[x.Fields["epoch"]] = x.Fields["to"]
		}
		if len(seen) < 3 {
			t.Error(fmt.Sprint("too few epochs: ", seen))
		}
	})
}

// TestTheTargetOfASwitchover: a replica that does not count, which an operator's
// invalidate brings about too, is no reason to name a switchover what only a forced
// failover has.
func TestTheTargetOfASwitchover(t *testing.T) {
	t.Parallel()
	v := &state.Volume{Name: "db", InSync: []ident.Node{"alpha"}, Replicas: []state.Replica{{Node: "alpha"}, {Node: "beta", Failed: true, Reason: "invalidated by an operator"}}}
	for _, x := range []struct {
		request
		force bool
	}{{request{to: "beta", switchover: true}, false}, {request{to: "beta"}, true}} {
		err := target(v, &x.request)
		if !errors.Is(err, ErrTarget) || !strings.Contains(err.Error(), "invalidated by an operator") || strings.Contains(err.Error(), "--force") != x.force {
			t.Errorf("switchover %v: %v", x.switchover, err)
		}
	}
	if err := target(v, &request{to: "beta", force: true}); err != nil {
		t.Errorf("by force: %v", err)
	}
}
