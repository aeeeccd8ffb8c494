package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/version"
	"github.com/blockstep/blockstep/raft"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication/core"
)

const (
	// applyTry is how long one attempt of a command may take; it is asked again
	// under the same id, so a short time costs nothing but a question.
	applyTry = 2 * time.Second
	// applyPause is between two attempts without a leader.
	applyPause = 50 * time.Millisecond
	// hearPauseMax is the longest between two questions of runHear, each of which
	// costs the cluster an empty entry.
	hearPauseMax = time.Second
	// seenWait is how long a change that the leader has applied is waited for
	// in the local copy of the cluster state.
	seenWait = 2 * time.Second

	reportTimeout = time.Second
	// failedRetry is how often a failed disk is told to a cluster state that
	// cannot change at the moment.
	failedRetry = time.Second
	// remarksMax bounds the remarks for the cluster's event list that wait;
	// beyond it they are only in this node's own list.
	remarksMax = 64
)

// applyReply is the leader's answer to a forwarded command.
type applyReply struct {
	Result    state.Result `json:"result"`
	NotLeader bool         `json:"not_leader,omitempty"`
	Unknown   bool         `json:"unknown,omitempty"` // ask again with the same id
	Err       string       `json:"err,omitempty"`
}

// apply gives a command to the cluster, wherever its leader is, and returns
// when the outcome is definite or ctx ends. It is sent again under the same id
// as often as it takes: the state answers a repeated command as the first one.
func (d *Daemon) apply(ctx context.Context, c state.Command) (state.Result, error) {
	if c.ID == "" {
		c.ID = raft.NewCommandID()
	}
	if c.Time == 0 {
		c.Time = time.Now().UnixNano()
	}
	var last error
	for {
		res, err := d.applyOnce(ctx, c)
		switch {
		case err == nil:
			d.awaitSeen(ctx, res)
			return res, nil
		case ctx.Err() != nil:
			if last == nil {
				last = err
			}
			return state.Result{}, fmt.Errorf("%w: %w", ctx.Err(), last)
		case !retryable(err):
			return state.Result{}, err
		}
		last = err
		if !pause(ctx, applyPause) {
			return state.Result{}, fmt.Errorf("%w: %w", ctx.Err(), last)
		}
	}
}

// errAskAgain is returned by one attempt whose outcome is not definite.
var errAskAgain = errors.New("the outcome is not known yet")

func retryable(err error) bool {
	return errors.Is(err, raft.ErrNotLeader) || errors.Is(err, raft.ErrUnknownOutcome) || errors.Is(err, errAskAgain)
}

func (d *Daemon) applyOnce(ctx context.Context, c state.Command) (state.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, applyTry)
	defer cancel()
	if d.raft.IsLeader() {
		return d.raft.Apply(ctx, c)
	}
	leader, address := d.raft.Leader()
	if leader == "" {
		return state.Result{}, &raft.NotLeaderError{}
	}
	var reply applyReply
	if err := d.rpc.callAddress(ctx, leader, address, "/node/v1/apply", c, &reply); err != nil {
		return state.Result{}, fmt.Errorf("%w: %w", errAskAgain, err)
	}
	switch {
	case reply.NotLeader, reply.Unknown:
		return state.Result{}, fmt.Errorf("%w: %s", errAskAgain, reply.Err)
	case reply.Err != "":
		return state.Result{}, errors.New(reply.Err)
	}
	return reply.Result, nil
}

// serveApply is the leader's side of a forwarded command.
func (d *Daemon) serveApply(ctx context.Context, _ ident.Node, c state.Command) (applyReply, error) {
	res, err := d.raft.Apply(ctx, c)
	reply := applyReply{Result: res}
	if err != nil {
		reply.Err = err.Error()
		reply.NotLeader = errors.Is(err, raft.ErrNotLeader)
		reply.Unknown = errors.Is(err, raft.ErrUnknownOutcome)
	}
	return reply, nil
}

