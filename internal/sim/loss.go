package sim

import (
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// loss is a promotion that may have given something up: of the one true log it
// keeps what its primary held.
type loss struct {
	epoch      ident.Epoch
	keep       ident.Seq
	generation uint64 // of caches, from then on
	forced     bool   // the old side may live on
}

// fence is the newest promotion by which an operator has ended the sessions from before:
// none of them writes in its epoch or later.
type fence struct {
	epoch      ident.Epoch
	generation uint64 // of caches, from then on
}

func (k *checker) newestLoss() loss {
	if n := len(k.losses); n > 0 {
		return k.losses[n-1]
	}
	return loss{}
}

// local reports whether an answer waits for the primary alone: then a failover
// may lose the tail, and says so.
func (s *Sim) local() bool { return s.opt.Ack == core.AckLocal }

// dead reports whether an entry was given up: it may be on some disks, and an
// old side that is not fenced may go on to commit behind it.
func (k *checker) dead(p ident.Position) bool {
	if i := int(p.Seq); i > 0 && i <= len(k.log) && k.log[i-1].pos == p {
		return false
	}
	for i := range k.losses {
		if l := &k.losses[i]; p.Epoch < l.epoch && p.Seq > l.keep {
			return true
		}
	}
	return false
}

// unfenced reports whether one of two primaries is the old side of a forced
// failover.
func (k *checker) unfenced(a, b ident.Epoch) bool {
	for i := range k.losses {
		if l := &k.losses[i]; l.forced && min(a, b) < l.epoch && max(a, b) >= l.epoch {
			return true
		}
	}
	return false
}

// after: a command has changed the cluster state.
func (k *checker) after(s *Sim, c *command, old *state.Volume) {
	if !c.result.OK {
		return
	}
	p := c.cmd.Promote
	if p == nil {
		if c.cmd.ChangeSet != nil {
			k.held(s, "after a change of the set")
		}
		return
	}
	if p.Epoch <= old.Epoch {
		s.fail("I1", "epoch %d after %d", p.Epoch, old.Epoch)
	}
	if p.Fence {
		k.fence = fence{p.Epoch, s.cl.vol().Generation}
	}
	n := s.nodes[s.index(p.Node)]
	keep := len(k.log)
	for keep > 0 && !n.disk.holds(k.log[keep-1].pos) {
		keep--
	}
	takes := n.disk.meta.incarnation == p.Incarnation && n.disk.log.last() == p.Position
	switch c.result.Loss {
	case state.LossForced, state.LossLocal:
		// Whether this one takes office or not: the set is a new one, or the
		// sessions from before end.
		k.lose(s, keep, c)
	case state.LossPower:
		if takes {
			k.lose(s, keep, c)
		}
	case state.LossNone:
		switch {
		case keep == len(k.log) || !takes:
		case k.limbo:
			k.lose(s, keep, c)
		default:
			s.fail("I2", "%s is promoted at %v without the committed entry %v", p.Node, p.Position, k.log[len(k.log)-1].pos)
		}
	}
}

// lose drops from the true log what a promotion gives up.
func (k *checker) lose(s *Sim, keep int, c *command) {
	p := c.cmd.Promote
	if int(k.flushed) > keep {
		if c.result.Loss == state.LossPower && !s.local() && !k.limbo {
			s.fail("I2", "%s is promoted at %v after a power loss, and %v was flushed", p.Node, p.Position, k.log[k.flushed-1].pos)
		}
		k.flushed = ident.Seq(keep)
	}
	k.losses = append(k.losses, loss{
		epoch: p.Epoch, keep: ident.Seq(keep), generation: s.cl.vol().Generation, forced: c.result.Loss == state.LossForced,
	})
	if c.result.Loss != state.LossPower {
		k.limbo, k.flushed = true, 0
	}
	for i := keep; i < len(k.log); i++ {
		delete(k.byReq, reqID{k.log[i].session, k.log[i].request})
	}
	k.log = k.log[:keep]
	k.lossAt = s.now + 1
	k.newest = min(k.newest, ident.Seq(keep))
	last := make([]ident.Seq, len(k.floor))
	for i := range k.log {
		e := &k.log[i]
		if e.kind == wire.KindMarker {
			continue
		}
		for b := e.off / blockSize; b < (e.off+e.len)/blockSize; b++ {
			last[b] = e.pos.Seq
		}
	}
	for b := range k.floor {
		if int(k.floor[b]) > keep {
			k.floor[b] = last[b]
		}
	}
}

// judge looks at a promotion from the facts alone (I7): as many answers as the
// design asks for, and nobody counted who has not spoken.
func (k *checker) judge(s *Sim, r *round, v *state.Verdict) {
	good, forgot, failed := 0, 0, 0
	for _, n := range r.vol.InSync {
		a, answered := r.answers[n]
		counts := slices.Contains(v.Heard, n)
		switch {
		case r.vol.Replica(n).Failed, answered && a.Refusal == ident.SealFailed:
			failed++
		case !answered || a.Refusal != ident.SealAccepted || a.Inconsistent || a.Epoch != r.epoch || a.Replica != r.vol.Replica(n).Replica:
			if counts && v.Loss != state.LossForced {
				s.fail("I7", "%s counts in epoch %d, and it answered %+v", n, r.epoch, a)
			}
		case !counts:
		case a.Amnesiac:
			forgot++
		default:
			good++
		}
		if counts && v.Answer.Last.Less(a.Last) {
			s.fail("I7", "%s is promoted at %v, and %s has %v", v.Node, v.Answer.Last, n, a.Last)
		}
	}
	w := len(r.vol.InSync)/2 + 1
	need := len(r.vol.InSync) - w + 1
	switch {
	case v.Loss == state.LossForced:
	case v.Loss == state.LossNone && good >= need && forgot == 0:
	case v.Loss == state.LossPower && forgot+failed >= w && good+forgot >= need && (s.now >= r.began+graceTime || good+forgot+failed == len(r.vol.InSync)):
	default:
		s.fail("I7", "%s is promoted in epoch %d (loss %q) with %d good answers, %d that forgot, %d that failed of %v", v.Node, r.epoch, v.Loss, good, forgot, failed, r.vol.InSync)
	}
}
