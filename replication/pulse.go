package replication

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/blockstep/blockstep/replication/core"
)

// Pulse ticks the replicas of a node, one after the other, in one goroutine: a
// hundred idle ones then wake the process once, and not a hundred goroutines of
// it, and what they say to a peer leaves in one message.
//
// A turn that it takes may have to wait for a disk. So there is a second goroutine,
// which has all replicas tick by themselves while a round is late, and a third
// that watches the disks.
type Pulse struct {
	clock Clock
	every time.Duration
	looks time.Duration // between two looks for disks that hang

	mu   sync.Mutex
	list []*replica
	wake chan struct{} // the first replica has come
}

// NewPulse makes a pulse for replicas with the given heartbeat and stall timeout;
// 0 takes the defaults of ReplicaOptions, and a nil clock is the host's.
func NewPulse(clock Clock, heartbeat, stall time.Duration) *Pulse {
	if clock == nil {
		clock = bootClock{}
	}
	def(&heartbeat, heartbeatDefault)
	def(&stall, stallDefault)
	return &Pulse{clock: clock, every: tickEvery(heartbeat), looks: stall / stallLooks, wake: make(chan struct{}, 1)}
}

// Run beats until ctx ends; without replicas it sleeps.
func (p *Pulse) Run(ctx context.Context) {
	late := time.NewTimer(p.every * 3 / 2)
	defer late.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { p.runLate(ctx, late) })
	wg.Go(func() { p.runStallWatch(ctx) })
	timer := time.NewTimer(p.every)
	defer timer.Stop()
	var list []*replica
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		case <-timer.C:
			late.Reset(p.every * 3 / 2) // when the next round is half a tick late
			list = p.replicas(list[:0])
			now := p.clock.Boot()
			for _, rp := range list {
				rp.beat(now)
			}
			if len(list) == 0 {
				continue // until one comes
			}
			list[0].v.opts.Links.Flush() // they all have the node's
		}
		timer.Reset(p.next(list))
	}
}

// next returns when the next round is: with the next tick, or when a replica is to be
// woken before that. Its primary asks for its leases with the ticks of its own clock,
// so that they end at any time between two of ours, or always just after one.
func (p *Pulse) next(list []*replica) time.Duration {
	wait := untilNext(p.clock, p.every)
	now := p.clock.Boot()
	for _, rp := range list {
		if at := core.Instant(rp.wakesAt.Load()); at >= now {
			wait = min(wait, time.Duration(at-now)+time.Millisecond)
		}
	}
	return wait
}

// runLate stands in for rounds that do not come.
func (p *Pulse) runLate(ctx context.Context, late *time.Timer) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-late.C:
		}
		list := p.replicas(nil)
		for _, rp := range list {
			rp.in.tick()
			signal(rp.in.wake)
		}
		if len(list) > 0 { // else the next round is the first
			late.Reset(p.every)
		}
	}
}

func (p *Pulse) runStallWatch(ctx context.Context) {
	var list []*replica
	forEach(ctx, p.clock, p.looks, func(now core.Instant) {
		list = p.replicas(list[:0])
		for _, rp := range list {
			rp.watchStall(now, p.looks)
		}
	})
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

// beat is one tick, by the pulse, if there is anything that it could do.
func (rp *replica) beat(now core.Instant) {
	if now >= core.Instant(rp.restsUntil.Load()) {
		rp.in.tick()
	}
	rp.turn(true) // for what was left quietly, too
}
