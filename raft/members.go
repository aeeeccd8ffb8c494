package raft

import (
	"context"
	"errors"
	"fmt"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

const (
	membersWait  = 10 * time.Second // for one change of hashicorp/raft's configuration
	leaderRetry  = 200 * time.Millisecond
	unmarkedNote = "this node could not note its membership"
)

// runLeader does what a new leader owes the cluster: it names the cluster when
// it is new, and brings hashicorp/raft's configuration in line with the nodes of
// the cluster state, which a leader before it may have left half done. On every
// node it notes the membership durably.
func (n *Node) runLeader() {
	defer n.wg.Done()
	changed, stop := n.Watch()
	defer stop()
	for {
		select {
		case <-changed:
		case <-n.halted:
			if err := n.raft.Shutdown().Error(); err != nil {
				n.log.Error("raft did not stop", "err", err)
			}
			return
		case <-n.ctx.Done():
			return
		}
		if id := n.State().ClusterID; id != "" {
			if err := n.markMember(id); errors.Is(err, errForeign) {
				_ = n.fsm.stop(err) // the next turn ends raft, and the daemon says why
				continue
			} else if err != nil {
				n.log.Error(unmarkedNote, "err", err)
			}
		}
		if !n.IsLeader() {
			continue
		}
		if err := n.lead(); err != nil && n.IsLeader() && n.ctx.Err() == nil {
			n.log.Warn("the leader's duties wait", "err", err)
			if !pause(n.ctx, leaderRetry) {
				return
			}
			n.watch.wake()
		}
	}
}

func (n *Node) lead() error {
	ctx, cancel := context.WithTimeout(n.ctx, membersWait)
	defer cancel()
	if n.State().ClusterID == "" {
		if err := n.Barrier(ctx); err != nil {
			return err
		}
		if n.State().ClusterID == "" {
			return n.nameCluster(ctx)
		}
	}
	return n.reconcile(ctx)
}

// nameCluster gives the first command.
func (n *Node) nameCluster(ctx context.Context) error {
	f := n.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return n.translate(err)
	}
	p := &state.InitCluster{Cluster: n.opts.Cluster, ClusterID: randomID()}
	for _, s := range f.Configuration().Servers {
		_, address := splitAddress(s.Address)
		name := NodeOf(string(s.ID))
		node := state.Node{Name: name, Address: address, RaftID: string(s.ID)}
		for _, fo := range n.opts.Founders {
			if fo.Name == name {
				node.Witness = fo.Witness
			}
		}
		p.Nodes = append(p.Nodes, node)
	}
	r, err := n.Apply(ctx, state.Command{InitCluster: p})
	if err != nil {
		return err
	}
	if r.Rule == state.RuleInitOnce {
		return nil
	}
	return r.Err()
}

// reconcile makes hashicorp/raft's configuration that of the cluster state.
// Removals come first: a dead member that stays would make the quorum larger
// just when a new one joins.
func (n *Node) reconcile(ctx context.Context) error {
	f := n.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return n.translate(err)
	}
	s := n.State()
	want := map[hraft.ServerID]hraft.ServerAddress{}
	for _, node := range s.Nodes {
		if node.Lost {
			continue // until it is replaced: as a voter it would take the quorum away again
		}
		want[hraft.ServerID(node.RaftID)] = serverAddress(node.RaftID, node.Address)
	}
	have := map[hraft.ServerID]hraft.ServerAddress{}
	for _, srv := range f.Configuration().Servers {
		have[srv.ID] = srv.Address
		if _, ok := want[srv.ID]; ok {
			continue
		}
		if string(srv.ID) == n.RaftID() {
			// A leader that is no member hands over; the next one removes it.
			return n.TransferLeadership(ctx)
		}
		n.log.Info("removing a node from the Raft group", "raft_id", string(srv.ID))
		if err := n.wait(ctx, n.raft.RemoveServer(srv.ID, 0, timeLeft(ctx))); err != nil {
			return fmt.Errorf("remove %s from the Raft group: %w", srv.ID, err)
		}
	}
	for id, address := range want {
		if have[id] == address {
			continue
		}
		n.log.Info("adding a node to the Raft group", "raft_id", string(id))
		if err := n.wait(ctx, n.raft.AddVoter(id, address, 0, timeLeft(ctx))); err != nil {
			return fmt.Errorf("add %s to the Raft group: %w", id, err)
		}
	}
	return nil
}

// AddNode adds a member, at the leader. Its Raft id is what its FoundInfo says.
func (n *Node) AddNode(ctx context.Context, node state.Node) error {
	return n.changeNodes(ctx, state.Command{AddNode: &state.AddNode{Node: node}})
}

// RemoveNode removes a member that holds no replica, at the leader. Asked to
// remove itself, a leader hands over first and returns ErrNotLeader: ask the
// next one.
func (n *Node) RemoveNode(ctx context.Context, name ident.Node) error {
	if name == n.opts.Node && n.IsLeader() && len(n.State().Nodes) > 1 {
		if err := n.TransferLeadership(ctx); err != nil {
			return err
		}
		return n.translate(hraft.ErrNotLeader)
	}
	return n.changeNodes(ctx, state.Command{RemoveNode: &state.RemoveNode{Name: name}})
}

// ReplaceNode lets a new data_dir (raftID is what its FoundInfo says) take the
// place of a member's lost one, at the leader. address "" leaves the address.
func (n *Node) ReplaceNode(ctx context.Context, name ident.Node, raftID, address string) error {
	return n.changeNodes(ctx, state.Command{ReplaceNode: &state.ReplaceNode{Name: name, RaftID: raftID, Address: address}})
}

func (n *Node) changeNodes(ctx context.Context, c state.Command) error {
	r, err := n.Apply(ctx, c)
	if err != nil {
		return err
	}
	if err := r.Err(); err != nil {
		return err
	}
	if err := n.reconcile(ctx); err != nil && !errors.Is(err, ErrNotLeader) {
		// The command stands, and every leader brings the group in line with
		// it: the change is late, not lost.
		n.log.Warn("the Raft group is not in line with the nodes yet, it is tried again", "err", err)
		n.watch.wake()
	}
	return nil
}
