package raft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// Replicas is how the controller reaches the node that holds a replica; the
// daemon provides it. Both calls end with their context.
type Replicas interface {
	// Seal asks a replica to promise epoch. A refusal is an answer, not an error.
	Seal(ctx context.Context, node ident.Node, vol ident.Volume, epoch ident.Epoch) (ident.SealAnswer, error)
	// Drain asks the primary of epoch to finish what is in flight, to take
	// nothing new and to give its lease back. It returns when that is done.
	Drain(ctx context.Context, node ident.Node, vol ident.Volume, epoch ident.Epoch) error
	// Readmit opens a replica that has failed again, for as long as the volume is
	// in epoch and for a short time, so that it answers SEAL with what it holds.
	Readmit(ctx context.Context, node ident.Node, vol ident.Volume, epoch ident.Epoch) error
}

// Cluster is what the controller needs of a Node.
type Cluster interface {
	State() *state.State
	Apply(ctx context.Context, c state.Command) (state.Result, error)
	Barrier(ctx context.Context) error
	IsLeader() bool
	Leader() (name ident.Node, address string)
	Watch() (changed <-chan struct{}, stop func())
}

// ReportKind is what a replica tells the controller.
type ReportKind uint8

// The reports. The numbers are core.ReportKind's.
const (
	// ReportLapsed: the replica grants no live lease to any primary of the
	// newest epoch. Repeated, at least every second, while it is so.
	ReportLapsed ReportKind = iota + 1
	// ReportReseal: the primary was refused for a newer promise and wants a new
	// epoch.
	ReportReseal
	// ReportRefused: the replica was promoted and cannot take office.
	ReportRefused
	// ReportStalled: the primary's own disk hangs or failed: hand over.
	ReportStalled
)

// String names the report as design and logs do.
func (k ReportKind) String() string {
	switch k {
	case ReportLapsed:
		return "lapsed"
	case ReportReseal:
		return "reseal"
	case ReportRefused:
		return "refused"
	case ReportStalled:
		return "stalled"
	}
	return fmt.Sprintf("report(%d)", uint8(k))
}

// ControllerOptions configure a Controller. Zero durations mean the defaults.
type ControllerOptions struct {
	Cluster  Cluster
	Replicas Replicas
	Logger   *slog.Logger

	PowerLossGrace time.Duration // 60 s; the cluster's setting goes first
	SealTimeout    time.Duration // 1 s: of one SEAL
	DrainTimeout   time.Duration // 2 s: of one drain
	ReadmitTimeout time.Duration // 20 s: of opening a replica that has failed again
	Straggler      time.Duration // 20 ms: how long a round that is decided waits for the rest
}

const (
	// reportLife is how long a report counts that is not repeated.
	reportLife = 5 * time.Second
	// probeAfter is how long too few lapsed reports wait before those that did
	// not report are asked.
	probeAfter = 500 * time.Millisecond
	// roundsMax bounds the rounds that are under way at once; the rest wait.
	roundsMax = 64
	// leaseRetryLow and leaseRetryHigh bound the wait after a declined SEAL.
	leaseRetryLow  = 20 * time.Millisecond
	leaseRetryHigh = 200 * time.Millisecond
	// backoffLow and backoffHigh bound the wait when too few answered.
	backoffLow  = 100 * time.Millisecond
	backoffHigh = time.Second
	// promoteWait bounds one promote command.
	promoteWait = 5 * time.Second
	// reportsMax bounds the volumes for which reports are held.
	reportsMax = state.VolumesMax
)

// ErrStopped is returned to an operator whose request was cut off because this
// node is no longer the Raft leader: ask again.
var ErrStopped = errors.New("the Raft leader changed: ask again")

// Controller decides who is primary. One runs on each node; it acts only while
// its node is the Raft leader. Design, section 4.
type Controller struct {
	o     ControllerOptions
	slots chan struct{} // one a round under way

	mu   sync.Mutex // guards what follows
	lead context.Context
	vols map[ident.Volume]*volumeTask
	wg   sync.WaitGroup // the workers of this reign; added to under mu while lead is not nil
}

