package replication

import (
	"context"
	"fmt"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// turnRoundsMax is how many batches a goroutine feeds to the core that has work
// of its own, before it leaves the rest to the loop: it is some milliseconds
// away from its socket then, under the heaviest load.
const turnRoundsMax = 16

// statusEvery is how old the picture is at the most that is shown of a replica
// whose disk holds the loop up.
const statusEvery = time.Second

// turn steps the core with what is in the inbox, on the caller's goroutine. With
// flushes the caller flushes the links soon after, for many volumes at once. If
// another one is at that already, it does nothing: that one goes on until the
// inbox is empty. The caller holds no lock, since answers are given and messages
// sent from here; it may have to wait for the disk.
func (rp *replica) turn(flushes bool) {
	if rp.in.enter(false) {
		rp.step(turnRoundsMax, flushes)
	}
}

// runLoop takes the turns that nobody else takes: ticks, what was left quietly
// or by a goroutine that cannot wait, and the rest of a turn that was too long.
// It ends when ctx has ended, the inbox is closed and empty, and nobody has the
// turn.
func (rp *replica) runLoop(ctx context.Context) {
	done := ctx.Done()
	rp.in.tick()
	var tick <-chan time.Time // nil with a pulse
	var again func()
	if rp.v.opts.Pulse == nil {
		ticker := time.NewTimer(untilNext(rp.clock, rp.tickEvery()))
		defer ticker.Stop()
		tick = ticker.C
		again = func() { ticker.Reset(untilNext(rp.clock, rp.tickEvery())) }
	}
	for {
		if rp.in.enter(true) {
			rp.step(0, false)
		}
		if done == nil && rp.in.end() {
			return
		}
		select {
		case <-done:
			done = nil
		case <-rp.in.wake:
		case <-tick:
			rp.in.tick()
			again()
		}
	}
}

// tickEvery is the time between two ticks of the core.
func (rp *replica) tickEvery() time.Duration { return tickEvery(rp.opt.Heartbeat) }

func tickEvery(heartbeat time.Duration) time.Duration { return heartbeat / 2 }

// untilNext returns how long it is until the clock is a multiple of every. What
// is done now and then is done then: all volumes of a node tick at the same
// moments, so that many idle ones wake it once, and what they say to a peer goes
// out together.
func untilNext(c Clock, every time.Duration) time.Duration {
	return every - time.Duration(c.Boot()%core.Instant(every))
}

// step feeds the core what is in the inbox, again and again, and performs what
// it decides, until the inbox is empty; after the given number of batches (0: no
// limit) it leaves the rest to the loop. The caller has the turn, and has lost
// it when step returns. What it sends leaves at once, unless it is signs of life
// alone: these leave soon, with those of other volumes, or when the caller
// flushes.
func (rp *replica) step(rounds int, flushes bool) {
	for n := 1; ; n++ {
		batch, ok := rp.in.next()
		if !ok {
			return
		}
		now := rp.clock.Boot()
		rp.core.ClientAt(core.Instant(rp.readAt.Load()))
		idle := true
		for i := range batch {
			idle = idle && batch[i].kind == inMessage
			rp.feed(&batch[i], now)
		}
		if now >= rp.nextTick {
			// By the clock, not by the ticker: who is busy finds it due, too.
			rp.nextTick = now + core.Instant(rp.tickEvery())
			rp.nextTick -= rp.nextTick % core.Instant(rp.tickEvery())
			rp.core.DiskRead(rp.readers.oldest())
			rp.core.DiskApply(core.Instant(rp.disk.apply.Load()))
			rp.core.Tick(now)
			rp.tickBarriers(now)
			if now >= rp.nextStatus {
				rp.nextStatus = now + core.Instant(statusEvery)
				st := rp.core.Status(now)
				rp.lastStatus.Store(&st)
			}
		}
		rp.disk.loop.Store(int64(now))
		for again := true; again; {
			// Its own appends are in the file: that may commit, or ack, something.
			again = rp.perform()
			idle = idle && len(rp.effects.Append)+len(rp.effects.Answers)+len(rp.effects.SealReplies) == 0
		}
		rp.disk.loop.Store(0)
		rp.rest(idle)
		switch {
		case !idle:
			rp.v.opts.Links.Flush()
		case !flushes:
			rp.v.opts.Links.FlushSoon()
		}
		if rp.syncTo != 0 {
			// Last: who waits for the answers, or for an entry, is not to wait for
			// the thread that is woken here as well.
			rp.syncer.demand(rp.syncTo)
			rp.syncTo = 0
		}
		if n == rounds {
			rp.in.handOver()
			return
		}
	}
}

// rest notes until when the pulse may leave the replica alone, after a batch that was
// idle; a busy one's ticks come anyway.
func (rp *replica) rest(idle bool) {
	rest, wake := core.Instant(0), core.Instant(0)
	if idle {
		rest, wake = min(rp.core.RestsUntil(), rp.nextStatus), rp.core.WakesAt()
	}
	if int64(rest) != rp.restsUntil.Load() {
		rp.restsUntil.Store(int64(rest))
	}
	if int64(wake) != rp.wakesAt.Load() {
		rp.wakesAt.Store(int64(wake))
	}
}

// feed hands one input to the core.
func (rp *replica) feed(in *input, now core.Instant) {
	c := rp.core
	switch in.kind {
	case inMessage:
		c.Message(now, in.from, in.env.Msg)
		in.env.Free()
	case inRequest:
		rp.feedRequest(in.req, now)
	case inBarrier:
		rp.barrierID++
		rp.barriers[rp.barrierID] = in.req
		if in.req.heldSince == 0 {
			in.req.heldSince = now
		}
		c.Barrier(now, rp.barrierID, in.seq)
	case inForget:
		c.Forget(in.id)
		rp.forgotten[in.id] = struct{}{}
		for id, r := range rp.barriers {
			if r.session == in.id {
				delete(rp.barriers, id)
				rp.v.finishOp(r, rp.dropped(r), ident.Position{}, ErrClosed)
			}
		}
	case inPeerUp:
		c.PeerUp(now, in.from)
	case inPeerDown:
		c.PeerDown(now, in.from)
	case inSyncStarted:
		c.SyncStarted(now)
	case inSyncEnded:
		c.SyncEnded(now)
		// After a cut only an fsync that began after it counts.
		if in.id == rp.syncer.generation() {
			c.Durable(now, in.seq)
		}
	case inApplied:
		if in.id == rp.resets.Load() {
			rp.appliedFed = in.seq
			c.Applied(now, in.seq)
		}
	case inCall:
		in.call(now)
	}
}

// dropped returns what a request that was dropped with its session is answered
// with. Another node may have sent it anew while the news of a broken link was
// on its way here: it is to send it again, if its client is still there.
func (rp *replica) dropped(r *Request) wire.Status {
	if r.sess == nil {
		return wire.StatusRetry
	}
	return wire.StatusIO
}

func (rp *replica) feedRequest(r *Request, now core.Instant) {
	req := core.Request{
		Origin:     core.Origin{ID: r.number, From: r},
		FUA:        r.FUA,
		Off:        r.Offset,
		Len:        r.Length,
		Session:    r.session,
		Request:    r.number,
		Replay:     r.replay,
		LastSeen:   r.lastSeen,
		Generation: r.generation,
	}
	switch r.Op {
	case OpWrite:
		req.Kind = wire.KindData
		req.Entry.Payload, req.Entry.PayloadCRC = r.Data.Retain(), r.crc
	case OpZero:
		req.Kind = wire.KindZero
		if r.NoHole {
			req.Flags = wire.FlagNoHole
		}
	case OpTrim:
		req.Kind = wire.KindTrim
	case OpFlush:
		req.Flush = true
	case OpRead, OpCache, OpBlockStatus:
		return // they do not come here
	}
	rp.core.Request(now, req)
}

// tickBarriers ends reads that were held too long, where the volume is not to
// hold I/O for ever.
func (rp *replica) tickBarriers(now core.Instant) {
	hold := core.Instant(rp.holdNanos.Load())
	if hold <= 0 {
		return
	}
	for id, r := range rp.barriers {
		if now-r.heldSince > hold {
			delete(rp.barriers, id)
			rp.v.finishOp(r, wire.StatusIO, ident.Position{}, noQuorum(int64(hold)))
		}
	}
}

// noQuorum is what a request ends with that was held for so long, in nanoseconds.
func noQuorum(hold int64) error {
	return fmt.Errorf("%w: no quorum for %v (on_no_quorum is error)", ErrIO, time.Duration(hold))
}

// call runs fn in a turn and waits for it. It returns ErrClosed when the
// replica is stopped.
func (rp *replica) call(ctx context.Context, fn func(now core.Instant)) error {
	done := make(chan struct{})
	ok := rp.in.push(input{kind: inCall, call: func(now core.Instant) {
		fn(now)
		close(done)
	}})
	if !ok {
		return ErrClosed
	}
	return rp.await(ctx, done)
}

// await waits until done is closed, the replica stops, or ctx ends.
func (rp *replica) await(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-rp.loopDone:
		select {
		case <-done:
			return nil
		default:
			return ErrClosed
		}
	}
}

