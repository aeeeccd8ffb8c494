package core

import "github.com/blockstep/blockstep/internal/ident"

// Seal asks this replica to promise epoch and to refuse everything older. The
// answer is a SealReply, after the promise is durable.
func (c *Core) Seal(now Instant, id uint64, epoch ident.Epoch) {
	c.advance(now)
	a := ident.SealAnswer{
		Epoch: epoch, Replica: c.cfg.Replica, Incarnation: c.cfg.Incarnation,
		Amnesiac: c.amnesiac, Inconsistent: c.inconsistent(),
	}
	a.Refusal, a.WaitNanos = c.judgeSeal(epoch)
	if a.Refusal == ident.SealAccepted && epoch > c.promise {
		if c.isPrimary() {
			c.stepDown("sealed for a newer epoch")
		}
		c.promise, c.metaDirty = epoch, true
		c.sealed = epoch
		c.follow.ackDue = false
	}
	a.Promised, a.Last = c.promise, c.last
	c.seals = append(c.seals, SealReply{ID: id, Answer: a})
}

// judgeSeal decides without changing anything.
func (c *Core) judgeSeal(epoch ident.Epoch) (ident.SealRefusal, int64) {
	for _, m := range c.view.Members {
		if m.Node == c.cfg.Node && m.Replica != 0 && m.Replica != c.cfg.Replica {
			return ident.SealUnknown, 0
		}
	}
	switch {
	case c.failed != "":
		return ident.SealFailed, 0
	case c.now < c.silentUntil:
		return ident.SealSilent, int64(c.silentUntil - c.now)
	case epoch < c.promise:
		return ident.SealPromised, 0
	case epoch == c.promise:
		// Asked the same again, it answers the same, until it has seen
		// anything of that epoch.
		if c.sealed == epoch && !c.isPrimary() {
			return ident.SealAccepted, 0
		}
		return ident.SealPromised, 0
	}
	if c.isPrimary() {
		// The primary grants to itself too.
		if left := int64(c.leaseUntil() - c.now); left > 0 {
			return ident.SealLease, left
		}
		return ident.SealAccepted, 0
	}
	if left := int64(c.grantUntil - c.now); left > 0 {
		return ident.SealLease, left
	}
	return ident.SealAccepted, 0
}
