package replication

import (
	"context"
	"errors"
	"fmt"
	"path"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/invariant"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wal"
	"github.com/blockstep/blockstep/replication/wire"
)

// perform takes the core's effects and performs them in their order, but leaves
// the fsync that they ask for to the end of the batch. It reports whether the core has been told something new meanwhile, so that
// there may be more.
func (rp *replica) perform() bool {
	defer rp.doneEffects()
	e := &rp.effects
	rp.core.Ready(e)
	if e.Cut && !rp.muted && rp.failedWith == nil {
		// Before the commit index of what comes in their stead is published:
		// by seq alone a reader could not tell the one from the other.
		rp.overlay.cut(e.CutTo)
	}
	if e.Reset != nil {
		rp.blurTo.Store(blurAll) // likewise: the commit index is the new log's
	}
	// The gate first. What it says rests on what the core has been told, so it
	// may be known at once; and when it closes, readers must know before
	// anything that rests on its being closed (a lease that is given back, a
	// promise, a cut) is performed.
	rp.publish()
	if rp.muted {
		rp.performAnswers(e)
		return false
	}
	for i := range e.Early {
		rp.send(&e.Early[i])
	}
	if len(e.Early) > 0 && (len(e.Append) > 0 || e.MetaDirty || e.Cut || e.Reset != nil) {
		rp.v.opts.Links.Flush() // the peers work while the disk does
	}
	again, err := rp.performDisk(e)
	if err != nil {
		// What rests on the disk is not performed. The core is told last: with
		// the next input it uses the effects' room again.
		rp.performAnswers(e)
		rp.performNews(e)
		rp.failNow(err)
		return true
	}
	for i := range e.Send {
		rp.send(&e.Send[i])
	}
	for i := range e.SealReplies {
		s := &e.SealReplies[i]
		if reply := rp.seals[s.ID]; reply != nil {
			delete(rp.seals, s.ID)
			reply(s.Answer)
		}
	}
	rp.performAnswers(e)
	rp.performNews(e)
	written := ident.Seq(0)
	if again {
		written = e.Append[len(e.Append)-1].Pos.Seq
	}
	if err := rp.performBackground(e); err != nil {
		rp.failNow(err)
		return true
	}
	if again {
		rp.core.Written(rp.clock.Boot(), written)
	}
	return again
}

// doneEffects gives back what was lent to the core for these effects.
func (rp *replica) doneEffects() {
	for i, fn := range rp.afterEffects {
		fn()
		rp.afterEffects[i] = nil
	}
	rp.afterEffects = rp.afterEffects[:0]
}

func (rp *replica) publish() {
	if g := rp.core.Gate(); g != rp.published {
		rp.published = g
		rp.gate.store(g)
		rp.probeCommitted()
	}
}

// send hands a message to the links, which take a reference of each payload.
func (rp *replica) send(o *core.Out) {
	wire.RetainPayloads(o.Msg)
	rp.v.opts.Links.Send(o.To, rp.v.opts.Volume, o.Msg)
}

// performDisk does what Send and SealReplies rest on: the cut, the append, the
// meta. It reports whether anything was appended.
func (rp *replica) performDisk(e *core.Effects) (bool, error) {
	if rp.failedWith != nil {
		return false, nil //nolint:nilerr // it was told when it happened; nothing is performed after it
	}
	if e.Reset != nil {
		if err := rp.reset(e.Reset); err != nil {
			return false, err
		}
	}
	if e.Cut {
		if err := rp.cut(e.CutTo); err != nil {
			return false, err
		}
	}
	if len(e.Append) > 0 {
		if err := rp.append(e.Append); err != nil {
			return false, err
		}
	}
	rp.syncTo = max(rp.syncTo, e.SyncTo)
	if e.MetaDirty {
		rp.meta.Promise, rp.meta.Amnesiac, rp.meta.Incarnation = e.Meta.Promise, e.Meta.Amnesiac, e.Meta.Incarnation
		if err := rp.writeMeta(); err != nil {
			return false, err
		}
		rp.incarnation.Store(uint64(e.Meta.Incarnation))
	}
	return len(e.Append) > 0, nil
}

// append writes entries to the log file, and only then shows them to readers
// and the applier.
func (rp *replica) append(entries []wire.Entry) error {
	for i := range entries {
		if err := rp.grow(entries[i].End()); err != nil {
			return err
		}
	}
	began := time.Now()
	if err := rp.log.Append(entries, rp.syncer.durableSeq()); err != nil {
		return fmt.Errorf("append %d entries to the log: %w", len(entries), err)
	}
	rp.v.stages.observe(StageLogWrite, began)
	rp.probeCommit(entries[len(entries)-1].Pos)
	rp.overlay.add(entries)
	bytes := 0
	for i := range entries {
		bytes += entries[i].PayloadLen()
	}
	rp.syncer.wrote(entries[len(entries)-1].Pos.Seq, int64(bytes), rp.clock.Boot())
	return nil
}

// cut drops the entries after seq from log and overlay, after it has saved them
// where an operator finds them.
func (rp *replica) cut(seq ident.Seq) error {
	if file, err := rp.saveDiscarded(seq); err != nil {
		// What is saved is a courtesy: the entries were never committed.
		rp.logger.Warn("save discarded entries", "after", seq, "error", err)
	} else if file != "" {
		rp.event(core.Event{Name: "discarded", From: rp.log.Last().String(), To: path.Base(file), Rule: "entries that no newer primary has are kept in a file", Pos: rp.log.Last()})
	}
	rp.overlay.cut(seq)
	rp.syncer.cut(seq)
	if err := rp.log.Truncate(seq); err != nil {
		return fmt.Errorf("cut the log after %d: %w", seq, err)
	}
	// What is cut was never applied, so it no longer blurs the content.
	if b := rp.blurTo.Load(); b > uint64(seq) && b != blurAll {
		rp.blurTo.Store(uint64(seq))
	}
	return nil
}

