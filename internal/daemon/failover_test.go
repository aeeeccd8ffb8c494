package daemon

import (
	"testing"

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
