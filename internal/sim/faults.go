package sim

import (
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
)

// Fault is a kind of trouble.
type Fault uint8

// The faults. Each history draws its own mix.
const (
	FaultKill       Fault = iota // kill -9: the page cache survives
	FaultPower                   // the machine loses power
	FaultCleanStop               // the daemon stops cleanly, perhaps for a reboot
	FaultStop                    // SIGSTOP, later SIGCONT
	FaultPartition               // one node is cut off
	FaultLink                    // one link, in one direction or both
	FaultFlap                    // a connection breaks and is made again
	FaultSlow                    // fsync takes long
	FaultHang                    // the disk hangs
	FaultDisk                    // the disk fails for good (once a history)
	FaultSwitchover              // a planned change of primary
	FaultStall                   // Raft has no leader for a while
	FaultController              // another Raft leader; the old one may not know
	FaultPowerAll                // all machines at once
	FaultForget                  // a client goes away with requests under way
	FaultDoubt                   // an operator lets blocks of a replica be copied anew
	FaultSplit                   // a partition into two halves, perhaps in one direction only
	FaultLongHang                // the disk hangs for up to ten seconds
	FaultPause                   // replicas are to be compared: new writes wait
	FaultForce                   // an operator forces a failover and accepts loss
	FaultRot                     // a record of the log does not verify any more, below what was durable
	FaultWipe                    // a data directory is lost: the node is replaced
	FaultAdd                     // another node is to have a replica
	FaultRemove                  // a replica is removed
	FaultGrow                    // the volume is resized
	FaultMinCopies               // min_copies is changed
	FaultRate                    // the rates of resyncs are changed
	FaultEcho                    // a command of long ago comes again, under another id
	FaultFence                   // an operator ends all sessions
	faultKinds
)

var faultNames = [faultKinds]string{
	"kill", "power", "clean-stop", "stop", "partition", "link", "flap", "slow", "hang", "disk", "switchover",
	"raft-stall", "controller", "power-all", "forget", "doubt",
	"split", "long-hang", "pause", "force", "rot", "wipe", "add", "remove", "grow", "min-copies", "rate", "echo", "fence",
}

func (f Fault) String() string { return faultNames[f] }

// fault injects one fault and schedules the next.
func (s *Sim) fault() {
	if s.healed {
		return
	}
	s.at(s.delay(20*ms, 900*ms), event{kind: evFault})
	s.look()
	f := s.opt.Faults[s.rng.IntN(len(s.opt.Faults))]
	n := s.nodes[s.rng.IntN(len(s.nodes))]
	if p := s.index(s.cl.vol().Primary); p >= 0 && s.rng.IntN(3) == 0 {
		n = s.nodes[p]
	}
	s.Inject(f, n.i)
}

