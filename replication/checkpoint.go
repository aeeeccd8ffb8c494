package replication

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/blockstep/blockstep/replication/bitmap"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/store"
)

// checkpointer decides when a checkpoint is made.
type checkpointer struct {
	mu     sync.Mutex
	wake   chan struct{}
	most   int64     // bytes applied after which one is made
	bytes  int64     // of the log, applied since the last one
	since  time.Time // when the first of them were
	waiter []chan error
	hurry  bool
	making bool
	moved  time.Time // when the one that is made last got on
}

// checkpointMax returns how many bytes of the log are applied between two checkpoints
// of a volume of that size. Who lets the log have little room gets them more often,
// and a log of many times the volume's size would be of no use.
func (rp *replica) checkpointMax(size uint64) int64 {
	most := rp.v.opts.Limits.CheckpointMax
	most = min(most, int64(max(min(size, math.MaxInt64), checkpointMaxLeast)))
	if r := rp.opt.LogRetention; r != 0 {
		most = min(most, max(2*r, checkpointMaxLeast))
	}
	return min(most, rp.share(checkpointShare))
}

// limit says that a checkpoint is to be made after so many bytes.
func (c *checkpointer) limit(most int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.most = most
}

// now asks for a checkpoint without delay.
func (c *checkpointer) now() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hurry = true
	signal(c.wake)
}

// note says that bytes have been applied. It wakes the checkpointer for the
// first of them, whose age it watches, and when they have become too many: to
// wake it for each round of the applier is a thread's work.
func (c *checkpointer) note(bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.bytes
	if before == 0 {
		c.since = time.Now()
	}
	c.bytes += bytes + 1 // a marker changes the applied position too
	if before == 0 || before < c.most && c.bytes >= c.most {
		signal(c.wake)
	}
}

// due reports whether a checkpoint is to be made now, for whom, and else how
// long it may wait.
func (c *checkpointer) due(l *Limits) (bool, []chan error, time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	left := time.Hour
	if c.bytes > 0 {
		left = l.CheckpointAge - time.Since(c.since)
	}
	if len(c.waiter) == 0 && !c.hurry && c.bytes < c.most && left > 0 {
		return false, nil, left
	}
	waiter := c.waiter
	c.bytes, c.waiter, c.hurry, c.making, c.moved = 0, nil, false, true, time.Now()
	return true, waiter, 0
}

// made says that a checkpoint has been made, or not.
func (c *checkpointer) made() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.making = false
}

// moves says that the one that is made gets on.
func (c *checkpointer) moves() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.moved = time.Now()
}

// behind reports whether a checkpoint is being made, and the next one is due already:
// all that was applied since the last one is in the log. moved is when it last got on.
func (c *checkpointer) behind() (is bool, moved time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.making && c.bytes >= c.most, c.moved
}

// runCheckpointer makes checkpoints until ctx ends.
func (rp *replica) runCheckpointer(ctx context.Context) {
	defer rp.wg.Done()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for ctx.Err() == nil {
		now, waiter, left := rp.checkpointer.due(&rp.v.opts.Limits)
		if !now {
			timer.Reset(left)
			select {
			case <-ctx.Done():
			case <-rp.checkpointer.wake:
			case <-timer.C:
			}
			continue
		}
		err := rp.makeCheckpoint(ctx)
		rp.checkpointer.made()
		signal(rp.applier.wake)
		for _, w := range waiter {
			w <- err
		}
		if err != nil {
			if ctx.Err() == nil {
				rp.fail(err)
			}
			return
		}
	}
}

// checkpointNow makes one and waits for it.
func (rp *replica) checkpointNow(ctx context.Context) error {
	done := make(chan error, 1)
	rp.checkpointer.mu.Lock()
	rp.checkpointer.waiter = append(rp.checkpointer.waiter, done)
	rp.checkpointer.mu.Unlock()
	signal(rp.checkpointer.wake)
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-rp.loopDone:
		return ErrClosed
	}
}

