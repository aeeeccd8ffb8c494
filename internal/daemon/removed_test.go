package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft"
)

// TestJudgeRemoved: what others must say before a node believes that it was removed.
func TestJudgeRemoved(t *testing.T) {
	ids := func(names ...string) []string {
		for i := range names {
			names[i] += "/1"
		}
		return names
	}
	word := func(members ...string) raft.FoundInfo {
		return raft.FoundInfo{Founded: true, ClusterID: "7", Members: ids(members...)}
	}
	replaced := word("a", "b")
	replaced.Members = append(replaced.Members, "c/2")
	foreign := word("a", "b", "x")
	foreign.ClusterID = "8"
	for what, tc := range map[string]struct {
		known []ident.Node
		words map[ident.Node]raft.FoundInfo
		want  bool
	}{
		"nobody answers": {[]ident.Node{"a", "b", "c"}, nil, false},
		"all others":     {[]ident.Node{"a", "b", "c"}, map[ident.Node]raft.FoundInfo{"a": word("a", "b"), "b": word("a", "b")}, true},
		"replaced":       {[]ident.Node{"a", "b", "c"}, map[ident.Node]raft.FoundInfo{"a": replaced, "b": replaced}, true},
		"one of two":     {[]ident.Node{"a", "b", "c"}, map[ident.Node]raft.FoundInfo{"a": word("a", "b")}, false},
		"one knows it":   {[]ident.Node{"a", "b", "c"}, map[ident.Node]raft.FoundInfo{"a": word("a", "b"), "b": word("a", "b", "c")}, false},
		"nothing known":  {[]ident.Node{"a", "b", "c"}, map[ident.Node]raft.FoundInfo{"a": {Founded: true}, "b": {}}, false},
		"the others were recovered": {[]ident.Node{"a", "b", "c"}, map[ident.Node]raft.FoundInfo{
			"a": foreign, "b": foreign,
		}, true},
		"strangers": {[]ident.Node{"a", "b", "c"}, map[ident.Node]raft.FoundInfo{
			"a": foreign, "x": foreign,
		}, false},
		// Of those that it knows most are gone; the members that are left agree.
		"others came": {[]ident.Node{"a", "b", "c"}, map[ident.Node]raft.FoundInfo{
			"a": word("a", "d", "e"), "d": word("a", "d", "e"),
		}, true},
		"others came, and only one answers": {[]ident.Node{"a", "b", "c"}, map[ident.Node]raft.FoundInfo{"a": word("a", "d", "e")}, false},
		// c has joined a and b: committed by a and c, b lags behind and a is down.
		"one that lags": {[]ident.Node{"a", "b", "c"}, map[ident.Node]raft.FoundInfo{"b": word("a", "b")}, false},
	} {
		own := raft.FoundInfo{Node: "c", RaftID: "c/1", ClusterID: "7", Founded: true}
		if got := judgeRemoved("c", own, tc.known, tc.words); got != tc.want {
			t.Errorf("%s: %v", what, got)
		}
	}
}

// TestRemovedWhileDown: a node that was removed while it was down, and of whose
// configuration's other nodes most are gone, asks the members that its Raft log names,
// and those that they name.
func TestRemovedWhileDown(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha, beta, gamma := nodes["alpha"], nodes["beta"], nodes["gamma"]
	list := "  alpha: {address: " + alpha.config().Self().Address + "}\n"
	add := func(name string) *testNode {
		address := freeAddress(t)
		n := alpha.beside(name, list+"  "+name+": {address: "+address+"}\n")
		n.start()
		alpha.eventually(20*time.Second, "node add", func(ctx context.Context) error {
			_, err := alpha.client.AddNode(ctx, control.AddNode{Name: name, Address: address})
			return err
		})
		return n
	}
	remove := func(n *testNode) {
		alpha.eventually(40*time.Second, "node remove "+n.name, func(ctx context.Context) error {
			_, err := alpha.client.RemoveNode(ctx, n.name, control.RemoveNode{Force: true})
			return err
		})
	}
	delta := add("delta")
	gamma.eventually(20*time.Second, "it knows of delta", func(context.Context) error {
		if got := gamma.daemon.Load().raft.FoundInfo().Members; !slices.ContainsFunc(got, func(id string) bool { return raft.NodeOf(id) == "delta" }) {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	gamma.halt()
	epsilon := add("epsilon") // of which gamma knows nothing
	beta.halt()
	remove(beta)
	remove(gamma)
	for _, n := range []*testNode{alpha, delta, epsilon} {
		// No leader that would try to reach it for a last time.
		n.halt()
		n.start()
	}
	gamma.start()
	select {
	case err := <-gamma.done:
		if !errors.Is(err, ErrRemoved) {
			t.Errorf("the removed node ended with %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("the removed node goes on")
	}
	gamma.stop()
	gamma.stop = nil
	gamma.client.Close()
}