// volumeTask is what the controller has to do for one volume. Its fields are
// guarded by Controller.mu, but for those of the worker.
type volumeTask struct {
	id       ident.Volume
	running  bool
	reports  map[ident.Node]report
	requests []*request
	waiting  string
	kick     chan struct{} // capacity 1: a report, a request or the cluster state is news
	news     chan struct{} // capacity 1: a report that is not the one of before again
	first    ident.Node    // where a new volume's first primary should be
	elected  ident.Node    // who is being promoted; "" when nobody is

	// The worker's own.
	asked       ident.Epoch // newest epoch that SEAL was sent for
	sealed      ident.Epoch // epoch of the volume in which someone may have promised more: it must be ended
	outage      time.Time   // since when a power loss is known …
	outageEpoch ident.Epoch // … in this epoch of the volume
}

type report struct {
	kind  ReportKind
	epoch ident.Epoch
	first time.Time
	last  time.Time
}

// request is an operator's.
type request struct {
	switchover bool
	fence      bool
	to         ident.Node
	force      bool
	done       chan struct{} // closed after result and err are set
	result     state.Result
	err        error
}

// NewController makes a controller; Run lets it act.
func NewController(o ControllerOptions) *Controller {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&o.PowerLossGrace, 60*time.Second)
	setDefault(&o.SealTimeout, time.Second)
	setDefault(&o.DrainTimeout, 2*time.Second)
	setDefault(&o.ReadmitTimeout, 20*time.Second)
	setDefault(&o.Straggler, 20*time.Millisecond)
	return &Controller{o: o, slots: make(chan struct{}, roundsMax)}
}

