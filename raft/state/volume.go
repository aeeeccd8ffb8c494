package state

import (
	"fmt"
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
)

// live gives a copy of the volume, in s and free to be changed, or a refusal.
func (s *State) live(id ident.Volume) (*Volume, Result) {
	v := s.Volumes[id]
	if v == nil || v.Deleted {
		return nil, refuse(RuleNoVolume, "there is no volume with id %d: it may have been deleted", uint64(id))
	}
	c := v.clone()
	s.Volumes[id] = c
	return c, Result{OK: true}
}

func (s *State) createVolume(c *Command, p *CreateVolume) Result {
	if !ValidName(p.Name) {
		return refuse(RuleBadName, "volume name %q: use letters, digits, '.', '_', '-', at most %d", p.Name, NameMax)
	}
	if s.Volume(p.Name) != nil {
		return refuse(RuleVolumeExists, "there is a volume %q already", p.Name)
	}
	if p.ID == 0 || s.Volumes[p.ID] != nil {
		return refuse(RuleVolumeIDUsed, "volume id %d is used or zero: ids are never used again", uint64(p.ID))
	}
	if len(s.Live()) >= VolumesMax {
		return refuse(RuleLimit, "a cluster has at most %d volumes", VolumesMax)
	}
	if r := checkSize(p.Size); !r.OK {
		return r
	}
	if len(p.Replicas) == 0 || len(p.Replicas) > ReplicasMax {
		return refuse(RuleLimit, "a volume has 1 to %d replicas, not %d", ReplicasMax, len(p.Replicas))
	}
	v := &Volume{Name: p.Name, ID: p.ID, Size: p.Size, Options: p.Options, SetVersion: 1, Generation: 1, Created: c.Time}
	for _, r := range p.Replicas {
		if res := s.storing(r.Node); !res.OK {
			return res
		}
		if v.Replica(r.Node) != nil {
			return refuse(RuleReplicaExists, "node %q is named twice", r.Node)
		}
		if res := s.freeDevice(r.Node, r.Device); !res.OK {
			return res
		}
		v.Replicas = append(v.Replicas, Replica{Node: r.Node, Device: r.Device})
		v.InSync = append(v.InSync, r.Node)
	}
	slices.SortFunc(v.Replicas, func(a, b Replica) int {
		if a.Node < b.Node {
			return -1
		}
		return 1
	})
	slices.Sort(v.InSync)
	defaults(&v.Options, len(v.Replicas))
	if r := checkOptions(&v.Options, len(v.Replicas)); !r.OK {
		return r
	}
	s.Volumes[v.ID] = v
	return s.event(c, v, Event{Name: "volume-created", Text: fmt.Sprintf("volume %s of %d bytes created on %v", v.Name, v.Size, v.InSync)})
}

// freeDevice reports whether no replica on a node has the device, by the same
// path. The node itself finds out when two paths are one device.
func (s *State) freeDevice(node ident.Node, device string) Result {
	if len(device) > TextMax {
		return refuse(RuleBadValue, "the device path of %q is too long", node)
	}
	for _, v := range s.Live() {
		if r := v.Replica(node); device != "" && r != nil && r.Device == device {
			return refuse(RuleDevice, "%s on %q has the replica of volume %q: give another device", device, node, v.Name)
		}
	}
	return Result{OK: true}
}

// storing reports whether a node exists and holds replicas.
func (s *State) storing(node ident.Node) Result {
	n := s.Nodes[node]
	if n == nil {
		return refuse(RuleNoNode, "there is no node %q: the nodes are %v", node, s.NodeNames())
	}
	if n.Witness {
		return refuse(RuleWitness, "node %q is a witness: it votes and stores nothing", node)
	}
	return Result{OK: true}
}

func checkSize(size uint64) Result {
	if size == 0 || size > SizeMax || size%SizeMultiple != 0 {
		return refuse(RuleBadValue, "size %d: give a multiple of %d bytes, at most %d", size, SizeMultiple, uint64(SizeMax))
	}
	return Result{OK: true}
}

