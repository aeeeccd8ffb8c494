package peer

import (
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
)

// A peer that takes nothing any more (its process is stopped, or its host is
// gone without a word) loses the link after about a lease time, although its
// queue has not overflowed.
func TestStalledPeerLosesTheLink(t *testing.T) {
	n := newNetwork(t, false)
	ra := newRecorder()
	a := n.add("alpha", ra, func(o *Options) { o.Lease = 500 * time.Millisecond })
	stuck(t, n, "beta")
	a.SetPeers([]ident.Node{"beta"})
	ra.want(t, "up beta")
	for i := 1; i <= 64; i++ {
		a.Send("beta", 1, write(i, 1<<20))
	}
	a.Flush()
	ra.want(t, "down beta", "up beta")
}
