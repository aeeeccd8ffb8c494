package raft

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// fenceWait is how long a fence waits for what it lacks, a primary that is gone to lose
// its lease for example. Other requests for the volume wait as long.
const fenceWait = 10 * time.Second

// LackingError is returned when nodes may not understand what was asked for, so that
// nothing was begun.
type LackingError struct{ Nodes []ident.Node }

// Error says which nodes.
func (e *LackingError) Error() string {
	var names []string
	for _, n := range e.Nodes {
		names = append(names, string(n))
	}
	return fmt.Sprintf("whether blockstepd on %s understands a fence is not known", strings.Join(names, ", "))
}

// fence is a switchover of the primary to itself, by a promotion that raises the cache
// generation. Whatever else began an epoch meanwhile, an automatic failover or the word
// of a leader before, was not it: only the generation says that it is in force. What it
// was when the request came is read here, behind the barrier: a session of it must end,
// whoever asked has known of an older one perhaps.
func (c *Controller) fence(ctx context.Context, t *volumeTask) (state.Result, error) {
	until := time.Now().Add(fenceWait)
	first := c.o.Cluster.State().Volumes[t.id]
	for v := first; ; v = c.o.Cluster.State().Volumes[t.id] {
		switch {
		case v == nil || v.Deleted:
			return state.Result{}, errNoVolume
		case v.Generation > first.Generation:
			return state.Result{OK: true, Volume: v.ID, Epoch: v.Epoch, SetVersion: v.SetVersion}, nil
		case v.Epoch == 0:
			return state.Result{}, fmt.Errorf("volume %s has no primary yet", v.Name)
		}
		if lacking := c.o.Cluster.State().Lacking(state.VersionFence); len(lacking) > 0 {
			return state.Result{}, &LackingError{lacking}
		}
		j := &job{rule: "an operator fenced it", epoch: v.Epoch, fence: true, until: until, drain: true, plan: true, prefer: v.Primary}
		if p := v.Replica(v.Primary); p == nil || p.Failed {
			j.prefer, j.avoid, j.drain = "", v.Primary, false
		}
		res, err := c.work(ctx, t, j)
		if err != nil {
			return state.Result{}, fmt.Errorf("the fence is not in force: %w", err)
		}
		if now := c.o.Cluster.State().Volumes[t.id]; now != nil && now.Generation > first.Generation {
			res.SetVersion = now.SetVersion // of a promotion of ours: res says what it has lost
			return res, nil
		}
		if time.Now().After(until) {
			return state.Result{}, fmt.Errorf("the fence is not in force: other promotions of %s came first", v.Name)
		}
	}
}
