package raft

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// errNoVolume is returned when a volume is not there (any more).
var errNoVolume = errors.New("there is no such volume: it may have been deleted")

// job is one reason to find a primary for a volume.
type job struct {
	rule   string      // why, for logs and events
	epoch  ident.Epoch // of the volume when the job began: it is done when that moves
	votes  bool        // rests on reports alone: it ends when a round has bound nobody
	drain  bool        // the primary may live and must stop before the next SEAL
	plan   bool        // the primary is expected to live: its answer is worth waiting for
	prefer ident.Node
	avoid  ident.Node
	pause  time.Duration // between the drain and SEAL
	// first are asked before all others; when one of them still grants a
	// lease, nobody else is asked (see probe).
	first    []ident.Node
	operator bool // do not wait for what does not come; power loss is accepted
	force    bool
	fence    bool         // the promotion raises the cache generation
	until    time.Time    // with fence: a round that has promoted nobody by then is the last
	readmit  []ident.Node // replicas that have failed and are asked all the same
	// declined is the newest answer of the preferred node that was no consent.
	declined ident.SealAnswer
}

// runVolume works for one volume until there is nothing to do.
func (c *Controller) runVolume(ctx context.Context, t *volumeTask) {
	defer c.wg.Done()
	for {
		r, j, wait := c.next(ctx, t)
		switch {
		case r != nil:
			res, err := c.serve(ctx, t, r)
			r.end(res, err)
		case j != nil:
			if _, err := c.work(ctx, t, j); err != nil && ctx.Err() == nil {
				c.o.Logger.Debug("failover round ended", "volume", uint64(t.id), "rule", j.rule, "err", err)
			}
		case wait > 0:
			c.gather(ctx, t, wait)
		default:
			return
		}
	}
}

// next finds what to do: an operator's request, a job, or a time after which to
// look again. With none of them the worker is marked as ended.
func (c *Controller) next(ctx context.Context, t *volumeTask) (*request, *job, time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ctx.Err() == nil {
		if len(t.requests) > 0 {
			r := t.requests[0]
			t.requests = t.requests[1:]
			return r, nil, 0
		}
		s := c.o.Cluster.State()
		if v := s.Volumes[t.id]; v != nil && !v.Deleted {
			waiting := ""
			if v.Epoch == 0 && t.first == "" {
				t.first = c.firstLocked(s, v)
			}
			j, wait := automatic(s, v, t, time.Now(), &waiting)
			if j != nil || wait > 0 {
				return nil, j, wait
			}
			t.waiting = waiting
		}
	}
	t.running = false
	return nil, nil, 0
}

// primariesLocked is of how many volumes beside one each node is the primary, those
// counted that it is about to be.
func (c *Controller) primariesLocked(s *state.State, but ident.Volume) map[ident.Node]int {
	has := map[ident.Node]int{}
	for _, o := range s.Volumes {
		switch t := c.vols[o.ID]; {
		case o.Deleted || o.ID == but:
		case t != nil && t.elected != "":
			has[t.elected]++
		case o.Epoch > 0:
			has[o.Primary]++
		case t != nil && t.first != "":
			has[t.first]++
		}
	}
	return has
}

// decide comes to the verdict of a round. Rounds of many volumes end at the same time,
// when a node has died: each counts whom those before it have elected.
func (c *Controller) decide(t *volumeTask, r state.Round, decide func(state.Round) state.Verdict) state.Verdict {
	c.mu.Lock()
	defer c.mu.Unlock()
	r.Has = c.primariesLocked(c.o.Cluster.State(), t.id)
	d := decide(r)
	if d.Kind == state.VerdictPromote {
		t.elected = d.Node
	}
	return d
}

// firstLocked picks the node of a new volume's first primary: the one that is
// primary of the fewest volumes, the first by name among equals.
func (c *Controller) firstLocked(s *state.State, v *state.Volume) ident.Node {
	has := c.primariesLocked(s, v.ID)
	var best ident.Node
	for _, n := range slices.Sorted(slices.Values(v.InSync)) {
		if best == "" || has[n] < has[best] {
			best = n
		}
	}
	return best
}

