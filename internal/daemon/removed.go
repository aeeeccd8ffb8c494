package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft"
	"github.com/blockstep/blockstep/raft/state"
)

const (
	// membershipEvery is how often a node asks itself whether it is a member still.
	membershipEvery = time.Second
	// leaderless is for how long it knows of no Raft leader before it asks the
	// others: nobody tells a node that is removed, the leader only falls silent.
	leaderless = 5 * time.Second
)

// ErrRemoved is returned (wrapped) by Run when the node is no member any more:
// to start it again would end in the same way.
var ErrRemoved = errors.New("this node is no member any more")

// runMembership stops the daemon when the node was removed from the cluster, or
// another data_dir was put in its place: what it would serve is the cluster's no
// more, and it would wait for a leader for ever.
func (d *Daemon) runMembership(ctx context.Context) {
	was := false
	var since time.Time // when the leader was lost
	for pause(ctx, membershipEvery) {
		me := d.state().Nodes[d.self]
		member := me != nil && me.RaftID == d.raft.RaftID()
		was = was || member
		leader, _ := d.raft.Leader()
		switch {
		case was && !member:
		case leader != "" || !d.raft.FoundInfo().Founded:
			// It has a leader, or has never been reached by one. (One that was removed
			// right after it had been reached has not always found out that it was in.)
			since = time.Time{}
			continue
		case since.IsZero():
			since = time.Now()
			continue
		case time.Since(since) < leaderless || !d.othersKnowUsNot(ctx):
			continue
		}
		d.fail(fmt.Errorf("%w: node %s was removed from cluster %s, or replaced by another data_dir, and stops; to have it back: empty its data_dir %s, start blockstepd, then on a member: blockstep node add %s --address %s",
			ErrRemoved, d.self, d.cfg.Cluster, d.cfg.DataDir, d.self, d.cfg.Self().Address))
		return
	}
}

// othersKnowUsNot asks all nodes that this one can name, and those that they name,
// whether it is a member; judgeRemoved is the rule.
func (d *Daemon) othersKnowUsNot(ctx context.Context) bool {
	own := d.raft.FoundInfo()
	known := map[ident.Node]string{}
	for i, id := range own.Members {
		// After a restart raft applies its log only when a leader says how far, and
		// the nodes of the configuration are the founders, at the best.
		known[raft.NodeOf(id)] = own.Addresses[i]
	}
	for name, m := range d.state().Nodes {
		known[name] = m.Address
	}
	ask := maps.Clone(known)
	for _, n := range d.cfg.Nodes {
		if _, ok := known[ident.Node(n.Name)]; !ok {
			ask[ident.Node(n.Name)] = n.Address
		}
	}
	if len(known) == 0 {
		known = maps.Clone(ask)
	}
	words := d.askAll(ctx, ask, nil)
	named := map[ident.Node]string{}
	for _, w := range words {
		for i, id := range w.Members {
			if name := raft.NodeOf(id); i < len(w.Addresses) && len(named) < state.NodesMax {
				named[name] = w.Addresses[i]
			}
		}
	}
	words = d.askAll(ctx, named, words)
	return judgeRemoved(d.self, own, slices.Collect(maps.Keys(known)), words)
}

// askAll adds the words of nodes on the founding to those that it has of others.
func (d *Daemon) askAll(ctx context.Context, nodes map[ident.Node]string, words map[ident.Node]raft.FoundInfo) map[ident.Node]raft.FoundInfo {
	ctx, cancel := context.WithTimeout(ctx, askNode)
	defer cancel()
	out := map[ident.Node]raft.FoundInfo{}
	maps.Copy(out, words)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for name, address := range nodes {
		if _, ok := words[name]; ok || name == d.self {
			continue
		}
		wg.Go(func() {
			info, err := d.Founding(ctx, name, address)
			if err != nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			out[name] = info
		})
	}
	wg.Wait()
	return out
}

// judgeRemoved reports whether the words of others prove that a node is no member of
// their cluster: nobody has it in its Raft configuration, and of the other nodes that
// it knows as members, or of those that one of the others knows as such, a majority
// has a configuration without it. A configuration with it was committed only by a
// majority of these: so few that lag behind it, or are cut off, are never a majority.
// A cluster of another id counts where most of the known ones are of it: after a
// recovery of the others that is what they are (ADR 0020), and what this node knew is
// no more. Whom strangers name says nothing.
func judgeRemoved(self ident.Node, own raft.FoundInfo, known []ident.Node, words map[ident.Node]raft.FoundInfo) bool {
	without := map[ident.Node]bool{}
	for name, w := range words {
		switch {
		case !w.Founded || len(w.Members) == 0:
		case slices.Contains(w.Members, own.RaftID):
			return false
		default:
			without[name] = true
		}
	}
	majority := func(of []ident.Node) bool {
		n := 0
		for _, name := range of {
			if without[name] {
				n++
			}
		}
		return 2*n > len(of)
	}
	if majority(slices.DeleteFunc(slices.Clone(known), func(n ident.Node) bool { return n == self })) {
		return true
	}
	for name, w := range words {
		if !without[name] || own.ClusterID != w.ClusterID {
			delete(without, name)
		}
	}
	for name := range without {
		var members []ident.Node
		for _, id := range words[name].Members {
			// Also one of our name: another data_dir has taken our place then.
			members = append(members, raft.NodeOf(id))
		}
		if majority(members) {
			return true
		}
	}
	return false
}