// defaults fills the options that were left out.
func defaults(o *Options, replicas int) {
	if o.Ack == "" {
		o.Ack = AckQuorum
	}
	if o.MinCopies == 0 {
		o.MinCopies = 1
		if replicas >= 3 {
			o.MinCopies = 2
		}
	}
	if o.OnNoQuorum == "" {
		o.OnNoQuorum = NoQuorumHold
	}
	if o.AfterPowerLoss == "" {
		o.AfterPowerLoss = PowerLossAuto
	}
}

func checkOptions(o *Options, replicas int) Result {
	switch {
	case o.Ack != AckQuorum && o.Ack != AckDurable && o.Ack != AckLocal:
		return refuse(RuleBadValue, "ack %q: give quorum, durable or local", o.Ack)
	case o.MinCopies < 1 || o.MinCopies > replicas:
		return refuse(RuleBadValue, "min_copies %d: give 1 to %d, the number of replicas", o.MinCopies, replicas)
	case o.OnNoQuorum != NoQuorumHold && o.OnNoQuorum != NoQuorumError:
		return refuse(RuleBadValue, "on_no_quorum %q: give hold or error", o.OnNoQuorum)
	case o.ErrorAfterMillis < 0 || o.ErrorAfterMillis > errorAfterMax:
		return refuse(RuleBadValue, "on_no_quorum error after %d ms: give 0 to %d", o.ErrorAfterMillis, errorAfterMax)
	case o.AfterPowerLoss != PowerLossAuto && o.AfterPowerLoss != PowerLossWait:
		return refuse(RuleBadValue, "after_power_loss %q: give auto or wait", o.AfterPowerLoss)
	case o.LogRetention < 0 || o.LogRetention > retentionMax:
		return refuse(RuleBadValue, "log_retention %d: give 0 to %d bytes", o.LogRetention, retentionMax)
	case o.ResyncRateMax < 0 || o.ResyncRateMax > resyncRateMost,
		o.ResyncRateMin < 0 || (o.ResyncRateMax > 0 && o.ResyncRateMin > o.ResyncRateMax):
		return refuse(RuleBadValue, "resync rate %d to %d: give a floor at or below the ceiling, in bytes a second", o.ResyncRateMin, o.ResyncRateMax)
	}
	return Result{OK: true}
}

func (s *State) deleteVolume(c *Command, p *DeleteVolume) Result {
	v, r := s.live(p.Volume)
	if !r.OK {
		return r
	}
	v.Deleted = true
	// The oldest tombstones go: their nodes have long seen them, and ids are
	// random, so that none comes again.
	var dead []*Volume
	for _, x := range s.Volumes {
		if x.Deleted {
			dead = append(dead, x)
		}
	}
	if len(dead) > TombstonesMax {
		oldest := slices.MinFunc(dead, func(a, b *Volume) int {
			if a.Created != b.Created {
				return int(min(max(a.Created-b.Created, -1), 1))
			}
			if a.ID < b.ID {
				return -1
			}
			return 1
		})
		delete(s.Volumes, oldest.ID)
	}
	return s.event(c, v, Event{Name: "volume-deleted", Text: fmt.Sprintf("volume %s deleted", v.Name)})
}

func (s *State) resizeVolume(c *Command, p *ResizeVolume) Result {
	v, r := s.live(p.Volume)
	if !r.OK {
		return r
	}
	if r := checkSize(p.Size); !r.OK {
		return r
	}
	if p.Size < v.Size {
		return refuse(RuleShrink, "volume %q has %d bytes and never shrinks", v.Name, v.Size)
	}
	old := v.Size
	v.Size = p.Size
	return s.event(c, v, Event{Name: "volume-resized", Text: fmt.Sprintf("volume %s from %d to %d bytes", v.Name, old, v.Size)})
}

