package raft

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// newReplicas are whole and empty, one a volume and node.
type newReplicas struct{}

func newReplicaID(vol ident.Volume, n ident.Node) ident.Replica {
	return ident.Replica(1000*uint64(vol) + uint64(n[0]))
}

func (newReplicas) Seal(_ context.Context, n ident.Node, vol ident.Volume, epoch ident.Epoch) (ident.SealAnswer, error) {
	return ident.SealAnswer{Epoch: epoch, Promised: epoch, Replica: newReplicaID(vol, n), Incarnation: 1}, nil
}

func (newReplicas) Readmit(context.Context, ident.Node, ident.Volume, ident.Epoch) error { return nil }

func (newReplicas) Drain(context.Context, ident.Node, ident.Volume, ident.Epoch) error { return nil }

// newVolume makes a volume whose replicas are newReplicas.
func (r *rig) newVolume(id ident.Volume, names []ident.Node) {
	vol := &state.CreateVolume{Name: fmt.Sprint("v", id), ID: id, Size: 1 << 20}
	for _, n := range names {
		vol.Replicas = append(vol.Replicas, state.Replica{Node: n})
	}
	r.do(state.Command{CreateVolume: vol})
	for _, n := range names {
		r.do(state.Command{RegisterReplica: &state.RegisterReplica{Volume: id, Node: n, Replica: newReplicaID(id, n)}})
	}
}

// New volumes spread their first primaries over the nodes, also when they are
// made all at once.
func TestNewVolumesSpreadTheirPrimaries(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		r.stop()
		names := []ident.Node{"a", "b", "c"}
		for id := ident.Volume(2); id <= 9; id++ {
			r.newVolume(id, names)
		}
		c := NewController(ControllerOptions{Cluster: r.cluster, Replicas: newReplicas{}, Logger: testLogger(t)})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = c.Run(ctx) })
		time.Sleep(10 * time.Second)
		cancel()
		wg.Wait()
		has := map[ident.Node]int{}
		for _, v := range r.cluster.State().Volumes {
			has[v.Primary]++
		}
		for _, n := range names {
			if has[n] != 3 {
				t.Fatalf("primaries of 9 volumes: %v", has)
			}
		}
	})
}

// deadNode are the replicas of volumes whose primaries were all on a, which is dead. Those
// that are left hold the same, but for what ahead says.
type deadNode struct {
	newReplicas
	ahead func(ident.Volume, ident.Node) ident.Seq
}

func (d deadNode) Seal(ctx context.Context, n ident.Node, vol ident.Volume, epoch ident.Epoch) (ident.SealAnswer, error) {
	if n == "a" {
		return ident.SealAnswer{}, errCut
	}
	a, err := d.newReplicas.Seal(ctx, n, vol, epoch)
	a.Last = ident.Position{Epoch: 1, Seq: 10 + d.ahead(vol, n)}
	return a, err
}

// The primaries of a node that died go to those that are left in equal parts, where they
// hold the same. Where one holds more it is the primary, whatever it has already.
func TestADeadNodesPrimariesSpread(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t)
		r.stop()
		names := []ident.Node{"a", "b", "c"}
		for id := ident.Volume(2); id <= 11; id++ {
			r.newVolume(id, names)
			p := ident.Node("a")
			if id == 2 {
				p = "b"
			}
			r.do(state.Command{Promote: &state.Promote{Volume: id, SetVersion: 1, Epoch: 1, Node: p, Replica: newReplicaID(id, p), Incarnation: 1, Heard: names}})
		}
		r.do(state.Command{DeleteVolume: &state.DeleteVolume{Volume: 1}})
		c := NewController(ControllerOptions{Cluster: r.cluster, Logger: testLogger(t), Replicas: deadNode{ahead: func(vol ident.Volume, n ident.Node) ident.Seq {
			if n == "b" && vol == 11 {
				return 1
			}
			return 0
		}}})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = c.Run(ctx) })
		synctest.Wait()
		for id := ident.Volume(3); id <= 11; id++ {
			for _, n := range []ident.Node{"b", "c"} {
				c.Report(id, n, ReportLapsed, 1)
			}
		}
		time.Sleep(10 * time.Second)
		cancel()
		wg.Wait()
		// The one that is b's in any case may have come last.
		has := r.cluster.State().Primaries()
		if has["b"]+has["c"] != 10 || has["c"] < 4 || has["c"] > 5 {
			t.Errorf("primaries: %v", has)
		}
		if v := r.cluster.State().Volumes[11]; v.Primary != "b" {
			t.Errorf("%s is primary of %s, and lacks what b has", v.Primary, v.Name)
		}
	})
}
