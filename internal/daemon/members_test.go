package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
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
	moved := func(from, to ident.Node) state.Event { return moves("db", from, to) }
	other := func(e state.Event) state.Event {
		e.Volume = "other"
		return e
	}
	for name, c := range map[string]struct {
		events []state.Event
		want   ident.Node
	}{
		"a member is away":                        {[]state.Event{set("b", "c")}, ""},
		"nothing is known of it":                  {nil, ""},
		"added just now":                          {[]state.Event{set("b", "c"), added("d"), moved("b", "d")}, "d"},
		"added as one more":                       {[]state.Event{set("b", "c"), added("d")}, ""},
		"added as one more, after a drain":        {[]state.Event{added("d"), moved("b", "d"), added("d")}, ""},
		"added for another's place":               {[]state.Event{added("d"), moved("c", "d")}, ""},
		"added, and a member left since":          {[]state.Event{added("d"), moved("b", "d"), set("b", "c")}, "d"},
		"added once, in sync since, and away":     {[]state.Event{added("d"), moved("b", "d"), set("b", "c", "d"), set("b", "c")}, ""},
		"added anew":                              {[]state.Event{added("d"), set("b", "c", "d"), set("b", "c"), added("d"), moved("b", "d")}, "d"},
		"added to another volume":                 {[]state.Event{other(added("d")), other(moved("b", "d"))}, ""},
		"in sync at another volume":               {[]state.Event{added("d"), moved("b", "d"), other(set("b", "c", "d"))}, "d"},
		"added to one of its name, deleted since": {[]state.Event{added("d"), moved("b", "d"), {Name: "volume-created", Volume: "db"}}, ""},
	} {
		sv := &state.Volume{Name: "db", InSync: []ident.Node{"b", "c"}, Replicas: []state.Replica{{Node: "a"}, {Node: "b"}, {Node: "c"}, {Node: "d"}}}
		if got := joining(&state.State{Events: c.events}, sv, "b"); got != c.want {
			t.Errorf("%s: %q is taken, not %q", name, got, c.want)
		}
	}
	failed := &state.Volume{Name: "db", InSync: []ident.Node{"b"}, Replicas: []state.Replica{{Node: "b"}, {Node: "d", Failed: true}}}
	if got := joining(&state.State{Events: []state.Event{added("d"), moved("b", "d")}}, failed, "b"); got != "" {
		t.Errorf("a failed replica is taken: %q", got)
	}
}

