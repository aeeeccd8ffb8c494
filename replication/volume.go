package replication

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// Volume is this node's end of one volume.
type Volume struct {
	opts   Options
	clock  Clock
	alive  *AliveClock
	logger *slog.Logger
	failed *failedError // why the replica could not be opened
	// current is the replica; nil: there is none here, or a failed one. It is
	// replaced when one that had no room is opened anew, and never taken away.
	current    atomic.Pointer[replica]
	forwarders forwarders
	stages     stageTimes

	size atomic.Uint64 // as the cluster state has it
	// primaryHere is set while the cluster state names this node's replica:
	// requests then take no lock on their way to it.
	primaryHere atomic.Bool

	swap sync.Mutex // held while a replica is put in the place of another

	cmu       sync.Mutex // guards what follows
	view      *core.View // the newest; nil: none yet
	sessions  map[*Session]struct{}
	table     map[uint64]*Request // sent to another node, by forward id
	nextID    uint64
	forwarded forwardProbe
	held      []*Request // wait for a primary
	heldSpare []*Request
	up        map[ident.Node]bool // links that are up
	seen      ident.Position      // the newest position that a primary has named
	stopped   bool

	clientWake chan struct{} // news: look at the held requests now
	clientArm  chan struct{} // one is held: look at the next tick
	ctx        context.Context
	cancel     context.CancelFunc
	wg         sync.WaitGroup
}

// Status is a picture of the volume at this node.
type Status struct {
	Replica bool        // this node has one
	Core    core.Status // of the replica
	Storage StorageStatus
	Held    int // requests of this node's clients that wait for a primary
	Remote  int // requests of this node's clients that are with another node
	// Sessions of this node's clients.
	Sessions int
	Stall    string // why the disk of the replica is taken to hang; "": it does not
}

// StorageStatus is what a replica keeps.
type StorageStatus struct {
	ReplicaID      ident.Replica
	Incarnation    ident.Incarnation
	LogBytes       int64
	OverlayEntries int
	OverlayBytes   int64 // of payload in memory
	Failed         string
}

// Open opens this node's end of a volume: its replica, if Options.Replica says
// that it has one (made by CreateReplica), and the client side. It recovers
// what a crash has left before it returns. A replica that has failed, or whose
// files turn out to be corrupt, is no error: the volume then serves clients by
// the others, Status says why, and the cluster is told.
func Open(_ context.Context, o Options) (*Volume, error) {
	o.Limits.setDefaults()
	v := &Volume{
		opts: o, clock: o.Clock, alive: o.Alive, logger: o.Logger,
		sessions: make(map[*Session]struct{}), table: make(map[uint64]*Request), up: make(map[ident.Node]bool),
		clientWake: make(chan struct{}, 1), clientArm: make(chan struct{}, 1),
	}
	if v.clock == nil {
		v.clock = bootClock{}
	}
	if v.logger == nil {
		v.logger = slog.New(slog.DiscardHandler)
	}
	v.logger = v.logger.With("volume", o.Name)
	ctx, cancel := context.WithCancel(context.Background())
	v.ctx, v.cancel = ctx, cancel
	if v.alive == nil {
		v.alive = NewAliveClock(v.clock, o.Limits.LinkLease)
		v.wg.Go(func() { v.alive.Run(ctx) })
	}
	if o.Replica != nil {
		rp, err := openReplica(v, *o.Replica)
		var failed *failedError
		switch {
		case errors.As(err, &failed):
			// This node's clients go on by the other replicas.
			v.logger.Error("replica failed", "error", err)
			v.failed = failed
			o.Cluster.MarkFailed(o.Volume, failed.id, failed.reason)
		case err != nil:
			cancel()
			v.wg.Wait()
			return nil, fmt.Errorf("open the replica of volume %s: %w", o.Name, err)
		default:
			rp.start()
			v.current.Store(rp)
		}
	}
	v.wg.Go(func() { v.runClient(ctx) })
	if o.View != nil {
		v.SetView(*o.View)
	}
	return v, nil
}

// rep returns this node's replica, nil when there is none to speak of.
func (v *Volume) rep() *replica { return v.current.Load() }

// finishOp ends one sending of a request, or of a forwarded one, with what its
// target said. why, when it is not nil, goes into the client's error.
func (v *Volume) finishOp(r *Request, status wire.Status, pos ident.Position, why error) {
	if status == wire.StatusGeneration && !v.outlived(r) {
		status = wire.StatusRetry
	}
	if r.sess == nil {
		v.finishForwarded(r, status, pos)
		return
	}
	switch status {
	case wire.StatusOK:
		v.finish(r, nil)
	case wire.StatusRetry, wire.StatusStaleEcho:
		v.undone(r)
	case wire.StatusGeneration:
		v.outlive(r)
	case wire.StatusIO, wire.StatusNoSpace, wire.StatusRange, wire.StatusTooOld, wire.StatusUnsupported:
		err := statusError(status)
		if why != nil && !errors.Is(why, err) {
			err = fmt.Errorf("%w: %w", err, why)
		} else if why != nil {
			err = why
		}
		v.finish(r, err)
	}
}

