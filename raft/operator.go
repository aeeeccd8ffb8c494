package raft

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// drainPauses are the waits between drain and SEAL at each try of a switchover:
// what the primary has sent last needs a moment to arrive, and only a replica
// that holds everything is promoted.
var drainPauses = []time.Duration{5 * time.Millisecond, 25 * time.Millisecond, 100 * time.Millisecond}

// settleWait is how long a switchover that went to another node waits at the
// least before it tries again: that node takes office first.
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
	if r.fence {
		return c.fence(ctx, t)
	}
	rule := "an operator asked for a failover"
	if r.force {
		rule = "an operator forced a failover"
	}
	j := &job{rule: rule, epoch: v.Epoch, prefer: r.to, operator: true, force: r.force}
	if r.force {
		var err error
		if j.readmit, err = c.readmit(ctx, v, r.to); err != nil {
			return state.Result{}, err
		}
	}
	return c.work(ctx, t, j)
}

// readmit opens replicas that have failed again, so that they can be sealed: the
// one that the operator names, or, when there is nobody else whose copy counts, all
// of the in-sync set. It returns those that are open, or says why none is.
func (c *Controller) readmit(ctx context.Context, v *state.Volume, to ident.Node) (open []ident.Node, err error) {
	var ask []ident.Node
	switch rep := v.Replica(to); {
	case rep != nil && rep.Failed:
		ask = []ident.Node{to}
	case !slices.ContainsFunc(v.InSync, func(n ident.Node) bool { return !v.Replica(n).Failed }):
		ask = v.InSync
	default:
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.o.ReadmitTimeout)
	defer cancel()
	errs := make([]error, len(ask))
	var wg sync.WaitGroup
	for i, n := range ask {
		wg.Go(func() {
			if err := c.o.Replicas.Readmit(ctx, n, v.ID, v.Epoch); err != nil {
				errs[i] = fmt.Errorf("%s (%w)", n, err)
			}
		})
	}
	wg.Wait()
	for i, n := range ask {
		if errs[i] == nil {
			c.o.Logger.Warn("a replica that had failed is open again, as an operator asked", "volume", v.Name, "replica", n, "failed", v.Replica(n).Reason)
			open = append(open, n)
		}
	}
	if len(open) == 0 && (to != "" || !othersMay(v)) {
		return nil, fmt.Errorf("no replica that failed can be taken back: %w", errors.Join(errs...))
	}
	return open, nil
}

// othersMay reports whether a replica beside the in-sync set has not failed.
func othersMay(v *state.Volume) bool {
	return slices.ContainsFunc(v.Replicas, func(r state.Replica) bool { return !r.Failed })
}

// ErrTarget is returned when the node that an operator named cannot be the primary,
// with the reason in place of this text.
var ErrTarget = errors.New("that node cannot be the primary")

type targetError struct{ error }

// Is makes errors.Is(err, ErrTarget) true.
func (targetError) Is(target error) bool { return target == ErrTarget } //nolint:errorlint // that is what Is is for

// target checks the node that an operator named.
func target(v *state.Volume, r *request) error {
	rep := v.Replica(r.to)
	switch {
	case rep == nil:
		return targetError{fmt.Errorf("volume %s has no replica on %s", v.Name, r.to)}
	case rep.Failed && r.switchover:
		return targetError{fmt.Errorf("the replica of %s on %s does not count (%s): it can be the primary when it is in sync again; 'blockstep status %s' says what that takes", v.Name, r.to, rep.Reason, v.Name)}
	case rep.Failed && !r.force:
		return targetError{fmt.Errorf("the replica of %s on %s failed (%s): replace its disk first, or, if no other is left, add --force --accept-data-loss", v.Name, r.to, rep.Reason)}
	case !v.InSet(r.to) && !r.force:
		return targetError{fmt.Errorf("the replica of %s on %s is not in sync: wait until it is ('blockstep wait %s --for healthy')", v.Name, r.to, v.Name)}
	}
	return nil
}

func (c *Controller) switchover(ctx context.Context, t *volumeTask, to ident.Node) (state.Result, error) {
	var res state.Result
	settle, why := settleWait, ""
	for try, wait := range drainPauses {
		v := c.o.Cluster.State().Volumes[t.id]
		switch {
		case v == nil || v.Deleted:
			return state.Result{}, errNoVolume
		case v.Primary == to:
			return state.Result{OK: true, Volume: v.ID, Epoch: v.Epoch, SetVersion: v.SetVersion}, nil
		case v.Epoch == 0:
			return state.Result{}, fmt.Errorf("volume %s has no primary yet", v.Name)
		case try > 0 && !pause(ctx, settle):
			return state.Result{}, ErrStopped
		}
		var err error
		j := &job{rule: "switchover to " + string(to), epoch: v.Epoch, drain: true, plan: true, prefer: to, pause: wait}
		res, err = c.work(ctx, t, j)
		if err != nil {
			return state.Result{}, err
		}
		settle, why = settleWait, "was behind"
		if r := j.declined.Refusal; r != ident.SealAccepted {
			// One that has just started, say, is bound by a lease that it may have
			// granted before: it says for how long.
			settle, why = max(settleWait, time.Duration(j.declined.WaitNanos)), "declined ("+r.String()+")"
		}
	}
	if v := c.o.Cluster.State().Volumes[t.id]; v != nil && v.Primary != to {
		return res, fmt.Errorf("%s %s at the last of %d tries; %s is primary of %s: try again when %s is in sync and has been up for some seconds", to, why, len(drainPauses), v.Primary, v.Name, to)
	}
	return res, nil
}