// awaitSeen waits a moment until the local state has what a result speaks of,
// so that whoever asked finds it here.
func (d *Daemon) awaitSeen(ctx context.Context, res state.Result) {
	if res.Volume == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, seenWait)
	defer cancel()
	d.until(ctx, func(s *state.State) bool {
		v := s.Volumes[res.Volume]
		return v != nil && (v.Epoch > res.Epoch || v.Epoch == res.Epoch && v.SetVersion >= res.SetVersion)
	})
}

// errNotCurrent is returned while this node's copy of the cluster state may be
// an old one.
var errNotCurrent = errors.New("waiting until this node has the whole cluster state")

// runCurrent writes into the cluster state that this node has started, and waits
// to see it. Only then is the copy of the state here known to be no older than
// the start: raft replays its log, and on the way a replica that is registered
// is not registered yet, or one that was added is not there.
func (d *Daemon) runCurrent(ctx context.Context) {
	cmd := state.Started(d.self, version.String())
	cmd.ID = raft.NewCommandID()
	for {
		// Not founded, or not a member: refused, under an id that is then used.
		if d.state().ClusterID != "" {
			res, err := d.apply(ctx, cmd)
			if err == nil && res.OK && d.until(ctx, func(s *state.State) bool { return s.NextEvent > res.Event }) {
				close(d.current)
				return
			}
		}
		if !pause(ctx, applyPause) {
			return
		}
	}
}

