package replication

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/blockstep/blockstep/internal/boottime"
	"github.com/blockstep/blockstep/replication/core"
)

// bootClock is the host's CLOCK_BOOTTIME.
type bootClock struct{}

// Boot implements Clock.
func (bootClock) Boot() core.Instant { return core.Instant(boottime.Now()) }

// BootClock returns the host's CLOCK_BOOTTIME as a Clock.
func BootClock() Clock { return bootClock{} }

// AliveClock notices that this process stood still (SIGSTOP, a suspend, a
// paused guest). Bytes that a client sent before such a stall may be read from
// its socket long after that client has gone elsewhere and written there;
// sessions from before a stall therefore make sure that the client is still
// there ("stopped-forwarder-writes-late"). One serves the whole process.
type AliveClock struct {
	clock  Clock
	gap    core.Instant
	last   atomic.Int64
	stalls atomic.Uint64
	// pauses counts the stalls of more than a third of gap, the long ones included.
	pauses atomic.Uint64
}

// aliveShare is how often Run touches the clock within a gap that is looked for:
// so that an idle process does not look like a stopped one.
const aliveShare = 5

// pauseShare is by how much less than the gap a stall may have lasted after which a
// client that is seen to have gone is not served: more than an idle process's touches
// are apart.
const pauseShare = 3

// NewAliveClock makes a clock that counts gaps longer than gap; 0 takes the
// default link lease. A nil clock is the host's.
func NewAliveClock(clock Clock, gap time.Duration) *AliveClock {
	if clock == nil {
		clock = bootClock{}
	}
	if gap == 0 {
		gap = linkLeaseDefault
	}
	a := &AliveClock{clock: clock, gap: core.Instant(gap)}
	a.last.Store(int64(clock.Boot()))
	return a
}

// Run touches the clock until ctx ends.
func (a *AliveClock) Run(ctx context.Context) {
	t := time.NewTicker(time.Duration(a.gap) / aliveShare)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			a.Stalls()
		}
	}
}

// Stalls touches the clock and returns how many stalls have been noticed. The
// touch is one atomic exchange, so of all goroutines that wake after a stall
// one finds the gap, and finds it before any caller has its number.
func (a *AliveClock) Stalls() uint64 {
	now := int64(a.clock.Boot())
	last := a.last.Load()
	// Coarse: an exchange a request would bounce the cache line for nothing.
	if now-last < int64(time.Millisecond) {
		return a.stalls.Load()
	}
	// The counts rise before the clock is moved: whoever sees the new time sees the
	// new count. Two finders count twice, which does no harm.
	if now-last > int64(a.gap)/pauseShare {
		a.pauses.Add(1)
	}
	if now-last > int64(a.gap) {
		a.stalls.Add(1)
	}
	a.last.Store(now)
	return a.stalls.Load()
}

// Pauses returns how many shorter stalls, too, had been noticed by the last Stalls.
func (a *AliveClock) Pauses() uint64 { return a.pauses.Load() }
