package replication

import (
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
)

// rates puts bounds on resyncs in force, as a configuration that is read anew does.
func (c *testCluster) rates(r core.Rates) {
	c.mu.Lock()
	r.Set = true
	c.view.Rates = r
	c.mu.Unlock()
	c.push()
}

// doubted makes a secondary a resync target of the first bytes, and waits until
// it has left the in-sync set.
func (c *testCluster) doubted(name ident.Node, bytes uint64) {
	c.t.Helper()
	if ok, err := c.nodes[name].volume().Doubt(c.t.Context(), 0, bytes); !ok || err != nil {
		c.t.Fatalf("doubt: %v, %v", ok, err)
	}
	for c.inSync() == 3 {
		time.Sleep(10 * time.Millisecond)
	}
}

func (c *testCluster) inSync() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.view.Set)
}

// healed waits until all are in sync and returns how long that took.
func (c *testCluster) healed() time.Duration {
	c.t.Helper()
	began := time.Now()
	for c.inSync() < 3 {
		if time.Since(began) > 10*time.Minute {
			c.t.Fatal("not in sync within ten minutes")
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(began)
}

func TestResyncKeepsToItsRates(t *testing.T) {
	const size = 16 << 20
	start := func(t *testing.T) (*testCluster, *testSession) {
		c := newTestCluster(t, size, 3)
		c.promote("n1")
		s := c.session("n1")
		for off := uint64(0); off < size; off += 1 << 20 {
			s.mustWrite(off, pattern(byte(off>>20), 1<<20))
		}
		s.must(s.flush())
		time.Sleep(15 * time.Second) // all is applied, and in a checkpoint
		return c, s
	}
	between := func(t *testing.T, what string, got, least, most time.Duration) {
		t.Helper()
		if got < least || got > most {
			t.Errorf("%s took %v, want %v to %v", what, got, least, most)
		}
	}
	t.Run("ceiling, changed live", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			c, _ := start(t)
			defer c.close()
			c.rates(core.Rates{Max: 1 << 20})
			c.doubted("n3", size)
			between(t, "16 MiB at 1 MiB/s", c.healed(), 14*time.Second, 20*time.Second)

			c.rates(core.Rates{Max: 256 << 10})
			c.doubted("n3", size)
			time.Sleep(8 * time.Second)
			for _, p := range c.nodes["n1"].volume().Status().Core.Peers {
				if p.Node == "n3" && (p.ResyncRate < 200<<10 || p.ResyncRate > 320<<10 || p.ResyncDone == 0 || p.DirtyBytes == 0) {
					t.Errorf("at 256 KiB/s the status says %+v", p)
				}
			}
			c.rates(core.Rates{})
			between(t, "the rest without a ceiling", c.healed(), 0, 3*time.Second)
		})
	})
	t.Run("yields to clients", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			c, s := start(t)
			defer c.close()
			c.rates(core.Rates{Min: 1 << 20})
			for _, write := range []bool{true, false} {
				stop, done := make(chan struct{}), make(chan struct{})
				go func() {
					defer close(done)
					for {
						select {
						case <-stop:
							return
						case <-time.After(10 * time.Millisecond):
						}
						if write {
							s.mustWrite(0, pattern(9, 4096))
						} else if _, err := s.read(0, 4096); err != nil {
							t.Error(err)
						}
					}
				}()
				time.Sleep(time.Second)
				c.doubted("n3", size)
				between(t, "16 MiB beside clients at 1 MiB/s", c.healed(), 12*time.Second, 20*time.Second)
				close(stop)
				<-done
				c.doubted("n3", size)
				between(t, "without clients", c.healed(), 0, 3*time.Second)
			}
		})
	})
}