// performAnswers ends requests and lets reads go on. It rests on nothing of
// this batch.
func (rp *replica) performAnswers(e *core.Effects) {
	for i := range e.Answers {
		a := &e.Answers[i]
		r, ok := a.Origin.From.(*Request)
		invariant.Assert(ok, "replication: an answer for nobody")
		a.Origin.From = nil
		status, why := a.Status, error(nil)
		if _, ok := rp.forgotten[r.session]; ok && status == wire.StatusIO {
			status, why = rp.dropped(r), ErrClosed
		} else if hold := rp.holdNanos.Load(); status == wire.StatusIO && hold > 0 {
			why = noQuorum(hold)
		}
		if status == wire.StatusOK && r.sess != nil {
			rp.done.succeed(r)
			continue
		}
		rp.v.finishOp(r, status, a.Pos, why)
	}
	rp.done.flush()
	if len(rp.forgotten) > 0 {
		clear(rp.forgotten)
	}
	for _, id := range e.Released {
		if r := rp.barriers[id]; r != nil {
			delete(rp.barriers, id)
			rp.queueRead(r)
		}
	}
	for _, id := range e.Bounced {
		if r := rp.barriers[id]; r != nil {
			delete(rp.barriers, id)
			rp.v.finishOp(r, wire.StatusRetry, ident.Position{}, nil)
		}
	}
	for _, id := range e.Drained {
		if done := rp.drains[id]; done != nil {
			delete(rp.drains, id)
			done()
		}
	}
}

// performBackground hands work to the other goroutines.
func (rp *replica) performBackground(e *core.Effects) error {
	if e.ApplyTo != 0 {
		rp.applier.allow(e.ApplyTo)
	}
	for _, q := range e.LogReads {
		rp.wg.Add(1)
		go rp.runLogRead(q)
	}
	for _, q := range e.BlockReads {
		rp.wg.Add(1)
		go rp.runBlockRead(q)
	}
	for _, m := range e.WriteBlocks {
		for i := range m.Blocks {
			if err := rp.grow(m.Blocks[i].Off + m.Blocks[i].Len); err != nil {
				return err
			}
		}
	}
	if len(e.WriteBlocks) > 0 {
		rp.applier.write(e.WriteBlocks)
	}
	if e.CheckpointNow {
		rp.checkpointer.now()
	}
	if e.TrimTo != 0 && rp.failedWith == nil {
		if err := rp.log.TrimTo(e.TrimTo); err != nil {
			return fmt.Errorf("trim the log to %d: %w", e.TrimTo, err)
		}
		rp.core.Trimmed(rp.log.Base())
	}
	return nil
}

// performNews tells the cluster.
func (rp *replica) performNews(e *core.Effects) {
	for i := range e.Propose {
		rp.wg.Add(1)
		go rp.runPropose(e.Propose[i])
	}
	for _, r := range e.Reports {
		rp.v.opts.Cluster.Report(rp.v.opts.Volume, r)
	}
	for i := range e.Events {
		rp.event(e.Events[i])
	}
}

func (rp *replica) event(e core.Event) {
	rp.logger.Info("replica", "event", e.Name, "from", e.From, "to", e.To, "rule", e.Rule, "peer", e.Peer, "position", e.Pos)
	rp.v.opts.Cluster.Event(rp.v.opts.Volume, e)
}

// runLogRead reads entries for a peer that lags behind what is in memory. The
// core asks for one run per peer at a time.
func (rp *replica) runLogRead(q core.LogRead) {
	defer rp.wg.Done()
	var err error
	// What is not applied yet is still in memory, for the most part.
	entries := rp.overlay.read(q.From, q.Bytes, nil)
	if len(entries) == 0 {
		entries, err = rp.log.Read(q.From, q.Bytes, nil)
	}
	if err != nil {
		rp.logger.Warn("read the log for a peer", "peer", q.Peer, "from", q.From, "error", err)
		if !errors.Is(err, wal.ErrTrimmed) && !errors.Is(err, wal.ErrClosed) && !rp.alone() {
			// What was durable does not verify: others have it.
			rp.fail(fmt.Errorf("read the log for %s: %w", q.Peer, err))
		}
	}
	release := func() {
		for i := range entries {
			entries[i].Payload.Release()
		}
	}
	ok := rp.in.push(input{kind: inCall, call: func(now core.Instant) {
		rp.core.LogRead(now, q, entries, err == nil)
		// The core may have put them into a message that is not sent yet.
		rp.afterEffects = append(rp.afterEffects, release)
	}})
	if !ok {
		release()
	}
}

// proposeRetry is the pause after a proposal whose outcome is not known.
const proposeRetry = 100 * time.Millisecond

// runPropose asks for a change of the in-sync set until the outcome is
// definite: until then the core acts by the old and the new set at once.
func (rp *replica) runPropose(p core.SetProposal) {
	defer rp.wg.Done()
	for rp.ctx.Err() == nil {
		shows, err := rp.v.opts.Cluster.ProposeSet(rp.ctx, rp.v.opts.Volume, p)
		if err == nil {
			rp.in.push(input{kind: inCall, call: func(now core.Instant) { rp.core.Proposed(now, p.ID, shows) }})
			return
		}
		rp.logger.Debug("propose the in-sync set", "epoch", p.Epoch, "set", p.Set, "error", err)
		sleep(rp.ctx, proposeRetry)
	}
}

// sleep waits for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