func (s *State) setOptions(c *Command, p *SetOptions) Result {
	v, r := s.live(p.Volume)
	if !r.OK {
		return r
	}
	o := &v.Options
	set(&o.Ack, p.Ack)
	set(&o.MinCopies, p.MinCopies)
	set(&o.OnNoQuorum, p.OnNoQuorum)
	set(&o.ErrorAfterMillis, p.ErrorAfterMillis)
	set(&o.AfterPowerLoss, p.AfterPowerLoss)
	set(&o.LogRetention, p.LogRetention)
	set(&o.ResyncRateMax, p.ResyncRateMax)
	set(&o.ResyncRateMin, p.ResyncRateMin)
	set(&o.Checksum, p.Checksum)
	if r := checkOptions(o, len(v.Replicas)); !r.OK {
		return r
	}
	if o.Ack == AckLocal {
		v.LocalEpoch = v.Epoch
	}
	return s.event(c, v, Event{Name: "options", Text: fmt.Sprintf("volume %s: ack %s, min_copies %d, on_no_quorum %s, after_power_loss %s",
		v.Name, o.Ack, o.MinCopies, o.OnNoQuorum, o.AfterPowerLoss)})
}

func set[T any](dst *T, src *T) {
	if src != nil {
		*dst = *src
	}
}

func (s *State) registerReplica(c *Command, p *RegisterReplica) Result {
	v, r := s.live(p.Volume)
	if !r.OK {
		return r
	}
	rep := v.Replica(p.Node)
	switch {
	case rep == nil:
		return refuse(RuleNoReplica, "volume %q has no replica on %q", v.Name, p.Node)
	case p.Replica == 0:
		return refuse(RuleBadValue, "a replica id is never zero")
	case rep.Replica == p.Replica && !rep.Failed:
		return Result{OK: true, Volume: v.ID, Epoch: v.Epoch, SetVersion: v.SetVersion} // asked again
	case s.replicaIDUsed(p.Replica):
		return refuse(RuleReplicaID, "replica id %d is used: ids are never used again", uint64(p.Replica))
	case rep.Leaving:
		return refuse(RuleLeaving, "the replica of %q on %q is being removed", v.Name, p.Node)
	case p.Was != 0 && rep.Replica != p.Was:
		// Decided long ago, and under way since: what it was to replace has gone, and this one too, perhaps.
		return refuse(RuleReplicaID, "the replica of %q on %q is no longer the one to be replaced", v.Name, p.Node)
	case rep.Replica != 0 && !p.Replace:
		return refuse(RuleRegistered, "another replica of %q is registered on %q: if its disk was replaced, register it anew with replace", v.Name, p.Node)
	case rep.Replica != 0 && v.InSet(p.Node):
		// To drop it from the set here would lower W behind the primary's back:
		// an entry that it and one other hold is committed, and with the
		// smaller set a third that lacks the entry could be promoted.
		return refuse(RuleInSync, "the replaced replica of %q on %q still counts: mark it failed, its primary then takes it out of the in-sync set", v.Name, p.Node)
	}
	text := fmt.Sprintf("volume %s: replica on %s registered", v.Name, p.Node)
	if rep.Replica != 0 {
		text = fmt.Sprintf("volume %s: replica on %s replaced by a new one (was %s)", v.Name, p.Node, failedText(rep))
	}
	rep.Replica, rep.Failed, rep.Reason = p.Replica, false, ""
	if v.Epoch > 0 {
		// A change of the set that is under way names nodes: a primary that
		// takes in the replica that was here before, which had caught up, would
		// take in this one, which has nothing.
		v.SetVersion++
	}
	return s.event(c, v, Event{Name: "replica-registered", Node: p.Node, Text: text})
}

func failedText(r *Replica) string {
	if r.Failed {
		return "failed: " + r.Reason
	}
	return "good"
}

func (s *State) replicaIDUsed(id ident.Replica) bool {
	for _, v := range s.Volumes {
		for i := range v.Replicas {
			if v.Replicas[i].Replica == id {
				return true
			}
		}
	}
	return false
}

