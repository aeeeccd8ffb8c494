package core

import (
	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// peerState is what the primary does about one other replica.
type peerState uint8

const (
	peerProbe  peerState = iota // where its log agrees with ours is not known
	peerStream                  // entries flow from next on
	peerResync                  // it cannot be streamed to
	peerFailed                  // it said that its disk failed
)

// peer is what the primary knows of one other replica in its own epoch.
type peer struct {
	node        ident.Node
	replica     ident.Replica
	incarnation ident.Incarnation // newest that has answered
	state       peerState
	stream      uint64

	matched    ident.Seq // in its log file; of this epoch and incarnation
	durable    ident.Seq // fsynced; <= matched
	durableAt  uint64    // the stream in which it last said so
	checkpoint ident.Seq
	amnesiac   bool
	// inconsistent says that it lacks blocks; since, whole and rule say what it
	// needs in state peerResync.
	inconsistent bool
	since        ident.Seq
	whole        bool
	rule         string
	resyncBase   ident.Seq
	run          *resyncRun
	reported     bool // it has acked in this epoch
	follows      bool // not in the set, it is streamed to: the trim horizon waits for it
	// owes is what a former incarnation of it reported durable in this epoch: a
	// replica that returns with less has had its disk changed.
	owes  ident.Seq
	floor ident.Seq
	// leftAt is where it stood when the trim horizon passed it.
	leftAt cumMark

	next       ident.Seq // the next entry to send; matched < next
	sentCommit ident.Seq
	sentSync   ident.Seq
	flight     []flight // sent and not acked
	inflight   int      // bytes of flight
	reading    bool     // a LogRead is out

	sendDue    bool // an Append is due even without entries
	lastSent   Instant
	lastHeard  Instant
	grantUntil Instant
}

type flight struct {
	last  ident.Seq
	bytes int
}

func bufOf(p []byte) *buf.Buf {
	b := buf.Get(len(p))
	copy(b.B, p)
	return b
}

func (c *Core) peer(n ident.Node) *peer {
	for _, pr := range c.p.peers {
		if pr.node == n {
			return pr
		}
	}
	return nil
}

// syncPeers makes the peer list match the members of the cluster state.
func (c *Core) syncPeers() {
	old := c.p.peers
	c.p.peers = nil
	for _, m := range c.view.Members {
		if m.Node == c.cfg.Node || m.Replica == 0 {
			continue
		}
		var pr *peer
		for _, o := range old {
			if o.node == m.Node && o.replica == m.Replica {
				pr = o
			}
		}
		if pr == nil {
			// Streams rise at the receiver too, which may have heard of us under
			// its former replica id: so they begin with the time.
			pr = &peer{node: m.Node, replica: m.Replica, floor: max(c.trim, c.base.Seq), stream: uint64(max(c.now, 0))}
			c.probe(pr)
		}
		if m.Failed {
			pr.state = peerFailed
		}
		c.p.peers = append(c.p.peers, pr)
	}
}

// probe begins anew with a peer: its answer tells where to stream from.
func (c *Core) probe(pr *peer) {
	if pr.state == peerFailed {
		return
	}
	pr.state = peerProbe
	pr.next = c.last.Seq + 1
	pr.anew()
}

// anew begins a new stream: what was under way may be lost.
func (pr *peer) anew() {
	pr.stream++
	pr.flight, pr.inflight, pr.reading = pr.flight[:0], 0, false
	pr.sendDue = true
	if r := pr.run; r != nil {
		r.todo, r.reads, r.flight, r.inflight, r.askedAt = nil, nil, nil, 0, 0
	}
}

// PeerUp says that a link to the peer is up: what was sent before may be lost.
func (c *Core) PeerUp(now Instant, n ident.Node) {
	c.advance(now)
	c.links[n] = true
	if pr := c.peer(n); pr != nil && c.isPrimary() {
		c.probe(pr)
	}
}

// PeerDown says that the link is gone. Messages to it are lost until PeerUp.
func (c *Core) PeerDown(now Instant, n ident.Node) {
	c.advance(now)
	delete(c.links, n)
	if pr := c.peer(n); pr != nil && c.isPrimary() {
		pr.lastHeard = 0
		c.probe(pr)
		pr.sendDue = false
	}
}

// accept judges who sent an answer and brings its incarnation up to date. It
// reports false for an answer that must not count.
func (c *Core) accept(from ident.Node, epoch ident.Epoch, r ident.Replica, inc ident.Incarnation) *peer {
	if !c.isPrimary() || epoch != c.p.epoch {
		return nil
	}
	pr := c.peer(from)
	if pr == nil || pr.replica != r || inc < pr.incarnation {
		return nil // another replica, or an ack of a former incarnation
	}
	if inc > pr.incarnation {
		if pr.incarnation != 0 {
			// It restarted: what it held counts anew, from its next answer on.
			pr.owes = max(pr.owes, pr.durable)
			pr.matched, pr.durable, pr.reported = 0, 0, false
			pr.incarnation = inc
			if pr.state == peerFailed && !c.markedFailed(pr) {
				pr.state = peerProbe // what ailed it is over: a full disk has room again
			}
			c.probe(pr)
			pr.lastHeard = c.now
			return nil
		}
		pr.incarnation = inc
	}
	pr.lastHeard = c.now
	return pr
}

// markedFailed reports whether the cluster state says that the peer failed.
func (c *Core) markedFailed(pr *peer) bool {
	for _, m := range c.view.Members {
		if m.Node == pr.node && m.Replica == pr.replica {
			return m.Failed
		}
	}
	return false
}

func (c *Core) granted(pr *peer, sent int64) {
	if sent != 0 && !c.p.released {
		pr.grantUntil = max(pr.grantUntil, Instant(sent+c.shorten(c.cfg.LeaseFor)))
	}
}

func (c *Core) onAck(from ident.Node, m *wire.Ack) {
	pr := c.accept(from, m.Epoch, m.Replica, m.Incarnation)
	if pr == nil {
		return
	}
	c.granted(pr, m.LeaseSent)
	if m.Matched > c.last.Seq {
		return // no log of ours reaches there
	}
	// A matched prefix stays matched for as long as epoch and incarnation do.
	pr.matched = max(pr.matched, m.Matched)
	if d := min(m.Durable, pr.matched); d > pr.durable {
		pr.durable, pr.durableAt = d, max(pr.durableAt, m.Stream)
	}
	pr.checkpoint = max(pr.checkpoint, m.Checkpoint)
	pr.reported = true
	if pr.matched >= pr.owes {
		pr.owes = 0
	}
	if m.Stream != pr.stream {
		return
	}
	// What follows may change to and fro, so an ack of a former stream, from
	// before a resync began, does not say it.
	pr.amnesiac = m.Amnesiac
	pr.inconsistent = m.Inconsistent
	if !m.Inconsistent && pr.run != nil && pr.state == peerStream {
		c.event(Event{Name: "resync", From: "Resyncing", To: "CatchingUp", Peer: from, Rule: "it has every block, durable", Pos: c.last})
		pr.run = nil
	}
	if pr.state == peerProbe || (pr.state == peerResync && m.Inconsistent && pr.run != nil) {
		pr.state = peerStream
		pr.next = m.Matched + 1
		pr.flight, pr.inflight = pr.flight[:0], 0
	}
	n := 0
	for n < len(pr.flight) && pr.flight[n].last <= pr.matched {
		pr.inflight -= pr.flight[n].bytes
		n++
	}
	if n > 0 {
		pr.flight = pr.flight[:copy(pr.flight, pr.flight[n:])]
	}
}

func (c *Core) onReject(from ident.Node, m *wire.Reject) {
	pr := c.accept(from, m.Epoch, m.Replica, m.Incarnation)
	if pr == nil {
		return
	}
	c.granted(pr, m.LeaseSent)
	pr.amnesiac = m.Amnesiac
	if m.Stream != pr.stream {
		return
	}
	if m.Reason == wire.RejectFailed {
		if pr.state != peerFailed {
			c.event(Event{Name: "peer", To: "Failed", Peer: from, Rule: "it says so"})
		}
		pr.state = peerFailed
		return
	}
	if pr.state == peerResync {
		return // it is known: answers to what was under way before
	}
	seq, ok := divergence(c.hist, c.last.Seq, m.History, m.Last.Seq)
	switch {
	case !ok:
		c.needResync(pr, 0, true, "the epoch histories do not reach back to a shared entry")
	case seq < pr.durable && m.Stream == pr.durableAt:
		c.probe(pr) // it may be from before it had that much: ask once more
	case seq < max(pr.owes, pr.durable):
		c.needResync(pr, 0, true, "it returns with less than it once reported durable: its disk was changed")
	case m.Reason == wire.RejectResync, seq < m.Applied:
		c.needResync(pr, seq, false, "it has applied past the point of divergence")
	case seq < c.base.Seq:
		c.needResync(pr, seq, false, "the log no longer holds what it lacks")
	default:
		pr.state = peerStream
		pr.next = seq + 1
		pr.anew()
	}
}

func (c *Core) needResync(pr *peer, since ident.Seq, whole bool, rule string) {
	if pr.state != peerResync {
		c.event(Event{Name: "peer", To: "Resyncing", Peer: pr.node, Rule: rule, Pos: c.posAt(since)})
		pr.run = nil
	}
	pr.state = peerResync
	pr.since, pr.whole, pr.rule = since, whole, rule
}

func (c *Core) onStale(from ident.Node, m *wire.Stale) {
	if c.isPrimary() && m.Epoch == c.p.epoch && m.Promised > c.p.epoch {
		if c.inSet(from) {
			c.p.refusedAt = c.now
		}
		// It was sealed by a round that promoted nobody, or by one that is
		// under way; only an epoch above its promise lets it follow again.
		c.report(ReportReseal, c.p.epoch)
	}
}

// heard reports whether a peer has answered within the time of a lease.
func (c *Core) heard(pr *peer) bool {
	return pr.lastHeard != 0 && c.now <= pr.lastHeard+Instant(c.cfg.LeaseFor)
}

// gone reports whether a peer is to be taken for dead: its link is down, or it
// has been silent for the time of a lease.
func (c *Core) gone(pr *peer) bool {
	return !c.heard(pr) && (!c.links[pr.node] || c.now > c.viewSince+Instant(c.cfg.LeaseFor))
}

// lagging reports whether a peer is further behind than the log retains for it.
func (c *Core) lagging(pr *peer) bool {
	return c.cfg.LagMax > 0 && c.lagBytes(max(pr.matched, pr.floor)) > c.cfg.LagMax
}

// tickPeer makes a message due where one is owed by time alone.
func (c *Core) tickPeer(pr *peer) {
	c.tickResync(pr)
	quiet := !c.heard(pr)
	switch {
	case quiet && c.now < pr.lastSent+quietHeartbeat:
		// A process that is stopped answers nothing: leave its link alone.
		if !c.p.askDue {
			return
		}
		if pr.lastHeard == 0 {
			pr.sendDue = true
		}
	case pr.state == peerStream:
		pr.sendDue = pr.sendDue || pr.sentCommit < c.commit || c.p.askDue || quiet
	default:
		pr.sendDue = pr.sendDue || c.p.askDue || c.now >= pr.lastSent+Instant(c.cfg.RetryAfter)
	}
}

// sendTo builds what is to go to one peer in this batch.
func (c *Core) sendTo(pr *peer) {
	due := pr.sendDue || (c.p.askDue && c.heard(pr)) || (pr.state == peerStream && c.p.syncTo > pr.sentSync && c.p.syncTo > pr.durable)
	if pr.state == peerStream {
		if pr.next <= c.base.Seq {
			c.probe(pr) // its answer says from where a resync must be
		} else if c.stream(pr) {
			due = false
		}
		c.readyResync(pr)
	}
	if !due {
		return
	}
	prev := c.last
	if pr.state == peerStream || pr.state == peerProbe {
		prev = c.posAt(max(min(pr.next, c.last.Seq+1)-1, c.base.Seq))
	}
	c.emit(pr, prev, nil, 0)
}

// stream sends the entries from next on, as far as the window allows. It
// reports whether a message went out.
func (c *Core) stream(pr *peer) bool {
	sent := false
	for pr.next <= c.last.Seq && pr.inflight < c.cfg.WindowBytes && !pr.reading {
		run := c.ring.from(pr.next)
		if run == nil {
			pr.reading = true
			c.reads = append(c.reads, LogRead{Peer: pr.node, Stream: pr.stream, From: pr.next, Bytes: c.cfg.AppendBytesMax})
			break
		}
		n, bytes := 0, 0
		for n < len(run) && n < c.cfg.AppendEntriesMax {
			cost := entryCost(&run[n])
			if n > 0 && bytes+cost > c.cfg.AppendBytesMax {
				break
			}
			bytes += cost
			n++
		}
		c.emit(pr, c.posAt(pr.next-1), run[:n], bytes)
		sent = true
	}
	return sent
}

// sentToAll returns up to where every peer that listens has been sent the log.
func (c *Core) sentToAll() ident.Seq {
	sent := c.last.Seq
	for _, pr := range c.p.peers {
		if pr.state == peerStream && c.heard(pr) {
			sent = min(sent, pr.next-1)
		}
	}
	return sent
}

// LogRead brings entries that Ready asked for. They stay valid until the
// effects of the next Ready are performed. ok is false when the log no longer
// has them, or cannot give them.
func (c *Core) LogRead(now Instant, q LogRead, entries []wire.Entry, ok bool) {
	c.advance(now)
	pr := c.peer(q.Peer)
	if pr == nil || !c.isPrimary() || pr.stream != q.Stream || !pr.reading {
		return
	}
	pr.reading = false
	if !ok || len(entries) == 0 || entries[0].Pos.Seq != pr.next {
		switch {
		case ok:
		case pr.next > c.base.Seq:
			// A driver that is not all alone has failed by then. What the entries
			// did is in the backing store, so it can be copied.
			c.needResync(pr, pr.next-1, false, "the log cannot be read where it needs it")
		default:
			c.probe(pr)
		}
		return
	}
	bytes := 0
	for i := range entries {
		bytes += entryCost(&entries[i])
	}
	c.emit(pr, c.posAt(pr.next-1), entries, bytes)
}

// emit sends one Append.
func (c *Core) emit(pr *peer, prev ident.Position, entries []wire.Entry, bytes int) {
	a := c.appends.next()
	*a = wire.Append{
		Epoch: c.p.epoch, Stream: pr.stream, Prev: prev, Commit: c.commit, Trim: c.trim,
		LossEpoch: c.view.LossEpoch, Met: pr.incarnation, Generation: c.view.Generation, Entries: entries,
	}
	if c.p.syncTo > pr.durable {
		a.SyncTo = c.p.syncTo
		pr.sentSync = c.p.syncTo
	}
	if c.p.askedAt != 0 && c.p.askDue && !c.p.released {
		a.LeaseSent, a.LeaseFor = int64(c.p.askedAt), c.cfg.LeaseFor
	}
	if len(entries) > 0 {
		last := entries[len(entries)-1].Pos.Seq
		pr.next = last + 1
		pr.flight = append(pr.flight, flight{last: last, bytes: bytes})
		pr.inflight += bytes
	}
	pr.sentCommit = c.commit
	pr.sendDue = false
	pr.lastSent = c.now
	c.early = append(c.early, Out{To: pr.node, Msg: a})
}
