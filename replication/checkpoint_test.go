package replication

import (
	"math"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/core"
)

// A small volume gets its checkpoints sooner, and a larger one when it has grown.
func TestCheckpointsOfASmallVolume(t *testing.T) {
	rp := &replica{v: &Volume{}}
	l := &rp.v.opts.Limits
	l.setDefaults()
	for _, c := range []struct {
		size            uint64
		retention, want int64
	}{
		{1 << 20, 0, 64 << 20},
		{64 << 20, 0, 64 << 20},
		{200 << 20, 0, 200 << 20},
		{1 << 30, 0, 512 << 20},
		{math.MaxUint64, 0, 512 << 20},
		{1 << 40, 1 << 20, 64 << 20},
		{1 << 40, 100 << 20, 200 << 20},
		{1 << 40, 1 << 30, 512 << 20},
	} {
		rp.opt.LogRetention = c.retention
		if got := rp.checkpointMax(c.size); got != c.want {
			t.Errorf("a volume of %d bytes that retains %d: a checkpoint after %d, not %d", c.size, c.retention, got, c.want)
		}
	}
	rp.opt.LogRetention = 256 << 20
	for _, c := range []struct{ disk, retention, checkpoint int64 }{
		{0, 256 << 20, 512 << 20},
		{1 << 40, 256 << 20, 512 << 20},
		{4 << 30, 256 << 20, 512 << 20},
		{2 << 30, 256 << 20, 256 << 20},
		{1 << 30, 128 << 20, 128 << 20},
		{200 << 20, 25 << 20, 25 << 20},
		{40 << 20, 16 << 20, 16 << 20},
	} {
		rp.room = c.disk
		if r, m := rp.retention(), rp.checkpointMax(1<<40); r != c.retention || m != c.checkpoint {
			t.Errorf("on a disk of %d bytes: %d are retained, not %d, and a checkpoint comes after %d, not %d", c.disk, r, c.retention, m, c.checkpoint)
		}
	}
	rp.room = 0
	l.CheckpointMax = 4096
	if got := rp.checkpointMax(1 << 30); got != 4096 {
		t.Errorf("a limit of 4096 has become %d", got)
	}

	v, _ := openLoneWith(t, 1<<20, Options{Replica: &ReplicaOptions{FS: vfs.OS()}})
	rp = v.rep()
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

// TestOverwritesAreCheckpointed: a load that overwrites a few blocks again and again
// writes little to the backing store and all of it to the log, which is bounded all the
// same.
func TestOverwritesAreCheckpointed(t *testing.T) {
	const block = 64 << 10
	v, s := openLoneWith(t, 1<<20, Options{
		Replica: &ReplicaOptions{FS: vfs.OS(), LogSegment: 1 << 20, LogRetention: 1 << 20},
		Limits:  Limits{CheckpointMax: 4 << 20, UnappliedMax: 4 << 20},
	})
	most := int64(0)
	done := make(chan error, 1) // Complete must not block
	for range 1024 {            // 64 MiB
		r := &Request{Op: OpWrite, Length: block, Data: buf.Get(block), Complete: func(r *Request, err error) {
			r.Data.Release()
			done <- err
		}}
		s.Submit(r)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		most = max(most, v.rep().log.Bytes())
	}
	if most > 32<<20 {
		t.Errorf("the log has grown to %d MiB, with a checkpoint after 4 MiB and 4 MiB that may wait to be applied", most>>20)
	}
}

// TestALogOnASmallDisk: what the log retains by itself is more than a small disk has.
// It keeps to a part of it, and the replica never fails for want of room.
func TestALogOnASmallDisk(t *testing.T) {
	const block = 64 << 10
	mem := vfs.NewMem(1)
	mem.SetCapacity(24 << 20)
	v, s := openLoneWith(t, 1<<20, Options{Replica: &ReplicaOptions{FS: mem, LogSegment: 1 << 20}})
	done := make(chan error, 1)
	for i := range 1024 { // 64 MiB
		r := &Request{Op: OpWrite, Length: block, Data: buf.Get(block), Complete: func(r *Request, err error) {
			r.Data.Release()
			done <- err
		}}
		s.Submit(r)
		select {
		case err := <-done:
			if err != nil {
				t.Fatalf("write %d: %v", i, err)
			}
		case <-time.After(time.Minute): // of a replica that failed nobody answers
			t.Fatalf("write %d: no answer; it is %+v", i, v.Status().Core)
		}
	}
	if st := v.Status(); st.Core.State != "InSync" {
		t.Errorf("it is %s: %s", st.Core.State, st.Core.Reason)
	}
}

// TestZeroesAreAppliedInSteps: a request may zero GiB. A disk that takes long for it is
// slow, and must not look like one that hangs.
func TestZeroesAreAppliedInSteps(t *testing.T) {
	const length = 256 << 20
	var most, total atomic.Int64
	fs := vfs.Inject(vfs.OS(), func(c vfs.Call) error {
		if c.Op == vfs.OpZero && filepath.Base(c.Path) == storeFile {
			most.Store(max(most.Load(), c.Len))
			total.Add(c.Len)
		}
		return nil
	})
	v, s := openLoneWith(t, 1<<30, Options{Replica: &ReplicaOptions{FS: fs}})
	most.Store(0)
	total.Store(0)
	done := make(chan error, 1)
	s.Submit(&Request{Op: OpZero, Offset: 4096, Length: length, NoHole: true, Complete: func(_ *Request, err error) { done <- err }})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for st := v.Status(); st.Core.Applied < st.Core.Last.Seq; st = v.Status() {
		time.Sleep(time.Millisecond)
	}
	if total.Load() != length || most.Load() > applyZeroMax {
		t.Errorf("%d bytes were zeroed, at most %d in one call; want %d and %d", total.Load(), most.Load(), length, applyZeroMax)
	}
}

// TestALogWhileACheckpointIsMade: a checkpoint that takes long holds clients back before
// the log has filled the disk, a small one or any, and no longer than it takes.
func TestALogWhileACheckpointIsMade(t *testing.T) {
	t.Run("small", func(t *testing.T) { logWhileACheckpointIsMade(t, 24<<20, Limits{}) })
	t.Run("large", func(t *testing.T) { logWhileACheckpointIsMade(t, 48<<20, Limits{CheckpointMax: 1 << 20}) })
}

func logWhileACheckpointIsMade(t *testing.T, disk int64, limits Limits) {
	const block = 64 << 10
	mem := vfs.NewMem(1)
	mem.SetCapacity(disk)
	begun, let := make(chan struct{}, 1), make(chan struct{})
	var hangs atomic.Bool
	fs := vfs.Inject(mem, func(c vfs.Call) error {
		if hangs.Load() && c.Op == vfs.OpSync && strings.HasSuffix(c.Path, "/data") {
			signal(begun)
			<-let
		}
		return nil
	})
	release := sync.OnceFunc(func() { close(let) })
	t.Cleanup(release)
	v, s := openLoneWith(t, 1<<20, Options{Replica: &ReplicaOptions{FS: fs, LogSegment: 1 << 20}, Limits: limits})
	hangs.Store(true)
	const writes = 1024 // 64 MiB
	done := make(chan error, writes)
	for range writes {
		s.Submit(&Request{Op: OpWrite, Length: block, Data: buf.Get(block), Complete: func(r *Request, err error) {
			r.Data.Release()
			done <- err
		}})
	}
	<-begun
	for answered := -1; answered < len(done); time.Sleep(200 * time.Millisecond) {
		answered = len(done) // until no more are
	}
	if st := v.Status(); st.Core.State != "InSync" || len(done) == writes {
		t.Errorf("it is %s: %s; %d of %d writes are answered", st.Core.State, st.Core.Reason, len(done), writes)
	}
	release()
	for i := range writes {
		select {
		case err := <-done:
			if err != nil {
				t.Fatalf("write %d: %v", i, err)
			}
		case <-time.After(time.Minute):
			t.Fatalf("write %d: no answer; it is %+v", i, v.Status().Core)
		}
	}
}

// A checkpoint is waited for from when it last got on, once the next one is due too.
func TestACheckpointThatGetsOn(t *testing.T) {
	l := &Limits{}
	l.setDefaults()
	c := &checkpointer{wake: make(chan struct{}, 1), most: 4096}
	want := func(is bool) time.Time {
		t.Helper()
		got, moved := c.behind()
		if got != is {
			t.Errorf("behind: %v", got)
		}
		return moved
	}
	c.note(4096)
	want(false)
	if now, _, _ := c.due(l); !now {
		t.Fatal("none is due")
	}
	want(false)
	c.note(4096)
	began := want(true)
	time.Sleep(time.Millisecond)
	if c.moves(); !want(true).After(began) {
		t.Error("it does not get on")
	}
	c.made()
	want(false)
}

// TestALogOnASmallDiskWhileOneIsAway: a member of the in-sync set that is down keeps the
// log from being trimmed, until it lags so far that it is evicted: before the disks of
// the others are full.
func TestALogOnASmallDiskWhileOneIsAway(t *testing.T) {
	const disk, block = 128 << 20, 256 << 10
	c := newTestCluster(t, 1<<20, 3)
	defer c.close()
	for _, name := range c.names {
		c.nodes[name].mem.SetCapacity(disk)
		c.stop(name)
	}
	for _, name := range c.names {
		c.start(name) // it looks at the disk
	}
	s := c.session(c.promote("n1"))
	s.mustWrite(0, pattern(1, block))
	for _, name := range c.names {
		if name != c.view.Primary {
			c.kill(name)
			break
		}
	}
	data := pattern(2, block)
	for range 2 * disk / block {
		s.mustWrite(0, data)
	}
	for _, name := range c.names {
		if v := c.nodes[name].volume(); v != nil {
			if st := v.Status(); st.Core.State != "InSync" || st.Storage.LogBytes > disk*3/4 {
				t.Errorf("%s is %s: %s; its log takes %d MiB of %d", name, st.Core.State, st.Core.Reason, st.Storage.LogBytes>>20, disk>>20)
			}
		}
	}
}
