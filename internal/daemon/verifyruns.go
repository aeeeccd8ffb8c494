package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

const (
	// verifyRunsMax is how many volumes are compared through this node at a time. Each
	// run reads all replicas as fast as they are read: more of them would come to
	// their end no sooner, and leave less to the clients. Those beyond it wait.
	verifyRunsMax = 2
	// verifyClaimLife is how long a volume stays claimed by a run that does not say
	// again, every verifyRenew, that it goes on: its node is gone.
	verifyClaimLife = 8 * time.Second
	verifyRenew     = 2 * time.Second
	// verifyAsk is how long the primary's node may take to answer, and the claim still
	// be renewed in time: a run that begins without an answer keeps nobody out there.
	verifyAsk = 4 * time.Second
	// verifyPatience is how long a run waits for one that may be about to end: of a
	// client that has just been stopped, say.
	verifyPatience = time.Second
)

// verifyRuns bounds the comparisons: one of a volume in the whole cluster, for which
// its primary's node keeps the claims, and verifyRunsMax through one node.
type verifyRuns struct {
	mu      sync.Mutex // guards what follows
	claims  map[ident.Volume]verifyClaim
	running []string      // the volumes that are compared through this node
	ended   chan struct{} // closed when one of them is not any more
}

// verifyClaim is a run that has a volume for itself.
type verifyClaim struct {
	run   string
	node  ident.Node // through which it runs
	began time.Time
	until time.Time
}

func newVerifyRuns() *verifyRuns {
	return &verifyRuns{claims: map[ident.Volume]verifyClaim{}, ended: make(chan struct{})}
}

// verifyCall claims a volume for a run, again and again while it goes on, or ends that.
type verifyCall struct {
	Volume ident.Volume  `json:"volume"`
	Run    string        `json:"run"`
	For    time.Duration `json:"for"` // how long it has gone on
	End    bool          `json:"end,omitempty"`
}

// verifyReply names the node through which another run goes on; "" when the claim is
// the caller's.
type verifyReply struct {
	Node ident.Node    `json:"node,omitempty"`
	For  time.Duration `json:"for,omitempty"`
}

func (v *verifyRuns) claim(c verifyCall, from ident.Node, now time.Time) verifyReply {
	v.mu.Lock()
	defer v.mu.Unlock()
	maps.DeleteFunc(v.claims, func(_ ident.Volume, held verifyClaim) bool { return now.After(held.until) })
	held, ok := v.claims[c.Volume]
	switch {
	case ok && held.run != c.Run:
		return verifyReply{Node: held.node, For: now.Sub(held.began)}
	case c.End:
		delete(v.claims, c.Volume)
	default:
		v.claims[c.Volume] = verifyClaim{run: c.Run, node: from, began: now.Add(-c.For), until: now.Add(verifyClaimLife)}
	}
	return verifyReply{}
}

