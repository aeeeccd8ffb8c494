package nbd

import "sync"

// budget is the payload memory that all connections share, beyond what each
// may always use. A connection gets at most as much as is left free after it,
// so that a few that hold theirs for long leave something for the others. An
// export may hold them for ever (no quorum): another one that has nothing of the
// budget gets room for one request all the same, beyond the limit if need be.
type budget struct {
	mu      sync.Mutex
	limit   int64
	used    int64
	exports map[string]int64 // who uses it
	waiting []*conn
}

// take takes n bytes for c, which holds held already. If there is no room it
// returns false and wakes c when bytes have come free.
func (b *budget) take(c *conn, held, n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	export := b.exports[c.export]
	// A single request that the reserve cannot hold goes by what is free.
	if export == 0 || b.used+n <= b.limit && (held == 0 || held+n <= b.limit-b.used) {
		b.used += n
		b.exports[c.export] = export + n
		return true
	}
	for _, w := range b.waiting {
		if w == c {
			return false
		}
	}
	b.waiting = append(b.waiting, c)
	return false
}

// give returns n bytes of c's.
func (b *budget) give(c *conn, n int64) {
	b.mu.Lock()
	b.used -= n
	if b.exports[c.export] -= n; b.exports[c.export] == 0 {
		delete(b.exports, c.export)
	}
	waiting := b.waiting
	b.waiting = nil
	b.mu.Unlock()
	for _, c := range waiting {
		c.wakeReader()
	}
}

// inUse returns the bytes taken.
func (b *budget) inUse() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// excess is what n bytes in flight on one connection cost the budget.
func excess(n int64) int64 { return max(0, n-connReserveBytes) }
