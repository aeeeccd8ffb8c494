package replication

import (
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// Stage is a part of the way of a request of which a volume measures the time on
// this node, so that "why is it slow" has an answer.
type Stage uint8

// The stages, in the order in which a write passes them.
const (
	// StageLogWrite is one write of a batch of entries to the log file.
	StageLogWrite Stage = iota
	// StageLogSync is one fdatasync of the log.
	StageLogSync
	// StageCommit, on the primary, is from an entry's being in its own log until
	// a majority holds it. One entry at a time is looked at.
	StageCommit
	// StageForward is from sending a request to the primary's node until its
	// answer is here. One request at a time is looked at.
	StageForward
	// StageApply is one write of a batch of entries to the backing store.
	StageApply
	// StageStoreSync is one fdatasync of the backing store, for a checkpoint.
	StageStoreSync
	// StageRead is one read of the backing store that had to wait for the disk.
	StageRead

	stages = int(StageRead) + 1
)

// String names a stage as metrics do.
func (s Stage) String() string {
	switch s {
	case StageLogWrite:
		return "log_write"
	case StageLogSync:
		return "log_sync"
	case StageCommit:
		return "commit"
	case StageForward:
		return "forward"
	case StageApply:
		return "apply"
	case StageStoreSync:
		return "store_sync"
	case StageRead:
		return "read"
	}
	return "unknown"
}

// StageBuckets is how many buckets the histogram of a stage has. Bucket i counts
// what took less than 2^i microseconds, and no less than the bucket before; the
// last one counts all the rest.
const StageBuckets = 26

// StageStats is what has been measured of one stage since the daemon's start.
type StageStats struct {
	Count   uint64
	Sum     time.Duration
	Buckets [StageBuckets]uint64
}

// stageTimes are the histograms of a volume. They need no lock, and cost nothing
// but the look at the clock.
type stageTimes [stages]struct {
	nanos   atomic.Uint64
	buckets [StageBuckets]atomic.Uint64
}

// observe counts one passage that began at a moment and ends now.
func (t *stageTimes) observe(s Stage, began time.Time) {
	d := max(0, time.Since(began))
	t[s].nanos.Add(uint64(d))
	t[s].buckets[min(bits.Len64(uint64(d)/1000), StageBuckets-1)].Add(1)
}

// stats returns a copy.
func (t *stageTimes) stats() map[Stage]StageStats {
	out := make(map[Stage]StageStats, stages)
	for s := range t {
		st := StageStats{Sum: time.Duration(t[s].nanos.Load())}
		for i := range st.Buckets {
			st.Buckets[i] = t[s].buckets[i].Load()
			st.Count += st.Buckets[i] // and not a counter of its own: the sum always fits
		}
		out[Stage(s)] = st
	}
	return out
}

// Stages returns what this node has measured of the volume since it was opened.
func (v *Volume) Stages() map[Stage]StageStats { return v.stages.stats() }

// commitProbe is the entry whose way to commit is being measured; it belongs to
// who has the turn. One at a time: a look at the clock for each would be dear.
type commitProbe struct {
	pos   ident.Position // the zero Position: none
	began time.Time
}

// probeCommit begins a measurement with an entry that is in the log now, if none
// is under way and this replica is the one that waits for a majority.
func (rp *replica) probeCommit(pos ident.Position) {
	if rp.published.Serving && rp.probe.pos.Seq == 0 {
		rp.probe = commitProbe{pos, time.Now()}
	}
}

// probeCommitted ends it when the entry is committed, or never will be.
func (rp *replica) probeCommitted() {
	switch p := rp.probe.pos; {
	case p.Seq == 0:
		return
	case p.Epoch != rp.published.Epoch || !rp.published.Serving: // no longer the one that waits
	case rp.published.Commit >= p.Seq:
		rp.v.stages.observe(StageCommit, rp.probe.began)
	default:
		return
	}
	rp.probe = commitProbe{}
}

// forwardProbe is the request to another node that is being measured.
type forwardProbe struct {
	id    uint64 // 0: none
	began time.Time
}

// forwardedLocked begins a measurement with a request that is sent now, if none
// is under way: the one that was may have been taken back with its link.
func (v *Volume) forwardedLocked(id uint64) {
	if v.forwarded.id == 0 || v.table[v.forwarded.id] == nil {
		v.forwarded = forwardProbe{id, time.Now()}
	}
}

// repliedLocked ends it with the reply.
func (v *Volume) repliedLocked(m *wire.Reply) {
	if v.forwarded.id != m.ID {
		return
	}
	if m.Status == wire.StatusOK {
		v.stages.observe(StageForward, v.forwarded.began)
	}
	v.forwarded = forwardProbe{}
}
