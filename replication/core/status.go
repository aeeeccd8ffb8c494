package core

import "github.com/blockstep/blockstep/internal/ident"

// Status describes the replica to an operator.
func (c *Core) Status(now Instant) Status {
	c.advance(now)
	s := Status{
		Role: c.role, State: c.ownState(), Reason: c.failed, Promise: c.promise, View: c.view,
		Last: c.last, Commit: c.commit, Durable: c.durable, Applied: c.applied, Waiting: len(c.queue), RingBytes: c.ring.bytes,
	}
	if !c.isPrimary() {
		return s
	}
	s.LeaseLeft = max(0, int64(c.leaseUntil()-c.now))
	s.Suspended = !c.serving() || s.LeaseLeft == 0
	s.Waiting += len(c.p.held.w) - c.p.held.head + len(c.p.synced.w) - c.p.synced.head
	for _, pr := range c.p.peers {
		dirty, done, total := c.resyncFigures(pr)
		rate := int64(0)
		if pr.run != nil {
			rate = int64(pr.run.rate)
		}
		ago := int64(-1)
		if pr.lastHeard != 0 {
			ago = int64(c.now - pr.lastHeard)
		}
		s.Peers = append(s.Peers, PeerStatus{
			ResyncRate: rate, HeardAgo: ago,
			DirtyBytes: dirty, ResyncDone: done, ResyncTotal: total,
			Node: pr.node, State: c.peerStateName(pr), Connected: c.heard(pr),
			Matched: pr.matched, Durable: pr.durable, LagBytes: c.lagOf(pr),
			LeaseGranted: pr.grantUntil > c.now,
		})
	}
	return s
}

func (c *Core) ownState() string {
	switch {
	case c.failed != "":
		return "Failed"
	case c.inconsistent():
		return "Resyncing"
	case c.amnesiac:
		return "Amnesiac"
	case c.haveView && !c.inSet(c.cfg.Node):
		return "CatchingUp"
	}
	return "InSync"
}

func (c *Core) peerStateName(pr *peer) string {
	switch {
	case pr.state == peerFailed:
		return "Failed"
	case !c.heard(pr):
		return "Absent"
	case pr.state == peerResync || pr.inconsistent:
		return "Resyncing"
	case pr.amnesiac:
		return "Amnesiac"
	case !c.inSet(pr.node) || pr.state != peerStream || pr.matched < c.p.marker || c.lagBytes(pr.matched) > int64(c.cfg.WindowBytes):
		return "CatchingUp"
	}
	return "InSync"
}

// Position returns the own log's last position.
func (c *Core) Position() ident.Position { return c.last }

// resyncFigures returns how many bytes may differ at a peer, and how far its
// resync is.
func (c *Core) resyncFigures(pr *peer) (dirty, done, total int64) {
	if r := pr.run; r != nil {
		done, total = r.moved, r.total
		if r.todo != nil {
			return r.todo.Bytes() + r.inflight, done, total
		}
	}
	if c.inSet(pr.node) && pr.state != peerResync {
		return 0, done, total
	}
	if b, ok := c.changes.Since(uint64(max(pr.durable, pr.since))); ok {
		return b.Bytes(), done, total
	}
	return int64(c.view.Size), done, total
}