// Inject does one fault to a node.
func (s *Sim) Inject(f Fault, i int) {
	n := s.nodes[i]
	s.note(i, "fault", "%v", f)
	if do := orders[f]; do != nil {
		do(s, n)
		return
	}
	switch f {
	case FaultKill, FaultPower, FaultCleanStop:
		if n.up && n.busy || s.rng.IntN(2) == 0 || f == FaultCleanStop {
			s.die(n, f)
		} else if n.up {
			n.crashIn, n.crashBy = 1+s.rng.IntN(12), f // in the middle of something
		}
	case FaultPowerAll:
		for _, m := range s.nodes {
			s.die(m, FaultPower)
		}
	case FaultStop:
		s.stop(n, s.delay(10*ms, 3*s1))
	case FaultPartition:
		for j := range s.nodes {
			if l := s.links[i][j]; l != nil {
				s.block(l, true, true)
			}
		}
		s.at(s.delay(20*ms, 3*s1), event{kind: evUnblock, node: i, b: -1})
	case FaultLink:
		j := (i + 1 + s.rng.IntN(len(s.nodes)-1)) % len(s.nodes)
		k := s.rng.IntN(3)
		s.block(s.links[i][j], k != 0, k != 1)
		s.at(s.delay(20*ms, 3*s1), event{kind: evUnblock, node: i, b: j})
	case FaultFlap:
		j := (i + 1 + s.rng.IntN(len(s.nodes)-1)) % len(s.nodes)
		l, silent := s.links[i][j], s.rng.IntN(3) == 0
		if k := s.rng.IntN(3); k < 2 {
			s.hangUp(l, k, silent)
		} else {
			s.breakLink(l, silent)
		}
	case FaultSlow:
		n.disk.slowTo = s.now + s.delay(100*ms, 3*s1)
	case FaultHang:
		s.hang(n, s.delay(50*ms, 3*s1))
	case FaultSwitchover:
		if c := s.ctl[0]; c != nil {
			c.want, c.drain = true, true
			c.to = s.nodes[s.rng.IntN(len(s.nodes))].name
		}
	case FaultStall:
		s.cl.stall = s.now + s.delay(100*ms, 2*s1)
	case FaultController:
		s.changeController()
	case FaultForget:
		for _, c := range s.cli {
			if c.node == i {
				s.forget(c)
			}
		}
	case FaultDoubt:
		s.doubt(n)
	case FaultSplit:
		s.split()
	case FaultLongHang:
		s.hang(n, s.delay(s1, 10*s1))
	case FaultDisk, FaultPause, FaultForce, FaultRot, FaultWipe, FaultAdd, FaultRemove, FaultGrow, FaultMinCopies, FaultRate, FaultEcho, FaultFence, faultKinds:
	}
}

// hang lets the disk of a node hang for d, or its backing store alone.
func (s *Sim) hang(n *node, d int64) {
	if s.chance(0.3) {
		n.disk.storeHungTo = s.now + d
	} else {
		n.disk.hungTo = s.now + d
	}
}

// doubt makes a few blocks of a secondary ones that it lacks.
func (s *Sim) doubt(n *node) {
	if n.core != nil && len(s.cl.vol().InSync) >= 3 && !s.doubted {
		s.doubted = true
		s.put(n, input{kind: inDoubt, x: uint64(s.rng.IntN(s.opt.Blocks))})
	}
}

// split parts the nodes in two: nothing passes between the parts, or in one
// direction only.
func (s *Sim) split() {
	side := 1 + s.rng.IntN(1<<len(s.nodes)-2)
	way := s.rng.IntN(4)
	for i := range s.nodes {
		for j := i + 1; j < len(s.nodes); j++ {
			if a, b := side>>i&1, side>>j&1; a != b {
				// way 1: nothing from part 1, way 2: nothing from part 0.
				s.block(s.links[i][j], way != 1+b, way != 1+a)
				s.at(s.delay(20*ms, 3*s1), event{kind: evUnblock, node: i, b: j})
			}
		}
	}
}

// look takes the operator's picture of each replica, as a status does.
func (s *Sim) look() {
	for _, n := range s.nodes {
		if n.core == nil || n.busy || n.stopped {
			continue
		}
		st := n.core.Status(s.clock(n))
		size := int64(n.view.Size)
		for i := range st.Peers {
			p := &st.Peers[i]
			if p.DirtyBytes < 0 || p.DirtyBytes > int64(s.blocksMax()*blockSize)+size || p.LagBytes < 0 || p.Durable > p.Matched {
				s.fail("status", "node %s says of %s: %+v", n.name, p.Node, *p)
			}
		}
		if last := n.core.Position(); last != st.Last {
			s.fail("status", "node %s is at %v and says %v", n.name, last, st.Last)
		}
	}
}

