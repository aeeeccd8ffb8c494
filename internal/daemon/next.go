package daemon

import (
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication/core"
)

// replacedReason begins the reason of a replica that failed with its node's replacement.
const replacedReason = "the node was replaced"

// nextStep is the command for the first replica that needs an operator. What it
// names works as it stands, in the state that the status shows. office: there is a
// primary, be it one that has too few copies to answer its clients.
func nextStep(out *control.VolumeStatus, sv *state.Volume, serving, office bool) string {
	// What lies there is of no use, or was given up with its node.
	gone := func(r control.ReplicaStatus) bool {
		return r.State == control.Failed && !isFull(sv, r) || r.State == control.Absent && r.Reason == lostReason
	}
	failed := 0          // of the in-sync set
	var missing []string // and those of them that come back when what they miss does
	for _, r := range out.Replicas {
		if rep := sv.Replica(ident.Node(r.Node)); rep != nil && sv.InSet(rep.Node) && gone(r) {
			failed++
			if !rep.Failed && r.State == control.Failed {
				missing = append(missing, r.Node)
			}
		}
	}
	lost := !serving && failed >= sv.Majority()
	first := ""
	for _, r := range out.Replicas {
		if (lost || !office) && gone(r) {
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
		case r.Reason == lostReason:
			return fmt.Sprintf("start blockstepd on %s on an empty data_dir, then: blockstep node replace %s", r.Node, r.Node)
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

// brings reports whether a primary, be it one that serves nobody or is about to take
// office, is bringing a replica up to date that is not in the in-sync set.
func (r *volumeReport) brings(sv *state.Volume, p *core.PeerStatus) bool {
	return p != nil && p.Connected && !sv.InSet(p.Node) && r.holdsEpoch(sv) &&
		(p.State == string(control.Resyncing) || p.State == string(control.CatchingUp))
}

// holdsEpoch reports whether the node was made the primary of the volume's epoch, and
// is still: in office, or on its way.
func (r *volumeReport) holdsEpoch(sv *state.Volume) bool {
	return r.Reached && r.Replica && r.Core.View.Epoch == sv.Epoch && (r.Core.Role == core.RolePrimary || r.Core.Role == core.RolePrimaryElect)
}

// awaited is what a primary that serves nobody waits for, where that comes by itself,
// and the next step; "" when it is something else. It has too few copies, or too few
// of the in-sync set answer, and a replica is on its way with which they are enough. what
// is appended to the reason.
func awaited(out *control.VolumeStatus, sv *state.Volume, primary volumeReport) (what, next string) {
	if !primary.holdsEpoch(sv) {
		return "", ""
	}
	there := 1
	var first *control.ReplicaStatus // of those on their way, the one that is soonest there
	var away []string
	for i := range out.Replicas {
		r := &out.Replicas[i]
		p := primary.peer(ident.Node(r.Node))
		switch in := sv.InSet(ident.Node(r.Node)); {
		case r.Node == string(sv.Primary):
		case in && p != nil && p.Connected && p.State != string(control.Failed) && p.State != string(control.Resyncing):
			there++
		case in && r.State == control.Absent:
			away = append(away, r.Node)
		case primary.brings(sv, p) && (first == nil || r.DirtyBytes+r.LagBytes < first.DirtyBytes+first.LagBytes):
			first = r
		}
	}
	n := len(sv.InSync)
	enough := there > n/2 && n >= sv.Options.MinCopies
	if first == nil || enough || there+1 <= (n+1)/2 || n+1 < sv.Options.MinCopies {
		return "", ""
	}
	next = fmt.Sprintf("wait: it serves once %s is in sync (blockstep wait %s --for primary)", first.Node, sv.Name)
	if len(away) > 0 {
		next += ", or sooner when blockstepd runs on " + strings.Join(away, ", ") + " again"
	}
	return "; it serves once " + onItsWay(first), next
}

// withFewer is the way on for a primary of which so many replicas are gone that it could
// go on with the others, if it were allowed to: it has all that was answered. "" where
// that would not do, or nothing can be changed since there is no Raft leader.
func withFewer(out *control.VolumeStatus, sv *state.Volume, reports map[ident.Node]volumeReport) string {
	primary := reports[sv.Primary]
	led := false
	for _, r := range reports {
		led = led || r.Leads
	}
	n := len(sv.InSync)
	if !led || !primary.holdsEpoch(sv) || n < sv.Options.MinCopies {
		return ""
	}
	there := []string{string(sv.Primary)}
	for i := range out.Replicas {
		r := &out.Replicas[i]
		p := primary.peer(ident.Node(r.Node))
		switch {
		case r.Node == string(sv.Primary) || !sv.InSet(ident.Node(r.Node)):
		case r.State == control.Absent || r.State == control.Failed:
		case p != nil && p.Connected:
			there = append(there, r.Node)
		default:
			return "" // it may answer in a moment
		}
	}
	if len(there) >= min(sv.Options.MinCopies, sv.Majority()) {
		return ""
	}
	return fmt.Sprintf("; to go on with %s alone: blockstep volume set %s --min-copies %d", strings.Join(there, ", "), sv.Name, len(there))
}

// onItsWay says when a replica that is brought up to date will be, and how far that is.
func onItsWay(r *control.ReplicaStatus) string {
	switch {
	case r.Resync != nil && r.Resync.TotalBytes > 0:
		left := ""
		if r.Resync.Left != nil {
			left = fmt.Sprintf(", %v left", time.Duration(*r.Resync.Left)*time.Second)
		}
		return fmt.Sprintf("the resync of %s is done (%d%% of %s%s)", r.Node, 100*r.Resync.DoneBytes/r.Resync.TotalBytes, config.FormatSize(r.Resync.TotalBytes), left)
	case r.State == control.Resyncing:
		return fmt.Sprintf("the resync of %s is done (%s)", r.Node, config.FormatSize(r.DirtyBytes))
	}
	return fmt.Sprintf("%s has caught up (%s of log)", r.Node, config.FormatSize(r.LagBytes))
}
