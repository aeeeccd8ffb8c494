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

	// Of who watches.
	looked core.Instant
	began  core.Instant // of the operation that was said to hang
}

// stallLooks is how often a watch looks within the time that makes a stall.
const stallLooks = 4

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

// runStallWatch watches the disk of a replica that has no pulse.
func (rp *replica) runStallWatch(ctx context.Context) {
	defer rp.wg.Done()
	every := rp.opt.StallTimeout / stallLooks
	forEach(ctx, rp.clock, every, func(now core.Instant) { rp.watchStall(now, every) })
}

// forEach calls look each time that the clock is a multiple of every, until ctx ends.
func forEach(ctx context.Context, clock Clock, every time.Duration, look func(now core.Instant)) {
	timer := time.NewTimer(untilNext(clock, every))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			timer.Reset(untilNext(clock, every))
			look(clock.Boot())
		}
	}
}

// watchStall says when the disk begins to hang and when it answers again: the
// loop itself may be what stands. One goroutine looks, every so often.
func (rp *replica) watchStall(now core.Instant, every time.Duration) {
	d := &rp.disk
	late := now-d.looked > core.Instant(2*every)
	d.looked = now
	what, since := rp.oldest()
	hangs := what != "" && now-since > core.Instant(rp.opt.StallTimeout)
	switch {
	case hangs && d.began == 0 && !late: // else the process itself stood still
		d.began = since
		text := fmt.Sprintf("its disk hangs: %s has been out for more than %v", what, rp.opt.StallTimeout)
		d.said.Store(&text)
		rp.event(core.Event{Name: "stalled", To: "Stalled", Rule: text})
	case !hangs && d.began != 0:
		d.said.Store(nil)
		took := time.Duration(now - d.began).Round(100 * time.Millisecond)
		rp.event(core.Event{Name: "stalled", From: "Stalled", To: "Answering", Rule: fmt.Sprintf("its disk answers again after about %v", took)})
		d.began = 0
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
