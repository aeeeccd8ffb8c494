package daemon

import (
	"context"
	"fmt"
	"strings"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// RemoveNode implements control.Backend.
func (b backend) RemoveNode(ctx context.Context, node string, r control.RemoveNode) (out control.ChangedNode, err error) {
	if err := b.ready(ctx); err != nil {
		return out, err
	}
	n := ident.Node(node)
	call := memberCall{Verb: "remove", Name: n}
	if out.Already = call.isDone(b.d.state()); out.Already {
		return out, nil // perhaps by this very command, whose answer was lost
	}
	if err := b.checkNode(node); err != nil {
		return out, err
	}
	up := b.d.nodeUp(n)
	holds := holdingsOf(b.d.state(), n)
	switch {
	case len(holds) > 0 && up:
		next := fmt.Sprintf("run blockstep node drain %s first", node)
		if r.Force {
			next += ": --force is for a node that is gone"
		}
		return out, control.Errorf(control.CodeRefused, next, "%s is up and holds replicas of %s", node, holds.names())
	case len(holds) > 0 && !r.Force:
		return out, control.Errorf(control.CodeRefused,
			fmt.Sprintf("start it, or run blockstep node drain %s where other nodes have room; if it is gone for good: blockstep node remove %s --force", node, node),
			"%s is down and holds replicas that would be lost: %s", node, holds)
	}
	if err := holds.refuse(node); err != nil {
		return out, err
	}
	for _, h := range holds {
		if err := b.giveUp(ctx, h.volume, n); err != nil {
			return out, err
		}
	}
	if out.Already, err = b.changeMember(ctx, call); err == nil {
		out.Warnings = leftWithout(b.d.state(), holds)
	}
	return out, err
}

// leftWithout says what is left of the volumes that have lost a replica, and how to have
// another one in its place: nothing else tells that there were more.
func leftWithout(st *state.State, lost holdings) (out []control.Warning) {
	for _, h := range lost {
		v := st.Volumes[h.volume.ID]
		if v == nil || v.Deleted {
			continue
		}
		text, next := fmt.Sprintf("%s has %d replicas left", v.Name, len(v.Replicas)), fmt.Sprintf("to have one more again: blockstep volume set %s --replicas %d", v.Name, len(v.Replicas)+1)
		switch {
		case needsEach(v):
			text, next = eachNeeded(v)
		case len(v.Replicas) == 1:
			text = fmt.Sprintf("%s has one replica left, on %s: what is lost with that one is gone", v.Name, v.Replicas[0].Node)
		}
		out = append(out, control.Warning{Volume: v.Name, Text: text, Next: next})
	}
	return out
}

// needsEach reports whether a volume is suspended as soon as any of its replicas goes,
// for want of copies. One with a single replica has no choice.
func needsEach(v *state.Volume) bool {
	return v.Options.MinCopies > 1 && len(v.Replicas) <= v.Options.MinCopies
}

// eachNeeded says so, and how to change it.
func eachNeeded(v *state.Volume) (text, next string) {
	return fmt.Sprintf("%s has %d replicas and min_copies %d: the loss of one more suspends it", v.Name, len(v.Replicas), v.Options.MinCopies),
		fmt.Sprintf("to have it go on with fewer then: blockstep volume set %s --min-copies %d; or give it one replica more: blockstep volume set %[1]s --replicas %[3]d",
			v.Name, v.Options.MinCopies-1, len(v.Replicas)+1)
}

// giveUp takes a dead node's replica out of a volume.
func (b backend) giveUp(ctx context.Context, sv *state.Volume, n ident.Node) error {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	if _, err := b.d.applyWhole(ctx, state.Command{RemoveReplica: &state.RemoveReplica{Volume: sv.ID, Node: n}}); err != nil {
		return err
	}
	if err := b.d.awaitVolume(ctx, sv.ID, func(v *state.Volume) bool { return v.Replica(n) == nil }); err != nil {
		return control.Errorf(control.CodeTimeout, "see blockstep status "+sv.Name+", then run this again", "the replica of %s on %s has not left the in-sync set yet: %v", sv.Name, n, err)
	}
	return nil
}

// holding is a replica on a node that is to go, and what would be left without.
type holding struct {
	volume *state.Volume
	left   []ident.Node // other nodes in the in-sync set
	block  string       // why it cannot be given up, and what to do; "" when it can
}

type holdings []holding

func holdingsOf(st *state.State, n ident.Node) (out holdings) {
	for _, v := range st.Live() {
		if v.Replica(n) == nil {
			continue
		}
		h := holding{volume: v}
		for _, m := range v.InSync {
			if m != n {
				h.left = append(h.left, m)
			}
		}
		switch {
		case len(v.Replicas) == 1:
			h.block = fmt.Sprintf("it is the only one: the volume would be gone with it (blockstep volume delete %s, if it is)", v.Name)
		case len(h.left) == 0:
			h.block = fmt.Sprintf("it is the only good one: start %s, or accept the loss with blockstep failover %s --force --accept-data-loss", n, v.Name)
		case v.Primary == n:
			h.block = fmt.Sprintf("it is the primary: run blockstep failover %s", v.Name)
		case v.InSet(n) && len(h.left) < v.Options.MinCopies:
			h.block = fmt.Sprintf("%d in sync would be left, and min_copies is %d: wait until another replica is in sync (blockstep status %s)", len(h.left), v.Options.MinCopies, v.Name)
		}
		out = append(out, h)
	}
	return out
}

func (hs holdings) names() string {
	var out []string
	for _, h := range hs {
		out = append(out, h.volume.Name)
	}
	return strings.Join(out, ", ")
}

// String says what would be lost.
func (hs holdings) String() string {
	var out []string
	for _, h := range hs {
		if h.block != "" {
			out = append(out, h.volume.Name+" ("+h.block+")")
			continue
		}
		var left []string
		for _, n := range h.left {
			left = append(left, string(n))
		}
		out = append(out, fmt.Sprintf("%s (in sync on %s)", h.volume.Name, strings.Join(left, ", ")))
	}
	return strings.Join(out, ", ")
}

// refuse is an error when a volume would be lost; nothing is changed then.
func (hs holdings) refuse(node string) error {
	var bad holdings
	for _, h := range hs {
		if h.block != "" {
			bad = append(bad, h)
		}
	}
	if len(bad) == 0 {
		return nil
	}
	return control.Errorf(control.CodeRefused, "do what stands beside it, then run this again", "%s cannot be removed without loss: its replica of %s", node, bad)
}