// outlived reports whether the volume's cache generation is newer than the
// request's. The core refuses a newer request too, as another node's may be
// that has heard the news first: that one only has to come again.
func (v *Volume) outlived(r *Request) bool {
	v.cmu.Lock()
	defer v.cmu.Unlock()
	return v.view != nil && v.view.Generation > r.generation
}

// submitLocal hands a request to the replica of this node.
func (v *Volume) submitLocal(r *Request) {
	rp, s := v.rep(), r.sess
	r.target = v.opts.Node
	if !r.Op.changes() {
		rp.read(r)
		return
	}
	r.replay = r.sent
	if !r.sent {
		r.sent, r.lastSeen = true, rp.gate.load().Last
	}
	if !rp.in.request(r) {
		v.finishOp(r, wire.StatusRetry, ident.Position{}, nil)
		return
	}
	// From here on r may be anybody's. A session that was closed before has been
	// forgotten before too, perhaps; one that is closed from now on will be after it.
	if s.closed.Load() {
		rp.in.forget(s.id)
	}
}

// Seal asks this node's replica to promise epoch (design section 4).
func (v *Volume) Seal(ctx context.Context, epoch ident.Epoch) (ident.SealAnswer, error) {
	if v.rep() == nil {
		return ident.SealAnswer{}, ErrNoReplica
	}
	return v.rep().seal(ctx, epoch)
}

// Drain makes the primary of epoch finish what is in flight, give its lease
// back, and serve no more. It returns at once where there is nothing to drain.
// When ctx ends before, the primary serves on.
func (v *Volume) Drain(ctx context.Context, epoch ident.Epoch) error {
	if v.rep() == nil {
		return nil
	}
	return v.rep().drain(ctx, epoch)
}

// Size is the volume's size as this node has been told; 0 before that.
func (v *Volume) Size() uint64 { return v.size.Load() }

// statusWait is how long Status waits for a loop that is in a slow disk.
const statusWait = 100 * time.Millisecond

// Status returns a picture of the volume. When the loop is held up by the disk
// it is as old as that, and a second more.
func (v *Volume) Status() Status {
	v.cmu.Lock()
	s := Status{Replica: v.rep() != nil, Held: len(v.held), Remote: len(v.table), Sessions: len(v.sessions)}
	if v.failed != nil {
		s.Replica = true
		s.Core.Role, s.Core.State, s.Core.Reason = core.RoleFailed, "Failed", v.failed.reason
		s.Storage = StorageStatus{ReplicaID: v.failed.id, Failed: v.failed.reason}
	}
	v.cmu.Unlock()
	rp := v.rep()
	if rp == nil {
		return s
	}
	ctx, cancel := context.WithTimeout(context.Background(), statusWait)
	defer cancel()
	_ = rp.call(ctx, func(now core.Instant) {
		st := rp.core.Status(now)
		rp.lastStatus.Store(&st)
	})
	if st := rp.lastStatus.Load(); st != nil {
		s.Core = *st
	}
	if s.Core.Role == core.RolePrimary && !gateOpen(rp.gate.load(), rp.clock.Boot()) {
		s.Core.Suspended = true // the picture may be of before its disk hung
	}
	s.Stall = rp.stall()
	s.Storage = rp.storageStatus()
	return s
}

// Memory returns the bytes of payloads that the volume's replica holds: in the
// overlay, and as the newest entries, some of which are in both.
func (v *Volume) Memory() (overlay, ring int64) {
	rp := v.rep()
	if rp == nil {
		return 0, 0
	}
	_, overlay = rp.overlay.stats()
	if st := rp.lastStatus.Load(); st != nil {
		ring = int64(st.RingBytes) // of the last tick
	}
	return overlay, ring
}

// Checkpoint makes the backing store durable up to what is applied, and the log
// before it free to be recycled.
func (v *Volume) Checkpoint(ctx context.Context) error {
	if v.rep() == nil {
		return ErrNoReplica
	}
	return v.rep().checkpointNow(ctx)
}

// Replica returns the id and incarnation of this node's replica.
func (v *Volume) Replica() (ident.Replica, ident.Incarnation, error) {
	if v.rep() == nil {
		return 0, 0, ErrNoReplica
	}
	return v.rep().id, ident.Incarnation(v.rep().incarnation.Load()), nil
}

// Stop ends the volume: what waits is answered with ErrClosed, the log is
// fsynced, a checkpoint is made and the replica is marked as cleanly stopped.
// Requests that should be answered first must have been waited for.
func (v *Volume) Stop() error { return v.stop(true) }

// Kill ends the volume as a crash of the process would: nothing is written any
// more. It is for tests.
func (v *Volume) Kill() { _ = v.stop(false) }

func (v *Volume) stop(clean bool) error {
	v.cmu.Lock()
	if v.stopped {
		v.cmu.Unlock()
		return nil
	}
	v.stopped = true
	v.primaryHere.Store(false)
	drop := v.takeRemoteLocked(func(*Request) bool { return true })
	drop = append(drop, v.held...)
	v.held = nil
	v.cmu.Unlock()
	for _, r := range drop {
		v.finish(r, ErrClosed)
	}
	v.cancel()
	v.wg.Wait() // nobody opens the replica anew from here on
	var err error
	if v.rep() != nil {
		err = v.rep().stop(clean)
	}
	if err != nil {
		return fmt.Errorf("stop the replica of volume %s: %w", v.opts.Name, err)
	}
	return nil
}
