package replication

import (
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/core"
)

const (
	// reopenPause and reopenPauseMax are the pauses before a replica that had no room
	// is opened anew, doubled from one time to the next.
	reopenPause    = 2 * time.Second
	reopenPauseMax = time.Minute
	// roomBytes is what must be free before it is tried: some segments of the
	// log and what waits to be applied of it. A file system that has less than
	// roomShare times that may never have it free beside the replica's own files:
	// there its share is enough, or one segment of the log (roomLeast, unless
	// LogSegment says otherwise), without which nothing goes on.
	roomBytes = 64 << 20
	roomShare = 8
	roomLeast = 16 << 20
	// roomFile is made and removed again to see whether that much is free.
	roomFile = "room"
)

// noRoom reports whether an error says that a disk is full, which ends when
// somebody makes room. An fsync that fails never counts: what it did not write
// may be gone from memory.
func noRoom(err error) bool {
	var final *syncError
	if errors.As(err, &final) {
		return false
	}
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// syncError is a failed fsync of the log.
type syncError struct{ err error }

// Error implements error.
func (e *syncError) Error() string { return fmt.Sprintf("fsync the log: %v", e.err) }

// Unwrap returns the cause.
func (e *syncError) Unwrap() error { return e.err }

// runReopen waits until there is room, and opens the replica anew in the place
// of the one that had none: it recovers as after a crash of the process.
func (v *Volume) runReopen(old *replica) {
	for pause := reopenPause; ; pause = min(2*pause, reopenPauseMax) {
		sleep(v.ctx, pause)
		if v.ctx.Err() != nil {
			return // Stop closes what is still open
		}
		if err := old.opt.room(); err != nil {
			v.logger.Warn("replica waits for room", "error", err)
			continue
		}
		if v.reopen(old) {
			return
		}
	}
}

// reopen opens the replica anew, in the place of old. It reports whether that is
// settled, one way or the other.
func (v *Volume) reopen(old *replica) bool {
	v.swap.Lock()
	defer v.swap.Unlock()
	if v.rep() != old || (old.stopping.Load() && !old.reopening.Load()) {
		return true // it was given up meanwhile
	}
	old.reopening.Store(true)
	if err := old.stop(false); err != nil {
		v.logger.Warn("close the replica that had no room", "error", err)
	}
	rp, err := openReplica(v, old.opt)
	var failed *failedError
	switch {
	case errors.As(err, &failed):
		v.logger.Error("replica failed", "error", err)
		v.opts.Cluster.MarkFailed(v.opts.Volume, failed.id, failed.reason)
		return true
	case err != nil:
		v.logger.Warn("open the replica anew", "error", err)
		return false
	}
	v.install(rp)
	v.opts.Cluster.Event(v.opts.Volume, core.Event{Name: "reopened", From: "Failed", To: "CatchingUp", Rule: "the disk has room again"})
	return true
}

// install puts a replica in the place of the one before, and tells it what the
// other had been told.
func (v *Volume) install(rp *replica) {
	v.cmu.Lock()
	defer v.cmu.Unlock()
	rp.start()
	v.current.Store(rp)
	if v.view != nil {
		rp.setView(*v.view)
		v.primaryHere.Store(v.view.Primary == v.opts.Node && !v.stopped)
	}
	for node := range v.up {
		rp.in.peer(node, true)
	}
}

// room returns an error when there is not enough room for a replica to go on.
func (o *ReplicaOptions) room() error {
	dirs := []string{o.Dir}
	if d := filepath.Dir(o.Store); d != o.Dir && !strings.HasPrefix(o.Store, "/dev/") {
		dirs = append(dirs, d)
	}
	for _, d := range dirs {
		total, err := o.FS.Total(d)
		if err != nil {
			return fmt.Errorf("look for room: %w", err)
		}
		need := RoomNeeded(total, o.LogSegment)
		if err := roomIn(o.FS, d, need); err != nil {
			return fmt.Errorf("%d MiB are not free in %s: %w", need>>20, d, err)
		}
	}
	return nil
}

// RoomNeeded is how much must be free in a file system of total bytes, so that a
// replica which had no room there is opened anew. segment is of its log (0: 16 MiB).
func RoomNeeded(total, segment int64) int64 {
	def(&segment, roomLeast)
	return min(roomBytes, max(total/roomShare, segment))
}

// LogRoom is about how much the log of a replica takes where it is written to without an
// end: what is retained (0: the default) and what is applied between two checkpoints; on a
// small disk all that it may come to. size is the volume's, total what the file system of
// the log has in all.
func LogRoom(retention int64, size uint64, total int64) int64 {
	def(&retention, logRetentionDefault)
	retained := min(retention, max(total/retentionShare, roomLeast))
	applied := min(checkpointMaxDefault, int64(max(min(size, math.MaxInt64), checkpointMaxLeast)), max(2*retention, checkpointMaxLeast))
	if total >= checkpointShare*checkpointMaxDefault {
		return retained + applied
	}
	return retained + 2*min(applied, max(total/checkpointShare, roomLeast)) + max(total/unappliedShare, roomLeast)
}

func roomIn(fs vfs.FS, dir string, bytes int64) error {
	path := filepath.Join(dir, roomFile)
	f, err := fs.Open(path, vfs.Create)
	if err != nil {
		return err
	}
	err = f.Allocate(0, bytes)
	return errors.Join(err, f.Close(), fs.Remove(path))
}
