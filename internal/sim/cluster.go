package sim

import (
	"fmt"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication/core"
)

// clusterState is the Raft group as the replicas see it: linearizable commands
// that may take long, and whose outcome may be lost; views that come late. The
// rules are the real ones (raft/state).
type clusterState struct {
	st     *state.State
	views  []core.View     // each state of the volume that ever was
	vols   []*state.Volume // the same, for the controllers
	cmds   []*command
	stall  int64 // commands commit only after this time: Raft has no leader
	lastTo []int64
}

type command struct {
	cmd     state.Command
	node    int // who asked; -1: a controller
	ctl     int
	result  state.Result
	applied bool
	done    func(*command)
}

// setCommand is a proposal of the driver's core whose outcome it does not know.
type setCommand struct {
	id  uint64
	cmd state.Command
}

func (cl *clusterState) vol() *state.Volume { return cl.vols[len(cl.vols)-1] }

func (s *Sim) initCluster() {
	cl := &s.cl
	cl.lastTo = make([]int64, len(s.nodes))
	cl.st = state.New()
	must := func(c state.Command) {
		next, r := cl.st.Apply(c)
		if !r.OK {
			panic(r.Err())
		}
		cl.st = next
	}
	var nodes []state.Node
	var reps []state.Replica
	for _, n := range s.nodes {
		nodes = append(nodes, state.Node{Name: n.name, Address: "x:1", RaftID: string(n.name)})
		if n.replica {
			reps = append(reps, state.Replica{Node: n.name})
		}
	}
	must(state.Command{InitCluster: &state.InitCluster{Cluster: "sim", ClusterID: "1", Nodes: nodes}})
	ack := map[core.AckMode]state.AckMode{core.AckQuorum: state.AckQuorum, core.AckDurable: state.AckDurable, core.AckLocal: state.AckLocal}[s.opt.Ack]
	must(state.Command{CreateVolume: &state.CreateVolume{
		Name: "v", ID: volumeID, Size: uint64(s.opt.Blocks * blockSize), Replicas: reps,
		Options: state.Options{Ack: ack, MinCopies: max(s.opt.MinCopies, 1)},
	}})
	for _, n := range s.nodes {
		if n.replica {
			must(state.Command{RegisterReplica: &state.RegisterReplica{Volume: volumeID, Node: n.name, Replica: n.disk.meta.replica}})
		}
	}
	s.newView()
}

// newView records the volume's state if it is a new one.
func (s *Sim) newView() {
	v := s.cl.st.Volumes[volumeID]
	if len(s.cl.vols) > 0 && s.cl.vol() == v {
		return
	}
	s.cl.vols = append(s.cl.vols, v)
	view := core.View{
		Epoch: v.Epoch, Primary: v.Primary, Incarnation: v.PrimaryIncarnation, Position: v.PrimaryPosition,
		Set: v.InSync, SetVersion: v.SetVersion, MinCopies: v.Options.MinCopies, Generation: v.Generation,
		LossEpoch: v.LossEpoch, HoldNanos: s.opt.Hold, Size: v.Size, Ack: s.opt.Ack,
	}
	if v.Options.ResyncRateMax > 0 {
		view.Rates = core.Rates{Set: true, Max: v.Options.ResyncRateMax, Min: v.Options.ResyncRateMin}
	}
	for _, r := range v.Replicas {
		view.Members = append(view.Members, core.Member{Node: r.Node, Replica: r.Replica, Failed: r.Failed, Leaving: r.Leaving})
	}
	s.cl.views = append(s.cl.views, view)
	k := uint64(len(s.cl.views) - 1)
	for _, n := range s.nodes {
		late := s.delay(200*us, 40*ms)
		if !s.healed && s.chance(0.05) {
			late = s.delay(40*ms, 2*s1)
		}
		// A node's copy of the state only goes forward.
		t := max(s.now+late, s.cl.lastTo[n.i])
		s.cl.lastTo[n.i] = t
		s.at(t-s.now, event{kind: evView, node: n.i, x: k})
	}
}

// takeView hands a node a state of the volume.
func (s *Sim) takeView(n *node, k int) {
	if k < n.viewN {
		return
	}
	n.viewN = k
	old := n.view
	n.view = s.cl.views[k]
	if n.seen.Less(n.view.Position) {
		n.seen = n.view.Position
	}
	if n.core != nil {
		s.put(n, input{kind: inView, view: &s.cl.views[k]})
	}
	if old.Generation != n.view.Generation && old.Generation != 0 {
		s.endSessions(n, n.view.Generation)
	}
	if old.Primary != n.view.Primary || old.Epoch != n.view.Epoch {
		s.rerouteAll(n)
	}
	s.keepReplica(n, k)
}

