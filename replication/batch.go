package replication

import (
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// Flusher sends answers that Request.Queue has queued.
type Flusher interface{ Flush() }

// completions are requests that end together: the answers of one connection
// leave in one system call. It is used by one goroutine at a time.
type completions struct{ flushers []Flusher }

// succeed ends a request of this node's client well.
func (b *completions) succeed(r *Request) {
	r.sess = nil
	if r.Queue == nil {
		r.Complete(r, nil)
		return
	}
	f := r.Queue(r, nil)
	if n := len(b.flushers); n > 0 && b.flushers[n-1] == f || slices.Contains(b.flushers, f) {
		return
	}
	b.flushers = append(b.flushers, f)
}

// flush sends what succeed has queued.
func (b *completions) flush() {
	for i, f := range b.flushers {
		f.Flush()
		b.flushers[i] = nil
	}
	b.flushers = b.flushers[:0]
}

// HandleBatch takes over envelopes that a link has delivered together, in order
// and all for this volume, and frees them. It may be called from several
// goroutines, for one peer from one at a time. It does not wait for the disk:
// the caller calls Settle after the last one of a delivery.
func (v *Volume) HandleBatch(from ident.Node, envs []wire.Envelope) {
	var b completions
	for i := range envs {
		v.handle(from, envs[i], &b)
	}
	b.flush()
}

// Settle performs what HandleBatch and Session.Queue have brought, on the
// caller's goroutine, unless another one is at that already, which then finds
// it. The caller holds no lock. It may wait for the disk, and as long as that
// hangs.
func (v *Volume) Settle() {
	v.SettleQuiet()
	v.opts.Links.Flush()
}

// SettleQuiet is Settle for who settles many volumes, and then flushes the links.
func (v *Volume) SettleQuiet() {
	if rp := v.rep(); rp != nil {
		rp.turn(true)
	}
}

// Handle is HandleBatch and Settle for one envelope.
func (v *Volume) Handle(from ident.Node, env wire.Envelope) {
	v.HandleBatch(from, []wire.Envelope{env})
	v.Settle()
}
