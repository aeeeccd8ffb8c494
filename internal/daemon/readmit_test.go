package daemon

import (
	"os"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/raft/state"
)

// TestOldNewsOfAFailure: a replica that was taken back has the id of the one that
// failed. Until this node has the whole cluster state, a failure of that epoch or
// before is old news; a later one is not.
func TestOldNewsOfAFailure(t *testing.T) {
	d := &Daemon{
		cfg: &config.Config{DataDir: t.TempDir()}, self: "alpha", fs: vfs.OS(), current: make(chan struct{}),
		readmits: map[ident.Volume]*readmission{},
	}
	sv := &state.Volume{ID: 7, Name: "db", Epoch: 3, Replicas: []state.Replica{{Node: "alpha", Replica: 1, Failed: true}, {Node: "beta", Replica: 2, Failed: true}}}
	want := func(what string, failed bool) {
		t.Helper()
		m := d.viewOf(sv).Members
		if m[0].Failed != failed || !m[1].Failed {
			t.Errorf("%s: failed is %v, and %v for the other", what, m[0].Failed, m[1].Failed)
		}
	}
	if err := os.MkdirAll(d.replicaDir(sv.ID), 0o700); err != nil {
		t.Fatal(err)
	}
	want("never taken back", true)
	d.readmits[sv.ID] = &readmission{epoch: 3, until: time.Now().Add(time.Hour)}
	want("open at an operator's word", false)
	d.readmits[sv.ID].until = time.Now()
	want("the time is over", true)
	if err := d.markReadmitted(sv.ID, 3); err != nil {
		t.Fatal(err)
	}
	want("a state from before", false)
	sv.Epoch = 4
	want("it failed again", true)
}

// With the whole state it is the newest that counts, whatever was read before.
func TestTakenBack(t *testing.T) {
	vol := func(r ...state.Replica) *state.Volume { return &state.Volume{ID: 7, Replicas: r} }
	old := vol(state.Replica{Node: "alpha", Replica: 1, Failed: true})
	for _, tc := range []struct {
		what string
		now  *state.Volume
		want bool
	}{
		{"it says the same", old, false},
		{"it was taken back", vol(state.Replica{Node: "alpha", Replica: 1}), true},
		{"another one is in its place", vol(state.Replica{Node: "alpha", Replica: 2}), false},
		{"there is none any more", vol(state.Replica{Node: "beta", Replica: 1}), false},
		{"there is no such volume", nil, false},
	} {
		if got := takenBack(old, tc.now, "alpha"); got != tc.want {
			t.Errorf("%s: taken back: %v", tc.what, got)
		}
	}
}
