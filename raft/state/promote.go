package state

import (
	"fmt"
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
)

// promote begins an epoch (design, section 4, step 3). What makes a promotion
// safe is found by the controller from the answers to SEAL; what is compared
// here makes sure that nothing moved since.
func (s *State) promote(c *Command, p *Promote) Result {
	v, r := s.live(p.Volume)
	if !r.OK {
		return r
	}
	if r := promotable(v, p, c.V); !r.OK {
		return r
	}
	old, oldPrimary := v.Epoch, v.Primary
	loss := p.Loss
	if loss == LossNone && lostLocalTail(v, p) {
		loss = LossLocal
	}
	if loss == LossForced {
		v.dropLeaving(p.Set)
		v.InSync = slices.Clone(p.Set)
		v.SetVersion++
	}
	was := ""
	if rep := v.Replica(p.Node); p.Readmit {
		was, rep.Failed, rep.Reason = failedText(rep), false, ""
	}
	v.Epoch, v.Primary = p.Epoch, p.Node
	v.PrimaryReplica, v.PrimaryIncarnation, v.PrimaryPosition = p.Replica, p.Incarnation, p.Position
	if loss != LossNone || p.Fence {
		v.Generation++
	}
	if loss != LossNone {
		v.LossEpoch = p.Epoch
	}
	if v.Options.Ack == AckLocal {
		v.LocalEpoch = p.Epoch
	}
	e := Event{
		Name: "promoted", Node: p.Node,
		Text: fmt.Sprintf("volume %s: primary is %s in epoch %d at %s", v.Name, p.Node, p.Epoch, p.Position),
		Fields: map[string]string{
			"from": string(oldPrimary), "to": string(p.Node), "rule": clip(p.Rule), "position": p.Position.String(),
			"epoch": fmt.Sprint(p.Epoch), "old_epoch": fmt.Sprint(old), "heard": clip(fmt.Sprint(p.Heard)),
		},
	}
	if loss != LossNone {
		e.Fields["loss"] = string(loss)
		e.Text += fmt.Sprintf("; %s: answered writes that were not flushed may be gone, sessions from before end with an error", loss)
	}
	if was != "" {
		e.Text += fmt.Sprintf("; its replica, which had %s, is taken back as it is", was)
	}
	res := s.event(c, v, e)
	if p.Fence {
		res = s.event(c, v, Event{
			Name: "fenced", Node: p.Node,
			Text:   fmt.Sprintf("volume %s: fenced by an operator in epoch %d: sessions from before end with an error", v.Name, p.Epoch),
			Fields: map[string]string{"epoch": fmt.Sprint(p.Epoch), "generation": fmt.Sprint(v.Generation)},
		})
	}
	res.Loss = loss
	return res
}

// promotable compares the command, of a version, with the volume.
func promotable(v *Volume, p *Promote, version int) Result {
	rep := v.Replica(p.Node)
	switch {
	case p.OldEpoch != v.Epoch:
		return refuse(RuleEpoch, "volume %q is in epoch %d, not %d: another promotion came first", v.Name, v.Epoch, p.OldEpoch)
	case p.SetVersion != v.SetVersion:
		return refuse(RuleSetVersion, "the in-sync set of %q is version %d, not %d: it changed meanwhile", v.Name, v.SetVersion, p.SetVersion)
	case p.Epoch <= v.Epoch:
		return refuse(RuleEpochFalls, "epoch %d does not follow %d", p.Epoch, v.Epoch)
	case rep == nil:
		return refuse(RuleNoReplica, "volume %q has no replica on %q", v.Name, p.Node)
	case rep.Replica == 0 || rep.Replica != p.Replica:
		return refuse(RuleReplicaID, "the replica of %q on %q is not the registered one", v.Name, p.Node)
	case p.Readmit && (p.Loss != LossForced || len(p.Set) != 1 || !rep.Failed):
		return refuse(RuleReadmit, "only a replica that failed is taken back, alone, and by force: %q on %q", v.Name, p.Node)
	case rep.Failed && !p.Readmit:
		return refuse(RuleFailed, "the replica of %q on %q failed: %s", v.Name, p.Node, rep.Reason)
	case p.Position.Epoch >= p.Epoch:
		return refuse(RulePosition, "position %s is not below epoch %d", p.Position, p.Epoch)
	case p.Loss != LossNone && p.Loss != LossPower && p.Loss != LossForced:
		return refuse(RuleBadValue, "loss %q is none that a promotion names", p.Loss)
	case p.Loss != LossForced && len(p.Set) > 0:
		return refuse(RuleOnlyForcedSet, "only a forced promotion sets the in-sync set")
	case p.Loss != LossForced && !v.InSet(p.Node):
		return refuse(RuleNotInSync, "%q is not in the in-sync set of %q", p.Node, v.Name)
	}
	if p.Loss != LossForced {
		return Result{OK: true}
	}
	if r := v.checkSet(p.Set); !r.OK {
		return r
	}
	if !slices.Contains(p.Set, p.Node) {
		return refuse(RulePrimaryInSet, "the primary %q must be in the set", p.Node)
	}
	for _, n := range p.Set {
		if v.Replica(n).Failed && !p.Readmit {
			return refuse(RuleFailed, "the replica of %q on %q failed", v.Name, n)
		}
		if v.Replica(n).Replica == 0 && version >= VersionCompares {
			// It was removed and added again since it was heard: what comes is empty.
			return refuse(RuleReplicaID, "the replica of %q on %q is another one by now", v.Name, n)
		}
	}
	return Result{OK: true}
}

