package raft

import (
	"context"
	"fmt"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// drainPauses are the waits between drain and SEAL at each try of a switchover:
// what the primary has sent last needs a moment to arrive, and only a replica
// that holds everything is promoted.
var drainPauses = []time.Duration{5 * time.Millisecond, 25 * time.Millisecond, 100 * time.Millisecond}

// settleWait is how long a switchover that went to another node waits before it
// tries again: that node takes office first.
const settleWait = 250 * time.Millisecond

// serve does what an operator asked for.
func (c *Controller) serve(ctx context.Context, t *volumeTask, r *request) (state.Result, error) {
	// What is answered from the state must not be a former leader's.
	if err := c.o.Cluster.Barrier(ctx); err != nil {
		return state.Result{}, fmt.Errorf("%w: %w", ErrStopped, err)
	}
	v := c.o.Cluster.State().Volumes[t.id]
	if v == nil || v.Deleted {
		return state.Result{}, errNoVolume
	}
	if r.to != "" {
		if err := target(v, r); err != nil {
			return state.Result{}, err
		}
	}
	if r.switchover {
		return c.switchover(ctx, t, r.to)
	}
	rule := "an operator asked for a failover"
	if r.force {
		rule = "an operator forced a failover"
	}
	return c.work(ctx, t, &job{rule: rule, epoch: v.Epoch, prefer: r.to, operator: true, force: r.force})
}

// target checks the node that an operator named.
func target(v *state.Volume, r *request) error {
	rep := v.Replica(r.to)
	switch {
	case rep == nil:
		return fmt.Errorf("volume %s has no replica on %s: its replicas are on %v", v.Name, r.to, replicaNodes(v))
	case rep.Failed:
		return fmt.Errorf("the replica of %s on %s failed (%s): replace its disk first", v.Name, r.to, rep.Reason)
	case !v.InSet(r.to) && !r.force:
		return fmt.Errorf("the replica of %s on %s is not in sync: wait until it is ('blockstep wait %s --for healthy'); in sync are %v", v.Name, r.to, v.Name, v.InSync)
	}
	return nil
}

func replicaNodes(v *state.Volume) []ident.Node {
	var out []ident.Node
	for i := range v.Replicas {
		out = append(out, v.Replicas[i].Node)
	}
	return out
}

func (c *Controller) switchover(ctx context.Context, t *volumeTask, to ident.Node) (state.Result, error) {
	var res state.Result
	for try, wait := range drainPauses {
		v := c.o.Cluster.State().Volumes[t.id]
		switch {
		case v == nil || v.Deleted:
			return state.Result{}, errNoVolume
		case v.Primary == to:
			return state.Result{OK: true, Volume: v.ID, Epoch: v.Epoch, SetVersion: v.SetVersion}, nil
		case v.Epoch == 0:
			return state.Result{}, fmt.Errorf("volume %s has no primary yet", v.Name)
		case try > 0 && !pause(ctx, settleWait):
			return state.Result{}, ErrStopped
		}
		var err error
		res, err = c.work(ctx, t, &job{rule: "switchover to " + string(to), epoch: v.Epoch, drain: true, plan: true, prefer: to, pause: wait})
		if err != nil {
			return state.Result{}, err
		}
	}
	if v := c.o.Cluster.State().Volumes[t.id]; v != nil && v.Primary != to {
		return res, fmt.Errorf("%s was behind at each of %d tries; %s is primary of %s: try again when %s has caught up", to, len(drainPauses), v.Primary, v.Name, to)
	}
	return res, nil
}
