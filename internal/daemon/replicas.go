package daemon

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// checkReplicas says why a volume cannot have so many replicas, of which it has fewer
// now or as many.
func (d *Daemon) checkReplicas(sv *state.Volume, n int) error {
	st, has := d.state(), sv.Staying()
	from, to, moves := moving(st, sv)
	storing, witnesses := 0, 0
	for _, m := range st.Nodes {
		switch {
		case m.Witness:
			witnesses++
		case !m.Lost:
			storing++
		}
	}
	switch {
	case n < 1 || n > state.ReplicasMax:
		return control.Errorf(control.CodeUsage, "", "a volume has 1 to %d replicas, not %d", state.ReplicasMax, n)
	case n < has:
		return control.Errorf(control.CodeRefused,
			"replicas go with their nodes: blockstep node drain NODE moves them to others, and blockstep node remove NODE --force gives those of a dead node up",
			"%s has %d replicas, and this makes no fewer", sv.Name, has)
	case moves:
		// It counts twice for now: there would be a copy fewer than was asked for.
		return control.Errorf(control.CodeRefused,
			fmt.Sprintf("run it again when that has ended; if it was cut off: blockstep node drain %s goes on with it", from),
			"the replica of %s on %s is being moved to %s", sv.Name, from, to)
	case n > has && n > storing:
		others := ""
		if witnesses > 0 {
			others = ", beside those that only vote"
		}
		return control.Errorf(control.CodeRefused, "add one first: blockstep node add NAME --address HOST:PORT",
			"%s cannot have %d replicas: there are %d nodes to store them%s", sv.Name, n, storing, others)
	}
	return nil
}

// setOptions changes what is given: the replicas first, since there are no more copies
// than those. What the cluster state would refuse afterwards is refused before.
func (d *Daemon) setOptions(ctx context.Context, sv *state.Volume, r control.SetOptions) error {
	options := state.Command{SetOptions: &state.SetOptions{
		Volume: sv.ID, MinCopies: r.MinCopies, ResyncRateMax: r.ResyncRateMax, ResyncRateMin: r.ResyncRateMin,
	}}
	if r.Replicas != nil {
		if err := d.checkReplicas(sv, *r.Replicas); err != nil {
			return err
		}
		if err := d.raiseReplicas(ctx, sv, *r.Replicas, options); err != nil {
			return err
		}
		if err := d.keepFilled(ctx, sv); err != nil {
			return err
		}
		if r.MinCopies == nil && r.ResyncRateMax == nil && r.ResyncRateMin == nil {
			return nil
		}
	}
	return d.applyTo(ctx, sv, options)
}

// keepFilled has those replicas stay that drains had added, which were cut off: they were
// counted among those that are asked for now.
func (d *Daemon) keepFilled(ctx context.Context, sv *state.Volume) error {
	for _, rep := range sv.Replicas {
		to := filled(d.state(), sv, rep.Node)
		if to == "" {
			continue
		}
		res, err := d.applyWhole(ctx, state.Command{AddEvent: &state.AddEvent{Event: stays(sv.Name, to)}})
		if err != nil {
			return err
		}
		d.until(ctx, func(s *state.State) bool { return s.NextEvent > res.Event })
	}
	return nil
}

// raiseReplicas gives a volume replicas until it has n of them. They are there when it
// returns, and not filled as yet. Nothing is done where not all of them find a place, or
// then would be refused.
func (d *Daemon) raiseReplicas(ctx context.Context, sv *state.Volume, n int, then state.Command) error {
	planned := *sv
	after := d.state()
	var places []ident.Node
	for has := sv.Staying(); has < n; has++ {
		to, without := d.placeFor(ctx, &planned)
		if to == "" {
			return d.noPlace(&planned, n, without)
		}
		places = append(places, to)
		planned.Replicas = append(slices.Clone(planned.Replicas), state.Replica{Node: to})
		after, _ = after.Apply(state.Command{AddReplica: &state.AddReplica{Volume: sv.ID, Node: to}})
	}
	if _, res := after.Apply(then); !res.OK {
		return d.refusal(res.Err())
	}
	for _, to := range places {
		if v := d.state().Volumes[sv.ID]; v == nil || v.Staying() >= n {
			return nil // somebody else has asked for it too
		}
		res, err := d.addReplica(ctx, sv.ID, to, n)
		switch {
		case err != nil:
			return err
		case res.Rule == state.RuleEnough:
			return nil // through another node, at the same time
		case res.Rule == state.RuleReplicaExists:
			// Likewise, and on the very node that was chosen here: there may be more to do.
			if v := d.state().Volumes[sv.ID]; v != nil && v.Replica(to) != nil {
				return d.raiseReplicas(ctx, v, n, then)
			}
			return deletedMeanwhile(sv, d.refusal(res.Err()))
		case !res.OK:
			return deletedMeanwhile(sv, d.refusal(res.Err()))
		}
	}
	return nil
}

// addReplica adds a replica to a volume that shall have n of them, 0 where that is no
// matter. It returns when this node sees the replica there (where the Raft leader is
// another one that is a moment later, and until then it looks like one that was
// removed), or for a moment waits to see who has done it instead. It is refused where
// there are n already.
func (d *Daemon) addReplica(ctx context.Context, id ident.Volume, to ident.Node, n int) (state.Result, error) {
	add := &state.AddReplica{Volume: id, Node: to}
	if d.state().Understood(state.VersionCompares) {
		add.AtMost = n
	}
	res, err := d.apply(ctx, state.Command{AddReplica: add})
	if err != nil {
		return res, d.explain(err)
	}
	if res.OK {
		return res, d.awaitVolume(ctx, id, func(v *state.Volume) bool { return v.Replica(to) != nil })
	}
	ctx, cancel := context.WithTimeout(ctx, seenWait)
	defer cancel()
	d.until(ctx, func(s *state.State) bool {
		v := s.Volumes[id]
		return v == nil || v.Replica(to) != nil || v.Staying() >= n
	})
	return res, nil
}

// noPlace says why there is no node for one more replica, though there are enough.
func (d *Daemon) noPlace(sv *state.Volume, n int, without []string) error {
	down := d.downWithout(sv)
	why, next := "a replica of it is about to leave", "run it again in a moment"
	switch {
	case len(without) > 0:
		why, next = strings.Join(without, ", "), "make room there, or add a node (blockstep node add), then run this again"
	case len(down) > 0:
		why, next = "not up: "+strings.Join(down, ", "), "start blockstepd there, then run this again"
	}
	return control.Errorf(control.CodeRefused, next, "%s cannot have %d replicas now: %s", sv.Name, n, why)
}

// downWithout are the nodes that could store a volume and have none of it, but are not up.
func (d *Daemon) downWithout(sv *state.Volume) (down []string) {
	st := d.state()
	for _, name := range st.NodeNames() {
		if m := st.Nodes[name]; !m.Witness && !m.Lost && sv.Replica(name) == nil && !d.nodeUp(name) {
			down = append(down, string(name))
		}
	}
	return down
}
