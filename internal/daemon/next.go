package daemon

import (
	"fmt"
	"strings"
	"syscall"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// replacedReason begins the reason of a replica that failed with its node's replacement.
const replacedReason = "the node was replaced"

// nextStep is the command for the first replica that needs an operator. What it
// names works as it stands, in the state that the status shows. office: there is a
// primary, be it one that has too few copies to answer its clients.
func nextStep(out *control.VolumeStatus, sv *state.Volume, serving, office bool) string {
	failed := 0          // of the in-sync set
	var missing []string // and those of them that come back when what they miss does
	for _, r := range out.Replicas {
		if rep := sv.Replica(ident.Node(r.Node)); rep != nil && sv.InSet(rep.Node) && r.State == control.Failed && !isFull(sv, r) {
			failed++
			if !rep.Failed {
				missing = append(missing, r.Node)
			}
		}
	}
	lost := !serving && failed >= sv.Majority()
	first := ""
	for _, r := range out.Replicas {
		if (lost || !office) && r.State == control.Failed && !isFull(sv, r) {
			continue // nothing can be copied anew: there is nobody to copy from
		}
		switch step := nextOf(out, sv, r); {
		case step == "":
		case r.State == control.Absent, office && !lost:
			return step
		case first == "":
			first = step
		}
	}
	if lost {
		// The others never suffice: an operator decides.
		step := "blockstep failover " + out.Volume + " --force --accept-data-loss"
		if failed-len(missing) < sv.Majority() {
			step = fmt.Sprintf("bring back what is missing on %s (a mount, a disk): it is tried again by itself; only if it is lost: %s", strings.Join(missing, ", "), step)
		}
		return step
	}
	return first
}

// nextOf is the step for one replica; "" when it needs none.
func nextOf(out *control.VolumeStatus, sv *state.Volume, r control.ReplicaStatus) string {
	switch r.State {
	case control.Absent:
		switch {
		case r.Reason == foreignReason:
			return "blockstep node replace " + r.Node
		case !strings.HasPrefix(r.Reason, devicePrefix):
			return fmt.Sprintf("start blockstepd on %s, or check its network", r.Node)
		}
		step := fmt.Sprintf("see to the device on %s: it is tried again by itself (blockstep wait %s --for healthy)", r.Node, out.Volume)
		if out.Primary != "" && !strings.Contains(r.Reason, "it is in use") {
			step += fmt.Sprintf("; if its content is lost: blockstep invalidate %s --node %s", out.Volume, r.Node)
		}
		return step
	case control.Failed:
		if isFull(sv, r) {
			return fmt.Sprintf("make room on %s: it comes back by itself (blockstep wait %s --for healthy)", r.Node, out.Volume)
		}
		if rep := sv.Replica(ident.Node(r.Node)); rep != nil && (rep.Reason == invalidReason || strings.HasPrefix(rep.Reason, replacedReason)) {
			return fmt.Sprintf("wait: it is copied anew by itself, once blockstepd runs on %s (blockstep wait %s --for healthy)", r.Node, out.Volume)
		}
		return fmt.Sprintf("replace the disk of %s, then: blockstep invalidate %s --node %s", r.Node, out.Volume, r.Node)
	case control.CatchingUp, control.Resyncing, control.Amnesiac:
		return fmt.Sprintf("wait: it comes back by itself (blockstep wait %s --for healthy)", out.Volume)
	case control.InSync:
	}
	return ""
}

// isFull reports whether a replica is out for want of room alone, which it gets
// over by itself: one that the cluster state holds for failed does not.
func isFull(sv *state.Volume, r control.ReplicaStatus) bool {
	rep := sv.Replica(ident.Node(r.Node))
	return rep != nil && !rep.Failed &&
		(strings.Contains(r.Reason, syscall.ENOSPC.Error()) || strings.Contains(r.Reason, syscall.EDQUOT.Error()))
}
