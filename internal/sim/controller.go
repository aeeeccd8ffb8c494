package sim

import (
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication/core"
)

const (
	graceTime  = 600 * ms // power_loss_grace
	roundTime  = 2 * s1
	sealEvery  = 60 * ms
	drainLimit = 1 * s1
)

// controller is the failover controller on one Raft leader (design section 4).
// Two may be at work when the leader has changed and the old one has not heard.
type controller struct {
	i       int
	gen     uint32
	vol     *state.Volume // as this leader has it: maybe not the newest
	behind  int           // how many states it is behind at least
	highest ident.Epoch   // any promise that it has heard of

	want   bool // somebody asked for a round
	drain  bool // the primary is to drain first
	force  bool // an operator accepts loss
	fence  bool // an operator ends the sessions from before
	to     ident.Node
	round  round
	sendTo map[ident.Node]bool // whom it can reach; nil: everybody
}

type round struct {
	on       bool
	force    bool
	fence    bool
	epoch    ident.Epoch
	vol      *state.Volume
	began    int64
	asked    int64
	drainEnd int64 // 0: the primary has drained or need not
	answers  map[ident.Node]ident.SealAnswer
	promoted bool
}

func (s *Sim) newController(i int) *controller {
	c := &controller{i: i, vol: s.cl.vol(), want: true}
	if old := s.ctl[i]; old != nil {
		c.gen = old.gen + 1
	}
	s.ctl[i] = c
	s.at(sealEvery, event{kind: evCtl, a: i, x: uint64(c.gen)})
	return c
}

// report carries a replica's word to whoever leads.
func (s *Sim) report(n *node, r core.Report) {
	s.note(n.i, "report", "kind %d epoch %d", r.Kind, r.Epoch)
	for i, c := range s.ctl {
		if c != nil && (s.healed || s.chance(0.9)) {
			s.at(s.delay(200*us, 20*ms), event{kind: evReport, node: n.i, a: i, b: int(r.Kind), x: uint64(r.Epoch), gen: c.gen})
		}
	}
}

func (s *Sim) controllerEvent(e *event) {
	c := s.ctl[e.a]
	if c == nil {
		return
	}
	switch e.kind {
	case evCtl:
		if uint32(e.x) == c.gen {
			s.controllerTick(c)
			s.at(25*ms, event{kind: evCtl, a: c.i, x: uint64(c.gen)})
		}
	case evReport:
		if ident.Epoch(e.x) >= c.vol.Epoch && c.gen == e.gen {
			c.want = true
			if k := core.ReportKind(e.b); k == core.ReportReseal || k == core.ReportStalled {
				c.drain = true
			}
		}
	case evDrained:
		if c.gen == e.gen && c.round.on {
			c.round.drainEnd = 0
		}
	}
}

// controllerTick goes on with a round, or begins one.
func (s *Sim) controllerTick(c *controller) {
	if k := len(s.cl.vols) - 1 - c.behind; k >= 0 && s.cl.vols[k].Epoch >= c.vol.Epoch {
		c.vol = s.cl.vols[k]
	}
	r := &c.round
	if r.on && (s.now > r.began+roundTime+graceTime || c.vol.Epoch != r.vol.Epoch || c.vol.SetVersion != r.vol.SetVersion) {
		r.on = false
	}
	if !r.on {
		if !c.want {
			return
		}
		c.want = false
		*r = round{on: true, vol: c.vol, began: s.now, epoch: max(c.vol.Epoch, c.highest) + 1, answers: map[ident.Node]ident.SealAnswer{}}
		if c.drain && c.vol.Primary != "" {
			r.drainEnd = s.now + drainLimit
			s.askDrain(c)
		}
		if r.force = c.force; r.force {
			r.drainEnd = 0
		}
		r.fence = c.fence
		c.drain, c.force, c.fence = false, false, false
		s.note(-1, "round", "controller %d epoch %d set %v drain %v", c.i, r.epoch, c.vol.InSync, r.drainEnd > 0)
	}
	if r.promoted || s.now < r.drainEnd {
		return
	}
	if s.now >= r.asked+sealEvery {
		r.asked = s.now
		for i := range r.vol.Replicas {
			if n := r.vol.Replicas[i].Node; r.force || r.vol.InSet(n) {
				s.askSeal(c, n)
			}
		}
	}
	s.decide(c)
}

func (s *Sim) reach(c *controller, n ident.Node) bool {
	return s.healed || (c.sendTo == nil || c.sendTo[n]) && (s.opt.Manual || s.chance(0.95))
}