// automatic finds the job that facts and reports ask for. It changes only t's
// reports, dropping those of other epochs and those that were not repeated.
func automatic(s *state.State, v *state.Volume, t *volumeTask, now time.Time, waiting *string) (*job, time.Duration) {
	for n, r := range t.reports {
		if r.epoch != v.Epoch || now.Sub(r.last) >= reportLife {
			delete(t.reports, n)
		}
	}
	j := &job{epoch: v.Epoch}
	if v.Epoch == 0 {
		registered := 0
		for _, n := range v.InSync {
			if v.Replica(n).Replica != 0 {
				registered++
			}
		}
		if registered < v.SealsNeeded() {
			*waiting = fmt.Sprintf("the first primary needs %d replicas that are made, %d are", v.SealsNeeded(), registered)
			return nil, 0
		}
		j.rule = "a new volume"
		// Its answer is worth waiting for: they are all equal but for that.
		j.prefer, j.plan = t.first, true
		return j, 0
	}
	own := t.reports[v.Primary]
	switch primary := v.Replica(v.Primary); {
	case primary == nil || primary.Failed:
		j.rule, j.avoid = "the primary's disk failed", v.Primary
		return j, 0
	case own.kind == ReportReseal:
		j.rule, j.drain, j.plan, j.prefer = "the primary was refused for a newer promise", true, true, v.Primary
		return j, 0
	case own.kind == ReportRefused:
		j.rule, j.avoid = "the promoted replica could not take office", v.Primary
		return j, 0
	case own.kind == ReportStalled:
		j.rule, j.avoid = "the primary's disk hangs", v.Primary
		return j, 0
	case t.sealed == v.Epoch:
		j.rule = "a round promoted nobody, and somebody has promised"
		return j, 0
	}
	return lapsed(s, v, t, now, waiting, j)
}

// lapsed judges the reports that no lease is in force. A report is a vote
// before the vote: with as many of them as a promotion needs nobody who is well
// off is disturbed by the round. With fewer, for example because one replica
// has lost only its own link to a primary that lives, those that did not report
// are asked first, and if one of them still grants a lease, the round ends and
// has sealed nobody.
func lapsed(s *state.State, v *state.Volume, t *volumeTask, now time.Time, waiting *string, j *job) (*job, time.Duration) {
	votes, oldest := 0, now
	j.votes = true
	for _, n := range v.InSync {
		r, ok := t.reports[n]
		if ok && r.kind == ReportLapsed {
			votes++
			if r.first.Before(oldest) {
				oldest = r.first
			}
		} else if !v.Replica(n).Failed && v.Replica(n).Replica != 0 {
			j.first = append(j.first, n)
		}
	}
	switch {
	case votes == 0:
		return nil, 0
	case s.Settings.ManualFailover:
		*waiting = fmt.Sprintf("the lease has lapsed and automatic failover is off: 'blockstep failover %s'", v.Name)
		return nil, 0
	case votes >= v.SealsNeeded():
		j.rule, j.first = "the lease has lapsed", nil
		return j, 0
	case now.Sub(oldest) >= probeAfter:
		j.rule = fmt.Sprintf("the lease has lapsed at %d of %d", votes, len(v.InSync))
		return j, 0
	}
	return nil, probeAfter - now.Sub(oldest)
}

// work repeats rounds until somebody has an epoch above every promise made, or
// until a round has bound nobody and the reason is gone. It returns early when
// an operator asks for something.
func (c *Controller) work(ctx context.Context, t *volumeTask, j *job) (state.Result, error) {
	defer c.dropReports(t)
	w := patience{backoff: backoffLow}
	deadline := time.Now().Add(operatorWait)
	for ; ; w.try++ {
		v := c.o.Cluster.State().Volumes[t.id]
		if v == nil || v.Deleted {
			return state.Result{}, errNoVolume
		}
		if v.Epoch != j.epoch {
			c.setWaiting(t, "")
			return state.Result{OK: true, Volume: v.ID, Epoch: v.Epoch, SetVersion: v.SetVersion}, nil
		}
		out, err := c.attempt(ctx, t, v, j)
		if ctx.Err() != nil {
			return state.Result{}, ErrStopped
		}
		if err != nil {
			return state.Result{}, err
		}
		if out.done {
			c.setWaiting(t, "")
			return out.result, nil
		}
		c.explain(t, j, out.verdict)
		if j.votes && t.sealed != v.Epoch {
			switch out.verdict.Kind {
			case state.VerdictLease, state.VerdictWait, state.VerdictGrace:
				return state.Result{}, errors.New(out.verdict.Text())
			case state.VerdictPromote, state.VerdictRaise:
			}
		}
		if j.operator && out.hopeless(time.Now().After(deadline)) {
			return state.Result{}, operatorError(v, j, out.verdict)
		}
		if j.fence {
			if time.Now().After(j.until) {
				return state.Result{}, errors.New(out.verdict.Text())
			}
		} else if !j.operator && c.asked(t) {
			return state.Result{}, nil
		}
		// Someone may have promised while the primary lives on: it must hand
		// over, or the one who promised stays lost to it.
		if out.verdict.PrimaryLives && !j.operator && w.try >= j.drainAfter() {
			j.drain = true
		}
		c.sleep(ctx, t, w.after(out.verdict))
	}
}

