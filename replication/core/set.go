package core

import (
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
)

// setChange is a change of the in-sync set under way. From its beginning until
// its outcome is read from the cluster state, commit, FLUSH and lease each need
// a majority of the old set and of the new.
//
// It begins before it is proposed: at the fence, everything appended so far.
// It is proposed once a majority of the new set has fsynced through the fence.
// What is appended after the fence is committed by both majorities, so at the
// time of the command a majority of the new set holds all that the old set
// could have committed alone, and holds it durably.
type setChange struct {
	id       uint64
	set      []ident.Node
	version  uint64
	fence    ident.Seq
	joiner   ident.Node // "" for an eviction
	reason   string
	proposed bool
}

func (c *Core) inSet(n ident.Node) bool { return slices.Contains(c.view.Set, n) }

// considerSet begins a change of the in-sync set where a rule asks for one. At
// most one change is outstanding.
func (c *Core) considerSet() {
	if c.p.change != nil || c.p.draining || c.now < c.p.coolOff || len(c.view.Set) == 0 {
		return
	}
	set, joiner, reason := c.wantedSet()
	if set == nil {
		return
	}
	c.p.changeID++
	c.p.change = &setChange{
		id: c.p.changeID, set: slices.Clone(set), version: c.view.SetVersion, fence: c.last.Seq, joiner: joiner, reason: reason,
	}
	c.p.syncTo = max(c.p.syncTo, c.last.Seq)
}

// wantedSet decides by rule which set should be in force: nil for the present
// one. No smaller set than min_copies is ever wanted, unless all who go must be
// resynced or have failed.
func (c *Core) wantedSet() (set []ident.Node, joiner ident.Node, rule string) {
	enough := func(set []ident.Node) bool { return len(set) >= max(c.view.MinCopies, 1) }
	// All that are no use go at once: one of them alone would leave a set that
	// the others keep from ever holding anything.
	fit, live := c.fit[:0], c.live[:0] // of every tick: valid until the next
	for _, n := range c.view.Set {
		why, pr := c.unfit(n), c.peer(n)
		if why == "" {
			fit = append(fit, n)
		} else {
			rule = "evict " + string(n) + ": " + why
		}
		if why == "" && (n == c.cfg.Node || (pr != nil && !c.gone(pr))) {
			live = append(live, n)
		}
	}
	c.fit, c.live = fit, live
	if len(fit) < len(c.view.Set) {
		// Below min_copies too: those that go hold nothing that counts, and a
		// set that small answers nobody until they are back.
		switch {
		case c.carried(fit):
			return fit, "", rule
		case enough(live):
			return live, "", rule + ", and who does not answer: no majority otherwise"
		}
		return nil, "", ""
	}
	short := len(live) < len(c.view.Set)/2+1
	if short && enough(live) {
		return live, "", "evict who does not answer: no majority otherwise"
	}
	// Before its marker is committed, a primary takes in only whom it cannot do
	// without.
	if c.role != RolePrimary && !short {
		return nil, "", ""
	}
	for _, m := range c.view.Members {
		if m.Leaving && m.Node != c.cfg.Node && c.inSet(m.Node) && enough(c.view.Set[1:]) && c.carried(c.setWithout(m.Node)) {
			return c.setWithout(m.Node), "", "evict " + string(m.Node) + ": an operator removes it"
		}
	}
	for _, pr := range c.p.peers {
		if !c.inSet(pr.node) && pr.state == peerStream && c.heard(pr) && pr.reported && !pr.inconsistent && c.caughtUp(pr) {
			return append(slices.Clone(c.view.Set), pr.node), pr.node, "join " + string(pr.node) + ": it has caught up"
		}
	}
	for _, pr := range c.p.peers {
		if c.inSet(pr.node) && c.lagging(pr) && enough(c.view.Set[1:]) && c.carried(c.setWithout(pr.node)) {
			return c.setWithout(pr.node), "", "evict " + string(pr.node) + ": it lags beyond the log's retention"
		}
	}
	return nil, "", ""
}

func (c *Core) setWithout(n ident.Node) []ident.Node {
	return slices.DeleteFunc(slices.Clone(c.view.Set), func(m ident.Node) bool { return m == n })
}

