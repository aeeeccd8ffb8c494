package state

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/blockstep/blockstep/internal/ident"
)

// tester is a *testing.T, a fuzz target's or rapid's.
type tester interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

func do(t tester, s *State, c Command) *State {
	t.Helper()
	next, r := s.Apply(c)
	if !r.OK {
		t.Fatalf("%s: %v", c.Kind(), r.Err())
	}
	return next
}

func refused(t tester, s *State, c Command, rule Rule) Result {
	t.Helper()
	before := encoded(t, s)
	next, r := s.Apply(c)
	if r.OK || r.Rule != rule {
		t.Fatalf("%s: %+v, want a refusal by %q", c.Kind(), r, rule)
	}
	if c.ID == "" && !bytes.Equal(before, encoded(t, next)) {
		t.Fatalf("%s was refused and changed the state", c.Kind())
	}
	return r
}

func encoded(t tester, s *State) []byte {
	t.Helper()
	b, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ptr[T any](v T) *T { return &v }

// three is a founded cluster of three storing nodes and a witness.
func three(t tester) *State {
	var nodes []Node
	for _, n := range []string{"a", "b", "c", "w"} {
		nodes = append(nodes, Node{Name: ident.Node(n), Address: n + ":1", RaftID: n + "/1", Witness: n == "w"})
	}
	return do(t, New(), Command{InitCluster: &InitCluster{Cluster: "prod", ClusterID: "id", Nodes: nodes}})
}

func create(name string, id ident.Volume, nodes ...ident.Node) Command {
	c := &CreateVolume{Name: name, ID: id, Size: 1 << 20}
	for _, n := range nodes {
		c.Replicas = append(c.Replicas, Replica{Node: n})
	}
	return Command{CreateVolume: c}
}

// serving is three with volume v (1) on a, b, c, primary a in epoch 1.
func serving(t tester) *State {
	s := do(t, three(t), create("v", 1, "c", "a", "b"))
	for i, n := range []ident.Node{"a", "b", "c"} {
		s = do(t, s, Command{RegisterReplica: &RegisterReplica{Volume: 1, Node: n, Replica: ident.Replica(10 * (i + 1))}})
	}
	return do(t, s, promote(s, "a", 1))
}

func promote(s *State, n ident.Node, epoch ident.Epoch) Command {
	v := s.Volumes[1]
	return Command{Promote: &Promote{
		Volume: 1, OldEpoch: v.Epoch, SetVersion: v.SetVersion, Epoch: epoch, Node: n,
		Replica: v.Replica(n).Replica, Incarnation: 3, Position: ident.Position{Epoch: v.Epoch, Seq: 7}, Heard: v.InSync,
	}}
}

func changeSet(s *State, set ...ident.Node) Command {
	v := s.Volumes[1]
	return Command{ChangeSet: &ChangeSet{Volume: 1, Epoch: v.Epoch, Version: v.SetVersion, Set: set, Reason: "test"}}
}

func TestNothingBeforeTheCluster(t *testing.T) {
	refused(t, New(), create("v", 1, "a"), RuleNoCluster)
	s := three(t)
	refused(t, s, Command{InitCluster: &InitCluster{Cluster: "x", ClusterID: "y"}}, RuleInitOnce)
	refused(t, s, Command{}, RuleBadValue)
}

func TestCreateVolume(t *testing.T) {
	s := three(t)
	for _, tc := range []struct {
		c    Command
		rule Rule
	}{
		{create("v@a", 1, "a"), RuleBadName},
		{create("", 1, "a"), RuleBadName},
		{create("v", 0, "a"), RuleVolumeIDUsed},
		{create("v", 1), RuleLimit},
		{create("v", 1, "z"), RuleNoNode},
		{create("v", 1, "w"), RuleWitness},
		{create("v", 1, "a", "a"), RuleReplicaExists},
		{Command{CreateVolume: &CreateVolume{Name: "v", ID: 1, Size: 100, Replicas: []Replica{{Node: "a"}}}}, RuleBadValue},
		{Command{CreateVolume: &CreateVolume{Name: "v", ID: 1, Size: 512, Replicas: []Replica{{Node: "a"}}, Options: Options{MinCopies: 2}}}, RuleBadValue},
		{Command{CreateVolume: &CreateVolume{Name: "v", ID: 1, Size: 512, Replicas: []Replica{{Node: "a"}}, Options: Options{Ack: "best"}}}, RuleBadValue},
	} {
		refused(t, s, tc.c, tc.rule)
	}
	s = do(t, s, create("v", 1, "c", "b", "a"))
	v := s.Volume("v")
	if v.Options.MinCopies != 2 || v.Options.Ack != AckQuorum || v.Options.OnNoQuorum != NoQuorumHold || v.Options.AfterPowerLoss != PowerLossAuto {
		t.Errorf("defaults: %+v", v.Options)
	}
	if !slices.Equal(v.InSync, []ident.Node{"a", "b", "c"}) {
		t.Errorf("in sync: %v", v.InSync)
	}
	refused(t, s, create("v", 2, "a"), RuleVolumeExists)
	s = do(t, s, Command{DeleteVolume: &DeleteVolume{Volume: 1}})
	refused(t, s, create("v", 1, "a"), RuleVolumeIDUsed)
	s = do(t, s, create("v", 2, "a", "b"))
	if got := s.Volume("v").Options.MinCopies; got != 1 {
		t.Errorf("min_copies of two replicas: %d", got)
	}
	refused(t, s, Command{DeleteVolume: &DeleteVolume{Volume: 1}}, RuleNoVolume)
}

// One device, one replica: two volumes on it would write over one another.
func TestADeviceIsOfOneVolume(t *testing.T) {
	s := three(t)
	on := func(name string, id ident.Volume, rs ...Replica) Command {
		return Command{CreateVolume: &CreateVolume{Name: name, ID: id, Size: 512, Replicas: rs}}
	}
	s = do(t, s, on("v", 1, Replica{Node: "a", Device: "/dev/x"}))
	refused(t, s, on("u", 2, Replica{Node: "a", Device: "/dev/x"}), RuleDevice)
	s = do(t, s, on("u", 2, Replica{Node: "b", Device: "/dev/x"}))
	refused(t, s, Command{AddReplica: &AddReplica{Volume: 2, Node: "a", Device: "/dev/x"}}, RuleDevice)
	s = do(t, s, Command{DeleteVolume: &DeleteVolume{Volume: 1}})
	do(t, s, Command{AddReplica: &AddReplica{Volume: 2, Node: "a", Device: "/dev/x"}})
}

func TestPromoteCompares(t *testing.T) {
	s := serving(t)
	for name, tc := range map[string]struct {
		change func(p *Promote)
		rule   Rule
	}{
		"old epoch":       {func(p *Promote) { p.OldEpoch = 0 }, RuleEpoch},
		"set version":     {func(p *Promote) { p.SetVersion++ }, RuleSetVersion},
		"same epoch":      {func(p *Promote) { p.Epoch = 1 }, RuleEpochFalls},
		"no replica":      {func(p *Promote) { p.Node = "w" }, RuleNoReplica},
		"other replica":   {func(p *Promote) { p.Replica++ }, RuleReplicaID},
		"future position": {func(p *Promote) { p.Position.Epoch = 2 }, RulePosition},
		"odd loss":        {func(p *Promote) { p.Loss = LossLocal }, RuleBadValue},
		"set, not forced": {func(p *Promote) { p.Set = []ident.Node{"b"} }, RuleOnlyForcedSet},
		"forced, no set":  {func(p *Promote) { p.Loss = LossForced }, RuleEmptySet},
		"forced, not in":  {func(p *Promote) { p.Loss, p.Set = LossForced, []ident.Node{"a"} }, RulePrimaryInSet},
		"readmit a good one": {func(p *Promote) {
			p.Loss, p.Set, p.Readmit = LossForced, []ident.Node{"b"}, true
		}, RuleReadmit},
		"readmit, not forced": {func(p *Promote) { p.Readmit = true }, RuleReadmit},
		"forced, twice":       {func(p *Promote) { p.Loss, p.Set = LossForced, []ident.Node{"b", "b"} }, RuleBadValue},
	} {
		t.Run(name, func(t *testing.T) {
			c := promote(s, "b", 2)
			tc.change(c.Promote)
			refused(t, s, c, tc.rule)
		})
	}
	one, two := promote(s, "b", 2), promote(s, "c", 2)
	s = do(t, s, one)
	refused(t, s, two, RuleEpoch)
	if v := s.Volumes[1]; v.Primary != "b" || v.Generation != 1 || v.LossEpoch != 0 {
		t.Errorf("a promotion without loss: %+v", v)
	}
}

func TestLossRaisesTheGeneration(t *testing.T) {
	s := serving(t)
	c := promote(s, "b", 5)
	c.Promote.Loss = LossPower
	s = do(t, s, c)
	if v := s.Volumes[1]; v.Generation != 2 || v.LossEpoch != 5 || len(v.InSync) != 3 {
		t.Errorf("power loss: %+v", v)
	}
	c = promote(s, "c", 6)
	c.Promote.Loss, c.Promote.Set = LossForced, []ident.Node{"c"}
	version := s.Volumes[1].SetVersion
	s = do(t, s, c)
	if v := s.Volumes[1]; v.Generation != 3 || v.LossEpoch != 6 || !slices.Equal(v.InSync, []ident.Node{"c"}) || v.SetVersion != version+1 {
		t.Errorf("forced: %+v", v)
	}
}

// A replica that was removed and added again since a forced failover heard of the one
// before is empty: it does not come into the set, unless an older release may decide too.
func TestForcedSetOfOneThatIsNew(t *testing.T) {
	s := serving(t)
	s = do(t, s, changeSet(s, "a", "b"))
	s = do(t, s, Command{RemoveReplica: &RemoveReplica{Volume: 1, Node: "c"}})
	s = do(t, s, Command{AddReplica: &AddReplica{Volume: 1, Node: "c"}})
	for v, ok := range map[int]bool{0: true, 1: true, VersionCompares: false, CommandVersion: false} {
		c := promote(s, "a", 7)
		c.V, c.Promote.Loss, c.Promote.Set = v, LossForced, []ident.Node{"a", "c"}
		if _, r := s.Apply(c); r.OK != ok || !ok && r.Rule != RuleReplicaID {
			t.Errorf("version %d: %+v", v, r)
		}
	}
}

// A fence is a promotion that raises the generation and loses nothing. One that comes late
// or again is refused, or answered as it was, like any promotion.
func TestFence(t *testing.T) {
	fence := func(s *State, n ident.Node, e ident.Epoch) Command {
		c := promote(s, n, e)
		c.Promote.Fence = true
		return c
	}
	names := func(s *State) (out []string) {
		for _, e := range s.Events {
			if e.Name == "promoted" || e.Name == "fenced" {
				out = append(out, e.Name)
			}
		}
		return out
	}
	first := serving(t)
	before := len(names(first))
	c := fence(first, "a", 5)
	c.ID = "fence"
	s := do(t, first, c)
	if v := s.Volumes[1]; v.Generation != 2 || v.LossEpoch != 0 || v.Epoch != 5 || v.Primary != "a" || v.SetVersion != first.Volumes[1].SetVersion {
		t.Errorf("%+v", v)
	}
	if got := names(s)[before:]; !slices.Equal(got, []string{"promoted", "fenced"}) {
		t.Errorf("events %v", got)
	}
	for _, e := range s.Events {
		if strings.Contains(e.Text, "may be gone") {
			t.Errorf("event %q", e.Text)
		}
	}
	s, r := s.Apply(c) // sent again
	if v := s.Volumes[1]; !r.OK || r.Loss != LossNone || v.Generation != 2 {
		t.Errorf("again: %+v, %+v", r, v)
	}
	c.ID = "late"
	refused(t, s, c, RuleEpoch)
	if v := s.Volumes[1]; v.Generation != 2 || v.Epoch != 5 {
		t.Errorf("late: %+v", v)
	}
	s = do(t, s, promote(s, "b", 6)) // a failover after it
	if v := s.Volumes[1]; v.Generation != 2 {
		t.Errorf("a promotion that is no fence: %+v", v)
	}
	s = do(t, s, fence(s, "c", 7)) // the next one
	if v := s.Volumes[1]; v.Generation != 3 || v.LossEpoch != 0 {
		t.Errorf("the second: %+v", v)
	}
	c = fence(s, "c", 8) // all nodes lost power meanwhile: it is a loss, and raised once
	c.Promote.Loss = LossPower
	s = do(t, s, c)
	if v := s.Volumes[1]; v.Generation != 4 || v.LossEpoch != 8 {
		t.Errorf("with a loss: %+v", v)
	}
}

// A replica that was to leave and is out of the set after a forced failover has
// left.
func TestForcedFailoverDropsWhoWasToLeave(t *testing.T) {
	s := do(t, serving(t), Command{ID: "leave", RemoveReplica: &RemoveReplica{Volume: 1, Node: "b"}})
	if r := s.Volumes[1].Replica("b"); r == nil || !r.Leaving {
		t.Fatalf("%+v", r)
	}
	c := promote(s, "c", 5)
	c.Promote.Loss, c.Promote.Set = LossForced, []ident.Node{"c"}
	if v := do(t, s, c).Volumes[1]; v.Replica("b") != nil || v.Replica("a") == nil {
		t.Errorf("%+v", v.Replicas)
	}
}

// With ack local the primary alone holds the tail: a failover that did not hear
// it may lose it, one that did hear it does not.
func TestLocalFailover(t *testing.T) {
	s := serving(t)
	s = do(t, s, Command{SetOptions: &SetOptions{Volume: 1, Ack: ptr(AckLocal)}})
	c := promote(s, "b", 2)
	s = do(t, s, c) // a was heard
	if s.Volumes[1].Generation != 1 {
		t.Error("a planned change raised the generation")
	}
	c = promote(s, "c", 3)
	c.Promote.Heard = []ident.Node{"a", "c"}
	s, r := s.Apply(c)
	if r.Loss != LossLocal || s.Volumes[1].Generation != 2 || s.Volumes[1].LossEpoch != 3 {
		t.Errorf("unplanned: %+v, %+v", r, s.Volumes[1])
	}
	// Changed back in the middle of an epoch, the epoch has its local tail yet.
	s = do(t, s, Command{SetOptions: &SetOptions{Volume: 1, Ack: ptr(AckQuorum)}})
	c = promote(s, "a", 4)
	c.Promote.Heard = []ident.Node{"a", "b"}
	s, r = s.Apply(c)
	if r.Loss != LossLocal {
		t.Errorf("quorum since the middle of a local epoch: %+v", r)
	}
	c = promote(s, "b", 5)
	c.Promote.Heard = []ident.Node{"b", "c"}
	if _, r = s.Apply(c); r.Loss != LossNone {
		t.Errorf("quorum for a whole epoch: %+v", r)
	}
}

func TestChangeSet(t *testing.T) {
	s := serving(t)
	refused(t, s, changeSet(s), RuleEmptySet)
	refused(t, s, changeSet(s, "b", "c"), RulePrimaryInSet)
	refused(t, s, changeSet(s, "a"), RuleMinCopies) // evicted-below-min-copies
	refused(t, s, changeSet(s, "a", "w"), RuleNoReplica)
	late := changeSet(s, "a", "c")
	s = do(t, s, changeSet(s, "a", "b"))
	refused(t, s, late, RuleSetVersion)
	s = do(t, s, Command{MarkFailed: &MarkFailed{Volume: 1, Node: "c", Replica: 30, Reason: "EIO"}})
	refused(t, s, changeSet(s, "a", "b", "c"), RuleFailed)
	late = changeSet(s, "a", "b")
	s = do(t, s, promote(s, "b", 2))
	refused(t, s, late, RuleEpoch) // set-command-commits-late
	s = do(t, s, Command{SetOptions: &SetOptions{Volume: 1, MinCopies: ptr(1)}})
	s = do(t, s, changeSet(s, "b"))
	s = do(t, s, Command{SetOptions: &SetOptions{Volume: 1, MinCopies: ptr(3)}})
	do(t, s, changeSet(s, "a", "b")) // growing towards min_copies is no eviction
}

func TestFailedIsSticky(t *testing.T) {
	s := serving(t)
	failed := Command{MarkFailed: &MarkFailed{Volume: 1, Node: "c", Replica: 30, Reason: "EIO"}}
	s = do(t, s, failed)
	refused(t, s, promote(s, "c", 2), RuleFailed) // fsync-failed-then-restart
	register := func(id ident.Replica, replace bool) Command {
		return Command{RegisterReplica: &RegisterReplica{Volume: 1, Node: "c", Replica: id, Replace: replace}}
	}
	refused(t, s, register(30, true), RuleReplicaID)
	refused(t, s, register(31, false), RuleRegistered)
	// Out of the set first: else W falls and an entry that b and c hold could
	// be missed by a.
	refused(t, s, register(31, true), RuleInSync)
	s = do(t, s, changeSet(s, "a", "b"))
	late := changeSet(s, "a", "b", "c") // of the replica that was there before
	s = do(t, s, register(31, true))
	refused(t, s, late, RuleSetVersion) // joiner-is-replaced-while-the-join-commits
	if r := s.Volumes[1].Replica("c"); r.Failed || r.Replica != 31 {
		t.Errorf("replaced: %+v", r)
	}
	refused(t, s, failed, RuleReplicaID)
	do(t, s, register(31, false)) // asked again
	do(t, s, changeSet(s, "a", "b", "c"))
}

// A registration names the replica that it replaces, and one that comes late, when that
// one is gone, takes no other's place. Those of before replace whichever is there.
func TestRegistrationCommitsLate(t *testing.T) {
	s := serving(t)
	s = do(t, s, changeSet(s, "a", "b"))
	s = do(t, s, Command{MarkFailed: &MarkFailed{Volume: 1, Node: "c", Replica: 30, Reason: "EIO"}})
	register := func(id, was ident.Replica) Command {
		return Command{RegisterReplica: &RegisterReplica{Volume: 1, Node: "c", Replica: id, Replace: true, Was: was}}
	}
	late := register(31, 30)
	if s := do(t, s, late); s.Volumes[1].Replica("c").Replica != 31 {
		t.Error("in time it is refused")
	}
	s = do(t, s, Command{RemoveReplica: &RemoveReplica{Volume: 1, Node: "c"}})
	s = do(t, s, Command{AddReplica: &AddReplica{Volume: 1, Node: "c"}})
	refused(t, s, late, RuleReplicaID)
	s = do(t, s, register(32, 0))
	refused(t, s, late, RuleReplicaID)
	do(t, s, register(32, 30)) // asked again: what it was to do is done
	if s = do(t, s, register(33, 32)); s.Volumes[1].Replica("c").Replica != 33 {
		t.Error("it does not take the place of the one that it names")
	}
	if s = do(t, s, register(34, 0)); s.Volumes[1].Replica("c").Replica != 34 {
		t.Error("one from where not all nodes compare is refused")
	}
}

// Two that decide at once on one replica more, on different nodes, make one.
func TestReplicasEnough(t *testing.T) {
	s := do(t, three(t), create("v", 1, "a"))
	add := func(n ident.Node, atMost int) Command {
		return Command{AddReplica: &AddReplica{Volume: 1, Node: n, AtMost: atMost}}
	}
	one := do(t, s, add("b", 2))
	refused(t, one, add("c", 2), RuleEnough)
	do(t, one, add("c", 3))
	do(t, one, add("c", 0)) // from where not all nodes compare, and of a drain
	s = do(t, s, create("w", 2, "a", "b"))
	s.Volumes[2].Replicas[1].Leaving = true // it does not count
	do(t, s, Command{AddReplica: &AddReplica{Volume: 2, Node: "c", AtMost: 2}})
}

func TestUnderstood(t *testing.T) {
	s := three(t)
	check := func(what string, want bool) {
		t.Helper()
		if got := s.Understood(VersionCompares); got != want {
			t.Errorf("%s: %v", what, got)
		}
	}
	check("nobody has started", false)
	for _, n := range s.NodeNames() {
		check("not all have started", false)
		if lacks := s.Lacking(VersionCompares); lacks[0] != n {
			t.Errorf("lacking: %v, not %s first", lacks, n)
		}
		s = do(t, s, Started(n, "v2"))
	}
	check("all have", true)
	if s.Understood(CommandVersion + 1) {
		t.Error("a version that nobody knows is understood")
	}
	s = do(t, s, Command{AddEvent: &AddEvent{Event: Event{Name: "node-started", Node: "b", Text: "node b started, blockstep v1"}}})
	check("one went back to a release before", false)
	s = do(t, s, Started("b", "v2"))
	check("and forth", true)
	s = do(t, s, Command{AddNode: &AddNode{Node: Node{Name: "d", Address: "d:1", RaftID: "d/1"}}})
	check("one was added", false)
	s = do(t, s, Started("d", "v2"))
	check("and has started", true)
	s = do(t, s, Command{ReplaceNode: &ReplaceNode{Name: "d", RaftID: "d/2"}})
	check("it was replaced", false)
	s = do(t, s, Command{RemoveNode: &RemoveNode{Name: "d"}})
	check("and removed", true)
	for range EventsMax {
		s = do(t, s, Command{AddEvent: &AddEvent{Event: Event{Name: "x"}}})
	}
	check("all started so long ago that no event tells", true)
	again, err := Decode(encoded(t, s))
	if err != nil || !again.Understood(VersionCompares) {
		t.Errorf("from a snapshot: %v, lacking %v", err, again.Lacking(VersionCompares))
	}
}

func TestRemoveReplica(t *testing.T) {
	s := serving(t)
	remove := func(n ident.Node) Command { return Command{RemoveReplica: &RemoveReplica{Volume: 1, Node: n}} }
	refused(t, s, remove("a"), RulePrimaryReplica)
	s, r := s.Apply(remove("c"))
	if !r.OK || !r.Pending {
		t.Fatalf("%+v", r)
	}
	refused(t, s, Command{RemoveNode: &RemoveNode{Name: "c"}}, RuleNodeInUse)
	s = do(t, s, changeSet(s, "a", "b"))
	if s.Volumes[1].Replica("c") != nil {
		t.Error("the leaving replica is still there")
	}
	refused(t, s, remove("b"), RuleMinCopies)
	s = do(t, s, Command{RemoveNode: &RemoveNode{Name: "c"}})
	refused(t, s, Command{AddNode: &AddNode{Node: Node{Name: "c", Address: "c:1", RaftID: "c/1"}}}, RuleRaftIDUsed)
	s = do(t, s, Command{AddNode: &AddNode{Node: Node{Name: "c", Address: "c:1", RaftID: "c/2"}}})
	s = do(t, s, Command{AddReplica: &AddReplica{Volume: 1, Node: "c"}})
	refused(t, s, changeSet(s, "a", "b", "c"), RuleReplicaID)
}

func TestReplaceNodeFailsItsReplicas(t *testing.T) {
	s := serving(t)
	s = do(t, s, Command{ReplaceNode: &ReplaceNode{Name: "b", RaftID: "b/2"}})
	if r := s.Volumes[1].Replica("b"); !r.Failed {
		t.Errorf("%+v", r)
	}
	if !slices.Contains(s.Removed, "b/1") || s.Nodes["b"].RaftID != "b/2" {
		t.Errorf("%+v %v", s.Nodes["b"], s.Removed)
	}
	refused(t, s, Command{ReplaceNode: &ReplaceNode{Name: "b", RaftID: "b/1"}}, RuleRaftIDUsed)
}

func TestRetryIsAnsweredAsTheFirst(t *testing.T) {
	s := serving(t)
	c := promote(s, "b", 2)
	c.ID = "once"
	s, first := s.Apply(c)
	again, second := s.Apply(c)
	if first != second || again != s {
		t.Errorf("%+v then %+v", first, second)
	}
	c = promote(serving(t), "b", 2)
	c.ID = "no"
	s, _ = s.Apply(c)
	if _, r := s.Apply(c); r.Rule != RuleEpoch {
		t.Errorf("a refusal is remembered too: %+v", r)
	}
}

func TestEventsAreBoundedAndInOrder(t *testing.T) {
	s := three(t)
	for i := range EventsMax + 10 {
		s = do(t, s, Command{Time: int64(i), AddEvent: &AddEvent{Event: Event{Name: "x", Text: fmt.Sprint(i)}}})
	}
	if len(s.Events) != EventsMax {
		t.Fatalf("%d events", len(s.Events))
	}
	last := s.Events[len(s.Events)-1].ID
	e, gap := s.EventsSince(last - 3)
	if len(e) != 3 || gap || e[0].ID != last-2 {
		t.Errorf("%v gap %v", e, gap)
	}
	if e, gap = s.EventsSince(0); len(e) != EventsMax || !gap {
		t.Errorf("%d events, gap %v", len(e), gap)
	}
	if e, gap = s.EventsSince(last + 5); len(e) != 0 || gap {
		t.Errorf("%d events, gap %v", len(e), gap)
	}
	refused(t, s, Command{AddEvent: &AddEvent{Event: Event{Name: "x", Fields: map[string]string{strings.Repeat("k", 100): ""}}}}, RuleLimit)
}

func TestEncodingVersions(t *testing.T) {
	s := serving(t)
	b := encoded(t, s)
	back, err := Decode(b)
	if err != nil || !bytes.Equal(b, encoded(t, back)) {
		t.Fatalf("round trip: %v", err)
	}
	if _, err := Decode(bytes.Replace(b, []byte(`"v":1`), []byte(`"v":2`), 1)); !errors.Is(err, ErrNewer) {
		t.Errorf("newer: %v", err)
	}
	for _, bad := range []string{"", "{}", "null", `{"v":1,"nodes":{"a":null}}`, `{"v":1,"volumes":{"1":{"id":2}}}`, `{"v":1,"nodes":null}`} {
		if _, err := Decode([]byte(bad)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := DecodeCommand([]byte(`{"v":5,"teleport":{}}`)); !errors.Is(err, ErrNewer) {
		t.Errorf("newer command: %v", err)
	}
	for _, bad := range []string{"", "{}", `{"v":1}`, `{"v":1,"add_event":{},"promote":{}}`} {
		if _, err := DecodeCommand([]byte(bad)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	c := promote(s, "b", 2)
	c.ID = "x"
	if b, err = c.Encode(); err != nil {
		t.Fatal(err)
	}
	if d, err := DecodeCommand(b); err != nil || d.Promote.Node != "b" || d.V != 1 {
		t.Errorf("%+v, %v", d, err)
	}
	c.Promote.Readmit = true // an older build must not take it for one without
	if b, err = c.Encode(); err != nil {
		t.Fatal(err)
	}
	if d, err := DecodeCommand(b); err != nil || !d.Promote.Readmit || d.V != 2 {
		t.Errorf("%+v, %v", d, err)
	}
	// What a release before would do where the others refuse it must stop that one; what is
	// as it was must not.
	for v, c := range map[int][]Command{
		VersionCompares: {
			{RegisterReplica: &RegisterReplica{Volume: 1, Node: "c", Replica: 31, Replace: true, Was: 30}},
			{AddReplica: &AddReplica{Volume: 1, Node: "c", AtMost: 3}},
		},
		VersionFence: {{Promote: &Promote{Volume: 1, Epoch: 2, Node: "b", Fence: true}}},
		1: {
			{RegisterReplica: &RegisterReplica{Volume: 1, Node: "c", Replica: 31, Replace: true}},
			{AddReplica: &AddReplica{Volume: 1, Node: "c"}},
		},
	} {
		for i := range c {
			b, err := c[i].Encode()
			if err != nil {
				t.Fatal(err)
			}
			if d, err := DecodeCommand(b); err != nil || d.V != v {
				t.Errorf("%s has version %d: %v", b, d.V, err)
			}
		}
	}
	old := []byte(`{"v":1,"id":"9f","time":5,"register_replica":{"volume":1,"node":"c","replica":31,"replace":true}}`)
	if d, err := DecodeCommand(old); err != nil || !d.RegisterReplica.Replace || d.RegisterReplica.Was != 0 {
		t.Errorf("an entry of a release before: %+v, %v", d, err)
	}
}

func FuzzDecodeCommand(f *testing.F) {
	s := serving(f)
	for _, c := range []Command{promote(s, "b", 2), changeSet(s, "a"), create("v", 2, "a")} {
		b, err := c.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := DecodeCommand(b)
		if err != nil {
			return
		}
		next, _ := s.Apply(c)
		if err := next.check(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestInvariants gives random commands and holds the state against what must
// always be so.
func TestInvariants(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := serving(t)
		primaries := map[ident.Epoch]string{}
		steps := rapid.IntRange(1, 60).Draw(t, "steps")
		for i := range steps {
			c := drawCommand(t, s)
			c.ID, c.V = fmt.Sprint(i), CommandVersion
			before := encoded(t, s)
			next, r := s.Apply(c)
			if again, r2 := s.Apply(c); r != r2 || !bytes.Equal(encoded(t, again), encoded(t, next)) {
				t.Fatalf("%s: not deterministic", c.Kind())
			}
			if !bytes.Equal(before, encoded(t, s)) {
				t.Fatalf("%s changed a state that was handed out", c.Kind())
			}
			if err := next.check(); err != nil {
				t.Fatal(err)
			}
			holds(t, s, next, &c, r, primaries)
			s = next
		}
	})
}

func drawCommand(t *rapid.T, s *State) Command {
	v := s.Volumes[1]
	node := rapid.SampledFrom([]ident.Node{"a", "b", "c"})
	near := func(x uint64, what string) uint64 {
		return x + uint64(rapid.SampledFrom([]int{0, 0, 0, 0, 1}).Draw(t, what))
	}
	set := slices.Sorted(slices.Values(rapid.SliceOfNDistinct(node, 0, 3, rapid.ID[ident.Node]).Draw(t, "set")))
	n := node.Draw(t, "node")
	id := ident.Replica(rapid.IntRange(1, 40).Draw(t, "replica"))
	if r := v.Replica(n); r != nil && rapid.Bool().Draw(t, "own id") {
		id = r.Replica
	}
	switch rapid.IntRange(0, 7).Draw(t, "kind") {
	case 0:
		return Command{Promote: &Promote{
			Volume: 1, OldEpoch: ident.Epoch(near(uint64(v.Epoch), "old")), SetVersion: near(v.SetVersion, "version"),
			Epoch: v.Epoch + ident.Epoch(rapid.IntRange(0, 3).Draw(t, "epoch")), Node: n, Replica: id, Incarnation: 1,
			Loss: rapid.SampledFrom([]Loss{LossNone, LossNone, LossPower, LossForced, LossLocal}).Draw(t, "loss"), Heard: set,
			Fence: rapid.Bool().Draw(t, "fence"),
			Set:   rapid.SampledFrom([][]ident.Node{nil, set}).Draw(t, "forced set"),
		}}
	case 1, 2:
		return Command{ChangeSet: &ChangeSet{Volume: 1, Epoch: ident.Epoch(near(uint64(v.Epoch), "epoch")), Version: near(v.SetVersion, "version"), Set: set}}
	case 3:
		return Command{MarkFailed: &MarkFailed{Volume: 1, Node: n, Replica: id, Reason: "drawn"}}
	case 4:
		return Command{RegisterReplica: &RegisterReplica{Volume: 1, Node: n, Replica: id, Replace: rapid.Bool().Draw(t, "replace"), Was: ident.Replica(rapid.SampledFrom([]int{0, 0, 30}).Draw(t, "was"))}}
	case 5:
		return Command{SetOptions: &SetOptions{Volume: 1, MinCopies: ptr(rapid.IntRange(0, 4).Draw(t, "min")), Ack: ptr(rapid.SampledFrom([]AckMode{AckQuorum, AckLocal}).Draw(t, "ack"))}}
	case 6:
		return Command{RemoveReplica: &RemoveReplica{Volume: 1, Node: n}}
	}
	return Command{AddReplica: &AddReplica{Volume: 1, Node: n, AtMost: rapid.IntRange(0, 3).Draw(t, "at most")}}
}

// holds checks one step.
func holds(t *rapid.T, s, next *State, c *Command, r Result, primaries map[ident.Epoch]string) {
	old, v := s.Volumes[1], next.Volumes[1]
	if v.Epoch < old.Epoch || v.SetVersion < old.SetVersion || v.Generation < old.Generation || v.LossEpoch < old.LossEpoch {
		t.Fatalf("%s: something fell: %+v then %+v", c.Kind(), old, v)
	}
	if !slices.Equal(old.InSync, v.InSync) && v.SetVersion == old.SetVersion {
		t.Fatalf("%s: the set changed and its version did not", c.Kind())
	}
	who := fmt.Sprint(v.Primary, v.PrimaryReplica, v.PrimaryIncarnation, v.PrimaryPosition)
	if was, ok := primaries[v.Epoch]; ok && was != who {
		t.Fatalf("two primaries in epoch %d: %s and %s", v.Epoch, was, who)
	}
	primaries[v.Epoch] = who
	if len(v.InSync) == 0 || !v.InSet(v.Primary) {
		t.Fatalf("%s: in sync %v, primary %s", c.Kind(), v.InSync, v.Primary)
	}
	if c.ChangeSet != nil && len(v.InSync) < len(old.InSync) && len(v.InSync) < v.Options.MinCopies {
		t.Fatalf("the set fell below min_copies %d: %v", v.Options.MinCopies, v.InSync)
	}
	for _, n := range v.InSync {
		if rep := v.Replica(n); !old.InSet(n) && (rep.Failed || rep.Replica == 0) {
			t.Fatalf("%s joined: %+v", n, rep)
		}
		if was := old.Replica(n); was != nil && old.InSet(n) && was.Failed && !v.Replica(n).Failed {
			t.Fatalf("%s: a failed member of the set was forgiven", n)
		}
	}
	if !r.OK && (v.Epoch != old.Epoch || v.SetVersion != old.SetVersion || next.NextEvent != s.NextEvent) {
		t.Fatalf("%s was refused and did something", c.Kind())
	}
	if r.OK && c.Promote != nil && v.Epoch <= old.Epoch {
		t.Fatal("a promotion without a new epoch")
	}
	ends := r.OK && c.Promote != nil && (r.Loss != LossNone || c.Promote.Fence)
	if raised := v.Generation - old.Generation; raised > 1 || ends != (raised == 1) {
		t.Fatalf("loss %q, generation %d then %d", r.Loss, old.Generation, v.Generation)
	}
	if r.Loss == LossNone && v.LossEpoch != old.LossEpoch {
		t.Fatalf("no loss, and one in epoch %d", v.LossEpoch)
	}
}