// seal asks the core for its promise and returns the answer once the promise
// is durable.
func (rp *replica) seal(ctx context.Context, epoch ident.Epoch) (ident.SealAnswer, error) {
	var answer ident.SealAnswer
	done := make(chan struct{})
	ok := rp.in.push(input{kind: inCall, call: func(now core.Instant) {
		rp.sealID++
		rp.seals[rp.sealID] = func(a ident.SealAnswer) {
			answer = a
			close(done)
		}
		rp.core.Seal(now, rp.sealID, epoch)
	}})
	if !ok {
		return answer, ErrClosed
	}
	if err := rp.await(ctx, done); err != nil {
		return ident.SealAnswer{}, err
	}
	return answer, nil
}

// drain hands the lease back after what is in flight is answered.
func (rp *replica) drain(ctx context.Context, epoch ident.Epoch) error {
	done := make(chan struct{})
	ok := rp.in.push(input{kind: inCall, call: func(now core.Instant) {
		rp.drainID++
		rp.drains[rp.drainID] = func() { close(done) }
		rp.core.Drain(now, rp.drainID, epoch)
	}})
	if !ok {
		return ErrClosed
	}
	err := rp.await(ctx, done)
	if err != nil {
		// Nobody waits for the switchover any more: serve on, if that is still possible.
		rp.in.push(input{kind: inCall, call: func(now core.Instant) { rp.core.Undrain(now) }})
	}
	return err
}