func (s *State) addReplica(c *Command, p *AddReplica) Result {
	v, r := s.live(p.Volume)
	if !r.OK {
		return r
	}
	if r := s.storing(p.Node); !r.OK {
		return r
	}
	switch {
	case v.Replica(p.Node) != nil:
		return refuse(RuleReplicaExists, "volume %q has a replica on %q already", v.Name, p.Node)
	case len(v.Replicas) >= ReplicasMax:
		return refuse(RuleLimit, "a volume has at most %d replicas", ReplicasMax)
	case p.AtMost > 0 && v.Staying() >= p.AtMost:
		return refuse(RuleEnough, "volume %q has %d replicas already", v.Name, v.Staying())
	}
	if r := s.freeDevice(p.Node, p.Device); !r.OK {
		return r
	}
	i, _ := slices.BinarySearchFunc(v.Replicas, p.Node, func(r Replica, n ident.Node) int {
		if r.Node < n {
			return -1
		}
		return 1
	})
	v.Replicas = slices.Insert(v.Replicas, i, Replica{Node: p.Node, Device: p.Device})
	return s.event(c, v, Event{Name: "replica-added", Node: p.Node, Text: fmt.Sprintf("volume %s: replica on %s added, it will be filled", v.Name, p.Node)})
}

func (s *State) removeReplica(c *Command, p *RemoveReplica) Result {
	v, r := s.live(p.Volume)
	if !r.OK {
		return r
	}
	rep := v.Replica(p.Node)
	if rep == nil {
		return refuse(RuleNoReplica, "volume %q has no replica on %q", v.Name, p.Node)
	}
	if !v.InSet(p.Node) {
		v.drop(p.Node)
		return s.event(c, v, Event{Name: "replica-removed", Node: p.Node, Text: fmt.Sprintf("volume %s: replica on %s removed", v.Name, p.Node)})
	}
	switch {
	case v.Primary == p.Node:
		return refuse(RulePrimaryReplica, "%q is the primary of %q: 'switchover %s --to' another node first", p.Node, v.Name, v.Name)
	case len(v.InSync) == 1:
		return refuse(RuleEmptySet, "%q has the only good copy of %q", p.Node, v.Name)
	case len(v.InSync)-1 < v.Options.MinCopies:
		return refuse(RuleMinCopies, "volume %q has %d in sync and min_copies %d: add a replica first, or lower min_copies", v.Name, len(v.InSync), v.Options.MinCopies)
	}
	rep.Leaving = true
	res := s.event(c, v, Event{Name: "replica-leaving", Node: p.Node, Text: fmt.Sprintf("volume %s: replica on %s leaves as soon as its primary has taken it out of the set", v.Name, p.Node)})
	res.Pending = true
	return res
}

// dropLeaving forgets the replicas that were to leave and are out of the set
// from now on.
func (v *Volume) dropLeaving(next []ident.Node) {
	for _, n := range v.InSync {
		if v.Replica(n).Leaving && !slices.Contains(next, n) {
			v.drop(n)
		}
	}
}

// drop forgets a replica, and keeps min_copies possible.
func (v *Volume) drop(node ident.Node) {
	v.Replicas = slices.DeleteFunc(v.Replicas, func(r Replica) bool { return r.Node == node })
	v.Options.MinCopies = max(min(v.Options.MinCopies, len(v.Replicas)), 1)
}

func (s *State) markFailed(c *Command, p *MarkFailed) Result {
	v, r := s.live(p.Volume)
	if !r.OK {
		return r
	}
	rep := v.Replica(p.Node)
	switch {
	case rep == nil:
		return refuse(RuleNoReplica, "volume %q has no replica on %q", v.Name, p.Node)
	case rep.Replica != p.Replica || p.Replica == 0:
		return refuse(RuleReplicaID, "the replica of %q on %q has another id: the failed one was replaced", v.Name, p.Node)
	case rep.Failed:
		return Result{OK: true, Volume: v.ID, Epoch: v.Epoch, SetVersion: v.SetVersion}
	}
	rep.Failed, rep.Reason = true, clip(p.Reason)
	return s.event(c, v, Event{Name: "replica-failed", Node: p.Node, Text: fmt.Sprintf("volume %s: replica on %s failed: %s", v.Name, p.Node, rep.Reason)})
}