// changeController makes another node lead. The old leader may go on for a
// while, with an old view of the state.
func (s *Sim) changeController() {
	if s.ctl[1] != nil && s.rng.IntN(2) == 0 {
		s.ctl[1] = nil
		return
	}
	s.ctl[1] = nil
	if s.rng.IntN(2) == 0 {
		c := s.newController(1)
		c.behind = s.rng.IntN(3)
	}
	c := s.ctl[0]
	if s.rng.IntN(2) == 0 {
		c.gen++
		c.round, c.highest, c.want = round{}, 0, true
		s.at(sealEvery, event{kind: evCtl, a: 0, x: uint64(c.gen)})
	}
	c.sendTo = nil
	if s.rng.IntN(2) == 0 {
		c.sendTo = map[ident.Node]bool{}
		for _, n := range s.nodes {
			c.sendTo[n.name] = s.rng.IntN(3) > 0
		}
	}
}

// forget: the client is gone; what it had under way must not take effect late.
func (s *Sim) forget(c *session) {
	if !c.on {
		return
	}
	n := s.nodes[c.node]
	if n.up && n.core != nil {
		s.put(n, input{kind: inForget, x: c.id})
	}
	c.on, c.op.on, c.op.target = false, false, targetNone
	c.tries++
	s.at(s.delay(5*ms, 50*ms), event{kind: evOp, a: c.i, x: c.tries})
}

// healMost ends all trouble but one: a node goes down and stays away for a while.
// If those that are left are enough, they must serve without it (I8).
func (s *Sim) healMost() {
	n := s.nodes[s.rng.IntN(s.opt.Replicas)]
	s.die(n, FaultKill)
	s.gone = n
	s.heal()
}

// heal ends all trouble: from here on the cluster must serve and, when nobody is
// away, converge.
func (s *Sim) heal() {
	s.healed, s.healAt = true, s.now
	s.note(-1, "heal", "")
	s.cl.stall = 0
	s.ctl[1] = nil
	if s.ctl[0] != nil {
		s.ctl[0].sendTo, s.ctl[0].behind, s.ctl[0].force = nil, 0, false
	}
	for _, n := range s.nodes {
		n.disk.slowTo, n.disk.hungTo, n.disk.storeHungTo, n.crashIn = 0, 0, 0, 0
		s.cont(n)
		s.unblock(n.i, -1)
		if !n.up && n != s.gone {
			s.at(ms, event{kind: evStart, node: n.i})
		}
	}
	for _, c := range s.cli {
		c.okSince = [4]int{}
	}
	// What waits for a disk that hung goes on: its events are in the queue, at
	// the latest ten seconds from now.
	s.at(200*ms, event{kind: evCheck})
}

// checkHealed ends the history when everybody has been served and all replicas
// are the same, or says who is stuck (I8, I6).
func (s *Sim) checkHealed() {
	s.look()
	if s.gone != nil {
		s.checkMost()
		return
	}
	why := s.waitingFor()
	if why == "" {
		s.done = true
		return
	}
	if s.now < s.healAt+s.opt.HealFor {
		s.at(50*ms, event{kind: evCheck})
		return
	}
	if x := s.excuse(); x != "" {
		s.excused, s.done = x, true
		return
	}
	v := s.cl.vol()
	s.fail("I8", "healed for %s and still: %s\n  cluster: epoch %d primary %s at %v inc %d set %v version %d generation %d replicas %+v%s",
		clock(s.opt.HealFor), why, v.Epoch, v.Primary, v.PrimaryPosition, v.PrimaryIncarnation, v.InSync, v.SetVersion, v.Generation, v.Replicas, s.states())
}

// checkMost heals the one who is away once the others have served everybody at
// them, or need not without it, or says who is stuck (I8).
func (s *Sim) checkMost() {
	why := ""
	for _, c := range s.cli {
		if s.nodes[c.node] != s.gone && !c.served() {
			why = "session at " + string(s.nodes[c.node].name) + " is not served"
		}
	}
	switch {
	case !s.enough():
		s.wellAt = 0
	case s.wellAt == 0:
		s.wellAt = s.now
	}
	if why == "" || s.now >= s.healAt+2*s.opt.HealFor && s.wellAt == 0 {
		s.note(s.gone.i, "heal", "the last one")
		s.gone = nil
		s.heal()
		return
	}
	if s.wellAt != 0 && s.now >= max(s.healAt, s.wellAt)+s.opt.HealFor {
		v := s.cl.vol()
		s.fail("I8", "node %s is away, the others are enough for %s and still: %s\n  cluster: epoch %d primary %s set %v version %d%s",
			s.gone.name, clock(s.opt.HealFor), why, v.Epoch, v.Primary, v.InSync, v.SetVersion, s.states())
	}
	s.at(50*ms, event{kind: evCheck})
}

