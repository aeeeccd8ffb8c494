package peer

import (
	"math"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
)

// now is the clock that pings carry. Each Manager's is shifted by a random
// amount, so that a value that an earlier process gave away (perhaps in an
// earlier boot, whose clock began at zero too) is never taken for one of ours.
func (m *Manager) now() int64 { return m.opt.Clock() + m.shift }

// age returns how long ago our clock showed value.
func (m *Manager) age(value int64) (time.Duration, bool) {
	now := m.now()
	if value < m.started || value > now {
		return math.MaxInt64, false
	}
	return time.Duration(now - value), true
}

// Echo returns the newest clock value of node that has been heard, for
// wire.Forward.Echo; 0 if there is none.
func (m *Manager) Echo(node ident.Node) int64 {
	if l := m.link(node); l != nil {
		return l.in.heardClock.Load()
	}
	return 0
}

// EchoAge returns how long ago, at the least, the node from was in touch with
// us when it sent a message with this echo: the time since we sent the clock
// value that it echoes. It is the longest Duration if echo is not a clock value
// of this Manager, or from is no peer.
func (m *Manager) EchoAge(from ident.Node, echo int64) time.Duration {
	if m.link(from) == nil {
		return math.MaxInt64
	}
	d, _ := m.age(echo)
	return d
}
