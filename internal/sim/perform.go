package sim

import (
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// The steps of performing Effects, in the order of their fields.
const (
	stepEarly uint8 = iota
	stepCut
	stepAppend
	stepMeta
	stepSend
	stepAnswer
	stepRest
	stepEnd
)

// perform does the effects' steps; each may take time, and between any two the
// process may die or stand still.
func (s *Sim) perform(n *node) {
	if !n.busy {
		return
	}
	for n.step < stepEnd {
		if s.crashHere(n) {
			return
		}
		if n.stopped {
			n.deferred = append(n.deferred, event{kind: evStep, node: n.i, gen: n.gen})
			return
		}
		took := s.doStep(n)
		if !n.up {
			return
		}
		n.step++
		if took > 0 {
			s.at(took, event{kind: evStep, node: n.i, gen: n.gen})
			return
		}
	}
	n.busy = false
}

// crashHere is a place between two steps at which the process may die.
func (s *Sim) crashHere(n *node) bool {
	if n.crashIn > 0 {
		if n.crashIn--; n.crashIn == 0 {
			s.die(n, n.crashBy)
			return true
		}
	}
	return false
}

func (s *Sim) doStep(n *node) (took int64) {
	e := &n.eff
	switch n.step {
	case stepEarly:
		for i := range e.Early {
			if m, ok := e.Early[i].Msg.(*wire.Blocks); ok {
				s.chk.moves(s, n, e.Early[i].To, m)
			}
			s.send(n, e.Early[i])
		}
	case stepCut:
		if e.Reset != nil {
			s.reset(n, e.Reset)
			if !n.up {
				return 0
			}
		}
		if e.Cut {
			s.chk.cut(s, n, e.CutTo)
			s.note(n.i, "cut", "%v to %d", n.disk.log.last(), e.CutTo)
			n.disk.log.cut(e.CutTo)
		}
	case stepAppend:
		if len(e.Append) == 0 {
			break
		}
		if n.disk.failed {
			s.diskError(n)
			break
		}
		torn := n.crashIn > 0 && s.chance(0.2)
		for i := range e.Append {
			if torn && s.rng.IntN(len(e.Append)) == 0 {
				s.die(n, n.crashBy) // the rest is not in the file, or does not verify
				return 0
			}
			s.chk.append(s, n, &e.Append[i])
			n.disk.log.append(e.Append[i])
		}
		s.put(n, input{kind: inWritten, x: uint64(n.disk.log.last().Seq)})
		if wait := n.disk.hungTo - s.now; wait > 0 && !s.opt.Manual && s.chance(0.3) {
			return wait
		}
		if s.chance(0.2) {
			return s.delay(10*us, 2*ms)
		}
	case stepMeta:
		return s.writeMeta(n)
	case stepSend:
		if e.MetaDirty && n.disk.failed {
			s.diskError(n)
		} else if e.MetaDirty {
			n.disk.meta.Meta = e.Meta // the fsync has returned
			n.disk.meta.incarnation = e.Meta.Incarnation
			s.chk.meta(s, n)
		}
		s.chk.committed(s, n)
		for i := range e.Send {
			s.chk.sent(s, n, &e.Send[i])
			s.send(n, e.Send[i])
		}
		for i := range e.SealReplies {
			s.sealReply(n, &e.SealReplies[i])
		}
	case stepAnswer:
		for i := range e.Answers {
			s.answer(n, &e.Answers[i])
		}
		for _, id := range e.Released {
			s.readAgain(n, id)
		}
		for _, id := range e.Bounced {
			s.readBounced(n, id)
		}
	case stepRest:
		s.rest(n)
	}
	return 0
}

func (s *Sim) writeMeta(n *node) int64 {
	if !n.eff.MetaDirty {
		return 0
	}
	if n.disk.failed {
		s.diskError(n)
		return 0
	}
	return s.fsyncTime(n)
}

// diskError gives up what rests on a write that failed.
func (s *Sim) diskError(n *node) {
	// The core hears of it before anything else.
	n.inbox = slices.Insert(n.inbox, 0, input{kind: inFailed})
	n.eff.Send, n.eff.SealReplies = n.eff.Send[:0], n.eff.SealReplies[:0]
}

func (s *Sim) fsyncTime(n *node) int64 {
	if wait := n.disk.hungTo - s.now; wait > 0 {
		return wait
	}
	if s.now < n.disk.slowTo {
		return s.delay(20*ms, 400*ms)
	}
	return s.delay(100*us, 10*ms)
}

// unappliedMax bounds the entries that a replica holds in memory because they
// are not applied: the limit for new ones, what is in flight besides, and as
// much again for what a change of primary brings on top.
func (s *Sim) unappliedMax() ident.Seq {
	limit := 256
	if s.opt.Entries > 0 {
		limit = s.opt.Entries
	}
	return ident.Seq(3 * (limit + 64 + 16))
}

// rest does what needs no order.
func (s *Sim) rest(n *node) {
	e := &n.eff
	// What the log held at the start is read back from it, and in no memory.
	if last, from := n.disk.log.last().Seq, max(n.apply.done, n.startedAt); last > from+s.unappliedMax() {
		s.fail("I9", "node %s holds %d entries that are not applied", n.name, last-from)
	}
	if n.ticks++; e.SyncTo > 0 || (n.disk.log.durable < n.disk.log.last().Seq && n.ticks%32 == 0) {
		s.startSync(n)
	}
	if e.ApplyTo > n.apply.to {
		n.apply.to = e.ApplyTo
		if len(n.blocks) > 0 && e.ApplyTo > n.blocks[0].AsOf {
			s.fail("I4", "node %s may apply to %d while blocks as of %d wait", n.name, e.ApplyTo, n.blocks[0].AsOf)
		}
		if !n.apply.on {
			n.apply.on = true
			s.at(s.delay(0, 3*ms), event{kind: evApply, node: n.i, gen: n.gen})
		}
	}
	if e.TrimTo > 0 && (s.opt.Trim || s.chance(0.1)) {
		s.chk.trim(s, n, e.TrimTo)
		n.disk.log.trim(min(e.TrimTo, n.disk.log.last().Seq))
		n.core.Trimmed(n.disk.log.base)
	}
	for _, q := range e.LogReads {
		n.logReads = append(n.logReads, q)
		s.at(s.delay(20*us, 5*ms), event{kind: evLogRead, node: n.i, gen: n.gen})
	}
	for _, q := range e.BlockReads {
		n.blockReads = append(n.blockReads, q)
		s.at(s.delay(20*us, 5*ms), event{kind: evBlockRead, node: n.i, gen: n.gen})
	}
	if len(e.WriteBlocks) > 0 {
		n.blocks = append(n.blocks, e.WriteBlocks...)
		if !n.apply.on {
			n.apply.on = true
			s.at(s.delay(0, 3*ms), event{kind: evApply, node: n.i, gen: n.gen})
		}
	}
	if e.CheckpointNow {
		n.ckpt.again = true
	}
	for i := range e.Propose {
		s.propose(n, &e.Propose[i])
	}
	for _, r := range e.Reports {
		s.report(n, r)
	}
	for _, id := range e.Drained {
		s.drained(n, id)
	}
	for i := range e.Events {
		ev := &e.Events[i]
		if s.tracing() {
			s.note(n.i, ev.Name, "%s -> %s peer %s at %v: %s", ev.From, ev.To, ev.Peer, ev.Pos, ev.Rule)
		}
		if ev.Name == "failed" {
			n.disk.meta.failed = ev.Rule
			s.markFailed(n, ev.Rule)
		}
	}
}
