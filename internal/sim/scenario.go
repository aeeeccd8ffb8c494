package sim

import (
	"fmt"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// What a scenario is told with: a cluster in which nothing happens that it does
// not ask for. A violation panics, as everywhere; Play turns it into an error.

// Play tells one scenario. A step that comes to nothing calls s.Fail.
func Play(o Options, story func(*Sim)) (res Result) {
	o.Manual = true
	if o.Replicas == 0 {
		o.Replicas = 3
	}
	if o.Blocks == 0 {
		o.Blocks = 16
	}
	if o.DedupMax == 0 {
		o.DedupMax = 1 << 12
	}
	if o.Sessions == 0 {
		o.Sessions = 2
	}
	o.MinCopies = max(o.MinCopies, 1)
	s := New(o)
	defer s.catch(&res)
	s.schedule()
	story(s)
	return
}

// Fail ends the scenario.
func (s *Sim) Fail(format string, args ...any) { s.fail("scenario", format, args...) }

// Await lets time pass until cond holds, at most for d.
func (s *Sim) Await(d int64, what string, cond func() bool) {
	late := false
	s.at(d, event{kind: evCall, fn: func() { late = true }})
	s.RunUntil(func() bool { return late || cond() })
	if !cond() {
		state := ""
		for _, n := range s.nodes {
			state += "\n  " + n.String()
		}
		s.Fail("%s did not come about within %s%s", what, clock(d), state)
	}
}

// Primary is who serves; -1: nobody.
func (s *Sim) Primary() int {
	for _, n := range s.nodes {
		if n.up && !n.stopped && n.core != nil && n.gate.Serving && n.gate.LeaseUntil > s.clock(n) {
			return n.i
		}
	}
	return -1
}

// AwaitPrimary waits until somebody serves, and everybody knows of it.
func (s *Sim) AwaitPrimary() int {
	for {
		s.Await(20*s1, "a primary", func() bool { return s.Primary() >= 0 })
		s.RunFor(200 * ms)
		if p := s.Primary(); p >= 0 {
			return p
		}
	}
}

// Switchover makes another node the primary, as planned.
func (s *Sim) Switchover(to int) {
	s.Await(20*s1, "a switchover", func() bool {
		if s.Primary() == to {
			return true
		}
		if c := s.ctl[0]; !c.want && !c.round.on {
			c.want, c.drain, c.to = true, true, s.nodes[to].name
		}
		return false
	})
	s.RunFor(200 * ms)
}

// Status is the core's own picture.
func (s *Sim) Status(i int) core.Status { return s.nodes[i].core.Status(s.clock(s.nodes[i])) }

// Ask begins a request at a node and returns its session.
func (s *Sim) Ask(node int, kind opKind, block, blocks int) *session {
	for _, c := range s.cli {
		if c.node != node || c.op.on {
			continue
		}
		if !c.on {
			s.openSession(c)
		}
		c.next++
		c.op = op{on: true, kind: kind, block: block, blocks: blocks, request: c.next, invoked: s.now, target: targetNone}
		s.chk.begin(c)
		s.route(c)
		return c
	}
	c := s.newSession(node)
	s.openSession(c)
	return s.Ask(node, kind, block, blocks)
}

// Do makes a request and waits for its answer.
func (s *Sim) Do(node int, kind opKind, block, blocks int) {
	c := s.Ask(node, kind, block, blocks)
	s.Await(30*s1, "an answer", func() bool { return !c.op.on })
}

// Write makes n writes at a node, one after the other.
func (s *Sim) Write(node, n int) {
	for i := range n {
		s.Do(node, opWrite, i%s.opt.Blocks, 1)
	}
}

// Flush makes what was answered durable.
func (s *Sim) Flush(node int) { s.Do(node, opFlush, 0, 1) }

// Read reads everything: the checker judges what it shows.
func (s *Sim) Read(node int) { s.Do(node, opRead, 0, s.opt.Blocks) }

// Crash ends the process of a node (FaultKill), its machine (FaultPower) or
// stops it cleanly.
func (s *Sim) Crash(how Fault, nodes ...int) {
	for _, i := range nodes {
		s.die(s.nodes[i], how)
	}
}

// Restart starts nodes again.
func (s *Sim) Restart(nodes ...int) {
	for _, i := range nodes {
		s.start(s.nodes[i])
	}
	s.RunFor(50 * ms)
}

// Cut separates two nodes, Join connects them again.
func (s *Sim) Cut(a, b int) {
	s.block(s.links[a][b], true, true)
	s.breakLink(s.links[a][b], false)
	s.RunFor(30 * ms)
}

// Join ends the partition between two nodes.
func (s *Sim) Join(a, b int) { s.unblock(a, b) }

// Mute lets nothing from one node through to the other.
func (s *Sim) Mute(from, to int) {
	l := s.links[from][to]
	d := l.dir(from)
	s.block(l, d == 0, d == 1)
}

// InSet reports whether a node's replica counts.
func (s *Sim) InSet(i int) bool { return s.cl.vol().InSet(s.nodes[i].name) }

// Checkpoint lets replicas make a checkpoint each; their logs may then be
// recycled.
func (s *Sim) Checkpoint(nodes ...int) {
	for _, i := range nodes {
		if n := s.nodes[i]; n.core != nil {
			s.beginCheckpoint(n)
			s.pump(n)
		}
	}
	s.RunFor(300 * ms)
}

// Force lets an operator force a failover with the one replica that he can
// reach, and waits for the promotion.
func (s *Sim) Force(i int) {
	e := s.Epoch()
	s.Await(20*s1, "a forced promotion", func() bool {
		if c := s.ctl[0]; !c.force && !(c.round.on && c.round.force) && s.Epoch() == e {
			c.want, c.force, c.round.on = true, true, false
			c.sendTo = map[ident.Node]bool{s.nodes[i].name: true}
		}
		return s.Epoch() > e
	})
	s.ctl[0].sendTo = nil
}

// AwaitPrimaryIn waits until somebody serves in an epoch.
func (s *Sim) AwaitPrimaryIn(e ident.Epoch) int {
	who := -1
	s.Await(20*s1, "a primary", func() bool {
		for _, n := range s.nodes {
			if n.up && n.core != nil && n.gate.Serving && n.gate.Epoch >= e && n.gate.LeaseUntil > s.clock(n) {
				who = n.i
			}
		}
		return who >= 0
	})
	return who
}

// Isolate separates a node from all others, but not from the control layer.
func (s *Sim) Isolate(i int) {
	for j := range s.nodes {
		if j != i {
			s.Cut(i, j)
		}
	}
}

// Unfenced lets the power cut of a node take the whole tail that it had not
// fsynced.
func (s *Sim) loseTail(i int) {
	l := &s.nodes[i].disk.log
	l.ents = l.ents[:max(l.durable, l.base.Seq)-l.base.Seq]
	l.tail = nil
}

// PowerCut takes a machine's power, and with it everything not fsynced.
func (s *Sim) PowerCut(nodes ...int) {
	for _, i := range nodes {
		s.loseTail(i)
		s.die(s.nodes[i], FaultPower)
	}
}

// HangDisk lets the disk of a node hang for d.
func (s *Sim) HangDisk(i int, d int64) { s.nodes[i].disk.hungTo = s.now + d }

// HangStore lets the backing store of a node hang for d, and not its log.
func (s *Sim) HangStore(i int, d int64) { s.nodes[i].disk.storeHungTo = s.now + d }

// Seal asks a replica to promise an epoch, as a controller would.
func (s *Sim) Seal(i int, epoch ident.Epoch) ident.SealAnswer {
	n := s.nodes[i]
	var got *ident.SealAnswer
	n.sealHook = func(a ident.SealAnswer) { got = &a }
	s.put(n, input{kind: inSeal, b: 1 << 30, x: uint64(epoch)})
	s.pump(n)
	s.Await(s1, "an answer to SEAL", func() bool { return got != nil })
	n.sealHook = nil
	return *got
}

// Set is the in-sync set.
func (s *Sim) Set() []ident.Node { return s.cl.vol().InSync }

// Epoch is the newest.
func (s *Sim) Epoch() ident.Epoch { return s.cl.vol().Epoch }

// Heal checks that the cluster serves and that all replicas converge.
func (s *Sim) Converge(nodes ...int) {
	s.Await(30*s1, "convergence", func() bool {
		for _, i := range nodes {
			n := s.nodes[i]
			if n.core == nil || !s.cl.vol().InSet(n.name) || n.disk.log.last().Seq != ident.Seq(len(s.chk.log)) || n.apply.done != n.disk.log.last().Seq {
				return false
			}
		}
		return true
	})
	for _, i := range nodes {
		s.chk.content(s, s.nodes[i])
	}
}

// isAppend says whether a message carries entries.
func isAppend(m wire.Message) bool {
	a, ok := m.(*wire.Append)
	return ok && len(a.Entries) > 0
}

// applyNow lets Raft commit a command at once, whatever it is busy with.
func (s *Sim) applyNow(c state.Command) {
	s.orders++
	if c.ID == "" {
		c.ID = fmt.Sprintf("order-%d", s.orders)
	}
	s.cl.cmds = append(s.cl.cmds, &command{node: -1, cmd: c})
	s.clusterEvent(&event{kind: evApplyCmd, x: uint64(len(s.cl.cmds) - 1)})
}
