package replication

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// TestStageBuckets: a time lies in the bucket whose bound is the next above it.
func TestStageBuckets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var st stageTimes
		for _, d := range []time.Duration{0, time.Microsecond, 3 * time.Microsecond, time.Hour} {
			began := time.Now()
			time.Sleep(d)
			st.observe(StageLogSync, began)
		}
		got := st.stats()[StageLogSync]
		want := StageStats{Count: 4, Sum: time.Hour + 4*time.Microsecond}
		want.Buckets[0], want.Buckets[1], want.Buckets[2], want.Buckets[StageBuckets-1] = 1, 1, 1, 1
		if got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	})
}

// TestCommitProbe: the way to commit is measured from the entry's being in the
// log until it is committed, and not at all when another epoch begins between.
func TestCommitProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rp := &replica{v: &Volume{}}
		rp.probeCommit(ident.Position{Epoch: 1, Seq: 1}) // it is no primary
		rp.published = core.Gate{Serving: true, Epoch: 1}
		rp.probeCommit(ident.Position{Epoch: 1, Seq: 5})
		rp.probeCommit(ident.Position{Epoch: 1, Seq: 6}) // one at a time
		time.Sleep(time.Millisecond)
		rp.published.Commit = 4
		rp.probeCommitted()
		time.Sleep(time.Millisecond)
		rp.published.Commit = 5
		rp.probeCommitted()
		if got := rp.v.Stages()[StageCommit]; got.Count != 1 || got.Sum != 2*time.Millisecond {
			t.Errorf("got %+v, want one of 2 ms", got)
		}
		rp.probeCommit(ident.Position{Epoch: 1, Seq: 7})
		rp.published = core.Gate{Serving: true, Epoch: 3, Commit: 9}
		rp.probeCommitted()
		if got := rp.v.Stages()[StageCommit]; got.Count != 1 || rp.probe.pos.Seq != 0 {
			t.Errorf("an entry of an older epoch was measured: %+v, %+v", got, rp.probe)
		}
	})
}

// TestForwardProbe: one request at a time is measured; one that was taken back
// with its link makes room for another.
func TestForwardProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &Volume{table: map[uint64]*Request{1: {}, 2: {}}}
		v.forwardedLocked(1)
		v.forwardedLocked(2)
		time.Sleep(time.Millisecond)
		delete(v.table, 1)
		v.repliedLocked(&wire.Reply{ID: 1, Status: wire.StatusOK})
		if got := v.Stages()[StageForward]; got.Count != 1 || got.Sum != time.Millisecond {
			t.Errorf("got %+v, want one of 1 ms", got)
		}
		v.forwardedLocked(2)
		delete(v.table, 2)
		v.table[3] = &Request{}
		v.forwardedLocked(3)
		if v.forwarded.id != 3 {
			t.Errorf("request %d is measured, want 3", v.forwarded.id)
		}
		v.repliedLocked(&wire.Reply{ID: 3, Status: wire.StatusRetry})
		if got := v.Stages()[StageForward]; got.Count != 1 || v.forwarded.id != 0 {
			t.Errorf("a request that was not carried out was measured: %+v", got)
		}
	})
}
