package sim

import (
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// link is what is between two nodes: two one-way connections (ADR 0010), each
// dialed by the one who sends on it.
type link struct {
	a, b    int
	blocked [2]bool // packets are lost: [0] a to b, [1] b to a
	c       [2]conn // [0] a sends, [1] b sends
}

// conn is a TCP connection, or the want of one. gen rises each time that it is
// made anew. What it delivers is in order.
type conn struct {
	up     bool
	gen    uint64
	lastAt int64
	held   []event // waits for a partition to end
	known  int64   // when its owner will have heard of the newest up or down
}

func (l *link) dir(from int) int {
	if from == l.a {
		return 0
	}
	return 1
}

func (l *link) ends(d int) (from, to int) {
	if d == 0 {
		return l.a, l.b
	}
	return l.b, l.a
}

// dial makes a connection if nothing is in the way.
func (s *Sim) dial(l *link, d int) {
	c := &l.c[d]
	if c.up {
		return
	}
	i, j := l.ends(d)
	from, to := s.nodes[i], s.nodes[j]
	if !from.up || !to.up {
		return // who starts tries again
	}
	if l.blocked[0] || l.blocked[1] || from.stopped || to.stopped || s.now < c.known {
		s.at(s.delay(10*ms, 50*ms), event{kind: evLinkTry, node: i, b: j})
		return
	}
	c.up = true
	c.gen++
	c.known = s.now + s.delay(100*us, 5*ms)
	c.lastAt = s.now
	s.at(c.known-s.now, event{kind: evPeer, node: i, b: j, gen: from.gen, x: 1})
}

// hangUp ends a connection: the one who sends on it hears of it in its own time.
func (s *Sim) hangUp(l *link, d int, silent bool) {
	c := &l.c[d]
	if !c.up {
		return
	}
	c.up = false
	i, j := l.ends(d)
	late := s.delay(50*us, 20*ms)
	if silent {
		late = s.delay(leaseFor/2, 2*leaseFor) // no FIN comes: keepalive finds out
	}
	c.known = max(s.now+late, c.known+1)
	if n := s.nodes[i]; n.up {
		s.at(c.known-s.now, event{kind: evPeer, node: i, b: j, gen: n.gen, x: 0})
	}
	c.held = c.held[:0]
	s.at(s.delay(20*ms, 200*ms), event{kind: evLinkTry, node: i, b: j})
}

// breakLink ends both connections.
func (s *Sim) breakLink(l *link, silent bool) {
	s.hangUp(l, 0, silent)
	s.hangUp(l, 1, silent)
}

func (s *Sim) linksLost(n *node, silent bool) {
	for j := range s.nodes {
		if l := s.links[n.i][j]; l != nil {
			s.breakLink(l, silent)
		}
	}
}

// linkStale breaks connections over which nothing has come for long.
func (s *Sim) linkStale(l *link, gen uint64) {
	if l.c[0].gen+l.c[1].gen == gen && (l.blocked[0] || l.blocked[1] || s.nodes[l.a].stopped || s.nodes[l.b].stopped) {
		s.breakLink(l, false)
	}
}

// watch lets a link be given up after a while.
func (s *Sim) watch(l *link) {
	s.at(s.delay(leaseFor/2, 3*leaseFor), event{kind: evLinkStale, node: l.a, b: l.b, x: l.c[0].gen + l.c[1].gen})
}

// block stops one direction or both; TCP goes on to try until the link is
// given up.
func (s *Sim) block(l *link, ab, ba bool) {
	l.blocked[0], l.blocked[1] = l.blocked[0] || ab, l.blocked[1] || ba
	s.watch(l)
}

// unblock ends partitions of one link, or of all of a node's.
func (s *Sim) unblock(i, j int) {
	for k := range s.nodes {
		l := s.links[i][k]
		if l == nil || (j >= 0 && k != j) {
			continue
		}
		for d := range l.c {
			l.blocked[d] = false
			c := &l.c[d]
			for _, e := range c.held {
				e.at = max(s.now+s.delay(50*us, ms), c.lastAt+1)
				c.lastAt = e.at
				s.q.push(&e)
			}
			c.held = c.held[:0]
			from, to := l.ends(d)
			s.at(s.delay(ms, 20*ms), event{kind: evLinkTry, node: from, b: to})
		}
	}
}

// send puts a message on the wire. A link that the sender does not know to be
// up takes none.
func (s *Sim) send(n *node, o core.Out) {
	to := s.index(o.To)
	l := s.links[n.i][to]
	if l == nil || !n.peers[to] {
		return
	}
	if s.drop != nil && s.drop(n.i, to, o.Msg) {
		return
	}
	msg := s.copyMsg(o.Msg)
	if s.tracing() {
		s.noteMsg(n, o)
	}
	d := l.dir(n.i)
	c := &l.c[d]
	if !c.up {
		return // it breaks under the sender's hands
	}
	e := event{kind: evMsg, node: to, b: n.i, x: c.gen, msg: msg, gen: s.nodes[to].gen}
	if s.opt.Wild && msg.Type() != wire.TypeForward && msg.Type() != wire.TypeReply {
		// Requests are not idempotent: they rely on a link that loses or
		// doubles nothing while it is up.
		s.sendWild(l, d, e)
		return
	}
	if l.blocked[d] {
		c.held = append(c.held, e)
		return
	}
	e.at = max(s.now+s.delay(50*us, 3*ms), c.lastAt+1)
	c.lastAt = e.at
	s.q.push(&e)
}

// sendWild loses, doubles and reorders messages, and lets them arrive at a
// later process of the receiver: nothing in the protocol may rest on TCP.
func (s *Sim) sendWild(l *link, d int, e event) {
	e.gen = 0
	e.x = 0
	// A block that is lost is asked for again only when the link is made anew.
	block := e.msg.Type() == wire.TypeBlocks || e.msg.Type() == wire.TypeBlocksAck
	if l.blocked[d] && block {
		l.c[d].held = append(l.c[d].held, e)
		return
	}
	if l.blocked[d] || (!s.healed && !block && s.chance(0.02)) {
		return
	}
	n := 1
	if !s.healed && s.chance(0.03) {
		n = 2
	}
	for range n {
		late := s.delay(50*us, 8*ms)
		if !s.healed && s.chance(0.02) {
			late = s.delay(10*ms, 4*s1)
		}
		s.at(late, e)
	}
}

// copyMsg takes a message out of the core's hands: it is valid there until the
// next call only.
func (s *Sim) copyMsg(m wire.Message) wire.Message {
	switch m := m.(type) {
	case *wire.Append:
		var c *wire.Append
		if k := len(s.appends); k > 0 {
			c, s.appends = s.appends[k-1], s.appends[:k-1]
		} else {
			c = new(wire.Append)
		}
		ents := append(c.Entries[:0], m.Entries...)
		for i := range ents {
			ents[i].Payload.Retain() // never given back: it must outlive the message
		}
		*c = *m
		c.Entries = ents
		return c
	case *wire.Ack:
		c := *m
		return &c
	case *wire.Blocks:
		c := *m
		c.Blocks = append([]wire.Block(nil), m.Blocks...)
		wire.RetainPayloads(&c)
		return &c
	case *wire.ResyncStart:
		m.Payload.Retain()
	case *wire.ResyncState:
		m.Payload.Retain()
	}
	return m
}

// receive takes a message from the wire.
func (s *Sim) receive(n *node, e *event) {
	if e.x != 0 {
		l := s.links[n.i][e.b]
		if c := &l.c[l.dir(e.b)]; c.gen != e.x || !c.up {
			// The connection is gone. What had come through before may still
			// be read, now or after the next one is up.
			if s.rng.IntN(2) == 0 {
				return
			}
		}
	}
	switch m := e.msg.(type) {
	case *wire.Forward:
		s.takeForward(n, e.b, m)
	case *wire.Reply:
		s.takeReply(e.b, m)
	default:
		if n.core != nil {
			s.put(n, input{kind: inMsg, b: e.b, msg: e.msg})
		}
	}
}

func (s *Sim) index(name any) int {
	for _, n := range s.nodes {
		if n.name == name {
			return n.i
		}
	}
	return -1
}

func (s *Sim) noteMsg(n *node, o core.Out) {
	switch m := o.Msg.(type) {
	case *wire.Append:
		last := m.Prev
		if k := len(m.Entries); k > 0 {
			last = m.Entries[k-1].Pos
		}
		s.note(n.i, "append>", "%s epoch %d stream %d (%v..%v] commit %d sync %d trim %d lease %d loss %d", o.To, m.Epoch, m.Stream, m.Prev, last, m.Commit, m.SyncTo, m.Trim, m.LeaseSent/ms, m.LossEpoch)
	case *wire.Ack:
		s.note(n.i, "ack>", "%s epoch %d stream %d inc %d matched %d durable %d lease %d amnesiac %v", o.To, m.Epoch, m.Stream, m.Incarnation, m.Matched, m.Durable, m.LeaseSent/ms, m.Amnesiac)
	case *wire.Reject:
		s.note(n.i, "reject>", "%s epoch %d stream %d inc %d reason %d last %v base %v applied %d hist %v", o.To, m.Epoch, m.Stream, m.Incarnation, m.Reason, m.Last, m.Base, m.Applied, m.History)
	case *wire.Forward:
		s.note(n.i, "forward>", "%s op %d session %d request %d replay %v seen %v", o.To, m.Op, m.Session, m.Request, m.Replay, m.LastSeen)
	case *wire.Reply:
		s.note(n.i, "reply>", "%s id %d status %d pos %v", o.To, m.ID, m.Status, m.Pos)
	case *wire.Blocks:
		s.note(n.i, "blocks>", "%s epoch %d stream %d id %d as of %d last %v %+v", o.To, m.Epoch, m.Stream, m.ID, m.AsOf, m.Last, m.Blocks)
	default:
		s.note(n.i, "send>", "%s %T %+v", o.To, m, m)
	}
}
