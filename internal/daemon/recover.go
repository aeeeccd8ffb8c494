package daemon

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/raft"
	"github.com/blockstep/blockstep/raft/state"
)

// RecoverOptions say how a recovery from a lost majority goes.
type RecoverOptions struct {
	Keep    []string // nodes that go on; empty: this one alone
	Force   bool     // also where a majority of the nodes answers
	Preview bool     // only look
}

// Recover makes the nodes of Keep the whole Raft group, in the data_dir of this
// node, whose daemon is stopped. It is refused while so many of the others
// answer that the cluster may have its majority: then nothing is to be recovered.
func Recover(ctx context.Context, cfg *config.Config, o RecoverOptions, logger *slog.Logger) (control.Recovery, error) {
	var none control.Recovery
	keep := []ident.Node{}
	for _, k := range o.Keep {
		keep = append(keep, ident.Node(k))
	}
	if len(keep) == 0 {
		keep = append(keep, ident.Node(cfg.Node))
	}
	slices.Sort(keep)
	keep = slices.Compact(keep)
	r := raft.Recovery{
		Dir: cfg.DataDir, Cluster: cfg.Cluster, Node: ident.Node(cfg.Node), Keep: keep, Preview: true, Logger: logger, FS: vfs.OS(),
	}
	look, err := raft.Recover(r)
	if errors.Is(err, raft.ErrNoState) {
		return none, control.Errorf(control.CodeRefused, "run it on a node that was a member; an empty node needs blockstep node replace "+cfg.Node+" on a member", "%v", err)
	}
	if err != nil {
		return none, control.Errorf(control.CodeRefused, "", "%v", err)
	}
	up := answering(ctx, cfg, look.State)
	if voters := len(look.State.Nodes); !o.Force && 2*(len(up)+1) > voters && len(up) > 0 {
		return none, control.Errorf(control.CodeRefused, "start blockstepd here instead; if they are really no use, stop them first",
			"%s of %d nodes answer(s) and with this one that is a majority: nothing has to be recovered", strings.Join(up, ", "), voters)
	}
	if !o.Preview {
		r.Preview = false
		if look, err = raft.Recover(r); err != nil {
			return none, control.Errorf(control.CodeFailed, "", "%v", err)
		}
	}
	return recovery(cfg, look, keep), nil
}

func recovery(cfg *config.Config, look raft.Recovered, keep []ident.Node) control.Recovery {
	out := control.Recovery{Cluster: cfg.Cluster, Index: look.Index, Keep: []string{}, Lost: []string{}, Volumes: []control.RecoveredVolume{}}
	for _, k := range keep {
		out.Keep = append(out.Keep, string(k))
	}
	for _, n := range look.State.NodeNames() {
		if look.State.Nodes[n].Lost {
			out.Lost = append(out.Lost, string(n))
		}
	}
	for _, v := range look.State.Live() {
		rv := control.RecoveredVolume{Volume: v.Name, Replicas: []string{}, InSync: []string{}}
		for _, r := range v.Replicas {
			if slices.Contains(keep, r.Node) {
				rv.Replicas = append(rv.Replicas, string(r.Node))
			}
		}
		for _, n := range v.InSync {
			if slices.Contains(keep, n) {
				rv.InSync = append(rv.InSync, string(n))
			}
		}
		rv.Next = "blockstep failover " + v.Name + " --force --accept-data-loss"
		switch {
		case len(rv.Replicas) == 0:
			rv.Next = "none of its replicas is left: restore it from a backup"
		case 2*len(rv.InSync) > len(v.InSync):
			rv.Next = "it goes on by itself"
		}
		out.Volumes = append(out.Volumes, rv)
	}
	return out
}

// answering lists the other members whose daemons answer and are members of a
// cluster.
func answering(ctx context.Context, cfg *config.Config, s *state.State) []string {
	ctx, cancel := context.WithTimeout(ctx, askNode)
	defer cancel()
	rpc := newRPCClient(cfg.Cluster, ident.Node(cfg.Node), func(ident.Node) (string, bool) { return "", false })
	defer rpc.close()
	var mu sync.Mutex
	var wg sync.WaitGroup
	var up []string
	for name, n := range s.Nodes {
		if string(name) == cfg.Node {
			continue
		}
		wg.Go(func() {
			var info raft.FoundInfo
			if err := rpc.callAddress(ctx, name, n.Address, pathFounding, struct{}{}, &info); err == nil && info.Founded {
				mu.Lock()
				defer mu.Unlock()
				up = append(up, string(name))
			}
		})
	}
	wg.Wait()
	slices.Sort(up)
	return up
}