// lostLocalTail reports whether the epoch that ends answered writes that its
// primary alone held (ack local), and that primary was not among those heard,
// so that the tail may be gone. The primary that was heard and counted has
// given its last position, which the new primary's is not below.
func lostLocalTail(v *Volume, p *Promote) bool {
	wasLocal := v.Epoch > 0 && v.LocalEpoch == v.Epoch
	return wasLocal && !slices.Contains(p.Heard, v.Primary)
}

// checkSet finds a set that could never be one.
func (v *Volume) checkSet(set []ident.Node) Result {
	if len(set) == 0 {
		return refuse(RuleEmptySet, "the in-sync set of %q is never empty", v.Name)
	}
	if !slices.IsSorted(set) || len(slices.Compact(slices.Clone(set))) != len(set) {
		return refuse(RuleBadValue, "the in-sync set must be sorted and name each node once")
	}
	for _, n := range set {
		r := v.Replica(n)
		if r == nil {
			return refuse(RuleNoReplica, "volume %q has no replica on %q", v.Name, n)
		}
	}
	return Result{OK: true}
}

// changeSet changes the in-sync set at the word of the epoch's primary. That a
// majority of the new set holds the log durably is the primary's to know; what
// is compared here makes sure that it still is the primary, of the same set.
func (s *State) changeSet(c *Command, p *ChangeSet) Result {
	v, r := s.live(p.Volume)
	if !r.OK {
		return r
	}
	next := slices.Sorted(slices.Values(p.Set))
	if r := v.checkSet(next); !r.OK {
		return r
	}
	switch {
	case p.Epoch != v.Epoch || v.Epoch == 0:
		return refuse(RuleEpoch, "volume %q is in epoch %d, not %d", v.Name, v.Epoch, p.Epoch)
	case p.Version != v.SetVersion:
		return refuse(RuleSetVersion, "the in-sync set of %q is version %d, not %d", v.Name, v.SetVersion, p.Version)
	case !slices.Contains(next, v.Primary):
		return refuse(RulePrimaryInSet, "the primary %q stays in the set: hand over first", v.Primary)
	case len(next) < v.Options.MinCopies && len(next) < len(v.InSync) && !p.Unfit:
		return refuse(RuleMinCopies, "%d copies of %q are fewer than min_copies %d", len(next), v.Name, v.Options.MinCopies)
	}
	for _, n := range next {
		if v.InSet(n) {
			continue
		}
		rep := v.Replica(n)
		switch {
		case rep.Replica == 0:
			return refuse(RuleReplicaID, "the replica of %q on %q is not registered", v.Name, n)
		case rep.Failed:
			return refuse(RuleFailed, "the replica of %q on %q failed: %s", v.Name, n, rep.Reason)
		case rep.Leaving:
			return refuse(RuleLeaving, "the replica of %q on %q is being removed", v.Name, n)
		}
	}
	from := fmt.Sprint(v.InSync)
	v.dropLeaving(next)
	v.InSync = next
	v.SetVersion++
	return s.event(c, v, Event{
		Name: "set-changed", Node: v.Primary,
		Text:   fmt.Sprintf("volume %s: in sync are %v, were %s: %s", v.Name, next, from, p.Reason),
		Fields: map[string]string{"from": from, "to": fmt.Sprint(next), "rule": clip(p.Reason), "version": fmt.Sprint(v.SetVersion)},
	})
}
