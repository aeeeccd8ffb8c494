package state

import (
	"slices"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
)

// All who are kept come to the same cluster id by themselves, in whatever order they are
// named, and by a recovery that gives somebody up to another one; once more changes nothing.
// Who was given up is not kept by a later one.
func TestARecoveredClusterIsAnotherOne(t *testing.T) {
	s := New()
	s.Cluster, s.ClusterID = "prod", "0f0e"
	for _, n := range []ident.Node{"alpha", "beta", "gamma", "delta", "epsilon"} {
		s.Nodes[n] = &Node{Name: n, RaftID: string(n) + "/1", Address: string(n) + ":1"}
	}
	recovered := func(s *State, keep ...ident.Node) *State {
		t.Helper()
		next, err := s.Recovered(keep)
		if err != nil {
			t.Fatal(err)
		}
		return next
	}
	a, b := recovered(s, "alpha", "beta"), recovered(s.clone(), "beta", "alpha", "beta")
	if a.ClusterID == s.ClusterID || a.ClusterID == "" || a.ClusterID != b.ClusterID {
		t.Errorf("%q has become %q and %q", s.ClusterID, a.ClusterID, b.ClusterID)
	}
	if got := recovered(a, "alpha", "beta"); got.ClusterID != a.ClusterID {
		t.Errorf("once more it has become %q", got.ClusterID)
	}
	alone := recovered(a, "alpha")
	if ids := []string{s.ClusterID, a.ClusterID}; slices.Contains(ids, alone.ClusterID) || alone.ClusterID == recovered(s, "alpha").ClusterID {
		t.Errorf("alpha alone is %q as before", alone.ClusterID)
	}
	if got, err := alone.Recovered([]ident.Node{"alpha", "beta"}); err == nil {
		t.Errorf("one that was given up is kept: %+v", got.Nodes["beta"])
	}
	if s.ClusterID != "0f0e" || s.Nodes["gamma"].Lost {
		t.Error("the state that was recovered has changed")
	}
}