// enough reports whether a majority of the set, and min_copies of it, are up and
// have kept what they promised. Once writes may have been given up, a member may
// first have to be copied, for which it must leave the set.
func (s *Sim) enough() bool {
	if s.opt.Ack == core.AckLocal || len(s.chk.losses) > 0 {
		return false
	}
	v, good, base := s.cl.vol(), 0, ident.Seq(0)
	for _, name := range v.InSync {
		if n := s.nodes[s.index(name)]; n.core != nil {
			base = max(base, n.disk.log.base.Seq)
		}
	}
	for _, name := range v.InSync {
		n := s.nodes[s.index(name)]
		// Who is behind what another's log holds, since it lagged while no eviction
		// came through, or is in doubt about blocks, must be copied as well.
		useful := n.core != nil && n.disk.log.last().Seq >= base && n.core.Status(s.clock(n)).State != "Resyncing"
		if rep := v.Replica(name); useful && rep != nil && rep.Replica == n.disk.meta.replica && !n.disk.broken() && !n.amnesiac() {
			good++
		}
	}
	return good > len(v.InSync)/2 && good >= v.Options.MinCopies
}

func (c *session) served() bool {
	return c.okSince[opWrite] > 0 && c.okSince[opRead] > 0 && c.okSince[opFlush] > 0
}

func (s *Sim) states() string {
	text := ""
	for _, n := range s.nodes {
		text += "\n  " + n.String()
	}
	return text
}

func (s *Sim) waitingFor() string {
	for _, c := range s.cli {
		if !c.served() {
			return "session at " + string(s.nodes[c.node].name) + " is not served"
		}
	}
	v := s.cl.vol()
	for _, n := range s.nodes {
		if !n.replica || n.disk.broken() {
			continue
		}
		if rep := v.Replica(n.name); rep == nil || rep.Replica == 0 {
			return "replica at " + string(n.name) + " comes or goes"
		}
		if n.core == nil || !v.InSet(n.name) {
			return "replica at " + string(n.name) + " is not in the set"
		}
		if n.amnesiac() && n.disk.meta.Amnesiac {
			return "replica at " + string(n.name) + " is still amnesiac"
		}
	}
	// Nobody writes any more: then all must have the same.
	if !s.quiet() {
		return "requests under way"
	}
	return s.differing()
}

// differing names a replica that is not the same as the others, "" when all
// have applied everything.
func (s *Sim) differing() string {
	all := ident.Seq(len(s.chk.log))
	var first *node
	for _, n := range s.nodes {
		if !n.replica || n.disk.broken() {
			continue
		}
		if first == nil {
			first = n
		}
		if n.disk.log.last().Seq != all || n.apply.done != all {
			return "replica at " + string(n.name) + " has not applied everything"
		}
		s.chk.content(s, n)
		for b, p := range n.disk.store.cur {
			if p != first.disk.store.cur[b] {
				s.fail("I6", "block %d is %v at %s and %v at %s", b, p, n.name, first.disk.store.cur[b], first.name)
			}
		}
	}
	return ""
}

// quiet stops the clients and reports whether nothing of theirs is under way.
func (s *Sim) quiet() bool {
	s.quieting = true
	return !slices.ContainsFunc(s.cli, func(c *session) bool { return c.op.on })
}

// excuse names a reason for which a history may end without converging.
func (s *Sim) excuse() string {
	v := s.cl.vol()
	alive := 0
	for _, name := range v.InSync {
		if !s.nodes[s.index(name)].disk.broken() {
			alive++
		}
	}
	if alive == 0 {
		return "every replica of the set has failed"
	}
	return ""
}
