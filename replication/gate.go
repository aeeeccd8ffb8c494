package replication

import (
	"runtime"
	"sync/atomic"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
)

// gateBox publishes the core's Gate to readers without a lock: the loop writes,
// anyone reads. The version is odd while a write is under way.
type gateBox struct {
	version                   atomic.Uint64
	serving                   atomic.Bool
	leaseUntil                atomic.Int64
	epoch, generation, commit atomic.Uint64
	lastEpoch, lastSeq        atomic.Uint64
}

// store publishes g. Only the loop calls it.
func (b *gateBox) store(g core.Gate) {
	b.version.Add(1)
	b.serving.Store(g.Serving)
	b.leaseUntil.Store(int64(g.LeaseUntil))
	b.epoch.Store(uint64(g.Epoch))
	b.generation.Store(g.Generation)
	b.commit.Store(uint64(g.Commit))
	b.lastEpoch.Store(uint64(g.Last.Epoch))
	b.lastSeq.Store(uint64(g.Last.Seq))
	b.version.Add(1)
}

// load returns the gate as of one publication.
func (b *gateBox) load() core.Gate {
	for {
		v := b.version.Load()
		if v&1 == 1 {
			runtime.Gosched() // the writer is some stores from done, unless it lost its processor
			continue
		}
		g := core.Gate{
			Serving:    b.serving.Load(),
			LeaseUntil: core.Instant(b.leaseUntil.Load()),
			Epoch:      ident.Epoch(b.epoch.Load()),
			Generation: b.generation.Load(),
			Commit:     ident.Seq(b.commit.Load()),
			Last: ident.Position{
				Epoch: ident.Epoch(b.lastEpoch.Load()),
				Seq:   ident.Seq(b.lastSeq.Load()),
			},
		}
		if b.version.Load() == v {
			return g
		}
	}
}

// gateOpen reports whether a linearizable read may be answered at now.
func gateOpen(g core.Gate, now core.Instant) bool {
	return g.Serving && now < g.LeaseUntil
}
