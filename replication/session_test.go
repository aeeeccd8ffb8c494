package replication

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
)

// A session that is closed has nothing under way any more: not a write that is in
// the log without a majority, not a read that waits behind it. Its client is gone,
// and what it holds in memory must not wait for a quorum.
func TestCloseEndsAllThatIsUnderWay(t *testing.T) {
	for _, at := range []ident.Node{"n1", "client"} {
		t.Run(string(at), func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				c := newTestCluster(t, 1<<20, 3, "client")
				c.promote("n1")
				c.session("n1").mustWrite(0, pattern(1, 4096))
				c.kill("n2")
				c.kill("n3")
				other, s := c.session(at), c.session(at)
				w := pattern(2, 4096)
				held := other.write(8192, w, false)
				under := []<-chan error{s.write(0, w, false), s.write(4096, w, true)}
				synctest.Wait() // a read that comes before the write is not held
				under = append(under, s.flush(), s.startRead(0, 4096))
				synctest.Wait()
				s.s.Close()
				synctest.Wait() // no time passes
				for i, done := range under {
					select {
					case err := <-done:
						if err == nil {
							t.Errorf("request %d succeeded without a majority", i)
						}
					default:
						t.Errorf("request %d is still under way", i)
					}
				}
				// Another session's wait for the majority, and get it.
				select {
				case err := <-held:
					t.Errorf("another session's write has ended: %v", err)
				default:
				}
				c.start("n2")
				c.start("n3")
				c.promote("n1")
				other.must(held)
				other.mustRead(8192, w)
				c.close()
			})
		})
	}
}

// A request that was on its way to this node's replica while its session was closed
// is forgotten there all the same (route-after-close).
func TestARouteThatComesAfterCloseIsForgotten(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 1<<20, 3)
		c.promote("n1")
		before := pattern(1, 4096)
		c.session("n1").mustWrite(0, before)
		v := c.nodes["n1"].volume()
		// Nothing is let through for a while.
		if err := v.Pause(t.Context(), time.Minute); err != nil {
			t.Fatal(err)
		}
		s := c.session("n1")
		d := buf.Get(4096)
		copy(d.B, pattern(2, 4096))
		done := make(chan error, 1)
		r := &Request{Op: OpWrite, Length: 4096, Data: d, Complete: func(_ *Request, err error) { done <- err }}
		r.begin(s.s)
		s.s.Close() // while releaseHeld has r in its list
		synctest.Wait()
		v.route(r)
		v.Settle()
		synctest.Wait()
		select {
		case err := <-done:
			if err == nil {
				t.Error("a write of a closed session succeeded")
			}
		default:
			t.Error("a write of a closed session waits")
		}
		time.Sleep(2 * time.Minute)
		c.session("n1").mustRead(0, before)
		c.close()
	})
}

// A client that may believe in writes that are gone is told so by the answers to
// what it has under way; only then does its connection end.
func TestARaisedGenerationIsAnAnswer(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 1<<20, 1, "client")
		c.promote("n1")
		v := c.nodes["client"].volume()
		var order []string
		s, err := v.OpenSession(context.Background(), Client{Local: true, Gone: func() bool { return false }, Kill: func(err error) {
			if errors.Is(err, ErrGeneration) {
				order = append(order, "end")
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		c.stop("n1")
		for range 2 {
			s.Submit(&Request{Op: OpWrite, Length: 4096, Data: buf.Get(4096), Complete: func(_ *Request, err error) {
				if errors.Is(err, ErrGeneration) {
					order = append(order, "answer")
				}
			}})
		}
		synctest.Wait()
		c.mu.Lock()
		c.view.Generation++
		c.view.Epoch++
		c.mu.Unlock()
		c.push()
		synctest.Wait()
		if want := []string{"answer", "answer", "end"}; !slices.Equal(order, want) {
			t.Errorf("got %v, want %v", order, want)
		}
		c.close()
	})
}
