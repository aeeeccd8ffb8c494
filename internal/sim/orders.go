package sim

import (
	"fmt"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// What operators do, and what happens to whole disks.

// orders are the faults that are an order, or for which one is due.
var orders = map[Fault]func(*Sim, *node){
	FaultPause: func(s *Sim, n *node) {
		if n.core != nil {
			s.put(n, input{kind: inPause, x: uint64(s.delay(10*ms, 300*ms))})
		}
	},
	FaultForce: (*Sim).force,
	FaultFence: func(s *Sim, n *node) {
		if c := s.ctl[0]; c != nil {
			c.want, c.drain, c.fence = true, true, true
			if c.to = c.vol.Primary; s.rng.IntN(4) == 0 {
				c.to = n.name // it is gone, or slow to answer
			}
		}
	},
	FaultDisk: (*Sim).failDisk,
	FaultRot:  (*Sim).rot,
	FaultWipe: (*Sim).wipe,
	FaultAdd: func(s *Sim, n *node) {
		s.command(n.i, state.Command{AddReplica: &state.AddReplica{Volume: volumeID, Node: n.name}})
	},
	FaultRemove: func(s *Sim, n *node) {
		if v := s.cl.vol(); len(v.Replicas) > 2 || v.Replica(n.name) == nil || s.rng.IntN(4) == 0 {
			s.command(n.i, state.Command{RemoveReplica: &state.RemoveReplica{Volume: volumeID, Node: n.name}})
		}
	},
	FaultGrow: func(s *Sim, n *node) {
		if by := s.opt.Grow - s.grown; by > 0 {
			s.grown += 1 + s.rng.IntN(by)
			s.command(n.i, state.Command{ResizeVolume: &state.ResizeVolume{Volume: volumeID, Size: uint64((s.opt.Blocks + s.grown) * blockSize)}})
		}
	},
	FaultEcho: func(s *Sim, n *node) {
		if len(s.cl.cmds) == 0 {
			return
		}
		// Not one that is under way: its proposer would hear of the other's fate.
		c := s.cl.cmds[s.rng.IntN(len(s.cl.cmds))]
		if c.applied && (c.cmd.Promote != nil || c.cmd.ChangeSet != nil) {
			s.command(n.i, c.cmd)
		}
	},
	FaultRate: func(s *Sim, n *node) {
		k := 8 + s.rng.Int64N(200)
		most, least := blockSize*k, blockSize*(4+s.rng.Int64N(k-4))
		s.command(n.i, state.Command{SetOptions: &state.SetOptions{Volume: volumeID, ResyncRateMax: &most, ResyncRateMin: &least}})
	},
	FaultMinCopies: func(s *Sim, n *node) {
		k := 1 + s.rng.IntN(min(2, len(s.cl.vol().Replicas)))
		s.command(n.i, state.Command{SetOptions: &state.SetOptions{Volume: volumeID, MinCopies: &k}})
	},
}

// force lets an operator take whom he can reach, mostly when nobody serves.
func (s *Sim) force(*node) {
	c := s.ctl[0]
	if c == nil || s.Primary() >= 0 && s.rng.IntN(3) > 0 {
		return
	}
	c.want, c.force = true, true
	if s.rng.IntN(2) == 0 {
		c.sendTo = map[ident.Node]bool{}
		for _, m := range s.nodes {
			c.sendTo[m.name] = s.rng.IntN(2) == 0
		}
	}
}

// command gives an operator's command to Raft.
func (s *Sim) command(i int, c state.Command) {
	s.orders++
	c.ID = fmt.Sprintf("order-%d", s.orders)
	s.submit(&command{node: i, cmd: c})
}

// bears reports whether the volume can bear the loss of this disk: one in a
// history, and of a set that keeps others.
func (s *Sim) bears(n *node) bool {
	v := s.cl.vol()
	for _, c := range s.cl.cmds {
		if !c.applied && c.cmd.ChangeSet != nil {
			return false // it may leave nobody else in the set
		}
	}
	return !s.broken && n.replica && n.disk.log.rot == 0 && (len(v.InSync) >= 3 || !v.InSet(n.name))
}

// failDisk lets every further write and fsync of a disk fail.
func (s *Sim) failDisk(n *node) {
	if s.bears(n) {
		s.broken, n.disk.failed = true, true
		s.at(s.delay(s1, 4*s1), event{kind: evCall, fn: func() { s.replaceDisk(n) }})
	}
}

// rot damages a record of which the disk says that it was durable. Whoever
// reads it, a restart or a peer that lags, finds out.
func (s *Sim) rot(n *node) {
	l := &n.disk.log
	if to := n.disk.vouched(); s.bears(n) && to > l.base.Seq {
		s.broken = true
		l.rot = l.base.Seq + 1 + ident.Seq(s.rng.Int64N(int64(to-l.base.Seq)))
		s.note(n.i, "rot", "record %d of %v..%v", l.rot, l.base, l.last())
		if s.rng.IntN(4) > 0 {
			s.die(n, FaultKill)
		}
		s.at(s.delay(s1, 4*s1), event{kind: evCall, fn: func() { s.replaceDisk(n) }})
	}
}

// wipe loses a whole data directory; the operator then replaces the node.
func (s *Sim) wipe(n *node) {
	if !s.bears(n) {
		return
	}
	s.broken = true
	old := n.disk.meta.replica
	s.newReplica(n)
	id := n.disk.meta.replica
	s.orders++
	raftID := fmt.Sprintf("%s-%d", n.name, s.orders) // of the new data directory: asked again, it is the same
	var try func()
	try = func() {
		rep := s.cl.vol().Replica(n.name)
		if rep == nil || rep.Replica != old || rep.Failed {
			s.register(n, id)
			return
		}
		s.command(n.i, state.Command{ReplaceNode: &state.ReplaceNode{Name: n.name, RaftID: raftID}})
		s.at(s1, event{kind: evCall, fn: try})
	}
	try()
}

// newReplica gives a node an empty disk with a replica of a new id. Its process
// starts anew.
func (s *Sim) newReplica(n *node) {
	s.die(n, FaultKill)
	n.replica = true
	n.disk = s.newDisk(ident.Replica(1000+s.count), n.boots)
	n.sealed = 0
	s.note(n.i, "replica", "made, id %d", n.disk.meta.replica)
	s.at(10*ms, event{kind: evStart, node: n.i})
}

// replaceDisk gives a node a new, empty disk under a new replica id as soon as
// the failed one is out of the set.
func (s *Sim) replaceDisk(n *node) {
	v := s.cl.vol()
	rep := v.Replica(n.name)
	if rep == nil || !n.replica || !n.disk.broken() || (rep.Replica != n.disk.meta.replica && rep.Replica != 0) {
		return // it was removed meanwhile, or what was damaged was recycled
	}
	if !rep.Failed || v.InSet(n.name) || !n.up {
		s.at(300*ms, event{kind: evCall, fn: func() { s.replaceDisk(n) }})
		return
	}
	s.newReplica(n)
	s.register(n, n.disk.meta.replica)
}

// register makes a replica's id known, until that is done.
func (s *Sim) register(n *node, id ident.Replica) {
	rep := s.cl.vol().Replica(n.name)
	if rep == nil || rep.Replica == id || n.disk.meta.replica != id {
		return
	}
	s.command(n.i, state.Command{RegisterReplica: &state.RegisterReplica{
		Volume: volumeID, Node: n.name, Replica: id, Replace: rep.Replica != 0, Was: rep.Replica,
	}})
	s.at(s1, event{kind: evCall, fn: func() { s.register(n, id) }})
}

// keepReplica brings a node's replica in line with the newest cluster state, as
// the daemon does: it makes the one that is expected, and removes its files when
// none is any more.
func (s *Sim) keepReplica(n *node, k int) {
	if k != len(s.cl.views)-1 {
		return // a node that is behind makes and removes nothing
	}
	rep := s.cl.vol().Replica(n.name)
	n.registering = n.registering && rep != nil && rep.Replica == 0
	switch {
	case rep == nil && n.replica:
		s.note(n.i, "replica", "removed")
		s.die(n, FaultKill)
		n.replica, n.disk, n.sealed = false, disk{}, 0
		s.at(10*ms, event{kind: evStart, node: n.i})
	case rep != nil && rep.Replica == 0 && !n.replica:
		s.newReplica(n)
		s.register(n, n.disk.meta.replica)
	case rep != nil && rep.Replica == 0 && !n.registering:
		// One that was removed and is expected again before its files went.
		n.registering = true
		s.register(n, n.disk.meta.replica)
	}
}
