package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
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

// othersKnowUsNot reports whether a majority of the other nodes that this one knows say
// that it is not in their Raft configuration, and none says that it is.
func (d *Daemon) othersKnowUsNot(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, askNode)
	defer cancel()
	own := d.raft.RaftID()
	var mu sync.Mutex
	var wg sync.WaitGroup
	without, with := 0, 0
	others := map[ident.Node]string{}
	for name, m := range d.state().Nodes {
		others[name] = m.Address
	}
	if len(others) == 0 {
		// After a restart raft applies its log only when a leader says how far.
		for _, n := range d.cfg.Nodes {
			others[ident.Node(n.Name)] = n.Address
		}
	}
	delete(others, d.self)
	for name, address := range others {
		wg.Go(func() {
			info, err := d.Founding(ctx, name, address)
			if err != nil || !info.Founded || len(info.Members) == 0 {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if slices.Contains(info.Members, own) {
				with++
			} else {
				without++
			}
		})
	}
	wg.Wait()
	return with == 0 && 2*without > len(others)
}