// enter waits until a volume may be compared through this node; leave is called after
// it. waits is told which others are in the way, again when they are others.
func (v *verifyRuns) enter(ctx context.Context, volume string, waits func(others []string) error) error {
	for {
		v.mu.Lock()
		if len(v.running) < verifyRunsMax {
			v.running = append(v.running, volume)
			v.mu.Unlock()
			return nil
		}
		others, ended := slices.Clone(v.running), v.ended
		v.mu.Unlock()
		if err := waits(others); err != nil {
			return err
		}
		select {
		case <-ended:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (v *verifyRuns) leave(volume string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	i := slices.Index(v.running, volume)
	v.running = slices.Delete(v.running, i, i+1)
	close(v.ended)
	v.ended = make(chan struct{})
}

func (d *Daemon) serveVerify(_ context.Context, from ident.Node, c verifyCall) (verifyReply, error) {
	if sv := d.state().Volumes[c.Volume]; sv == nil || sv.Deleted {
		return verifyReply{}, control.Errorf(control.CodeNotFound, "", "no such volume on %s", d.self)
	}
	return d.verifies.claim(c, from, time.Now()), nil
}

// verifyRun is one comparison with its claim.
type verifyRun struct {
	d     *Daemon
	vol   ident.Volume
	name  string
	id    string
	began time.Time
	ctx   context.Context // ends with the claim, and says so in its cause
	stop  context.CancelCauseFunc
	wg    sync.WaitGroup
	mu    sync.Mutex // guards what follows
	at    map[ident.Node]bool
}

// beginVerify claims a volume for one comparison, until end is called. While another
// one goes on it is refused.
func (d *Daemon) beginVerify(ctx context.Context, sv *state.Volume) (*verifyRun, error) {
	r := &verifyRun{d: d, vol: sv.ID, name: sv.Name, id: rand.Text(), began: time.Now(), at: map[ident.Node]bool{}}
	r.ctx, r.stop = context.WithCancelCause(ctx)
	for {
		err := r.claim()
		if err == nil {
			break
		}
		if time.Since(r.began) > verifyPatience || !pause(ctx, verifyAgain) {
			r.end()
			return nil, err
		}
	}
	r.wg.Go(r.runClaim)
	return r, nil
}

// claim asks this node and the primary's. One that gives no answer, or is of a release
// that knows no claims, keeps nobody out.
func (r *verifyRun) claim() error {
	nodes := []ident.Node{r.d.self}
	if sv := r.d.state().Volumes[r.vol]; sv != nil && sv.Primary != "" && sv.Primary != r.d.self {
		nodes = append(nodes, sv.Primary)
	}
	for _, n := range nodes {
		reply, err := r.ask(r.ctx, n, false)
		if err == nil && reply.Node != "" {
			return control.Errorf(control.CodeRefused, "wait until it has ended",
				"the replicas of %s are being compared already, through %s, since %v", r.name, reply.Node, reply.For.Round(time.Second))
		}
		if err != nil {
			r.d.log.Debug("a volume is compared without a claim", "volume", r.name, "node", n, "err", err)
		}
	}
	return nil
}

func (r *verifyRun) ask(ctx context.Context, n ident.Node, end bool) (reply verifyReply, err error) {
	c := verifyCall{Volume: r.vol, Run: r.id, For: time.Since(r.began), End: end}
	if !end {
		r.mu.Lock()
		r.at[n] = true // also if the answer is lost
		r.mu.Unlock()
	}
	if n == r.d.self {
		return r.d.verifies.claim(c, n, time.Now()), nil
	}
	ctx, cancel := context.WithTimeout(ctx, verifyAsk)
	defer cancel()
	return reply, r.d.rpc.call(ctx, n, "/node/v1/verify", c, &reply)
}

// runClaim keeps the claim, also at a primary that is another one by now.
func (r *verifyRun) runClaim() {
	for pause(r.ctx, verifyRenew) {
		if err := r.claim(); err != nil && r.ctx.Err() == nil {
			r.stop(err)
			return
		}
	}
}

// end gives the claim back, wherever it was made.
func (r *verifyRun) end() {
	r.stop(nil)
	r.wg.Wait()
	var wg sync.WaitGroup
	for n := range r.at {
		wg.Go(func() {
			if _, err := r.ask(context.WithoutCancel(r.ctx), n, true); err != nil {
				r.d.log.Debug("a claim ends by itself", "volume", r.name, "node", n, "err", err)
			}
		})
	}
	wg.Wait()
}

// why is the error of a run that has ended with err: that it lost its claim, if so.
func (r *verifyRun) why(err error) error {
	var lost *control.Error
	if err != nil && errors.As(context.Cause(r.ctx), &lost) {
		return lost
	}
	return err
}

// Verify implements control.Backend.
func (b backend) Verify(ctx context.Context, name string, r control.Verify, progress func(control.VerifyProgress) error) error {
	sv, err := b.find(ctx, name)
	if err != nil {
		return err
	}
	run, err := b.d.beginVerify(ctx, sv)
	if err != nil {
		return err
	}
	var p control.VerifyProgress
	err = b.d.verifies.enter(run.ctx, name, func(others []string) error {
		return progress(control.VerifyProgress{
			TotalBytes: int64(sv.Size), Waits: fmt.Sprintf("waits until the verify of %s ends, which runs through %s too", strings.Join(others, " or of "), b.d.self),
		})
	})
	if err == nil {
		p, err = b.compare(run.ctx, sv, r.Repair, progress)
		b.d.verifies.leave(name)
	}
	run.end() // before whoever asked hears that it has ended
	if err != nil {
		return run.why(err)
	}
	p.Done = true
	return progress(p)
}
