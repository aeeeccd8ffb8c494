package sim

import (
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// fieldScenarios are the places where the peers' bugs in the field cluster:
// Longhorn 4513, 13139 and 10118, DRBD up to 9.0.27 (LINBIT/drbd 145), leases
// as long as a heartbeat; and what the design's sections 5 and 6 promise.
var fieldScenarios = []scenario{
	{"drbd-145-stale-replica-comes-back-first", Options{MinCopies: 2, Trim: true, DedupMax: 16}, func(s *Sim) {
		// c is away, and misses writes. b goes, the survivor a loses quorum;
		// then a goes too. The stale c comes back first: it must not be promoted,
		// and what it missed must not be forgotten.
		c := s.away(2)
		p := s.AwaitPrimary()
		b := 1 - p
		s.Crash(FaultKill, b)
		w := s.Ask(p, opWrite, 1, 1)
		s.RunFor(3 * s1)
		if !w.op.on || s.Primary() >= 0 {
			s.Fail("the survivor goes on alone")
		}
		s.Crash(FaultKill, p)
		e := s.Epoch()
		s.Restart(c)
		s.RunFor(5 * s1)
		if s.Epoch() != e || s.Primary() >= 0 || slices.Contains(s.Set(), s.nodes[c].name) {
			s.Fail("the stale replica: epoch %d, set %v", s.Epoch(), s.Set())
		}
		s.Restart(p)
		s.RunFor(s1)
		s.Restart(b)
		q := s.AwaitPrimary()
		if q == c {
			s.Fail("the stale replica is primary")
		}
		s.Read(q)
		s.Converge(0, 1, 2)
	}},
	{"survivor-resumes-with-who-comes-back", Options{MinCopies: 2, Trim: true}, func(s *Sim) {
		// c is away; b dies for good, with a write under way, so that the survivor
		// holds its I/O. c comes back and lacks the very block of that write: it
		// is copied, joins, and the write is answered.
		c := s.away(2)
		p := s.AwaitPrimary()
		s.Crash(FaultKill, 1-p)
		var ws []*session
		for b := range s.opt.Blocks {
			ws = append(ws, s.Ask(p, opWrite, b, 1))
		}
		s.RunFor(2 * s1)
		if !ws[0].op.on || s.Primary() >= 0 {
			s.Fail("the survivor goes on alone")
		}
		s.Restart(c)
		s.Await(10*s1, "the answers", func() bool {
			return !slices.ContainsFunc(ws, func(w *session) bool { return w.op.on })
		})
		s.Read(c)
		s.Converge(p, c)
	}},
	{"lagging-replica-starts-first-after-a-power-cut", Options{Trim: true}, func(s *Sim) {
		// All lose power. The one that had been away starts first, alone.
		c := s.away(2)
		p := s.AwaitPrimary()
		s.Flush(p)
		s.PowerCut(0, 1)
		e := s.Epoch()
		s.Restart(c)
		s.RunFor(5 * s1)
		if s.Epoch() != e {
			s.Fail("epoch %d", s.Epoch())
		}
		s.Restart(0, 1)
		s.Read(s.AwaitPrimary())
		s.Converge(0, 1, 2)
	}},
	{"target-forgets-what-it-had-not-applied", Options{}, func(s *Sim) {
		// A replica has applied a write, makes no checkpoint and is killed; the
		// write is given up by a forced failover to one that lacks it. When it
		// returns it takes the write for not applied yet, and cuts it: the block
		// must be copied all the same.
		p := s.AwaitPrimary()
		b, c := (p+1)%3, (p+2)%3
		s.Do(p, opWrite, 0, 1)
		s.Flush(p)
		s.RunFor(s1)
		s.Crash(FaultKill, c)
		s.Do(p, opWrite, 5, 1)
		s.Flush(p)
		s.RunFor(s1)
		s.Crash(FaultKill, p, b)
		s.Restart(c)
		s.Force(c)
		s.AwaitPrimary()
		s.Do(c, opWrite, 1, 1)
		s.Restart(p, b)
		s.Converge(0, 1, 2)
	}},
	{"link-flaps-during-resync", Options{Trim: true, Rate: 10 * blockSize, Blocks: 48}, func(s *Sim) {
		p := s.AwaitPrimary()
		c := s.resyncing(p)
		for i := range 12 {
			s.hangUp(s.links[p][c], i%2, i%3 == 0)
			s.Write(p, 2)
			s.RunFor(150 * ms)
		}
		s.Converge(0, 1, 2)
	}},
	{"target-dies-in-resync", Options{Trim: true, Rate: 10 * blockSize, Blocks: 48}, func(s *Sim) {
		p := s.AwaitPrimary()
		c := s.resyncing(p)
		for i, how := range []Fault{FaultKill, FaultPower, FaultKill} {
			s.Checkpoint(c)
			s.Crash(how, c)
			s.Write(p, 3+i)
			s.Restart(c)
			s.RunFor(200 * ms)
			if s.InSet(c) {
				s.Fail("it is in the set in the middle of a resync")
			}
		}
		s.Converge(0, 1, 2)
	}},
	{"source-dies-in-resync", Options{Trim: true, Rate: 10 * blockSize, Blocks: 48}, func(s *Sim) {
		// The next primary goes on from what the target says that it lacks.
		p := s.AwaitPrimary()
		c := s.resyncing(p)
		s.Crash(FaultPower, p)
		q := s.AwaitPrimary()
		if q == c {
			s.Fail("a resync target is primary")
		}
		s.Write(q, 5)
		s.Restart(p)
		s.Converge(0, 1, 2)
	}},
	{"copied-replica-copies-another", Options{Trim: true, Blocks: 48}, func(s *Sim) {
		// What changed while a third was away is known to whoever was copied
		// meanwhile, too: it may be the one that the third comes back to.
		p := s.AwaitPrimary()
		b, c := (p+1)%3, (p+2)%3
		s.Write(p, 3)
		s.Flush(p)
		s.RunFor(s1)
		s.Crash(FaultKill, c)
		s.Write(p, 48)
		s.Flush(p)
		s.wipe(s.nodes[b])
		s.Await(20*s1, "its eviction", func() bool { return !s.InSet(b) })
		s.Await(20*s1, "its copy", func() bool { return s.InSet(b) })
		s.Switchover(b)
		s.Write(b, 2)
		s.Restart(c)
		s.Converge(0, 1, 2)
	}},
	{"both-sides-changed-before-they-meet", Options{Trim: true}, func(s *Sim) {
		// An operator forces the cut-off side; the old one writes on. When they
		// meet, the forced side counts, and all replicas become the same.
		p := s.AwaitPrimary()
		f := (p + 1) % 3
		s.Write(p, 5)
		s.RunFor(200 * ms)
		s.Isolate(f)
		s.Force(f)
		s.Ask(p, opWrite, 2, 1)
		s.Ask(p, opWrite, 3, 1)
		q := s.AwaitPrimaryIn(s.Epoch())
		if q != f {
			s.Fail("primary is %d", q)
		}
		s.Write(f, 5)
		s.Ask(p, opWrite, 4, 1)
		s.RunFor(300 * ms)
		for j := range 3 {
			if j != f {
				s.Join(f, j)
			}
		}
		s.Converge(0, 1, 2)
		s.Read((f + 1) % 3)
		if s.cl.vol().Generation < 2 {
			s.Fail("sessions from before the loss live on")
		}
	}},
	{"forced-failover-ends-at-a-lease", Options{MinCopies: 2}, func(s *Sim) {
		// Not even an operator overrules a lease that is in force.
		p := s.AwaitPrimary()
		s.Write(p, 3)
		e := s.Epoch()
		c := s.ctl[0]
		c.want, c.force = true, true
		s.RunFor(s1)
		s.Write(p, 3)
		if s.Epoch() != e {
			s.Fail("epoch %d", s.Epoch())
		}
	}},
	{"primary-cut-from-peers-not-from-clients", Options{MinCopies: 2}, func(s *Sim) {
		// Its own client's write waits, and is answered by the next primary.
		p := s.AwaitPrimary()
		s.Write(p, 3)
		s.Isolate(p)
		w := s.Ask(p, opWrite, 1, 1)
		r := s.Ask(p, opRead, 1, 1)
		q := (p + 1) % 3
		s.Await(10*s1, "another primary", func() bool { k := s.Primary(); return k >= 0 && k != p })
		s.Write(q, 3)
		if !w.op.on {
			s.Fail("the write is answered")
		}
		for j := range 3 {
			if j != p {
				s.Join(p, j)
			}
		}
		s.Await(10*s1, "the answers", func() bool { return !w.op.on && !r.op.on })
		s.Converge(0, 1, 2)
	}},
	{"one-way-cut-primary-is-not-heard", Options{MinCopies: 2}, func(s *Sim) {
		p := s.AwaitPrimary()
		s.Write(p, 3)
		for j := range 3 {
			if j != p {
				s.Mute(p, j)
			}
		}
		q := (p + 1) % 3
		s.Await(10*s1, "another primary", func() bool { k := s.Primary(); return k >= 0 && k != p })
		s.Write(q, 5)
		for j := range 3 {
			if j != p {
				s.Join(p, j)
			}
		}
		s.Converge(0, 1, 2)
	}},
	{"one-way-cut-primary-hears-nobody", Options{MinCopies: 2}, func(s *Sim) {
		p := s.AwaitPrimary()
		s.Write(p, 3)
		for j := range 3 {
			if j != p {
				s.Mute(j, p)
			}
		}
		q := (p + 1) % 3
		s.Await(10*s1, "another primary", func() bool { k := s.Primary(); return k >= 0 && k != p })
		s.Write(q, 5)
		for j := range 3 {
			if j != p {
				s.Join(p, j)
			}
		}
		s.Converge(0, 1, 2)
	}},
	{"crash-right-after-a-switchover", Options{}, func(s *Sim) {
		// Each new primary dies at once, before and after its marker.
		p := s.AwaitPrimary()
		for i := range 5 {
			q := (p + 1) % 3
			s.Write((p+2)%3, 3)
			e := s.Epoch()
			s.Await(10*s1, "the promotion", func() bool {
				if c := s.ctl[0]; !c.want && !c.round.on {
					c.want, c.drain, c.to = true, true, s.nodes[q].name
				}
				return s.Epoch() > e
			})
			s.RunFor(int64(i) * 4 * ms)
			n := s.index(s.cl.vol().Primary)
			s.Crash(FaultKill, n)
			s.Write((n+1)%3, 3)
			s.Restart(n)
			p = s.AwaitPrimary()
		}
		if len(s.chk.losses) > 0 {
			s.Fail("something was given up")
		}
		s.Converge(0, 1, 2)
	}},
	{"slow-fsync-on-a-secondary-is-not-felt", Options{}, func(s *Sim) {
		p := s.AwaitPrimary()
		s.nodes[(p+1)%3].disk.slowTo = s.now + 1000*s1
		s.quick(p)
	}},
	{"slow-fsync-on-the-primary-is-not-felt", Options{}, func(s *Sim) {
		// Two secondaries have the entries durable: the primary's fsync may last.
		p := s.AwaitPrimary()
		s.nodes[p].disk.slowTo = s.now + 1000*s1
		s.quick(p)
	}},
	{"ten-second-stall-of-the-primary's-disk", Options{}, func(s *Sim) {
		// It hands over while its disk hangs, follows afterwards, and no write is
		// lost or refused meanwhile.
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		s.Write(q, 5)
		s.HangDisk(p, 10*s1)
		s.Ask(q, opFlush, 0, 1)
		s.Await(5*s1, "another primary", func() bool { k := s.Primary(); return k >= 0 && k != p })
		s.Write(q, 10)
		s.Flush(q)
		s.RunFor(10 * s1)
		s.Write(q, 3)
		s.Converge(0, 1, 2)
	}},
	{"backing-store-that-hangs-hands-over", Options{}, func(s *Sim) {
		// Its log, on another disk, goes on: it leads until so much is not applied
		// that writes wait for it.
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		s.Write(q, 5)
		s.RunFor(500 * ms)
		s.HangStore(p, 60*s1)
		for i := range 400 {
			s.Ask(q, opWrite, i%s.opt.Blocks, 1)
		}
		s.Await(10*s1, "another primary", func() bool { k := s.Primary(); return k >= 0 && k != p })
		s.Write(q, 5)
		s.Flush(q)
		s.RunFor(60 * s1)
		s.Write(q, 3)
		s.Converge(0, 1, 2)
	}},
	{"eviction-begun-holds-the-others-up", Options{MinCopies: 2}, func(s *Sim) {
		// c lags, and a set without it is begun; b, whose fsync it waits for, dies.
		// c catches up: a and c are a majority of the set in force.
		p := s.AwaitPrimary()
		b, c := (p+1)%3, (p+2)%3
		s.Write(p, 5)
		s.HangDisk(b, 3*s1)
		s.RunFor(10 * ms)
		s.drop = func(_, to int, m wire.Message) bool { return to == c && isAppend(m) }
		for i := range 150 {
			s.Do(p, opWrite, i%16, 1)
		}
		for i := range 100 {
			s.Ask(p, opWrite, i%16, 1)
		}
		s.RunFor(200 * ms)
		if len(s.Set()) != 3 {
			s.Fail("the set is %v: nothing is left to be begun", s.Set())
		}
		s.PowerCut(b)
		s.drop = nil
		s.Await(10*s1, "a primary", func() bool { return s.Primary() >= 0 })
		s.Write(p, 3)
		s.Restart(b)
		s.Converge(0, 1, 2)
	}},
	{"reads-that-hang-hand-over", Options{}, func(s *Sim) {
		// Nothing is written; a read of the backing store does not return.
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		s.Write(q, 5)
		s.RunFor(500 * ms)
		s.HangDisk(p, 10*s1)
		r := s.Ask(q, opRead, 0, 4)
		s.Await(5*s1, "another primary", func() bool { k := s.Primary(); return k >= 0 && k != p })
		s.Await(5*s1, "the answer", func() bool { return !r.op.on })
		s.RunFor(10 * s1)
		s.Converge(0, 1, 2)
	}},
	{"append-that-hangs-hands-over", Options{}, func(s *Sim) {
		// Not the fsync but the write itself hangs: the loop stands still.
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		s.Write(q, 5)
		s.stop(s.nodes[p], 10*s1) // nothing of it moves
		s.Await(5*s1, "another primary", func() bool { k := s.Primary(); return k >= 0 && k != p })
		s.Write(q, 10)
		s.RunFor(10 * s1)
		s.Converge(0, 1, 2)
	}},
	{"two-changes-of-the-set-in-a-row", Options{Replicas: 5, MinCopies: 1}, func(s *Sim) {
		// One after the other goes, to the last; one after the other comes back.
		p := s.AwaitPrimary()
		for k := 1; k < 5; k++ {
			s.Write(p, 3)
			s.Crash(FaultKill, (p+k)%5)
			s.RunFor(s1)
		}
		s.Write(p, 3)
		if len(s.Set()) != 2 && len(s.Set()) != 1 {
			s.Fail("set %v", s.Set())
		}
		for k := 1; k < 5; k++ {
			s.Restart((p + k) % 5)
			s.Write(p, 3)
		}
		s.Converge(0, 1, 2, 3, 4)
	}},
	{"several-partitions-in-a-row", Options{Trim: true, MinCopies: 2}, func(s *Sim) {
		// Each time another one is in the minority.
		for i := range 6 {
			p := s.AwaitPrimary()
			s.Isolate(p)
			s.Ask(p, opWrite, i, 1)
			q := (p + 1 + i%2) % 3
			s.Await(10*s1, "another primary", func() bool { k := s.Primary(); return k >= 0 && k != p })
			s.Write(q, 10)
			for j := range 3 {
				if j != p {
					s.Join(p, j)
				}
			}
			s.RunFor(int64(i) * 50 * ms)
		}
		s.Converge(0, 1, 2)
	}},
	{"returns-with-less-than-it-reported-durable", Options{}, func(s *Sim) {
		// A secondary's disk is put back to an older state while it is down.
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		s.Write(p, 5)
		s.Flush(p)
		s.RunFor(200 * ms)
		n := s.nodes[q]
		old := n.disk
		old.log.ents, old.store.cur, old.store.durable = slices.Clone(old.log.ents), slices.Clone(old.store.cur), slices.Clone(old.store.durable)
		s.Write(p, 20)
		s.Flush(p)
		s.Await(5*s1, "an fsync", func() bool { return n.disk.log.durable > old.log.last().Seq })
		s.RunFor(200 * ms)
		s.Crash(FaultKill, q)
		old.meta.Meta, old.meta.incarnation = n.disk.meta.Meta, n.disk.meta.incarnation
		old.store.dirty = nil
		n.disk = old
		s.Restart(q)
		s.Converge(0, 1, 2)
		if n.resets == 0 {
			s.Fail("it was not copied whole")
		}
	}},
	{"an-older-copy-of-the-data-directory", Options{}, func(s *Sim) {
		// All of a node's disk is put back while it is down: the count of its
		// starts too, so that the primary has met the next one, or later ones.
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		n := s.nodes[q]
		for starts := range 3 {
			s.Write(p, 5)
			s.Flush(p)
			s.RunFor(200 * ms)
			s.Crash(FaultKill, q)
			old := n.disk
			old.log.ents, old.store.cur, old.store.durable = slices.Clone(old.log.ents), slices.Clone(old.store.cur), slices.Clone(old.store.durable)
			for range starts + 1 {
				s.Restart(q)
				s.RunFor(s1)
				s.Write(p, 20)
				s.Flush(p)
				s.Await(5*s1, "an fsync", func() bool { return n.disk.log.durable > old.log.last().Seq })
				s.RunFor(200 * ms)
				s.Crash(FaultKill, q)
			}
			old.store.dirty = nil
			n.disk = old
			resets := n.resets
			s.Restart(q)
			s.Converge(0, 1, 2)
			if n.resets == resets {
				s.Fail("after %d more starts it was not copied whole", starts+1)
			}
		}
	}},
	{"rotten-record-fails-the-replica", Options{}, func(s *Sim) {
		// A record below the durable position does not verify: the replica fails
		// itself and goes out; the volume goes on; a new disk heals it.
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		s.Write(p, 20)
		s.Flush(p)
		s.RunFor(500 * ms)
		s.Write(p, 20)
		s.RunFor(500 * ms)
		s.Flush(p)
		s.RunFor(500 * ms)
		s.rot(s.nodes[q])
		s.Crash(FaultKill, q)
		s.Restart(q)
		s.Await(10*s1, "the eviction", func() bool { return !s.InSet(q) })
		s.Write(p, 5)
		s.Converge(0, 1, 2)
	}},
	{"rotten-record-that-a-peer-needs", Options{Replicas: 2}, func(s *Sim) {
		// The only copy that counts cannot read the part of its log that the other
		// one needs. It has nobody to give way to; the other one gets the blocks.
		p := s.AwaitPrimary()
		q := 1 - p
		s.Write(p, 5)
		s.Crash(FaultKill, q)
		s.Await(10*s1, "a set of one", func() bool { return len(s.Set()) == 1 })
		for range 5 {
			s.Write(p, 100)
			s.Flush(p)
			s.RunFor(300 * ms)
		}
		s.Crash(FaultKill, p)
		s.Restart(p) // so that nothing of it is in memory
		s.AwaitPrimary()
		n := s.nodes[p]
		n.disk.log.rot = n.disk.log.base.Seq + 20
		s.Restart(q)
		s.Await(20*s1, "its return", func() bool { return s.InSet(q) })
		n.disk.log.rot = 0
		s.Converge(p, q)
	}},
	{"lost-data-directory", Options{}, func(s *Sim) {
		p := s.AwaitPrimary()
		s.Write(p, 20)
		s.wipe(s.nodes[(p+1)%3])
		s.Write(p, 5)
		s.RunFor(s1)
		s.Converge(0, 1, 2)
	}},
	{"replica-added-and-removed-while-clients-write", Options{Clients: 1, Grow: 4}, func(s *Sim) {
		p := s.AwaitPrimary()
		s.Write(p, 20)
		s.Inject(FaultAdd, 3)
		s.Await(20*s1, "the new replica", func() bool { return s.InSet(3) })
		gone := (p + 1) % 3
		s.command(p, state.Command{RemoveReplica: &state.RemoveReplica{Volume: volumeID, Node: s.nodes[gone].name}})
		s.Write(p, 5)
		s.Await(10*s1, "its leaving", func() bool { return s.cl.vol().Replica(s.nodes[gone].name) == nil })
		s.Inject(FaultGrow, p)
		s.RunFor(s1)
		s.Do(p, opWrite, s.opt.Blocks, 1)
		s.Read(3)
		s.Converge(p, 3, (p+2)%3)
		s.Inject(FaultAdd, gone)
		s.Await(20*s1, "its return", func() bool { return s.InSet(gone) })
		s.Converge(0, 1, 2, 3)
	}},
	{"forced-failover-drops-who-was-to-leave", Options{}, func(s *Sim) {
		// b is to leave, and before it has left an operator forces c: b is gone
		// then, and nobody tries for ever to take it in again.
		p := s.AwaitPrimary()
		b, c := (p+1)%3, (p+2)%3
		s.Write(p, 3)
		s.Crash(FaultKill, p)
		s.ctl[0] = nil
		s.RunFor(s1)
		s.command(b, state.Command{RemoveReplica: &state.RemoveReplica{Volume: volumeID, Node: s.nodes[b].name}})
		s.Isolate(b)
		s.RunFor(200 * ms)
		s.newController(0).want = false
		s.Force(c)
		s.Write(c, 3)
		s.Join(b, c)
		s.Join(b, p)
		s.Restart(p)
		s.Converge(p, c)
		if s.cl.vol().Replica(s.nodes[b].name) != nil {
			s.Fail("it never leaves")
		}
	}},
	{"local-ack-says-what-it-loses", Options{Ack: core.AckLocal}, func(s *Sim) {
		// The primary answers alone; it dies with a tail that nobody else has.
		// Its successor's sessions begin anew.
		p := s.AwaitPrimary()
		s.Write(p, 5)
		s.drop = func(from, _ int, m wire.Message) bool { return from == p && isAppend(m) }
		s.Write(p, 5)
		s.Crash(FaultKill, p)
		s.drop = nil
		q := s.AwaitPrimary()
		if q == p || s.cl.vol().Generation < 2 || len(s.chk.losses) == 0 {
			s.Fail("primary %d generation %d", q, s.cl.vol().Generation)
		}
		s.Write(q, 5)
		s.Restart(p)
		s.Converge(0, 1, 2)
	}},
	{"passed-over-with-ack-local", Options{Ack: core.AckLocal, MinCopies: 2}, func(s *Sim) {
		// A primary that its peers do not hear, and the controller does, has
		// answered alone: it counts, and nothing is lost.
		p := s.AwaitPrimary()
		s.Write(p, 3)
		s.Isolate(p)
		s.Write(p, 3)
		s.RunFor(3 * s1)
		if len(s.chk.losses) > 0 {
			s.Fail("something was given up")
		}
		for j := range 3 {
			if j != p {
				s.Join(p, j)
			}
		}
		s.Converge(0, 1, 2)
	}},
	{"serves-below-min-copies", Options{MinCopies: 2}, func(s *Sim) {
		// Two disks fail: both go, and what is left answers nobody.
		p := s.AwaitPrimary()
		s.Write(p, 3)
		s.nodes[(p+1)%3].disk.failed, s.nodes[(p+2)%3].disk.failed = true, true
		w := s.Ask(p, opWrite, 1, 1)
		s.Await(10*s1, "a set of one", func() bool { return len(s.Set()) == 1 })
		s.RunFor(3 * s1)
		if !w.op.on || s.Primary() >= 0 {
			s.Fail("it is served with one copy")
		}
	}},
	{"local-ack-switchover-loses-nothing", Options{Ack: core.AckLocal}, func(s *Sim) {
		p := s.AwaitPrimary()
		s.Write(p, 10)
		s.Switchover((p + 1) % 3)
		s.Read(p)
		s.Converge(0, 1, 2)
		if len(s.chk.losses) > 0 {
			s.Fail("something was given up")
		}
	}},
	{"invalidated-replica-is-never-promoted", Options{NoCtl: true}, func(s *Sim) {
		// A target in the middle of its resync says so when it is sealed.
		s.elect(0)
		s.Write(0, 5)
		s.HangDisk(1, 100*s1)
		s.put(s.nodes[1], input{kind: inDoubt, x: 3})
		s.pump(s.nodes[1])
		s.Crash(FaultKill, 0)
		s.RunFor(2 * leaseFor)
		s.HangDisk(1, 0)
		if a := s.Seal(1, s.Epoch()+1); a.Refusal != ident.SealAccepted || !a.Inconsistent {
			s.Fail("%+v", a)
		}
	}},
	{"outcome-of-a-set-change-is-forgotten", Options{NoCtl: true, MinCopies: 1}, func(s *Sim) {
		// A change of the set is done, its primary has not heard of it, and by the
		// time that it asks again so much has happened that nobody remembers its
		// command: that the version has moved is no proof that it was refused.
		s.elect(0)
		s.Write(0, 5)
		a := s.nodes[0]
		s.applyNow(state.Command{RemoveReplica: &state.RemoveReplica{Volume: volumeID, Node: s.nodes[2].name}})
		s.Isolate(1) // the change waits for it
		s.RunFor(50 * ms)
		s.cl.stall = s.now + 2*s1
		for _, other := range []int{0, 2} {
			s.Join(1, other)
		}
		s.Await(2*s1, "a proposal", func() bool { return a.change != nil })
		c, known := s.nodes[2], a.viewN
		a.viewN, c.viewN = 1<<30, 1<<30 // their copies of the state stand still
		s.applyNow(a.change.cmd)
		for range state.OutcomesMax {
			s.applyNow(state.Command{AddEvent: &state.AddEvent{Event: state.Event{Name: "other"}}})
		}
		s.RunFor(3 * s1)
		s.Cut(0, 1)
		s.Ask(0, opWrite, 0, 1)
		s.RunFor(s1)
		a.viewN, c.viewN = known, known
		s.Join(0, 1)
		s.Converge(0, 1)
	}},
	{"joiner-is-replaced-while-the-join-commits", Options{Replicas: 2, Clients: 1}, func(s *Sim) {
		// The primary proposes to take in a replica that has caught up, and Raft
		// hears of it late. Meanwhile an operator gives that replica up: an empty
		// one has its name by the time that the proposal comes.
		p := s.AwaitPrimary()
		q := 1 - p
		s.Write(p, 3)
		s.Crash(FaultKill, q)
		s.Await(10*s1, "a set of one", func() bool { return len(s.Set()) == 1 })
		s.Write(p, 10)
		s.Flush(p)
		s.RunFor(s1)
		s.cl.stall = s.now + 4*s1
		s.Restart(q)
		s.RunFor(2 * s1) // it has caught up, the proposal waits
		n := s.nodes[q]
		s.applyNow(state.Command{MarkFailed: &state.MarkFailed{Volume: volumeID, Node: n.name, Replica: n.disk.meta.replica, Reason: "invalidated"}})
		s.newReplica(n)
		s.applyNow(state.Command{RegisterReplica: &state.RegisterReplica{Volume: volumeID, Node: n.name, Replica: n.disk.meta.replica, Replace: true}})
		s.drop = func(_, to int, _ wire.Message) bool { return to == q }
		s.RunFor(2 * s1)
		s.Crash(FaultKill, p) // before it has seen to the rest
		s.RunFor(5 * s1)
		if s.Primary() == q {
			s.Fail("the empty replica is primary")
		}
		s.drop = nil
		s.Restart(p)
		s.Converge(p, q)
	}},
	{"registration-commits-late", Options{MinCopies: 1}, func(s *Sim) {
		// A new replica is to take the place of one that failed, and Raft hears of it
		// late. Meanwhile an operator has removed the replica and had another one made
		// there, which its primary cannot reach as yet: the late command must not take that
		// one's place, since what it names is gone.
		p := s.AwaitPrimary()
		q := (p + 1) % 3
		n := s.nodes[q]
		s.Write(p, 3)
		s.applyNow(state.Command{MarkFailed: &state.MarkFailed{Volume: volumeID, Node: n.name, Replica: n.disk.meta.replica, Reason: "EIO"}})
		s.Await(5*s1, "a set without it", func() bool { return !s.InSet(q) })
		s.newReplica(n)
		late := n.disk.meta.replica
		s.cl.stall = s.now + 4*s1
		s.register(n, late)
		s.cl.stall = 0
		s.drop = func(_, to int, _ wire.Message) bool { return to == q }
		s.applyNow(state.Command{RemoveReplica: &state.RemoveReplica{Volume: volumeID, Node: n.name}})
		s.Await(s1, "its files gone", func() bool { return !n.replica })
		s.applyNow(state.Command{AddReplica: &state.AddReplica{Volume: volumeID, Node: n.name}})
		s.Await(2*s1, "another one", func() bool { return n.replica && s.cl.vol().Replica(n.name).Replica == n.disk.meta.replica })
		s.RunFor(5 * s1)
		if r := s.cl.vol().Replica(n.name).Replica; r == late {
			s.Fail("replica %d is registered, whose files are gone", r)
		}
		s.drop = nil
		s.Converge(0, 1, 2)
	}},
}

// away makes a replica miss writes for so long that the log no longer holds
// them, and returns it. Who is left has all that it missed in a bitmap.
func (s *Sim) away(c int) int {
	p := s.AwaitPrimary()
	if p == c {
		s.Switchover((c + 1) % 3)
		p = s.Primary()
	}
	s.Write(p, 8)
	s.Checkpoint(0, 1, 2)
	s.Crash(FaultKill, c)
	for range 4 {
		s.Write(p, 80)
		s.Flush(p)
		s.RunFor(300 * ms)
		s.Checkpoint(p, 3-p-c)
		s.Write(p, 2)
	}
	if s.InSet(c) {
		s.Fail("it is still in the set: %v", s.Set())
	}
	return c
}

// resyncing brings a replica into the middle of a whole resync from p.
func (s *Sim) resyncing(p int) int {
	c := (p + 1) % 3
	s.Write(p, s.opt.Blocks)
	s.Flush(p)
	s.RunFor(s1)
	s.Checkpoint(0, 1, 2)
	s.Write(p, 1)
	s.wipe(s.nodes[c])
	s.Await(10*s1, "the resync", func() bool { return s.nodes[c].core != nil && s.Status(c).State == "Resyncing" })
	s.RunFor(100 * ms)
	return c
}

// quick writes and flushes, and must not be slow.
func (s *Sim) quick(p int) {
	from := s.now
	s.Write(p, 20)
	s.Flush(p)
	if took := s.now - from; took > s1/2 {
		s.Fail("20 writes and a flush took %s", clock(took))
	}
}
