package daemon

import (
	"slices"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// A primary that is handed over goes to who has the fewest, and never to itself.
func TestHeirs(t *testing.T) {
	v := &state.Volume{Primary: "b", InSync: []ident.Node{"a", "b", "c", "d"}}
	if got := heirsOf(v, map[ident.Node]int{"a": 2, "c": 1, "d": 1}); !slices.Equal(got, []ident.Node{"c", "d", "a"}) {
		t.Errorf("%v", got)
	}
	if len(v.InSync) != 4 {
		t.Error("the volume has changed")
	}
}