// runHear asks the Raft leader to speak to this node until it is current. A leader
// notices that a follower has restarted when it next sends it something, drops what
// it had begun there, and speaks to it the time after that. Without news each of the
// two comes after one to two seconds.
func (d *Daemon) runHear(ctx context.Context) {
	for wait := applyPause; ; {
		if leader, address := d.raft.Leader(); leader != "" && leader != d.self {
			ask, cancel := context.WithTimeout(ctx, applyTry) // it may have just died, and another one lead
			if err := d.rpc.callAddress(ask, leader, address, "/node/v1/tell", struct{}{}, nil); err != nil {
				d.log.Debug("the leader was not asked to speak", "leader", leader, "err", err)
			}
			cancel()
			wait = min(2*wait, hearPauseMax)
		}
		select {
		case <-d.current:
			return
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// serveTell is the leader's side of runHear.
func (d *Daemon) serveTell(context.Context, ident.Node, struct{}) (struct{}, error) {
	d.raft.Tell()
	return struct{}{}, nil
}

// isCurrent reports whether the cluster state here is no older than the start of
// this daemon. Nothing is made or removed before.
func (d *Daemon) isCurrent() bool {
	select {
	case <-d.current:
		return true
	default:
		return false
	}
}

// until waits until the local state is as asked, or ctx ends.
func (d *Daemon) until(ctx context.Context, holds func(*state.State) bool) bool {
	changed, stop := d.raft.Watch()
	defer stop()
	for !holds(d.state()) {
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// applyWhole is apply for the admin API: a refusal is an error. Its rule is for
// the log.
func (d *Daemon) applyWhole(ctx context.Context, c state.Command) (state.Result, error) {
	res, err := d.apply(ctx, c)
	if err != nil {
		return res, d.explain(err)
	}
	if err := res.Err(); err != nil {
		return res, d.refusal(err)
	}
	return res, nil
}

// applyTo is applyWhole for a command about a volume, which may have been deleted
// since its name was looked up. The cluster state knows it by its id alone.
func (d *Daemon) applyTo(ctx context.Context, sv *state.Volume, c state.Command) error {
	_, err := d.applyWhole(ctx, c)
	return deletedMeanwhile(sv, err)
}

// deletedMeanwhile names a volume that was found, and is not there any more.
func deletedMeanwhile(sv *state.Volume, err error) error {
	if e := (*control.Error)(nil); errors.As(err, &e) && e.Code == control.CodeNotFound {
		return control.Errorf(control.CodeNotFound, "", "the volume %q was deleted meanwhile", sv.Name)
	}
	return err
}

// explain words an error of the cluster layer for the operator.
func (d *Daemon) explain(err error) error {
	if leader, _ := d.raft.Leader(); leader == "" && errors.Is(err, context.DeadlineExceeded) {
		return d.noLeader()
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, raft.ErrNotLeader) {
		return control.Errorf(control.CodeTimeout, "start the nodes that are down (blockstep node list), then look whether it has happened",
			"the cluster state could not change in time: %v", err)
	}
	return err
}

// noLeader is the error of a change for which there was no Raft leader in time.
func (d *Daemon) noLeader() error {
	if err := d.raft.StoreError(); err != nil {
		return control.Errorf(control.CodeTimeout, "make room in "+d.cfg.DataDir+", or mend its disk: it is tried again by itself",
			"not done in time: there is no Raft leader, and this node cannot write its part of the cluster state: %v", err)
	}
	return control.Errorf(control.CodeTimeout,
		"start the nodes that are down (blockstep node list); only if a majority of them is gone for good: blockstep recover --help",
		"not done in time: there is no Raft leader, since no majority of the nodes is up and connected")
}

// refusal turns a refused command into an error for the operator.
func (d *Daemon) refusal(err error) error {
	var r *state.Refusal
	if !errors.As(err, &r) {
		return err
	}
	code := control.CodeRefused
	switch r.Rule {
	case state.RuleNoVolume, state.RuleNoNode, state.RuleNoReplica:
		code = control.CodeNotFound
	case state.RuleBadName, state.RuleBadValue:
		code = control.CodeUsage
	default:
	}
	return control.Errorf(code, "", "%s", d.plain(err))
}

// plain is an error as an operator reads it: the rule of a refusal, which says
// nothing to them, goes to the log.
func (d *Daemon) plain(err error) string {
	var r *state.Refusal
	if !errors.As(err, &r) {
		return err.Error()
	}
	d.log.Info("a change was refused", "rule", r.Rule, "reason", r.Reason)
	return strings.ReplaceAll(err.Error(), r.Error(), r.Reason)
}

// clusterOf is replication.Cluster for one volume's driver.
type clusterOf struct{ d *Daemon }

// ProposeSet implements replication.Cluster.
func (c clusterOf) ProposeSet(ctx context.Context, vol ident.Volume, p core.SetProposal) (bool, error) {
	res, err := c.d.apply(ctx, state.Command{
		// The same proposal, asked again, has the same id.
		ID: fmt.Sprintf("set-%d-%d-%d-%d-%s", vol, p.Epoch, p.Version, p.ID, c.d.self),
		ChangeSet: &state.ChangeSet{
			Volume: vol, Epoch: p.Epoch, Version: p.Version,
			Set: slices.Sorted(slices.Values(p.Set)), Reason: p.Reason, Unfit: p.Unfit,
		},
	})
	if err != nil {
		return false, err
	}
	if err := res.Err(); err != nil {
		c.d.log.Info("in-sync set: change refused", "volume", c.d.volumeName(vol), "set", p.Set, "rule", err)
		return res.Superseded(), nil
	}
	return true, nil
}

// reportMsg is a replica's word on its way to the failover controller.
type reportMsg struct {
	Volume ident.Volume `json:"volume"`
	Node   ident.Node   `json:"node"`
	Report core.Report  `json:"report"`
}

// Report implements replication.Cluster. One report of a kind is under way at a
// time; the replica repeats it while it holds.
func (c clusterOf) Report(vol ident.Volume, r core.Report) {
	key := reportKey{vol, r.Kind}
	c.d.rmu.Lock()
	defer c.d.rmu.Unlock()
	if c.d.reporting[key] || c.d.ctx.Err() != nil {
		return
	}
	c.d.reporting[key] = true
	c.d.wg.Go(func() { c.d.runReport(key, reportMsg{vol, c.d.self, r}) })
}

type reportKey struct {
	vol  ident.Volume
	kind core.ReportKind
}

func (d *Daemon) runReport(key reportKey, m reportMsg) {
	defer func() {
		d.rmu.Lock()
		defer d.rmu.Unlock()
		delete(d.reporting, key)
	}()
	if d.raft.IsLeader() {
		d.takeReport(m)
		return
	}
	leader, address := d.raft.Leader()
	if leader == "" {
		return // it is made again
	}
	ctx, cancel := context.WithTimeout(d.ctx, reportTimeout)
	defer cancel()
	if err := d.rpc.callAddress(ctx, leader, address, "/node/v1/report", m, nil); err != nil {
		d.log.Debug("a report did not reach the leader; it is made again", "err", err)
	}
}

// MarkFailed implements replication.Cluster.
func (c clusterOf) MarkFailed(vol ident.Volume, r ident.Replica, reason string) {
	d := c.d
	if sv := d.state().Volumes[vol]; sv != nil && d.isCurrent() && !d.readmitting(sv) {
		if rep := sv.Replica(d.self); rep != nil && rep.Failed && rep.Replica == r {
			return // everybody knows: it was only tried again
		}
	}
	if !d.tellFailed(vol, failure{r, reason}) {
		return // it was told, and is being marked
	}
	d.local.add(control.Event{Node: string(d.self), Volume: d.volumeName(vol), Kind: "failed", Text: "the replica on this node failed: " + reason})
	d.wg.Go(func() { d.runMarkFailed(vol, r, reason) })
}

// failure is what was last told of a volume's replica here.
type failure struct {
	replica ident.Replica
	reason  string
}

// tellFailed reports whether the failure is news.
func (d *Daemon) tellFailed(vol ident.Volume, f failure) bool {
	d.rmu.Lock()
	defer d.rmu.Unlock()
	if d.failures[vol] == f {
		return false
	}
	d.failures[vol] = f
	return true
}

func (d *Daemon) runMarkFailed(vol ident.Volume, r ident.Replica, reason string) {
	cmd := state.Command{ID: raft.NewCommandID(), MarkFailed: &state.MarkFailed{Volume: vol, Node: d.self, Replica: r, Reason: reason}}
	for {
		res, err := d.apply(d.ctx, cmd)
		if err == nil {
			if rerr := res.Err(); rerr != nil {
				d.log.Warn("the failed replica is not marked", "volume", d.volumeName(vol), "rule", rerr)
				d.rmu.Lock()
				delete(d.failures, vol) // the next try may be marked
				d.rmu.Unlock()
			}
			return
		}
		if !pause(d.ctx, failedRetry) {
			return
		}
	}
}

// Event implements replication.Cluster: every event is in this node's own list
// (the driver logs it); what an operator may ask for later is in the cluster's.
func (c clusterOf) Event(vol ident.Volume, e core.Event) {
	d := c.d
	name := d.volumeName(vol)
	text := eventText(e)
	d.local.add(control.Event{Node: string(d.self), Volume: name, Kind: e.Name, Text: string(d.self) + ": " + text})
	if !slices.Contains(remarkable, e.Name) {
		return
	}
	select {
	case d.remarks <- state.Event{Name: e.Name, Volume: name, Node: d.self, Text: text}:
	default: // the cluster cannot take them at the moment; the local list has it
	}
}

// remarkable are the events that the whole cluster remembers.
var remarkable = []string{"discarded", "amnesia", "resync", "reopened", "stalled"}

func eventText(e core.Event) string {
	text := e.Name
	if e.Peer != "" {
		text += " " + string(e.Peer)
	}
	if e.From != "" || e.To != "" {
		text += fmt.Sprintf(": %s → %s", e.From, e.To)
	}
	if e.Pos != (ident.Position{}) {
		text += " at " + e.Pos.String()
	}
	if e.Rule != "" {
		text += " (" + e.Rule + ")"
	}
	return text
}

// runRemarks writes remarks into the cluster state, one at a time.
func (d *Daemon) runRemarks(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-d.remarks:
			try, cancel := context.WithTimeout(ctx, 10*time.Second)
			if _, err := d.apply(try, state.Command{AddEvent: &state.AddEvent{Event: e}}); err != nil {
				d.log.Debug("an event is only in this node's list", "event", e.Name, "err", err)
			}
			cancel()
		}
	}
}

// pause waits, unless ctx ends first; it reports whether the time has passed.
func pause(ctx context.Context, t time.Duration) bool {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
