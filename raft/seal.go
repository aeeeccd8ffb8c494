package raft

import (
	"context"
	"slices"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

type sealed struct {
	node   ident.Node
	answer ident.SealAnswer
	err    error
}

// seal asks and decides. It returns as soon as the answers decide, but for a
// short time in which the rest may still say something better.
func (c *Controller) seal(ctx context.Context, t *volumeTask, v *state.Volume, j *job) state.Verdict {
	round := c.round(t, v, j)
	decide := state.DecideSeal
	nodes := v.InSync
	if j.force {
		decide = state.DecideForced
		nodes = nil
		for i := range v.Replicas {
			nodes = append(nodes, v.Replicas[i].Node)
		}
	}
	if len(j.first) > 0 {
		c.collect(ctx, &round, j, j.first, probeDecided)
		if d := decide(round); d.Kind == state.VerdictLease || d.Kind == state.VerdictRaise {
			return d
		}
		nodes = slices.DeleteFunc(slices.Clone(nodes), func(n ident.Node) bool { return slices.Contains(j.first, n) })
	}
	c.collect(ctx, &round, j, nodes, decide)
	return c.decide(t, round, decide)
}

// probeDecided ends the asking of those that did not report at the first lease.
func probeDecided(r state.Round) state.Verdict {
	d := state.DecideSeal(r)
	if d.Kind == state.VerdictPromote {
		d.Kind = state.VerdictWait
	}
	return d
}

func (c *Controller) round(t *volumeTask, v *state.Volume, j *job) state.Round {
	grace := c.o.PowerLossGrace
	if ms := c.o.Cluster.State().Settings.PowerLossGraceMillis; ms > 0 {
		grace = time.Duration(ms) * time.Millisecond
	}
	return state.Round{
		Volume: v, Epoch: t.asked, Answers: map[ident.Node]ident.SealAnswer{},
		Prefer: j.prefer, Avoid: j.avoid, Readmit: j.readmit,
		PowerLoss: j.operator || v.Options.AfterPowerLoss != state.PowerLossWait,
		GraceOver: j.operator || (!t.outage.IsZero() && t.outageEpoch == v.Epoch && time.Since(t.outage) >= grace),
	}
}

// collect asks nodes at once and adds their answers to the round.
func (c *Controller) collect(ctx context.Context, r *state.Round, j *job, nodes []ident.Node, decide func(state.Round) state.Verdict) {
	ctx, cancel := context.WithTimeout(ctx, c.o.SealTimeout)
	defer cancel()
	ch := make(chan sealed, len(nodes)) // room for all: no call is ever stuck on it
	asked := 0
	for _, n := range nodes {
		if rep := r.Volume.Replica(n); rep.Replica == 0 || rep.Failed && !slices.Contains(j.readmit, n) {
			continue
		}
		asked++
		c.wg.Add(1)
		go c.runSeal(ctx, n, r.Volume.ID, r.Epoch, ch)
	}
	var enough <-chan time.Time
	for ; asked > 0; asked-- {
		select {
		case s := <-ch:
			if s.err != nil {
				c.o.Logger.Debug("seal: no answer", "volume", r.Volume.Name, "node", s.node, "epoch", r.Epoch, "err", s.err)
				continue
			}
			r.Answers[s.node] = s.answer
			if s.node == j.prefer && s.answer.Refusal != ident.SealAccepted {
				j.declined = s.answer
			}
			c.o.Logger.Debug("seal: answer", "volume", r.Volume.Name, "node", s.node, "epoch", r.Epoch, "refusal", s.answer.Refusal,
				"last", s.answer.Last, "amnesiac", s.answer.Amnesiac)
			if enough == nil {
				if wait, ok := c.linger(r, j, decide(*r)); ok {
					timer := time.NewTimer(wait)
					defer timer.Stop()
					enough = timer.C
				}
			}
		case <-enough:
			return
		case <-ctx.Done():
			return
		}
	}
}

// runSeal belongs to collect, which cancels its context; resign waits for it.
func (c *Controller) runSeal(ctx context.Context, n ident.Node, vol ident.Volume, epoch ident.Epoch, ch chan<- sealed) {
	defer c.wg.Done()
	a, err := c.o.Replicas.Seal(ctx, n, vol, epoch)
	ch <- sealed{n, a, err}
}

// linger says how long a round that has come to a verdict still waits for the
// others; false while the verdict may only come from them.
func (c *Controller) linger(r *state.Round, j *job, d state.Verdict) (time.Duration, bool) {
	switch d.Kind {
	case state.VerdictPromote:
		if j.force {
			return c.o.SealTimeout, true // each one more is one copy more
		}
		missing := func(n ident.Node) bool { _, ok := r.Answers[n]; return n != "" && !ok }
		if j.plan && (missing(j.prefer) || (r.Volume.Options.Ack == state.AckLocal && missing(r.Volume.Primary))) {
			// It lives, and its answer decides who serves, or whether a tail is lost.
			return c.o.SealTimeout / 4, true
		}
		return c.o.Straggler, true
	case state.VerdictLease, state.VerdictRaise:
		return c.o.Straggler, true
	case state.VerdictGrace, state.VerdictWait:
	}
	return 0, false
}
