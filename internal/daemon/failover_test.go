package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
)

// TestWhoCanTakeOver: whoever names a node that cannot be the primary is told which can
// now, and how the others are; the one that was named and the primary are neither.
func TestWhoCanTakeOver(t *testing.T) {
	for want, states := range map[string]map[string]control.ReplicaState{
		"can take over: gamma, delta":                                   {"gamma": control.InSync, "delta": control.InSync},
		"can take over: gamma; cannot: delta (Absent)":                  {"gamma": control.InSync, "delta": control.Absent},
		"no other can take over now: gamma (Failed), delta (Resyncing)": {"gamma": control.Failed, "delta": control.Resyncing},
		"no other node has a replica that could take over":              {},
	} {
		st := control.VolumeStatus{Primary: "alpha", InSync: []string{"alpha", "beta", "gamma", "delta"}}
		for _, n := range []string{"alpha", "beta", "gamma", "delta"} {
			state, ok := states[n]
			if n == "alpha" || n == "beta" {
				state, ok = control.InSync, true
			}
			if ok {
				st.Replicas = append(st.Replicas, control.ReplicaStatus{Node: n, State: state})
			}
		}
		if got := choicesOf(st, "beta"); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	joining := control.VolumeStatus{InSync: []string{"alpha"}, Replicas: []control.ReplicaStatus{{Node: "alpha", State: control.InSync}, {Node: "beta", State: control.InSync}}}
	if got, want := choicesOf(joining, "nosuch"), "can take over: alpha; cannot: beta (not in the in-sync set)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestFailoverWithoutALeader: where a majority of the nodes is gone, a failover says so
// once an election would be over.
func TestFailoverWithoutALeader(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	alpha.create("db", 1<<20)
	alpha.healthy("db")
	nodes["beta"].halt()
	nodes["gamma"].halt()
	alpha.eventually(20*time.Second, "it has no Raft leader", func(context.Context) error {
		if leader, _ := alpha.daemon.Load().raft.Leader(); leader != "" {
			return fmt.Errorf("it is %s", leader)
		}
		return nil
	})
	before := time.Now()
	_, err := alpha.client.Failover(t.Context(), "db", control.Failover{Force: true, AcceptDataLoss: true})
	var e *control.Error
	if !errors.As(err, &e) || e.Code != control.CodeTimeout || !strings.Contains(e.Message, "no Raft leader") || !strings.Contains(e.Next, "recover --help") {
		t.Errorf("%v", err)
	}
	if took := time.Since(before); took > electionTime+8*time.Second {
		t.Errorf("it said so after %v", took)
	}
}