// explain keeps what the round waits for. That a lease holds is no reason to
// worry anyone, unless somebody has to act.
func (c *Controller) explain(t *volumeTask, j *job, d state.Verdict) {
	switch d.Kind {
	case state.VerdictLease:
		if j.votes {
			c.setWaiting(t, "")
			return
		}
		c.setWaiting(t, d.Text())
	case state.VerdictGrace, state.VerdictWait:
		c.setWaiting(t, d.Text())
	case state.VerdictPromote, state.VerdictRaise:
	}
}

// drainAfter is how many rounds a primary that still has its lease gets before
// it is asked to drain. One whose disk hangs lets its lease run out, and a drain
// would only wait for the disk.
func (j *job) drainAfter() int {
	if j.avoid != "" {
		return 30
	}
	return 1
}

// patience counts the rounds of a job.
type patience struct {
	try     int
	backoff time.Duration
}

// after is how long to wait after a verdict that promoted nobody.
func (p *patience) after(d state.Verdict) time.Duration {
	switch d.Kind {
	case state.VerdictPromote: // refused by the comparison: facts moved
		return time.Duration(min(p.try, 10)) * leaseRetryLow
	case state.VerdictRaise:
		if p.try > 2 { // two controllers may be raising each other
			return leaseRetryLow
		}
		return 0
	case state.VerdictLease:
		return min(max(time.Duration(d.WaitNanos), leaseRetryLow), leaseRetryHigh)
	case state.VerdictGrace, state.VerdictWait:
	}
	wait := p.backoff
	p.backoff = min(2*p.backoff, backoffHigh)
	return wait
}

// operatorWait is how long an operator's round waits for leases to run out: a
// replica that restarted is silent for the longest lease time ever configured.
const operatorWait = 15 * time.Second

// hopeless reports whether an operator's round should say what is missing
// rather than go on.
func (o outcome) hopeless(late bool) bool {
	switch o.verdict.Kind {
	case state.VerdictWait:
		return true
	case state.VerdictLease, state.VerdictPromote, state.VerdictRaise, state.VerdictGrace:
		return late
	}
	return late
}

func operatorError(v *state.Volume, j *job, verdict state.Verdict) error {
	if verdict.PrimaryLives {
		return fmt.Errorf("%s is primary of %s and lives: use 'blockstep switchover %s --to NODE'", v.Primary, v.Name, v.Name)
	}
	if !j.force {
		return fmt.Errorf("%s; bring the missing nodes back, or accept that writes are lost with 'blockstep failover %s --force --accept-data-loss'", verdict.Text(), v.Name)
	}
	for i := range v.Replicas {
		if r := &v.Replicas[i]; r.Failed && !slices.Contains(j.readmit, r.Node) {
			return fmt.Errorf("%s; bring the missing nodes back, or take back the replica on %s, which failed (%s): 'blockstep failover %s --to %s --force --accept-data-loss'",
				verdict.Text(), r.Node, r.Reason, v.Name, r.Node)
		}
	}
	return fmt.Errorf("%s; bring one of them back: there is no content to go on with", verdict.Text())
}

// asked reports whether an operator waits for this worker.
func (c *Controller) asked(t *volumeTask) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(t.requests) > 0
}

// dropReports forgets the reports that the job was about: those that are still
// true come again.
func (c *Controller) dropReports(t *volumeTask) {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(t.reports)
}

// sleep waits; news end it after half of the time, since they are often many.
func (c *Controller) sleep(ctx context.Context, t *volumeTask, d time.Duration) {
	rest(ctx, d, t.kick, nil)
}

// gather is sleep, but that a replica which had not reported ends it at once: it may have
// made the reports enough.
func (c *Controller) gather(ctx context.Context, t *volumeTask, d time.Duration) {
	rest(ctx, d, t.kick, t.news)
}

