package state

import (
	"fmt"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
)

// founded is a cluster of one node, to invite others into.
func founded(t *testing.T) *State {
	t.Helper()
	return must(t, New(), Command{InitCluster: &InitCluster{Cluster: "c", ClusterID: "1", Nodes: []Node{{Name: "alpha", Address: "a:1", RaftID: "alpha/1"}}}})
}

func must(t *testing.T, s *State, c Command) *State {
	t.Helper()
	next, r := s.Apply(c)
	if !r.OK {
		t.Fatalf("%s: %v", c.Kind(), r.Err())
	}
	return next
}

// open lists the invitations as text, and the token of each among known.
func open(s *State, known ...string) string {
	out := ""
	for _, i := range s.Invitations() {
		token := "?"
		for _, k := range known {
			if i.IsFor(k) {
				token = k
			}
		}
		out += fmt.Sprintf("%s@%s:%s witness=%v expires=%d;", i.Name, i.Address, token, i.Witness, i.Expires)
	}
	return out
}

// TestInvitations: one is for a name, open until that node is added by whichever
// way, replaced by a newer one, and in the snapshot; the token itself is not.
func TestInvitations(t *testing.T) {
	s := founded(t)
	if got := open(s); got != "" {
		t.Errorf("before the first: %s", got)
	}
	delta := Invitation{Name: "delta", Address: "d:1", Witness: true, Expires: 1 << 60}
	s = must(t, s, delta.Command("first", "then"))
	s = must(t, s, Invitation{Name: "beta", Address: "b:1", Expires: 7}.Command("other", "then"))
	const both = "beta@b:1:other witness=false expires=7;delta@d:1:first witness=true expires=1152921504606846976;"
	if got := open(s, "first", "other"); got != both {
		t.Errorf("got  %s\nwant %s", got, both)
	}
	raw, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := Decode(raw)
	if err != nil {
		t.Fatal(err)
	}
	if got := open(back, "first", "other"); got != both {
		t.Errorf("from the snapshot: %s", got)
	}
	s = must(t, s, delta.Command("second", "then"))
	const newer = "beta@b:1:other witness=false expires=7;delta@d:1:second witness=true expires=1152921504606846976;"
	if got := open(s, "first", "second", "other"); got != newer {
		t.Errorf("the newest does not count: %s", got)
	}
	s = must(t, s, Command{AddNode: &AddNode{Node: Node{Name: "delta", Address: "d:1", RaftID: "delta/1"}}})
	const used = "beta@b:1:other witness=false expires=7;"
	if got := open(s, "other"); got != used {
		t.Errorf("after the node was added: %s", got)
	}
	s = must(t, s, Command{RemoveNode: &RemoveNode{Name: "delta"}})
	if got := open(s, "other"); got != used {
		t.Errorf("the token is good again after the node was removed: %s", got)
	}
}

// TestInvitationsOfOtherBuilds: a command that invites is one that the release
// before knows, and an event that lacks something invites nobody.
func TestInvitationsOfOtherBuilds(t *testing.T) {
	c := Invitation{Name: "delta", Address: "d:1", Expires: 7}.Command("tok", "then")
	if c.Kind() != "add-event" || Version != 1 {
		t.Errorf("%s in version %d: a node of the release before stops at it", c.Kind(), Version)
	}
	s := founded(t)
	for _, drop := range []string{fieldToken, fieldAddress, fieldExpires, "name"} {
		c := Invitation{Name: "delta", Address: "d:1", Expires: 7}.Command("tok", "then")
		delete(c.AddEvent.Event.Fields, drop)
		if drop == "name" {
			c.AddEvent.Event.Node = ident.Node("../x")
		}
		if got := open(must(t, s, c)); got != "" {
			t.Errorf("without its %s: %s", drop, got)
		}
	}
}
