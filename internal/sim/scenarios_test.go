package sim

import (
	"flag"
	"io"
	"os"
	"slices"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

var storyFlag = flag.String("story", "", "the one scenario to tell (TestScenario); with -events, event by event")

// scenario is one story.
type scenario struct {
	name string
	o    Options
	tell func(*Sim)
}

// scenarios are stories told step by step; most have the name of a known way to
// get it wrong (design section 10). The checkers judge each step of them too.
var scenarios = []scenario{
	{"two-replicas-marker-deadlock", Options{Replicas: 2, Clients: 1}, func(s *Sim) {
		// Two replicas and a witness. The primary dies for good: the other is
		// promoted and can commit its marker only in a set of its own.
		p := s.AwaitPrimary()
		s.Write(2, 10)
		s.Crash(FaultKill, p)
		s.RunFor(s1)
		if q := s.AwaitPrimary(); q != 1-p {
			s.Fail("primary is %d", q)
		}
		s.Write(2, 10)
		s.Restart(p)
		s.Converge(0, 1)
	}},
	{"evicted-below-min-copies", Options{MinCopies: 2}, func(s *Sim) {
		// The last one of three must not go on alone, nor make the set so small
		// that it could.
		p := s.AwaitPrimary()
		s.Write(p, 10)
		s.Crash(FaultKill, (p+1)%3)
		s.RunFor(2 * s1)
		s.Write(p, 10)
		s.Crash(FaultKill, (p+2)%3)
		c := s.Ask(p, opWrite, 0, 1)
		s.RunFor(5 * s1)
		if !c.op.on || len(s.Set()) < 2 || s.Primary() >= 0 {
			s.Fail("goes on with set %v", s.Set())
		}
		s.Restart((p + 2) % 3)
		s.AwaitPrimary()
		s.Write(p, 3)
	}},
	{"hung-disk-still-leads", Options{}, func(s *Sim) {
		// A primary whose disk hangs keeps no volume: another takes over.
		p := s.AwaitPrimary()
		s.Write((p+1)%3, 10)
		s.HangDisk(p, 60*s1)
		s.Write((p+1)%3, 3)
		s.Ask((p+1)%3, opFlush, 0, 1)
		s.Await(10*s1, "another primary", func() bool { q := s.Primary(); return q >= 0 && q != p })
		s.Write((p+1)%3, 10)
		s.Flush((p + 1) % 3)
	}},
	{"half-sealed-member-stuck", Options{}, func(s *Sim) {
		// One secondary was sealed by a round that promoted nobody. It must not
		// stay lost to a primary that keeps its lease with the other.
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		s.Write(p, 5)
		s.ctl[0] = nil
		s.Isolate(q)
		s.RunFor(2 * leaseFor)
		if a := s.Seal(q, s.Epoch()+1); a.Refusal != ident.SealAccepted {
			s.Fail("%v", a.Refusal)
		}
		s.newController(0).want = false
		for j := range 3 {
			if j != q {
				s.Join(q, j)
			}
		}
		s.RunFor(s1)
		s.Write(s.AwaitPrimary(), 5)
		s.Converge(0, 1, 2)
	}},
	{"seal-ignores-grant", Options{NoCtl: true}, func(s *Sim) {
		s.elect(0)
		s.Write(0, 5)
		for i := range 3 {
			if a := s.Seal(i, s.Epoch()+1); a.Refusal != ident.SealLease || a.WaitNanos <= 0 {
				s.Fail("node %d answers %v", i, a.Refusal)
			}
		}
		s.Write(0, 5)
	}},
	{"restarted-granter-stays-silent", Options{NoCtl: true}, func(s *Sim) {
		// It has forgotten what it granted: it says nothing for a lease time.
		s.elect(0)
		s.Crash(FaultKill, 1)
		s.Restart(1)
		if a := s.Seal(1, s.Epoch()+1); a.Refusal != ident.SealSilent {
			s.Fail("%v", a.Refusal)
		}
	}},
	{"wiped-replica-answers-seal", Options{NoCtl: true, MinCopies: 2}, func(s *Sim) {
		// A node comes back with an empty disk under another replica id: it
		// answers no SEAL, and its acks commit nothing.
		s.elect(0)
		s.Write(0, 5)
		s.Crash(FaultKill, 1, 2)
		n := s.nodes[2]
		n.disk = s.newDisk(999, n.boots)
		s.Restart(2)
		c := s.Ask(0, opWrite, 0, 1)
		s.RunFor(s1)
		if a := s.Seal(2, s.Epoch()+1); a.Refusal != ident.SealUnknown || !c.op.on {
			s.Fail("answers %v, write waits %v", a.Refusal, c.op.on)
		}
	}},
	{"office-twice-by-raft-replay", Options{NoCtl: true, MinCopies: 2}, func(s *Sim) {
		// The state that made it primary comes again: after it was deposed, and
		// after it has restarted.
		s.elect(0)
		s.Write(0, 5)
		s.Isolate(0)
		s.RunFor(2 * leaseFor)
		if a := s.Seal(0, s.Epoch()+1); a.Refusal != ident.SealAccepted {
			s.Fail("%v", a.Refusal)
		}
		replay := func() {
			n := s.nodes[0]
			n.viewN = 0
			s.takeView(n, len(s.cl.views)-1)
			s.pump(n)
			s.RunFor(s1)
			if r := s.Status(0).Role; r != core.RoleSecondary {
				s.Fail("role %d", r)
			}
		}
		replay()
		s.Crash(FaultKill, 0)
		s.Restart(0)
		replay()
	}},
	{"office-after-crash-since-seal", Options{NoCtl: true}, func(s *Sim) {
		// All are sealed; the best restarts before the promotion reaches it.
		s.elect(0)
		s.Write(0, 5)
		s.Crash(FaultKill, 0)
		s.RunFor(2 * leaseFor)
		e := s.Epoch() + 1
		a, b := s.Seal(1, e), s.Seal(2, e)
		if a.Refusal != ident.SealAccepted || b.Refusal != ident.SealAccepted {
			s.Fail("%v, %v", a.Refusal, b.Refusal)
		}
		s.Crash(FaultKill, 1)
		s.Restart(1)
		s.promoteByHand(1, a)
		s.RunFor(2 * s1)
		if s.Status(1).Role != core.RoleSecondary {
			s.Fail("it takes office")
		}
	}},
	{"sealed-at-another-position", Options{NoCtl: true}, func(s *Sim) {
		// A promotion for a position that the replica has left takes no effect.
		s.elect(0)
		s.Write(0, 5)
		s.Crash(FaultKill, 0)
		s.RunFor(2 * leaseFor)
		a := s.Seal(1, s.Epoch()+1)
		a.Last.Seq--
		s.promoteByHand(1, a)
		s.RunFor(s1)
		if s.Status(1).Role != core.RoleSecondary {
			s.Fail("it takes office")
		}
	}},
	{"clean-mark-outlives-start", Options{}, func(s *Sim) {
		// A clean stop, a start, writes, a power cut: the mark of the stop must
		// not vouch for what came later.
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		s.Write(p, 5)
		s.Crash(FaultCleanStop, q)
		s.Restart(q)
		s.Converge(q)
		s.Write(p, 5)
		s.PowerCut(q)
		s.Isolate(q)
		s.start(s.nodes[q])
		if !s.nodes[q].disk.meta.Amnesiac {
			s.Fail("not amnesiac")
		}
		for j := range 3 {
			if j != q {
				s.Join(q, j)
			}
		}
		s.Converge(0, 1, 2)
		s.Await(s1, "the end of amnesia", func() bool { return !s.nodes[q].disk.meta.Amnesiac })
	}},
	{"torn-tail-is-no-amnesia", Options{}, func(s *Sim) {
		// kill -9 of everybody at once: the page cache has all of it.
		p := s.AwaitPrimary()
		s.Write(p, 20)
		s.Crash(FaultKill, 0, 1, 2)
		s.Restart(0, 1, 2)
		s.Read(s.AwaitPrimary())
		if len(s.chk.losses) > 0 {
			s.Fail("a promotion that gives something up")
		}
	}},
	{"auto-promote-counts-absent", Options{}, func(s *Sim) {
		// One has forgotten, one is away, one is good: no majority is known to
		// have forgotten, so it waits.
		p := s.AwaitPrimary()
		a, b := (p+1)%3, (p+2)%3
		s.Write(p, 10)
		s.Crash(FaultKill, b)
		s.PowerCut(a)
		s.Crash(FaultKill, p)
		e := s.Epoch()
		s.Restart(a, b)
		s.RunFor(5 * s1)
		if s.Primary() >= 0 || s.Epoch() != e {
			s.Fail("primary %d in epoch %d", s.Primary(), s.Epoch())
		}
		s.Restart(p)
		s.Read(s.AwaitPrimary())
	}},
	{"power-cut-everywhere", Options{}, func(s *Sim) {
		// What was flushed survives; sessions from before end.
		p := s.AwaitPrimary()
		s.Write(p, 20)
		s.Flush(p)
		s.Write(p, 5)
		s.PowerCut(0, 1, 2)
		s.RunFor(s1)
		s.Restart(0, 1, 2)
		s.Read(s.AwaitPrimary())
		s.Converge(0, 1, 2)
		if s.cl.vol().Generation < 2 {
			s.Fail("the cache generation is %d", s.cl.vol().Generation)
		}
	}},
	{"fsync-failed-then-restart", Options{}, func(s *Sim) {
		// A restart reads the page cache's good-looking bytes: failed it stays.
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		s.Write(p, 5)
		s.nodes[q].disk.failed = true
		s.Write(p, 5)
		s.Await(10*s1, "the eviction", func() bool { return len(s.Set()) == 2 })
		s.Crash(FaultKill, q)
		s.nodes[q].disk.failed = false
		s.Restart(q)
		s.RunFor(2 * s1)
		if a := s.Seal(q, s.Epoch()+1); a.Refusal != ident.SealFailed || len(s.Set()) != 2 {
			s.Fail("%v, set %v", a.Refusal, s.Set())
		}
	}},
	{"failed-primary-hands-over", Options{}, func(s *Sim) {
		p := s.AwaitPrimary()
		s.Write((p+1)%3, 5)
		s.nodes[p].disk.failed = true
		s.Write((p+1)%3, 10)
		if q := s.AwaitPrimary(); q == p {
			s.Fail("it still leads")
		}
	}},
	{"switchover-back-and-forth", Options{}, func(s *Sim) {
		p := s.AwaitPrimary()
		for i := range 6 {
			c := s.ctl[0]
			c.want, c.drain, c.to = true, true, s.nodes[(p+i+1)%3].name
			s.Write(i%3, 3)
			s.RunFor(300 * ms)
			s.Write(i%3, 3)
		}
		if len(s.chk.losses) > 0 {
			s.Fail("something was given up")
		}
		s.Converge(0, 1, 2)
	}},
	{"one-dead-secondary-delays-nobody", Options{MinCopies: 2}, func(s *Sim) {
		p := s.AwaitPrimary()
		s.Write(p, 5)
		s.stop(s.nodes[(p+1)%3], 60*s1)
		from := s.now
		s.Write(p, 20)
		s.Flush(p)
		if took := s.now - from; took > s1 {
			s.Fail("20 writes and a flush took %s", clock(took))
		}
	}},
	{"lost-raft-leader-stops-no-io", Options{}, func(s *Sim) {
		p := s.AwaitPrimary()
		s.ctl[0] = nil
		s.cl.stall = s.now + 60*s1
		for range 20 {
			s.Write((p+1)%3, 3)
			s.Read((p + 2) % 3)
			s.RunFor(s1)
		}
	}},
	{"replay-after-trim", Options{DedupMax: 8}, func(s *Sim) {
		// The reply to a write is lost; by the time that it is sent again, the
		// table does not reach back so far. It must not be run again.
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		s.Write(q, 1)
		s.drop = func(from, to int, m wire.Message) bool { return from == p && m.Type() == wire.TypeReply }
		c := s.Ask(q, opWrite, 3, 1)
		s.RunFor(20 * ms)
		s.Write(p, 30)
		s.drop = nil
		s.breakLink(s.links[p][q], false)
		s.Await(5*s1, "an answer", func() bool { return !c.op.on })
		if c.last != wire.StatusTooOld {
			s.Fail("status %d", c.last)
		}
	}},
	{"replay-takes-effect-once", Options{}, func(s *Sim) {
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		s.drop = func(from, to int, m wire.Message) bool { return from == p && m.Type() == wire.TypeReply }
		c := s.Ask(q, opWrite, 3, 1)
		s.RunFor(20 * ms)
		s.drop = nil
		s.breakLink(s.links[p][q], false)
		s.Await(5*s1, "an answer", func() bool { return !c.op.on })
		if c.last != wire.StatusOK {
			s.Fail("status %d", c.last)
		}
	}},
	{"original-runs-after-its-replay", Options{}, func(s *Sim) {
		// A write is long under way to a primary; meanwhile it is sent again to
		// the next one and takes effect there. It arrives when the first is
		// primary anew: it must not run again.
		p := s.AwaitPrimary()
		q, f := (p+1)%3, (p+2)%3
		var late *wire.Forward
		s.drop = func(from, to int, m wire.Message) bool {
			w, ok := m.(*wire.Forward)
			if !ok || from != f || to != p {
				return false
			}
			late = w
			return true
		}
		c := s.Ask(f, opWrite, 3, 1)
		s.Switchover(q)
		s.Await(5*s1, "an answer", func() bool { return !c.op.on })
		s.Switchover(p)
		s.drop = nil
		s.serve(s.nodes[p], f, late)
		s.pump(s.nodes[p])
		s.RunFor(s1)
		s.Converge(0, 1, 2)
	}},
	{"commit-counts-old-epoch", Options{NoCtl: true}, func(s *Sim) {
		// Raft's figure 8. a leaves an entry at itself alone; b leaves a newer
		// one at itself alone; a comes back and brings its old entry to c, but
		// not its marker: the old entry must not count as committed, because b
		// can still be promoted and cut it.
		s.elect(0)
		s.Write(0, 3)
		s.RunFor(200 * ms)
		s.drop = func(_, _ int, m wire.Message) bool { return isAppend(m) }
		s.Ask(0, opWrite, 1, 1)
		s.RunFor(50 * ms)
		s.Crash(FaultKill, 0)
		s.RunFor(2 * leaseFor)
		s.elect(1, 2)
		s.RunFor(50 * ms)
		s.Crash(FaultKill, 1)
		s.Restart(0)
		s.RunFor(2 * leaseFor)
		s.drop = func(_, to int, m wire.Message) bool {
			a, ok := m.(*wire.Append)
			if !ok || len(a.Entries) == 0 {
				return false
			}
			// The old entry passes, alone; the marker does not.
			for i := range a.Entries {
				if a.Entries[i].Pos.Epoch == s.Epoch() {
					a.Entries = a.Entries[:i]
					break
				}
			}
			return len(a.Entries) == 0
		}
		s.elect(0, 2)
		s.RunFor(300 * ms)
		if got := s.Status(0).Commit; int(got) > len(s.chk.log) {
			s.Fail("commit %d", got)
		}
		s.drop = nil
		s.Crash(FaultKill, 0)
		s.Restart(1)
		s.RunFor(2 * leaseFor)
		s.elect(1, 2)
		s.Write(1, 3)
		s.Restart(0)
		s.Converge(0, 1, 2)
	}},
	{"amnesia-ends-behind-what-was-committed", Options{NoCtl: true, MinCopies: 2}, func(s *Sim) {
		// It had acked what a commit rests on and lost it in a power cut. It
		// meets the same primary again, and hears of that one's commit index,
		// but gets only some of the entries: it still does not count.
		s.elect(0)
		s.Crash(FaultKill, 2)
		s.Write(0, 3)
		s.RunFor(200 * ms)
		s.HangDisk(1, 100*s1)
		s.Write(0, 10)
		s.PowerCut(1)
		s.HangDisk(1, 0)
		upTo := s.nodes[1].disk.log.last().Seq + 2
		s.drop = withhold(1, upTo)
		s.Restart(1)
		s.RunFor(s1)
		if !s.nodes[1].disk.meta.Amnesiac {
			s.Fail("it counts again")
		}
		s.drop = nil
		s.Await(5*s1, "the end of amnesia", func() bool { return !s.nodes[1].disk.meta.Amnesiac })
		s.Restart(2)
		s.Converge(0, 1, 2)
	}},
	{"ack-of-former-incarnation", Options{NoCtl: true, MinCopies: 2}, func(s *Sim) {
		// An ack is on its way while its sender loses power, and with it the
		// entry. It arrives after the primary has met the next incarnation.
		s.elect(0)
		s.Crash(FaultKill, 2)
		s.Write(0, 5)
		s.Flush(0)
		s.Await(5*s1, "an fsync", func() bool { l := &s.nodes[1].disk.log; return l.durable == l.last().Seq })
		s.HangDisk(1, 100*s1)
		held := s.nodes[0].disk.log.last().Seq
		var late *wire.Ack
		s.drop = func(from, _ int, m wire.Message) bool {
			a, ok := m.(*wire.Ack)
			if !ok || from != 1 || a.Matched <= held {
				return false
			}
			if late == nil {
				k := *a
				late = &k
			}
			return true
		}
		c := s.Ask(0, opWrite, 1, 1)
		s.Await(s1, "an ack", func() bool { return late != nil })
		s.PowerCut(1)
		s.HangDisk(1, 0)
		s.drop = withhold(1, held)
		s.Restart(1)
		s.Await(5*s1, "the end of amnesia", func() bool { return !s.nodes[1].disk.meta.Amnesiac })
		s.put(s.nodes[0], input{kind: inMsg, b: 1, msg: late})
		s.RunFor(100 * ms)
		if !c.op.on {
			s.Fail("answered")
		}
	}},
	{"failed-replica-acks", Options{NoCtl: true, MinCopies: 2}, func(s *Sim) {
		// Entries come, and before they are written the disk fails.
		s.elect(0)
		s.Write(0, 3)
		var late *wire.Append
		s.drop = func(_, to int, m wire.Message) bool {
			if to != 1 || !isAppend(m) {
				return false
			}
			if late == nil {
				late, _ = s.copyMsg(m).(*wire.Append)
			}
			return true
		}
		s.Write(0, 1)
		for range 8 {
			s.put(s.nodes[1], input{kind: inTick})
		}
		s.put(s.nodes[1], input{kind: inMsg, b: 0, msg: late})
		s.put(s.nodes[1], input{kind: inFailed})
		s.pump(s.nodes[1])
		s.RunFor(50 * ms)
	}},
	{"lease-not-shortened-for-drift", Options{NoCtl: true, MinCopies: 2}, func(s *Sim) {
		// The primary's clock is as slow as allowed, the granters' as fast.
		for i, n := range s.nodes {
			n.drift = driftPPM / 2
			if i == 0 {
				n.drift = -driftPPM / 2
			}
		}
		s.elect(0)
		s.Write(0, 3)
		s.Isolate(0)
		end := int64(0)
		for _, i := range []int{1, 2} {
			a := s.Seal(i, s.Epoch()+1)
			if a.Refusal != ident.SealLease {
				s.Fail("node %d: %v", i, a.Refusal)
			}
			end = max(end, s.real(s.nodes[i], s.clock(s.nodes[i])+core.Instant(a.WaitNanos)))
		}
		if to := s.nodes[0].openTo; to > end {
			s.Fail("it may answer until %s, and all grants end at %s", clock(to), clock(end))
		}
	}},
	{"blocks-of-a-former-primary", Options{Replicas: 5, NoCtl: true, MinCopies: 3}, func(s *Sim) {
		// A block waits for entries that come to nothing. The next primary gives
		// their positions to others, which write that block.
		s.elect(0)
		s.Write(0, 3)
		s.RunFor(200 * ms)
		var stream uint64
		s.drop = func(_, to int, m wire.Message) bool {
			if a, ok := m.(*wire.Append); ok && to == 1 {
				stream = a.Stream
			}
			return to != 1 && isAppend(m)
		}
		for b := 1; b <= 5; b++ {
			s.Ask(0, opWrite, b, 1)
		}
		s.RunFor(20 * ms)
		n := s.nodes[1]
		s.put(n, input{kind: inDoubt, x: 0})
		s.put(n, input{kind: inMsg, b: 0, msg: &wire.Blocks{
			Epoch: s.Epoch(), Stream: stream, ID: 1, AsOf: n.disk.log.last().Seq, Blocks: []wire.Block{{Len: blockSize}},
		}})
		s.pump(n)
		s.Crash(FaultKill, 0)
		s.drop = func(_, to int, _ wire.Message) bool { return to == 1 }
		s.RunFor(2 * leaseFor)
		s.elect(2, 3, 4)
		s.Write(2, 10)
		s.drop = nil
		s.RunFor(2 * s1)
		s.Restart(0)
		s.Converge(0, 1, 2, 3, 4)
	}},
	{"resync-while-the-join-commits", Options{NoCtl: true}, func(s *Sim) {
		// A replica is taken in, but its primary has not seen that yet when the
		// replica says that it cannot be streamed to.
		s.elect(0)
		s.Write(0, 3)
		s.Crash(FaultKill, 1, 2)
		s.Await(5*s1, "a set of one", func() bool { return len(s.Set()) == 1 })
		s.RunFor(100 * ms)
		var stream uint64
		s.drop = func(_, to int, m wire.Message) bool {
			if a, ok := m.(*wire.Append); ok && to == 1 {
				stream = a.Stream
			}
			return false
		}
		s.cl.lastTo[0] = s.now + 3*s1
		n := s.nodes[1]
		s.start(n)
		s.Await(5*s1, "the join", func() bool { return len(s.Set()) == 2 })
		s.put(s.nodes[0], input{kind: inMsg, b: 1, msg: &wire.Reject{
			Epoch: s.Epoch(), Stream: stream, Replica: n.disk.meta.replica, Incarnation: n.disk.meta.incarnation,
			Reason: wire.RejectResync, Last: n.disk.log.last(), Applied: n.apply.done, Durable: n.disk.log.durable,
			History: []ident.EpochStart{{}, {Epoch: 1, First: 1}},
		}})
		s.pump(s.nodes[0])
		s.RunFor(5 * s1)
		s.Restart(2)
		s.Converge(0, 1, 2)
	}},
	{"unclamped-follower-commit", Options{Replicas: 5, NoCtl: true, MinCopies: 3}, func(s *Sim) {
		// A secondary with a tail that the new primary does not have hears of a
		// commit index beyond the point up to which the two have matched.
		s.elect(0)
		s.Write(0, 3)
		s.RunFor(200 * ms)
		s.drop = func(_, to int, m wire.Message) bool { return to != 1 && isAppend(m) }
		s.Ask(0, opWrite, 1, 1)
		s.Ask(0, opWrite, 2, 1)
		s.RunFor(100 * ms)
		s.drop = func(_, to int, m wire.Message) bool { return to == 1 }
		s.Crash(FaultKill, 0)
		s.RunFor(2 * leaseFor)
		s.elect(2, 3, 4)
		s.Write(2, 5)
		s.drop = nil
		s.RunFor(2 * s1)
		s.Restart(0)
		s.Converge(0, 1, 2, 3, 4)
	}},
	{"slow-secondary-is-bounded", Options{}, pushASlowSecondary},
	{"slow-secondary-is-bounded-in-entries", Options{Entries: 64}, pushASlowSecondary},
}

// A secondary whose fsync hangs holds what it could not apply in memory: clients must
// not push it through its limit (I9).
func pushASlowSecondary(s *Sim) {
	p := s.AwaitPrimary()
	q := (p + 1) % 3
	s.HangDisk(q, 1000*s1)
	for range 30 {
		s.Write(p, 100)
	}
}

// withhold lets no entry after upTo through to a node.
func withhold(node int, upTo ident.Seq) func(from, to int, m wire.Message) bool {
	return func(_, to int, m wire.Message) bool {
		a, ok := m.(*wire.Append)
		for ok && to == node && len(a.Entries) > 0 && a.Entries[len(a.Entries)-1].Pos.Seq > upTo {
			a.Entries = a.Entries[:len(a.Entries)-1]
		}
		return false
	}
}

// elect does by hand what a controller does: it seals the given nodes (all that
// are up, if none are given) and promotes the first.
func (s *Sim) elect(first int, more ...int) {
	s.RunFor(200 * ms)
	if len(more) == 0 {
		for i, n := range s.nodes {
			if i != first && n.replica && n.up {
				more = append(more, i)
			}
		}
	}
	e := s.Epoch() + 1
	for _, n := range s.nodes {
		e = max(e, n.disk.meta.Promise+1)
	}
	var best ident.SealAnswer
	for _, i := range append([]int{first}, more...) {
		a := s.Seal(i, e)
		if a.Refusal != ident.SealAccepted {
			s.Fail("node %d: %v", i, a.Refusal)
		}
		if i == first {
			best = a
		} else if best.Last.Less(a.Last) {
			s.Fail("node %d is not the best: %v, node %d %v", first, best.Last, i, a.Last)
		}
	}
	s.promoteByHand(first, best)
	s.RunFor(150 * ms)
}

func (s *Sim) promoteByHand(i int, a ident.SealAnswer) {
	v := s.cl.vol()
	s.submit(&command{node: -1, cmd: state.Command{Promote: &state.Promote{
		Volume: volumeID, OldEpoch: v.Epoch, SetVersion: v.SetVersion, Epoch: a.Epoch, Node: s.nodes[i].name,
		Replica: a.Replica, Incarnation: a.Incarnation, Position: a.Last,
	}}})
	s.Await(5*s1, "the promotion", func() bool { return s.Epoch() == a.Epoch })
	for _, n := range s.nodes {
		if n.up {
			s.takeView(n, len(s.cl.views)-1)
			s.pump(n)
		}
	}
}

// TestScenario tells every story, with several seeds for what is left to chance.
func TestScenario(t *testing.T) {
	for _, sc := range slices.Concat(scenarios, fieldScenarios) {
		if *storyFlag != "" && *storyFlag != sc.name {
			continue
		}
		t.Run(sc.name, func(t *testing.T) {
			for seed := uint64(1); seed <= 10; seed++ {
				o := sc.o
				o.Seed = seed
				o.Trace = trace()
				if r := Play(o, sc.tell); r.Err != nil {
					t.Fatalf("seed %d: %v\ntell it again: go test ./internal/sim -run TestScenario -story=%s -v -events", seed, r.Err, sc.name)
				}
			}
		})
	}
}

func trace() io.Writer {
	if *eventsFlag {
		return os.Stdout
	}
	return nil
}