// rest waits for d, until a kick in its second half, or until news at any time; nil: none.
func rest(ctx context.Context, d time.Duration, kick, news <-chan struct{}) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d / 2)
	defer timer.Stop()
	select {
	case <-news:
		return
	case <-ctx.Done():
		return
	case <-timer.C:
		timer.Reset(d - d/2)
	}
	select {
	case <-news:
	case <-kick:
	case <-ctx.Done():
	case <-timer.C:
	}
}

// outcome is what one attempt came to.
type outcome struct {
	verdict state.Verdict
	done    bool
	result  state.Result
}

// attempt drains if need be, seals, decides and promotes, once.
func (c *Controller) attempt(ctx context.Context, t *volumeTask, v *state.Volume, j *job) (outcome, error) {
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		return outcome{}, ctx.Err()
	}
	if j.drain && v.Primary != "" {
		// A leader that has lost its quorum would drain and then promote nobody.
		if err := c.o.Cluster.Barrier(ctx); err != nil {
			return outcome{verdict: state.Verdict{Kind: state.VerdictWait, Rule: "the Raft leader is not sure of its quorum: " + err.Error()}}, nil
		}
		c.drain(ctx, t, v, j)
		j.drain = false
	}
	t.asked = max(t.asked, v.Epoch+1)
	verdict := c.seal(ctx, t, v, j)
	if verdict.Sealed {
		t.sealed = v.Epoch
	}
	if verdict.Kind == state.VerdictRaise {
		t.asked, t.sealed = verdict.Epoch, v.Epoch
	}
	if verdict.Kind == state.VerdictGrace && (t.outage.IsZero() || t.outageEpoch != v.Epoch) {
		t.outage, t.outageEpoch = time.Now(), v.Epoch
	}
	if verdict.Kind != state.VerdictPromote {
		return outcome{verdict: verdict}, nil
	}
	res, err := c.promote(ctx, v, t.asked, j, verdict)
	c.promoted(t)
	if err != nil {
		// Unknown outcome, or not the leader: the epoch in the cluster state
		// says what came of it, and the next round compares.
		c.o.Logger.Warn("promotion not confirmed", "volume", v.Name, "epoch", t.asked, "err", err)
		return outcome{verdict: verdict}, nil
	}
	if !res.OK {
		c.o.Logger.Info("promotion refused", "volume", v.Name, "epoch", t.asked, "rule", res.Rule, "reason", res.Reason)
		return outcome{verdict: verdict}, nil
	}
	c.o.Logger.Info("promoted", "volume", v.Name, "from", v.Primary, "to", verdict.Node, "epoch", t.asked,
		"position", verdict.Answer.Last, "loss", res.Loss, "reason", j.rule, "rule", verdict.Rule)
	return outcome{verdict: verdict, done: true, result: res}, nil
}

// promoted is told when a promotion has come to something: from now on the cluster state
// says where the primary is.
func (c *Controller) promoted(t *volumeTask) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t.elected = ""
}

func (c *Controller) drain(ctx context.Context, t *volumeTask, v *state.Volume, j *job) {
	dctx, cancel := context.WithTimeout(ctx, c.o.DrainTimeout)
	defer cancel()
	err := c.o.Replicas.Drain(dctx, v.Primary, v.ID, v.Epoch)
	// Whatever came of it, the primary may have given its lease back and needs
	// an epoch, its own or another's.
	t.sealed = v.Epoch
	if err != nil {
		c.o.Logger.Info("the primary did not drain", "volume", v.Name, "primary", v.Primary, "epoch", v.Epoch, "err", err)
		return
	}
	if j.pause > 0 {
		pause(ctx, j.pause)
	}
}

func (c *Controller) promote(ctx context.Context, v *state.Volume, epoch ident.Epoch, j *job, d state.Verdict) (state.Result, error) {
	pctx, cancel := context.WithTimeout(ctx, promoteWait)
	defer cancel()
	cmd := state.Command{ID: NewCommandID(), Promote: &state.Promote{
		Volume: v.ID, OldEpoch: v.Epoch, SetVersion: v.SetVersion, Epoch: epoch,
		Node: d.Node, Replica: d.Answer.Replica, Incarnation: d.Answer.Incarnation, Position: d.Answer.Last,
		Loss: d.Loss, Heard: d.Heard, Set: d.Set, Readmit: d.Readmit, Rule: j.rule + "; " + d.Rule,
		Fence: j.fence,
	}}
	if d.Loss == state.LossForced && !j.fence && c.o.Cluster.State().Understood(state.VersionCompares) {
		cmd.V = state.VersionCompares // what it is compared with besides
	}
	return c.o.Cluster.Apply(pctx, cmd)
}
