package replication

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/blockstep/blockstep/replication/core"
)

// diskWatch knows which operations of the own disk are out, and since when: a
// disk that hangs returns no error. Each field is an instant, 0 for none.
type diskWatch struct {
	loop  atomic.Int64 // appending, cutting, the meta: the loop stands meanwhile
	sync  atomic.Int64 // the fsync of the log
	apply atomic.Int64 // one write of the backing store, or one read of the log for it
	said  atomic.Pointer[string]
}

// oldest returns the operation that has been out for longest; "" when there is
// none. Checkpoints are not among them: nobody waits for one, and on a slow disk
// the fsync of much data may take that long.
func (rp *replica) oldest() (what string, since core.Instant) {
	see := func(name string, at core.Instant) {
		if at != 0 && (since == 0 || at < since) {
			what, since = name, at
		}
	}
	see("a write of the log", core.Instant(rp.disk.loop.Load()))
	see("an fsync of the log", core.Instant(rp.disk.sync.Load()))
	see("a write of the backing store", core.Instant(rp.disk.apply.Load()))
	see("a read of the backing store", rp.readers.oldest())
	return what, since
}

// runStallWatch says when the disk begins to hang and when it answers again:
// the loop itself may be what stands.
func (rp *replica) runStallWatch(ctx context.Context) {
	defer rp.wg.Done()
	every := rp.opt.StallTimeout / 4
	timer := time.NewTimer(untilNext(rp.clock, every))
	defer timer.Stop()
	var began core.Instant // of the operation that was said to hang
	for last := rp.clock.Boot(); ; {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			timer.Reset(untilNext(rp.clock, every))
		}
		now := rp.clock.Boot()
		late := now-last > core.Instant(2*every)
		last = now
		what, since := rp.oldest()
		hangs := what != "" && now-since > core.Instant(rp.opt.StallTimeout)
		switch {
		case hangs && began == 0 && !late: // else the process itself stood still
			began = since
			text := fmt.Sprintf("its disk hangs: %s has been out for more than %v", what, rp.opt.StallTimeout)
			rp.disk.said.Store(&text)
			rp.event(core.Event{Name: "stalled", To: "Stalled", Rule: text})
		case !hangs && began != 0:
			rp.disk.said.Store(nil)
			took := time.Duration(now - began).Round(100 * time.Millisecond)
			rp.event(core.Event{Name: "stalled", From: "Stalled", To: "Answering", Rule: fmt.Sprintf("its disk answers again after about %v", took)})
			began = 0
		}
	}
}

// stall says why the disk is taken to hang; "" when it does not.
func (rp *replica) stall() string {
	if s := rp.disk.said.Load(); s != nil {
		return *s
	}
	return ""
}

// oldest returns when the read began that has been with the disk for longest; 0
// when there is none.
func (p *readPool) oldest() core.Instant {
	p.mu.Lock()
	defer p.mu.Unlock()
	var first core.Instant
	for _, at := range p.began {
		if at != 0 && (first == 0 || at < first) {
			first = at
		}
	}
	return first
}