// carried reports whether a majority of the set is there: only such a set can
// come to hold anything.
func (c *Core) carried(set []ident.Node) bool {
	there := 0
	for _, n := range set {
		if pr := c.peer(n); n == c.cfg.Node || pr != nil && !c.gone(pr) {
			there++
		}
	}
	return there > len(set)/2
}

// leaversUnfit reports whether everybody who is not in set any more is unfit.
func (c *Core) leaversUnfit(set []ident.Node) bool {
	for _, n := range c.view.Set {
		if !slices.Contains(set, n) && c.unfit(n) == "" {
			return false
		}
	}
	return true
}

// leaversWell reports whether there is no reason any more to evict anybody who is
// not in set.
func (c *Core) leaversWell(set []ident.Node) bool {
	for _, m := range c.view.Members {
		if !c.inSet(m.Node) || slices.Contains(set, m.Node) {
			continue
		}
		if pr := c.peer(m.Node); m.Leaving || pr == nil || c.gone(pr) || c.lagging(pr) || c.unfit(m.Node) != "" {
			return false
		}
	}
	return true
}

// unfit says why a member of the set can hold nothing for it any more; "" when
// it can.
func (c *Core) unfit(n ident.Node) string {
	pr := c.peer(n)
	switch {
	case n == c.cfg.Node || pr == nil:
		return ""
	case pr.state == peerFailed:
		return "its disk failed"
	case pr.state == peerResync:
		return "it cannot be streamed to"
	case pr.inconsistent:
		return "it is to be resynced"
	}
	return ""
}

// caughtUp reports whether all that is missing at a peer is in flight.
func (c *Core) caughtUp(pr *peer) bool {
	return pr.next > c.last.Seq && !pr.reading && pr.matched >= c.p.marker
}

// progressChange proposes the change once its fence is reached, and takes it
// back when it has become pointless before it was proposed.
func (c *Core) progressChange() {
	ch := c.p.change
	if ch == nil || ch.proposed {
		return
	}
	if ch.joiner != "" {
		pr := c.peer(ch.joiner)
		if pr == nil || pr.state != peerStream || !c.heard(pr) || pr.inconsistent {
			c.dropChange()
			return
		}
		if pr.durable < ch.fence {
			return // a joiner has fsynced all that it caught up with
		}
	}
	if ch.joiner == "" && (!c.carried(ch.set) || c.leaversWell(ch.set)) {
		// While it is under way nothing is committed without its majority, and
		// the present set may have another: it was proposed to nobody.
		c.dropChange()
		return
	}
	for _, n := range ch.set {
		// The reason to evict the others must still hold for a smaller set
		// that its own members cannot carry.
		if pr := c.peer(n); n != c.cfg.Node && (pr == nil || pr.state == peerFailed || pr.state == peerResync) {
			c.dropChange()
			return
		}
	}
	if kth(ch.set, c.durableBy) < max(ch.fence, c.p.marker) {
		return
	}
	ch.proposed = true
	c.proposes = append(c.proposes, SetProposal{
		ID: ch.id, Epoch: c.p.epoch, Version: ch.version, Set: slices.Clone(ch.set), Reason: ch.reason,
		Unfit: c.leaversUnfit(ch.set),
	})
	c.event(Event{Name: "set", To: join(ch.set), From: join(c.view.Set), Rule: ch.reason, Pos: c.last})
}

func (c *Core) dropChange() {
	c.p.change = nil
	c.p.coolOff = c.now + Instant(c.cfg.Heartbeat)
}

// Proposed brings the outcome of a proposal. When the next view shows it (the
// change is accepted, or epoch or version have moved) it stays under way until
// then; else it is refused, definitely.
func (c *Core) Proposed(now Instant, id uint64, shows bool) {
	c.advance(now)
	if c.isPrimary() && c.p.change != nil && c.p.change.id == id && !shows {
		c.dropChange()
	}
}

// viewAsPrimary adopts a newer view of our own epoch.
func (c *Core) viewAsPrimary() {
	if ch := c.p.change; ch != nil && c.view.SetVersion > ch.version {
		c.p.change = nil
	}
	c.syncPeers()
}

func join(set []ident.Node) string {
	s := ""
	for i, n := range set {
		if i > 0 {
			s += ","
		}
		s += string(n)
	}
	return s
}