// submit gives a command to Raft. done is called when its proposer hears of
// the outcome, if ever.
func (s *Sim) submit(c *command) {
	s.cl.cmds = append(s.cl.cmds, c)
	late := s.delay(500*us, 30*ms)
	if !s.healed && s.chance(0.05) {
		late = s.delay(30*ms, 3*s1)
	}
	late = max(late, s.cl.stall-s.now+s.delay(0, 50*ms))
	s.at(late, event{kind: evApplyCmd, x: uint64(len(s.cl.cmds) - 1)})
}

func (s *Sim) clusterEvent(e *event) {
	if e.kind == evViewAll {
		for _, n := range s.nodes {
			if n.up {
				s.at(s.delay(0, 20*ms), event{kind: evView, node: n.i, gen: n.gen, x: uint64(len(s.cl.views) - 1)})
			}
		}
		s.at(500*ms, event{kind: evViewAll})
		return
	}
	c := s.cl.cmds[e.x]
	old := s.cl.vol()
	next, r := s.cl.st.Apply(c.cmd)
	s.cl.st, c.result, c.applied = next, r, true
	if s.tracing() {
		v := next.Volumes[volumeID]
		s.note(-1, "command", "%s by %d: ok %v %s; now epoch %d primary %s at %v set %v version %d", describe(&c.cmd), c.node, r.OK, r.Reason, v.Epoch, v.Primary, v.PrimaryPosition, v.InSync, v.SetVersion)
	}
	s.newView()
	s.chk.after(s, c, old)
	if c.done == nil || (!s.healed && s.chance(0.05)) {
		return
	}
	s.at(s.delay(200*us, 10*ms), event{kind: evCall, fn: func() { c.done(c) }})
}

func describe(c *state.Command) string {
	switch {
	case c.Promote != nil:
		return fmt.Sprintf("promote %+v", *c.Promote)
	case c.ChangeSet != nil:
		return fmt.Sprintf("set %v epoch %d version %d (%s)", c.ChangeSet.Set, c.ChangeSet.Epoch, c.ChangeSet.Version, c.ChangeSet.Reason)
	}
	return c.Kind()
}

// propose sends the core's proposal to Raft, and asks again under the same id
// until its outcome is known: a time-out is none.
func (s *Sim) propose(n *node, p *core.SetProposal) {
	sc := &setCommand{id: p.ID, cmd: state.Command{
		ID: fmt.Sprintf("%d-%d-%d", n.disk.meta.replica, n.disk.meta.incarnation, p.ID),
		ChangeSet: &state.ChangeSet{
			Volume: volumeID, Epoch: p.Epoch, Version: p.Version, Set: append([]ident.Node(nil), p.Set...), Reason: p.Reason, Unfit: p.Unfit,
		},
	}}
	n.change = sc
	s.trySet(n, sc, n.gen)
}

func (s *Sim) trySet(n *node, sc *setCommand, gen uint32) {
	if n.gen != gen || n.change != sc {
		return
	}
	s.submit(&command{cmd: sc.cmd, node: n.i, done: func(c *command) {
		if n.gen != gen || n.change != sc || !n.up {
			return
		}
		ok := uint64(0)
		if c.result.OK || c.result.Superseded() {
			ok = 1
		}
		n.change = nil
		s.nodeEvent(n, &event{kind: evOutcome, node: n.i, gen: gen, a: int(ok), x: sc.id})
	}})
	s.at(400*ms, event{kind: evCall, fn: func() { s.trySet(n, sc, gen) }})
}

func (s *Sim) outcome(n *node, e *event) {
	if n.core != nil {
		s.put(n, input{kind: inProposed, x: e.x, y: uint64(e.a)})
	}
}

// markFailed records a failed disk in the cluster state, until it is done.
func (s *Sim) markFailed(n *node, reason string) {
	id, rep := fmt.Sprintf("fail-%s-%d", n.name, n.gen), n.disk.meta.replica
	var try func()
	told := false
	try = func() {
		if told || n.disk.meta.replica != rep {
			return
		}
		s.submit(&command{node: n.i, cmd: state.Command{ID: id, MarkFailed: &state.MarkFailed{
			Volume: volumeID, Node: n.name, Replica: rep, Reason: reason,
		}}, done: func(*command) { told = true }})
		s.at(500*ms, event{kind: evCall, fn: try})
	}
	try()
}
