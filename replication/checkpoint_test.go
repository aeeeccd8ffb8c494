package replication

import (
	"math"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/core"
)

// A small volume gets its checkpoints sooner, and a larger one when it has grown.
func TestCheckpointsOfASmallVolume(t *testing.T) {
	var l Limits
	l.setDefaults()
	for size, want := range map[uint64]int64{
		1 << 20: 64 << 20, 64 << 20: 64 << 20, 200 << 20: 200 << 20, 1 << 30: 512 << 20, math.MaxUint64: 512 << 20,
	} {
		if got := l.checkpointMax(size); got != want {
			t.Errorf("a volume of %d bytes: a checkpoint after %d, not %d", size, got, want)
		}
	}
	l.CheckpointMax = 4096
	if got := l.checkpointMax(1 << 30); got != 4096 {
		t.Errorf("a limit of 4096 has become %d", got)
	}

	v, _ := openLoneWith(t, 1<<20, Options{Replica: &ReplicaOptions{FS: vfs.OS()}})
	rp := v.rep()
	due := func(bytes int64) bool {
		rp.checkpointer.mu.Lock()
		rp.checkpointer.bytes, rp.checkpointer.since = bytes, time.Now()
		rp.checkpointer.mu.Unlock()
		now, _, _ := rp.checkpointer.due(&v.opts.Limits)
		return now
	}
	if due(64<<20-1) || !due(64<<20) {
		t.Error("no checkpoint after 64 MiB, or one before")
	}
	if err := rp.call(t.Context(), func(core.Instant) {
		if err := rp.grow(100 << 20); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if due(100<<20-1) || !due(100<<20) {
		t.Error("no checkpoint after 100 MiB of a volume that has grown, or one before")
	}
}
