package e2e

import (
	"fmt"
	"testing"
	"time"
)

// TestPrimariesSpread: the primaries of a node that dies go to the others in about
// equal parts while nothing is written, when all hold the same; and so do those of one
// that is stopped.
func TestPrimariesSpread(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	alpha := c.node("alpha")
	var names []string
	for i := range 8 {
		names = append(names, fmt.Sprintf("v%d", i))
		c.volume(names[i], "8MiB")
	}
	spread := func(gone *node, stop func()) {
		for _, name := range names {
			c.makePrimary(name, gone)
			c.waitHealthy(name)
		}
		stop()
		has := map[string]int{}
		for _, name := range names {
			eventually(t, 20*time.Second, name+" has another primary", func() bool {
				v, ok := c.live().tryStatus(name)
				if ok && v.Primary != "" && v.Primary != gone.name {
					has[v.Primary]++
					return true
				}
				return false
			})
		}
		t.Logf("primaries after %s has gone: %v", gone.name, has)
		for _, n := range c.others(gone.name) {
			if has[n.name] < 3 {
				t.Errorf("%s has %d of the %d primaries that %s had", n.name, has[n.name], len(names), gone.name)
			}
		}
		gone.start()
		gone.waitReady()
		for _, name := range names {
			c.waitHealthy(name)
		}
	}
	spread(alpha, alpha.kill)
	spread(alpha, alpha.stop)
}