// makeCheckpoint makes the backing store durable as of the applied position,
// and then says so. What is applied meanwhile may be durable too: the log
// brings it again, and applying twice is applying once.
func (rp *replica) makeCheckpoint(ctx context.Context) error {
	var (
		snap core.Snapshot
		serr error
		gen  uint64
	)
	err := rp.call(ctx, func(core.Instant) {
		snap, serr = rp.core.Snapshot()
		gen = rp.resets.Load()
		if len(snap.Remaining) > 0 {
			rp.blurTo.Store(blurAll)
		}
	})
	if err := errors.Join(err, serr); err != nil {
		return err
	}
	rp.checkpointMu.Lock()
	defer rp.checkpointMu.Unlock()
	if gen != rp.resets.Load() {
		return nil // the log began anew meanwhile, with a checkpoint of its own
	}
	if err := rp.writeCheckpoint(toCheckpoint(&snap)); err != nil {
		return err
	}
	rp.in.push(input{kind: inCall, call: func(now core.Instant) {
		if gen != rp.resets.Load() {
			return
		}
		rp.core.Checkpointed(now, snap.Applied.Seq)
		if len(snap.Remaining) == 0 && rp.blurTo.Load() == blurAll {
			rp.blurTo.Store(uint64(snap.Applied.Seq)) // a resync target that is whole now
		}
	}})
	return nil
}

// The names of what a checkpoint holds in its list of bitmaps.
const (
	bitmapChanges   = "changes"
	bitmapRemaining = "remaining"
)

// toCheckpoint puts a snapshot into the form of the file.
func toCheckpoint(s *core.Snapshot) store.Checkpoint {
	cp := store.Checkpoint{
		Applied: s.Applied, History: s.History, DedupFloor: s.DedupFloor,
		Dedup:   make([]store.DedupEntry, len(s.Dedup)),
		Bitmaps: []store.Bitmap{{Node: bitmapChanges, Data: s.Changes}},
	}
	for i, e := range s.Dedup {
		cp.Dedup[i] = store.DedupEntry(e)
	}
	if len(s.Remaining) > 0 {
		cp.Bitmaps = append(cp.Bitmaps, store.Bitmap{Node: bitmapRemaining, Data: s.Remaining})
	}
	return cp
}

// fromCheckpoint takes the core's part out of a checkpoint.
func fromCheckpoint(cp *store.Checkpoint, start *core.Start) error {
	start.Applied, start.DedupFloor = cp.Applied.Seq, cp.DedupFloor
	start.History = slices.Clone(cp.History)
	for _, d := range cp.Dedup {
		start.Dedup = append(start.Dedup, core.DedupEntry(d))
	}
	for i := range cp.Bitmaps {
		var err error
		switch b := &cp.Bitmaps[i]; b.Node {
		case bitmapChanges:
			start.Changes, err = bitmap.UnmarshalChanges(b.Data)
		case bitmapRemaining:
			start.Remaining, err = bitmap.Unmarshal(b.Data)
		default:
			err = errors.New("a bitmap of a kind that this version does not know")
		}
		if err != nil {
			return fmt.Errorf("%w: checkpoint at %v: %w", store.ErrCorrupt, cp.Applied, err)
		}
	}
	return nil
}

func (rp *replica) writeCheckpoint(cp store.Checkpoint) error {
	began := time.Now()
	if err := rp.store.WriteOut(rp.yieldDisk); err != nil {
		return fmt.Errorf("write out the backing store: %w", err)
	}
	if err := rp.store.Sync(); err != nil {
		return fmt.Errorf("fsync the backing store: %w", err)
	}
	rp.v.stages.observe(StageStoreSync, began)
	if err := rp.checkpoints.Write(cp); err != nil {
		return fmt.Errorf("write the checkpoint at %v: %w", cp.Applied, err)
	}
	return nil
}

// yieldDisk lets the disk work for d, and leaves it to a FLUSH that waits for it.
// It reports whether there is time to go on gently.
func (rp *replica) yieldDisk(d time.Duration) bool {
	if rp.stopping.Load() {
		return false
	}
	rp.checkpointer.moves()
	if rp.syncer.waited() {
		d = max(d, checkpointYield)
	}
	if d > 0 {
		sleep(rp.ctx, d)
	}
	return !rp.stopping.Load()
}