// Run acts while the node is the Raft leader, until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	changed, stop := c.o.Cluster.Watch()
	defer stop()
	var cancel context.CancelFunc
	resign := func() {
		if cancel != nil {
			c.resign(cancel)
			cancel = nil
		}
	}
	defer resign()
	var seen *state.State
	for {
		switch leads := c.o.Cluster.IsLeader(); {
		case !leads:
			resign()
			seen = nil
		case cancel == nil:
			// Everything that leaders before have committed must be known here:
			// a round on old facts would only disturb.
			if err := c.o.Cluster.Barrier(ctx); err != nil {
				if !pause(ctx, leaseRetryLow) {
					return nil
				}
				continue
			}
			cancel = c.reign(ctx)
		}
		if cancel != nil {
			if s := c.o.Cluster.State(); s != seen {
				seen = s
				c.look(s)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

func (c *Controller) reign(ctx context.Context) context.CancelFunc {
	c.o.Logger.Info("the failover controller acts: this node is the Raft leader")
	c.mu.Lock()
	defer c.mu.Unlock()
	lead, cancel := context.WithCancel(ctx)
	c.lead, c.vols = lead, map[ident.Volume]*volumeTask{}
	return cancel
}

// resign ends all rounds and waits for them.
func (c *Controller) resign(cancel context.CancelFunc) {
	c.o.Logger.Info("the failover controller rests")
	cancel()
	c.mu.Lock()
	vols := c.vols
	c.lead, c.vols = nil, nil
	c.mu.Unlock()
	c.wg.Wait()
	for _, t := range vols {
		for _, r := range t.requests {
			r.end(state.Result{}, ErrStopped)
		}
	}
}

func (r *request) end(res state.Result, err error) {
	r.result, r.err = res, err
	close(r.done)
}

// look finds volumes for which the cluster state alone is reason to act.
func (c *Controller) look(s *state.State) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, t := range c.vols {
		if v := s.Volumes[id]; (v == nil || v.Deleted) && !t.running {
			delete(c.vols, id)
			continue
		}
		t.wake()
	}
	for _, v := range s.Volumes {
		if v.Deleted {
			continue
		}
		primary := v.Replica(v.Primary)
		if v.Epoch == 0 || primary == nil || primary.Failed {
			c.taskLocked(v.ID)
		}
	}
}

// taskLocked gives the volume's task with a worker running; nil when this node
// does not lead.
func (c *Controller) taskLocked(id ident.Volume) *volumeTask {
	if c.lead == nil || c.lead.Err() != nil {
		return nil
	}
	t := c.vols[id]
	if t == nil {
		if len(c.vols) >= reportsMax {
			return nil
		}
		t = &volumeTask{id: id, reports: map[ident.Node]report{}, kick: make(chan struct{}, 1), news: make(chan struct{}, 1)}
		c.vols[id] = t
	}
	if !t.running {
		t.running = true
		c.wg.Add(1)
		go c.runVolume(c.lead, t)
	}
	return t
}

func (t *volumeTask) wake() { signal(t.kick) }

func signal(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// Report takes a replica's word. At a node that is not the leader it does
// nothing: the daemon sends reports to the leader, and repeats them.
func (c *Controller) Report(vol ident.Volume, node ident.Node, kind ReportKind, epoch ident.Epoch) {
	v := c.o.Cluster.State().Volumes[vol]
	if v == nil || v.Deleted || v.Replica(node) == nil || epoch != v.Epoch {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.taskLocked(vol)
	if t == nil {
		return
	}
	now := time.Now()
	old, known := t.reports[node]
	r := report{kind: kind, epoch: epoch, first: now, last: now}
	if known && old.kind == kind && old.epoch == epoch && now.Sub(old.last) < reportLife {
		r.first = old.first
	} else {
		signal(t.news)
	}
	t.reports[node] = r
	t.wake()
}

// Waiting says what the volume's failover waits for, for `blockstep status`; ""
// when it waits for nothing, or this node does not lead.
func (c *Controller) Waiting(vol ident.Volume) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.vols[vol]; t != nil {
		return t.waiting
	}
	return ""
}

func (c *Controller) setWaiting(t *volumeTask, text string) {
	c.mu.Lock()
	old := t.waiting
	t.waiting = text
	c.mu.Unlock()
	if text != old && text != "" {
		c.o.Logger.Info("failover waits", "volume", uint64(t.id), "for", text)
	}
}

// Switchover makes to the primary, with nothing lost and nothing refused. When
// ctx ends first the switchover goes on: a drained primary needs an epoch.
func (c *Controller) Switchover(ctx context.Context, vol ident.Volume, to ident.Node) error {
	_, err := c.ask(ctx, vol, &request{switchover: true, to: to})
	return err
}

// Failover makes the best replica primary at an operator's word. With force it
// goes round the rule that every committed write must be known: it may lose
// answered writes, and a living old side cannot be fenced. to is who is
// preferred among equals.
func (c *Controller) Failover(ctx context.Context, vol ident.Volume, to ident.Node, force bool) (state.Result, error) {
	return c.ask(ctx, vol, &request{to: to, force: force})
}

// Fence ends every session of the volume that was opened before with an error, on all
// nodes, those out of reach included: when it returns without an error none of their
// writes takes effect any more, and none that was answered is lost. The primary stays
// where it is, if it can. An error says that it is not in force; when ctx ends first it
// may still come. Asking again is safe, and ends the sessions opened meanwhile.
func (c *Controller) Fence(ctx context.Context, vol ident.Volume) (state.Result, error) {
	return c.ask(ctx, vol, &request{fence: true})
}

func (c *Controller) ask(ctx context.Context, vol ident.Volume, r *request) (state.Result, error) {
	r.done = make(chan struct{})
	c.mu.Lock()
	t := c.taskLocked(vol)
	if t == nil {
		c.mu.Unlock()
		name, address := c.o.Cluster.Leader()
		return state.Result{}, &NotLeaderError{Leader: name, Address: address}
	}
	t.requests = append(t.requests, r)
	t.wake()
	c.mu.Unlock()
	select {
	case <-r.done:
		return r.result, r.err
	case <-ctx.Done():
		return state.Result{}, ctx.Err()
	}
}
