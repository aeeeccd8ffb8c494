package state

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/blockstep/blockstep/internal/ident"
)

// Recovered is the state with which the nodes of keep go on when the other
// nodes are gone for good, and with them the majority of the Raft group. The
// others stay members by name, with their replicas, but are Lost: out of the
// group until an operator replaces or removes them, and their Raft ids never
// come back. Nothing is decided about volumes: that is for a forced failover.
// Every node of keep must be a member that was not given up before: such a one has
// another id, and as one of the group would keep the others from a majority. The
// receiver is left as it is. From here on it is another cluster: by its id the lost
// nodes, should they come back with what they had, are told from members, and cannot
// lead this one back to where it was.
func (s *State) Recovered(keep []ident.Node) (*State, error) {
	for _, name := range keep {
		if s.Nodes[name] == nil {
			return nil, fmt.Errorf("node %q is no member of cluster %q: its members are %v", name, s.Cluster, s.NodeNames())
		}
		if s.Nodes[name].Lost {
			return nil, fmt.Errorf("node %q was given up by an earlier recovery, and what it has is another cluster's: keep those that were kept then, and take it in on an empty data_dir by 'blockstep node replace %s'", name, name)
		}
	}
	if len(keep) == 0 {
		return nil, fmt.Errorf("no node of cluster %q would be left", s.Cluster)
	}
	next := s.clone()
	var lost []string
	for name, n := range next.Nodes {
		if slices.Contains(keep, name) || n.Lost {
			continue
		}
		gone := *n
		gone.Lost = true
		next.Nodes[name] = &gone
		next.Removed = appendBounded(next.Removed, gone.RaftID, RemovedMax)
		lost = append(lost, string(name))
	}
	slices.Sort(lost)
	if len(lost) > 0 {
		next.ClusterID = recoveredID(s.ClusterID, keep)
	}
	// Several nodes that are kept must come to the same state, so that no clock
	// is asked: the time is that of what happened last.
	var last int64
	if n := len(s.Events); n > 0 {
		last = s.Events[n-1].Time
	}
	next.event(&Command{Time: last}, nil, Event{
		Name: "cluster-recovered", Node: keep[0],
		Text: clip(fmt.Sprintf("an operator recovered the cluster state on %v; lost are %s", keep, strings.Join(lost, ", "))),
	})
	return next, nil
}

// recoveredID is the id of a cluster after a recovery: the same at each node that is
// kept, which all run it by themselves.
func recoveredID(before string, keep []ident.Node) string {
	names := make([]string, 0, len(keep))
	for _, k := range keep {
		names = append(names, string(k))
	}
	slices.Sort(names)
	sum := sha256.Sum256([]byte("recovered\x00" + before + "\x00" + strings.Join(slices.Compact(names), "\x00")))
	return hex.EncodeToString(sum[:16])
}
