package daemon

import (
	"fmt"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// TestDrainTakesNoOldReplica: what takes the place of a drained replica is one that a
// drain has added and that is not in sync yet. A member that is away, or on its way
// back, was a copy before: to count it would leave one fewer, or wait for ever.
func TestDrainTakesNoOldReplica(t *testing.T) {
	added := func(node string) state.Event {
		return state.Event{Name: "replica-added", Volume: "db", Node: ident.Node(node)}
	}
	set := func(nodes ...ident.Node) state.Event {
		return state.Event{Name: "set-changed", Volume: "db", Fields: map[string]string{"to": fmt.Sprint(nodes)}}
	}
	other := func(e state.Event) state.Event {
		e.Volume = "other"
		return e
	}
	for name, c := range map[string]struct {
		events []state.Event
		want   ident.Node
	}{
		"a member is away":                    {[]state.Event{set("b", "c")}, ""},
		"nothing is known of it":              {nil, ""},
		"added just now":                      {[]state.Event{set("b", "c"), added("d")}, "d"},
		"added, and a member left since":      {[]state.Event{added("d"), set("b", "c")}, "d"},
		"added once, in sync since, and away": {[]state.Event{added("d"), set("b", "c", "d"), set("b", "c")}, ""},
		"added anew":                          {[]state.Event{added("d"), set("b", "c", "d"), set("b", "c"), added("d")}, "d"},
		"added to another volume":             {[]state.Event{other(added("d"))}, ""},
		"in sync at another volume":           {[]state.Event{added("d"), other(set("b", "c", "d"))}, "d"},
	} {
		sv := &state.Volume{Name: "db", InSync: []ident.Node{"b", "c"}, Replicas: []state.Replica{{Node: "a"}, {Node: "b"}, {Node: "c"}, {Node: "d"}}}
		if got := joining(&state.State{Events: c.events}, sv, "b"); got != c.want {
			t.Errorf("%s: %q is taken, not %q", name, got, c.want)
		}
	}
	failed := &state.Volume{Name: "db", InSync: []ident.Node{"b"}, Replicas: []state.Replica{{Node: "b"}, {Node: "d", Failed: true}}}
	if got := joining(&state.State{Events: []state.Event{added("d")}}, failed, "b"); got != "" {
		t.Errorf("a failed replica is taken: %q", got)
	}
}
