package replication

import (
	"context"
	"slices"
	"sync"
	"time"
)

// Pulse ticks the replicas of a node, one after the other, in one goroutine: a
// hundred idle ones then wake the process once, and not a hundred goroutines of
// it, and what they say to a peer leaves in one message.
//
// A turn that it takes may have to wait for a disk. So each replica has a timer of
// its own, set anew at each beat, that fires when the next one is late.
type Pulse struct {
	clock Clock
	every time.Duration

	mu   sync.Mutex
	list []*replica
	wake chan struct{} // the first replica has come
}

// NewPulse makes a pulse for replicas with the given heartbeat; a nil clock is
// the host's.
func NewPulse(clock Clock, heartbeat time.Duration) *Pulse {
	if clock == nil {
		clock = bootClock{}
	}
	return &Pulse{clock: clock, every: tickEvery(heartbeat), wake: make(chan struct{}, 1)}
}

// Run beats until ctx ends; without replicas it sleeps.
func (p *Pulse) Run(ctx context.Context) {
	timer := time.NewTimer(p.every)
	defer timer.Stop()
	var list []*replica
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		case <-timer.C:
			list = p.replicas(list[:0])
			for _, rp := range list {
				rp.beat()
			}
			if len(list) == 0 {
				continue // until one comes
			}
			list[0].v.opts.Links.Flush() // they all have the node's
		}
		timer.Reset(untilNext(p.clock, p.every))
	}
}

func (p *Pulse) replicas(dst []*replica) []*replica {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append(dst, p.list...)
}

func (p *Pulse) join(rp *replica) {
	p.mu.Lock()
	p.list = append(p.list, rp)
	first := len(p.list) == 1
	p.mu.Unlock()
	if first {
		signal(p.wake)
	}
}

func (p *Pulse) leave(rp *replica) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.list = slices.DeleteFunc(p.list, func(r *replica) bool { return r == rp })
}

// ownTick returns when the replica ticks by itself: at the next tick, or, with a
// pulse, when its next beat is half a tick late.
func (rp *replica) ownTick() time.Duration {
	if rp.v.opts.Pulse != nil {
		return rp.tickEvery() * 3 / 2
	}
	return untilNext(rp.clock, rp.tickEvery())
}

// beat is one tick, by the pulse.
func (rp *replica) beat() {
	rp.ticker.Reset(rp.ownTick())
	rp.in.tick()
	rp.turn(true)
}
