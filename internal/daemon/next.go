package daemon

import (
	"fmt"
	"strings"
	"syscall"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// nextStep is the command for the first replica that needs an operator. What it
// names works as it stands, in the state that the status shows.
func nextStep(out *control.VolumeStatus, sv *state.Volume, office bool) string {
	if !office {
		return nextUnserved(out, sv)
	}
	for _, r := range out.Replicas {
		if step := nextOf(out, sv, r); step != "" {
			return step
		}
	}
	return ""
}

// nextUnserved is the step while there is no primary. Nothing can be copied anew then:
// first those that are away have to come back, and when so many of the in-sync set
// have failed that the others never suffice, an operator decides.
func nextUnserved(out *control.VolumeStatus, sv *state.Volume) string {
	failed, step := 0, ""
	for _, r := range out.Replicas {
		rep := sv.Replica(ident.Node(r.Node))
		if rep != nil && rep.Failed && sv.InSet(rep.Node) {
			failed++
		}
		if r.State == control.Failed && !isFull(rep, r.Reason) {
			continue
		}
		if s := nextOf(out, sv, r); s != "" && (step == "" || r.State == control.Absent) {
			step = s
		}
		if r.State == control.Absent {
			return step
		}
	}
	if failed >= sv.Majority() {
		return "blockstep failover " + out.Volume + " --force --accept-data-loss"
	}
	return step
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
		if isFull(sv.Replica(ident.Node(r.Node)), r.Reason) {
			return fmt.Sprintf("make room on %s: it comes back by itself (blockstep wait %s --for healthy)", r.Node, out.Volume)
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
func isFull(rep *state.Replica, reason string) bool {
	return rep != nil && !rep.Failed &&
		(strings.Contains(reason, syscall.ENOSPC.Error()) || strings.Contains(reason, syscall.EDQUOT.Error()))
}