// A drain takes no replica for its own that an operator has just asked for: there would
// be as few as before. Where there is no other place the one that was to go stays.
func TestDrainBesideAFill(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha, beta := nodes["alpha"], nodes["beta"]
	if _, err := alpha.client.CreateVolume(t.Context(), control.CreateVolume{Name: "db", Size: 16 << 20, Replicas: []string{"alpha", "beta"}}); err != nil {
		t.Fatal(err)
	}
	alpha.healthy("db")
	if err := alpha.open("db").WriteAt(t.Context(), bytes.Repeat([]byte{7}, 4<<20), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := alpha.client.Switchover(t.Context(), "db", control.Switchover{To: "beta"}); err != nil {
		t.Fatal(err)
	}
	rate := func(r int64) *int64 { return &r }
	three := 3
	if _, err := alpha.client.SetOptions(t.Context(), "db", control.SetOptions{Replicas: &three, ResyncRateMax: rate(8192), ResyncRateMin: rate(4096)}); err != nil {
		t.Fatal(err)
	}
	var e *control.Error
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := beta.client.ChangeNode(ctx, "alpha", "drain"); !errors.As(err, &e) || !strings.Contains(e.Message, "no other node that is up is without a replica of db") {
		t.Fatalf("drain: %v", err)
	}
	if v := beta.status("db"); len(v.Replicas) != 3 {
		t.Errorf("there are %d replicas: %+v", len(v.Replicas), v)
	}

	// The other way round: what a drain has added is none more.
	d := beta.daemon.Load()
	res, err := d.applyWhole(t.Context(), state.Command{AddEvent: &state.AddEvent{Event: moves("db", "alpha", "gamma")}})
	if err != nil {
		t.Fatal(err)
	}
	d.until(t.Context(), func(s *state.State) bool { return s.NextEvent > res.Event })
	if _, err := beta.client.SetOptions(t.Context(), "db", control.SetOptions{Replicas: &three}); !errors.As(err, &e) || !strings.Contains(e.Message, "the replica of db on alpha is being moved to gamma") {
		t.Errorf("three replicas while a drain moves one: %v", err)
	}
	if _, err := beta.client.SetOptions(t.Context(), "db", control.SetOptions{ResyncRateMax: rate(1 << 30)}); err != nil {
		t.Fatal(err)
	}
	if _, err := beta.client.ChangeNode(t.Context(), "alpha", "drain"); err != nil {
		t.Errorf("a drain that was cut off: %v", err)
	}
	if v := beta.status("db"); len(v.Replicas) != 2 || v.Replicas[1].Node != "gamma" {
		t.Errorf("after it: %+v", v)
	}
}

// A drain that was cut off, and whose new replica has been filled since, has only the old one
// to take away; unless somebody has asked for as many replicas as there are by then.
func TestADrainThatWasCutOffIsEnded(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha, beta := nodes["alpha"], nodes["beta"]
	if _, err := alpha.client.CreateVolume(t.Context(), control.CreateVolume{Name: "db", Size: 8 << 20, Replicas: []string{"alpha", "beta"}}); err != nil {
		t.Fatal(err)
	}
	alpha.healthy("db")
	d := beta.daemon.Load()
	id := d.state().Volume("db").ID
	cutOff := func() {
		t.Helper()
		res, err := d.applyWhole(t.Context(), state.Command{AddEvent: &state.AddEvent{Event: moves("db", "alpha", "gamma")}})
		if err != nil {
			t.Fatal(err)
		}
		d.until(t.Context(), func(s *state.State) bool { return s.NextEvent > res.Event })
	}
	if _, err := d.addReplica(t.Context(), id, "gamma", 0); err != nil {
		t.Fatal(err)
	}
	cutOff()
	if err := d.awaitVolume(t.Context(), id, func(v *state.Volume) bool { return v.InSet("gamma") }); err != nil {
		t.Fatal(err)
	}
	three := 3
	if _, err := beta.client.SetOptions(t.Context(), "db", control.SetOptions{Replicas: &three}); err != nil {
		t.Fatal(err)
	}
	var e *control.Error
	if _, err := beta.client.ChangeNode(t.Context(), "alpha", "drain"); !errors.As(err, &e) || !strings.Contains(e.Message, "no other node that is up is without a replica of db") {
		t.Errorf("a drain where three were asked for: %v", err)
	}
	cutOff()
	if _, err := beta.client.ChangeNode(t.Context(), "alpha", "drain"); err != nil {
		t.Errorf("a drain that was cut off: %v", err)
	}
	if v := beta.status("db"); len(v.Replicas) != 2 || v.Replicas[0].Node != "beta" || v.Replicas[1].Node != "gamma" {
		t.Errorf("after it: %+v", v)
	}
}

func TestFilled(t *testing.T) {
	added := func(node string) state.Event {
		return state.Event{Name: "replica-added", Volume: "db", Node: ident.Node(node)}
	}
	moved := func(from, to ident.Node) state.Event { return moves("db", from, to) }
	for name, c := range map[string]struct {
		events []state.Event
		want   ident.Node
	}{
		"nothing is known":                {nil, ""},
		"cut off":                         {[]state.Event{added("d"), moved("b", "d")}, "d"},
		"cut off, and d came by another":  {[]state.Event{added("b"), moved("a", "b"), added("d"), moved("b", "d")}, "d"},
		"it is another's":                 {[]state.Event{added("d"), moved("c", "d")}, ""},
		"it was added as one more since":  {[]state.Event{added("d"), moved("b", "d"), added("d")}, ""},
		"it is to stay":                   {[]state.Event{added("d"), moved("b", "d"), stays("db", "d")}, ""},
		"ended, and b is back":            {[]state.Event{added("d"), moved("b", "d"), added("b")}, ""},
		"ended, and b is back by a drain": {[]state.Event{added("d"), moved("b", "d"), added("b"), moved("a", "b")}, ""},
		"it is not in sync":               {[]state.Event{added("e"), moved("b", "e")}, ""},
		"of a volume that was deleted":    {[]state.Event{added("d"), moved("b", "d"), {Name: "volume-created", Volume: "db"}}, ""},
		"of another volume":               {[]state.Event{moves("web", "b", "d")}, ""},
	} {
		sv := &state.Volume{Name: "db", InSync: []ident.Node{"b", "c", "d"}, Replicas: []state.Replica{{Node: "b"}, {Node: "c"}, {Node: "d"}, {Node: "e"}}}
		if got := filled(&state.State{Events: c.events}, sv, "b"); got != c.want {
			t.Errorf("%s: %q, not %q", name, got, c.want)
		}
	}
}

// TestAMemberChangedAgain: whoever got no answer asks the same again, through any node,
// and is told that it is so; the leader says it too, whom a node asks again by itself.
// What is not as it was asked for is refused as before.
func TestAMemberChangedAgain(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha, beta := nodes["alpha"], nodes["beta"]
	add := control.AddNode{Name: "delta", Address: freeAddress(t)}
	delta := alpha.beside("delta", "  alpha: {address: "+alpha.config().Self().Address+"}\n  delta: {address: "+add.Address+"}\n")
	atLeader := func(c memberCall) {
		t.Helper()
		alpha.eventually(20*time.Second, "the leader answers", func(ctx context.Context) error {
			for _, n := range []*testNode{alpha, beta, nodes["gamma"], delta} {
				if n.name == string(c.Name) && c.Verb == "remove" {
					continue
				}
				d := n.daemon.Load()
				if reply, err := d.serveMember(ctx, "beta", c); err == nil && !reply.Again {
					if !reply.Already {
						t.Errorf("%s of %s at the leader: %+v", c.Verb, c.Name, reply)
					}
					return nil
				}
			}
			return errors.New("none of them is it")
		})
	}
	again := func(what string, already bool, err error) {
		t.Helper()
		if err != nil || !already {
			t.Errorf("%s: already: %v, %v", what, already, err)
		}
	}
	refused := func(what string, err error, says string) {
		t.Helper()
		var e *control.Error
		if !errors.As(err, &e) || e.Code != control.CodeRefused && e.Code != control.CodeNotFound || !strings.Contains(e.Error(), says) {
			t.Errorf("%s: %v", what, err)
		}
	}

	delta.start()
	alpha.eventually(20*time.Second, "node add", func(ctx context.Context) error {
		out, err := alpha.client.AddNode(ctx, add)
		if err == nil && out.Already {
			t.Error("the first one was told that it is so already")
		}
		return err
	})
	for _, n := range []*testNode{alpha, beta} {
		out, err := n.client.AddNode(t.Context(), add)
		again("node add through "+n.name, out.Already, err)
	}
	atLeader(memberCall{Verb: "add", Name: "delta", Address: add.Address, RaftID: delta.daemon.Load().raft.RaftID()})
	other := add
	other.Address = freeAddress(t)
	_, err := alpha.client.AddNode(t.Context(), other)
	refused("at another address", err, "node delta is a member already, at "+add.Address)
	other = add
	other.Witness = true
	_, err = alpha.client.AddNode(t.Context(), other)
	refused("as a witness", err, "node delta is a member already, and no witness")
	_, err = alpha.client.ChangeNode(t.Context(), "delta", "replace")
	refused("a replace of what runs as it is known", err, "there is nothing to replace")

	delta.halt()
	out, err := alpha.client.AddNode(t.Context(), add)
	again("node add of one that is down", out.Already, err)
	if err := os.RemoveAll(delta.dir); err != nil {
		t.Fatal(err)
	}
	delta.start()
	delta.eventually(20*time.Second, "it waits to be replaced", func(ctx context.Context) error {
		_, err := delta.client.Nodes(ctx)
		if err != nil && strings.Contains(err.Error(), "node replace delta") {
			return nil
		}
		return fmt.Errorf("it says %w", err)
	})
	_, err = alpha.client.AddNode(t.Context(), add)
	refused("with another data_dir", err, "runs with another data_dir now; for a new data_dir of it: blockstep node replace delta")
	changed, err := alpha.client.ChangeNode(t.Context(), "delta", "replace")
	if err != nil || changed.Already {
		t.Errorf("node replace: %+v, %v", changed, err)
	}
	for _, n := range []*testNode{alpha, beta} {
		changed, err := n.client.ChangeNode(t.Context(), "delta", "replace")
		again("node replace through "+n.name, changed.Already, err)
	}
	atLeader(memberCall{Verb: "replace", Name: "delta", RaftID: delta.daemon.Load().raft.RaftID()})
	_, err = alpha.client.ChangeNode(t.Context(), "beta", "replace")
	refused("a replace of another one", err, "there is nothing to replace")

	changed, err = alpha.client.RemoveNode(t.Context(), "delta", control.RemoveNode{})
	if err != nil || changed.Already {
		t.Errorf("node remove: %+v, %v", changed, err)
	}
	for _, n := range []*testNode{alpha, beta} {
		changed, err := n.client.RemoveNode(t.Context(), "delta", control.RemoveNode{})
		again("node remove through "+n.name, changed.Already, err)
	}
	atLeader(memberCall{Verb: "remove", Name: "delta"})
	_, err = alpha.client.RemoveNode(t.Context(), "omega", control.RemoveNode{})
	refused("a remove of nobody", err, `there is no node "omega"`)
	if err := <-delta.done; !errors.Is(err, ErrRemoved) {
		t.Errorf("the removed node ended with %v", err)
	}
	delta.stop()
	delta.stop = nil
	delta.client.Close()
}

// asks waits until another node that was started anew answers this one.
func (n *testNode) asks(other ident.Node) {
	n.t.Helper()
	n.eventually(20*time.Second, string(other)+" answers", func(ctx context.Context) error {
		if d := n.daemon.Load(); !d.nodeUp(other) || d.roomAt(ctx, other, 0) == nil {
			return errors.New("it does not")
		}
		return nil
	})
}

// TestDrainWithoutRoom: a node whose disk is all but full is not chosen, and a drain that
// has no other one says so; a new replica that fails ends the drain with the reason, and
// is taken away again. With room the same drain works.
func TestDrainWithoutRoom(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha, beta, gamma := nodes["alpha"], nodes["beta"], nodes["gamma"]
	var free atomic.Int64
	gamma.halt()
	gamma.space = func(string) (int64, int64, error) { return free.Load(), 120 << 20, nil }
	gamma.start()
	if _, err := alpha.client.CreateVolume(t.Context(), control.CreateVolume{Name: "db", Size: 16 << 20, Replicas: []string{"alpha", "beta"}}); err != nil {
		t.Fatal(err)
	}
	alpha.healthy("db")
	alpha.asks("gamma")
	fails := func(code control.Code, says string) {
		t.Helper()
		var e *control.Error
		_, err := alpha.client.ChangeNode(t.Context(), "beta", "drain")
		if !errors.As(err, &e) || e.Code != code || !strings.Contains(e.Error(), says) {
			t.Errorf("drain: %v", err)
		}
		if v := alpha.status("db"); len(v.Replicas) != 2 || v.Replicas[1].Node != "beta" {
			t.Errorf("the replicas after it: %+v", v.Replicas)
		}
	}
	free.Store(10 << 20)
	fails(control.CodeRefused, "no other node has room for its replicas of db (gamma has 10.0MiB free, and it takes ")
	three := 3
	if _, err := alpha.client.SetOptions(t.Context(), "db", control.SetOptions{Replicas: &three}); err == nil || !strings.Contains(err.Error(), "gamma has 10.0MiB free") {
		t.Errorf("a third replica: %v", err)
	}
	free.Store(100 << 20) // it says
	gamma.faults.on(syscall.ENOSPC, "/volumes/", vfs.OpWrite, vfs.OpAllocate, vfs.OpTruncate)
	fails(control.CodeFailed, "the new replica of db on gamma failed, and was taken away again: ")
	gamma.faults.off()
	if _, err := alpha.client.ChangeNode(t.Context(), "beta", "drain"); err != nil {
		t.Errorf("drain: %v", err)
	}
	alpha.healthy("db")
	if got := beta.status("db"); got.Replicas[1].Node != "gamma" {
		t.Errorf("%+v", got.Replicas)
	}
}

// TestThinVolumes: a volume may be larger than what is free on its nodes. That is said
// when it is made, and doctor warns as long as it is so.
func TestThinVolumes(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha, gamma := nodes["alpha"], nodes["gamma"]
	var free atomic.Int64
	gamma.halt()
	gamma.space = func(string) (int64, int64, error) { return free.Load(), 120 << 20, nil }
	gamma.start()
	alpha.asks("gamma")
	free.Store(104 << 20)
	v := alpha.create("db", 1<<30)
	if len(v.Warnings) != 1 || v.Warnings[0].Volume != "db" || v.Warnings[0].Text != "gamma has 104.0MiB free in its data_dir, and db may come to take 1GiB there" {
		t.Errorf("%+v", v.Warnings)
	}
	finds := func(state, says string) {
		t.Helper()
		list, err := alpha.client.Doctor(t.Context())
		if err != nil || !slices.ContainsFunc(list, func(f control.Finding) bool {
			return f.Node == "gamma" && f.Check == "room to grow" && f.State == state && strings.Contains(f.Text, says)
		}) {
			t.Errorf("not %s: %q: %+v, %v", state, says, list, err)
		}
	}
	finds(control.FindingWarn, "and the replica there (db) may take 1.") // GiB; less by a segment once it has a log
	free.Store(10 << 30)
	finds(control.FindingOK, "10.0GiB free")
	if v := alpha.create("small", 1<<20); len(v.Warnings) != 0 {
		t.Errorf("%+v", v.Warnings)
	}
}

// TestMoreReplicas: a volume is given replicas on nodes that have none, which are filled;
// asked again nothing happens, and what cannot be is refused before anything is done. A
// volume that had one replica can be drained then.
func TestMoreReplicas(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha, gamma := nodes["alpha"], nodes["gamma"]
	if _, err := alpha.client.CreateVolume(t.Context(), control.CreateVolume{Name: "db", Size: 8 << 20, Replicas: []string{"alpha"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := alpha.client.CreateVolume(t.Context(), control.CreateVolume{Name: "other", Size: 8 << 20, Replicas: []string{"beta"}}); err != nil {
		t.Fatal(err)
	}
	if err := alpha.open("db").WriteAt(t.Context(), []byte("moved"), 8192); err != nil {
		t.Fatal(err)
	}
	set := func(n int) (control.VolumeStatus, error) {
		return alpha.client.SetOptions(t.Context(), "db", control.SetOptions{Replicas: &n})
	}
	refused := func(n int, says string) {
		t.Helper()
		var e *control.Error
		if _, err := set(n); !errors.As(err, &e) || e.Code != control.CodeRefused || !strings.Contains(e.Error(), says) {
			t.Errorf("%d replicas: %v", n, err)
		}
		if n := len(alpha.status("db").Replicas); n > 2 {
			t.Errorf("there are %d replicas", n)
		}
	}
	for range 2 {
		v, err := set(2)
		if err != nil || len(v.Replicas) != 2 || v.Replicas[1].Node != "gamma" {
			t.Fatalf("%+v, %v", v, err)
		}
		alpha.healthy("db")
	}
	if got := gamma.read("db@gamma", 8192, 5); string(got) != "moved" {
		t.Errorf("the new replica has %q", got)
	}
	refused(4, "there are 3 nodes to store them")
	refused(1, "blockstep node drain NODE")
	if _, err := alpha.client.ChangeNode(t.Context(), "alpha", "drain"); err != nil {
		t.Errorf("drain: %v", err)
	}
	alpha.healthy("db")
	if got := nodes["beta"].read("db@beta", 8192, 5); string(got) != "moved" {
		t.Errorf("the drained replica has become %q", got)
	}
	nodes["alpha"].halt()
	alpha = nodes["beta"]
	alpha.eventually(20*time.Second, "it sees that alpha is down", func(ctx context.Context) error {
		list, err := alpha.client.Nodes(ctx)
		if err == nil && slices.ContainsFunc(list, func(n control.NodeStatus) bool { return n.Name == "alpha" && n.Up }) {
			err = errors.New("it is up")
		}
		return err
	})
	refused(3, "not up: alpha; start blockstepd there")
}

// Several that ask for one replica more at once, through different nodes, get one, and no
// error: whether they choose the same node for it or not.
func TestMoreReplicasAtOnce(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha, beta, gamma := nodes["alpha"], nodes["beta"], nodes["gamma"]
	alpha.eventually(20*time.Second, "it knows of each node which commands it understands", func(context.Context) error {
		if st := alpha.daemon.Load().state(); !st.Understood(state.VersionCompares) {
			return fmt.Errorf("%+v", st.Events)
		}
		return nil
	})
	create := func(name string) ident.Volume {
		t.Helper()
		if _, err := alpha.client.CreateVolume(t.Context(), control.CreateVolume{Name: name, Size: 8 << 20, Replicas: []string{"alpha"}}); err != nil {
			t.Fatal(err)
		}
		return alpha.daemon.Load().state().Volume(name).ID
	}
	id := create("db")
	var rules [2]state.Rule
	var wg sync.WaitGroup
	for i, n := range []*testNode{beta, gamma} {
		wg.Go(func() {
			res, err := n.daemon.Load().addReplica(t.Context(), id, ident.Node(n.name), 2)
			if err != nil {
				t.Error(err)
			}
			rules[i] = res.Rule
		})
	}
	wg.Wait()
	if slices.Sort(rules[:]); rules != [2]state.Rule{state.RuleNone, state.RuleEnough} {
		t.Errorf("refused by %q", rules)
	}
	create("other")
	two := 2
	for _, n := range nodes {
		wg.Go(func() {
			n.eventually(20*time.Second, "it knows the volume", func(ctx context.Context) error {
				_, err := n.client.SetOptions(ctx, "other", control.SetOptions{Replicas: &two})
				if e := (*control.Error)(nil); errors.As(err, &e) && e.Code == control.CodeNotFound {
					return err
				}
				if err != nil {
					t.Errorf("through %s: %v", n.name, err)
				}
				return nil
			})
		})
	}
	wg.Wait()
	for _, name := range []string{"db", "other"} {
		if v := alpha.status(name); len(v.Replicas) != 2 {
			t.Errorf("%s has %d replicas: %+v", name, len(v.Replicas), v)
		}
	}
}

// What a registration replaces is named where each node understands that, and nowhere else.
func TestRegistration(t *testing.T) {
	st := state.New()
	apply := func(c state.Command) {
		t.Helper()
		next, res := st.Apply(c)
		if !res.OK {
			t.Fatal(res.Err())
		}
		st = next
	}
	apply(state.Command{InitCluster: &state.InitCluster{Cluster: "test", ClusterID: "1", Nodes: []state.Node{{Name: "alpha", Address: "alpha:1", RaftID: "alpha/1"}}}})
	if c := registration(st, 7, "alpha", 31, 30); !c.Replace || c.Was != 0 {
		t.Errorf("where a node may be of a release before: %+v", c)
	}
	apply(state.Started("alpha", "test"))
	if c := registration(st, 7, "alpha", 31, 30); !c.Replace || c.Was != 30 {
		t.Errorf("%+v", c)
	}
	if c := registration(st, 7, "alpha", 31, 0); c.Replace || c.Was != 0 {
		t.Errorf("a first one: %+v", c)
	}
}

// TestWhatIsLeft: a volume that has lost a replica is healthy with the others, and only
// the remove itself can say that there was one more.
func TestWhatIsLeft(t *testing.T) {
	for _, tc := range []struct {
		left, copies int
		want         control.Warning
	}{
		{1, 1, control.Warning{Text: "db has one replica left, on a: what is lost with that one is gone", Next: "to have one more again: blockstep volume set db --replicas 2"}},
		{2, 2, control.Warning{
			Text: "db has 2 replicas and min_copies 2: the loss of one more suspends it",
			Next: "to have it go on with fewer then: blockstep volume set db --min-copies 1; or give it one replica more: blockstep volume set db --replicas 3",
		}},
		{3, 2, control.Warning{Text: "db has 3 replicas left", Next: "to have one more again: blockstep volume set db --replicas 4"}},
	} {
		sv := &state.Volume{Name: "db", ID: 7, Options: state.Options{MinCopies: tc.copies}}
		for _, n := range []ident.Node{"a", "b", "c"}[:tc.left] {
			sv.Replicas = append(sv.Replicas, state.Replica{Node: n})
		}
		tc.want.Volume = "db"
		got := leftWithout(&state.State{Volumes: map[ident.Volume]*state.Volume{7: sv}}, holdings{{volume: sv}})
		if len(got) != 1 || got[0] != tc.want {
			t.Errorf("%d left: %+v", tc.left, got)
		}
	}
}

// TestNowhereTo: a drain that finds no place says which nodes are down that may be one.
func TestNowhereTo(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		down       []string
		small      bool
		text, next string
	}{
		{nil, false, "but no other node that is up is without a replica of db, web", "to remove it, add a node that takes"},
		{nil, true, "but no other node has room for its replicas of db, web", "to remove it, add a node that takes"},
		{[]string{"gamma", "delta", "gamma"}, true, "but no other node that is up has room for its replicas of db, web; not up: delta, gamma", "to remove it, start blockstepd on delta, gamma, or add a node that takes"},
	} {
		var e *control.Error
		err := nowhereTo("alpha", []string{"db", "web"}, x.down, x.small)
		if !errors.As(err, &e) || !strings.HasSuffix(e.Message, x.text) || !strings.Contains(e.Next, x.next) {
			t.Errorf("%v: %v; %s", x.down, err, e.Next)
		}
	}
}