func (s *Sim) askSeal(c *controller, name ident.Node) {
	i := s.index(name)
	if !s.reach(c, name) {
		return
	}
	// The answer finds its round by controller, life and epoch.
	s.at(s.delay(200*us, 5*ms), event{kind: evSeal, node: i, a: c.i<<20 | int(c.gen), x: uint64(c.round.epoch)})
}

func (s *Sim) askDrain(c *controller) {
	if i := s.index(c.vol.Primary); i >= 0 && s.reach(c, c.vol.Primary) {
		s.at(s.delay(200*us, 5*ms), event{kind: evDrain, node: i, a: c.i<<20 | int(c.gen), x: uint64(c.vol.Epoch)})
	}
}

// drained: a node's core is done with a drain.
func (s *Sim) drained(n *node, id uint64) {
	for i, d := range n.drains {
		if d.id == id {
			n.drains = append(n.drains[:i], n.drains[i+1:]...)
			s.at(s.delay(200*us, 5*ms), event{kind: evDrained, a: d.ctl >> 20, gen: uint32(d.ctl & (1<<20 - 1))})
			return
		}
	}
}

// sealReply carries an answer back.
func (s *Sim) sealReply(n *node, r *core.SealReply) {
	a := r.Answer
	s.chk.sealed(s, n, &a)
	s.note(n.i, "sealed", "epoch %d: %v last %v promised %d amnesiac %v wait %d", a.Epoch, a.Refusal, a.Last, a.Promised, a.Amnesiac, a.WaitNanos/ms)
	if r.ID == 1<<30 {
		n.sealHook(a)
		return
	}
	c := s.ctl[r.ID>>20]
	gen := uint32(r.ID & (1<<20 - 1))
	if c == nil || c.gen != gen || !s.reach(c, n.name) {
		return
	}
	s.at(s.delay(200*us, 5*ms), event{kind: evCall, fn: func() { s.takeSealed(c, n.name, a) }})
}

func (s *Sim) takeSealed(c *controller, from ident.Node, a ident.SealAnswer) {
	c.highest = max(c.highest, a.Promised)
	r := &c.round
	if !r.on || r.epoch != a.Epoch {
		return
	}
	r.answers[from] = a
}

// decide promotes as soon as the real rules (raft/state) allow it, or gives the
// round up.
func (s *Sim) decide(c *controller) {
	r := &c.round
	all := len(r.answers) == len(r.vol.InSync)
	facts := state.Round{
		Volume: r.vol, Epoch: r.epoch, Answers: r.answers, Prefer: c.to,
		PowerLoss: true, GraceOver: s.now >= r.began+graceTime,
	}
	if p := r.vol.Primary; r.drainEnd == 0 && !r.force && p != c.to {
		facts.Avoid = p
	}
	var v state.Verdict
	if r.force {
		if s.now < r.began+200*ms {
			return // everybody has the time to answer
		}
		v = state.DecideForced(facts)
	} else {
		v = state.DecideSeal(facts)
	}
	if v.Text() == "" || v.Kind.String() == "" {
		s.fail("I7", "a verdict that says nothing: %+v", v)
	}
	switch v.Kind {
	case state.VerdictPromote:
		if all || s.now >= r.began+100*ms {
			s.promote(c, &v)
		}
	case state.VerdictRaise:
		// Someone is above this round: the next one is above everybody.
		c.highest = max(c.highest, v.Epoch-1)
		r.on, c.want = false, true
	case state.VerdictLease, state.VerdictGrace, state.VerdictWait:
	}
}

func (s *Sim) promote(c *controller, v *state.Verdict) {
	r := &c.round
	r.promoted = true
	s.chk.judge(s, r, v)
	epoch := r.epoch
	s.submit(&command{node: -1, ctl: c.i, cmd: state.Command{Promote: &state.Promote{
		Volume: volumeID, OldEpoch: r.vol.Epoch, SetVersion: r.vol.SetVersion, Epoch: r.epoch, Node: v.Node,
		Replica: v.Answer.Replica, Incarnation: v.Answer.Incarnation, Position: v.Answer.Last, Loss: v.Loss, Heard: v.Heard, Set: v.Set,
		Fence: r.fence,
	}}, done: func(*command) {
		if c.round.on && c.round.epoch == epoch {
			c.round.on = false
			if s.healed || s.chance(0.5) {
				c.want = false // what was reported of earlier epochs is forgotten
			}
		}
	}})
}