// setView hands the core a view of the cluster state.
func (rp *replica) setView(v core.View) {
	rp.in.push(input{kind: inCall, call: func(now core.Instant) {
		rp.holdNanos.Store(v.HoldNanos)
		rp.inSet.Store(int64(len(v.Set)))
		if err := rp.grow(v.Size); err != nil && rp.failing.CompareAndSwap(false, true) {
			rp.failNow(err)
		}
		rp.core.View(now, v)
	}})
}

// grow makes the backing store as large as the volume has become. The log may
// know it before the cluster state is seen here: an entry or a block beyond the
// end is the news (resize-write-before-view). It is durable before such an entry
// is in the log, so that a restart finds room for it.
func (rp *replica) grow(size uint64) error {
	if size <= rp.meta.Size || rp.failedWith != nil {
		return nil //nolint:nilerr // it was told when it happened
	}
	if err := rp.store.Resize(size); err != nil {
		return fmt.Errorf("grow the backing store to %d bytes: %w", size, err)
	}
	rp.meta.Size = size
	rp.checkpointer.limit(rp.checkpointMax(size))
	rp.log.SetSpare(rp.spareBytes(size))
	return rp.writeMeta()
}

// alone reports whether no other replica is in the in-sync set.
func (rp *replica) alone() bool { return rp.inSet.Load() <= 1 }

// fail marks the replica failed, once: its log or its backing store can no
// longer be trusted (design section 2). It may be called from any goroutine but
// the loop's own, which calls failNow.
func (rp *replica) fail(err error) {
	if !rp.failing.CompareAndSwap(false, true) {
		return
	}
	rp.in.push(input{kind: inCall, call: func(core.Instant) { rp.failNow(err) }})
}

// failNow is fail on the loop.
func (rp *replica) failNow(err error) {
	rp.failing.Store(true)
	if rp.failedWith != nil {
		return
	}
	rp.failedWith = err
	if noRoom(err) {
		// Nothing is lost or in doubt: the log has what the backing store has
		// not. It is out until there is room again, and then opens anew.
		rp.logger.Error("replica has no room", "error", err)
		rp.core.Failed(rp.clock.Boot(), err.Error())
		rp.v.cmu.Lock()
		if !rp.v.stopped {
			rp.v.wg.Go(func() { rp.v.runReopen(rp) })
		}
		rp.v.cmu.Unlock()
		return
	}
	rp.logger.Error("replica failed", "rule", "a disk error is final", "error", err)
	rp.core.Failed(rp.clock.Boot(), err.Error())
	// The disk may refuse this too; the cluster state then remembers it alone.
	rp.meta.Failed = err.Error()
	if werr := rp.writeMeta(); werr != nil {
		rp.logger.Error("mark the replica failed", "error", werr)
	}
	rp.v.opts.Cluster.MarkFailed(rp.v.opts.Volume, rp.meta.Replica, err.Error())
}
