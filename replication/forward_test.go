package replication

import (
	"errors"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

func TestWriteThatLayInABufferIsSentAgainOnlyForALivingClient(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 1<<20, 1, "client")
		c.promote("n1")
		s := c.session("client")
		old, a := pattern(1, 4096), pattern(2, 4096)
		s.mustWrite(0, old)
		c.nodes["n1"].setAge(6 * time.Second) // as if it had been under way so long
		w := s.write(0, a, false)
		time.Sleep(time.Second)
		select {
		case err := <-w:
			t.Fatalf("a late write was answered: %v", err)
		default:
		}
		s.mustRead(0, old)
		c.nodes["n1"].setAge(0)
		s.must(w)
		s.mustRead(0, a)
		c.close()
	})
}

// setAge sets how old the node finds the echoes that come in.
func (n *testNode) setAge(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.age = d
}

func TestStallOfTheProcess(t *testing.T) {
	for _, tc := range []struct {
		name        string
		local, gone bool
		stood       time.Duration
		want        error
	}{
		{"local and there", true, false, 6 * time.Second, nil},
		{"local and gone", true, true, 6 * time.Second, ErrClientGone},
		{"across the network", false, false, 6 * time.Second, ErrClientGone},
		{"not for long, and gone", false, true, 2 * time.Second, ErrClientGone},
		{"not for long, and there", false, false, 2 * time.Second, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				c := newTestCluster(t, 1<<20, 1)
				c.promote("n1")
				s := c.session("n1")
				a, b := pattern(1, 4096), pattern(2, 4096)
				s.mustWrite(0, a)
				v := c.nodes["n1"].vol
				// The process stands still: the clock has gone on without it.
				v.alive.last.Store(v.alive.last.Load() - int64(tc.stood))
				s.s.client.Local, s.gone = tc.local, tc.gone
				err := <-s.write(0, b, false)
				if !errors.Is(err, tc.want) {
					t.Fatalf("got %v, want %v", err, tc.want)
				}
				if killed := s.killed != nil; killed != (tc.want != nil) {
					t.Fatalf("killed: %v", s.killed)
				}
				want := a
				if tc.want == nil {
					want = b
				}
				c.session("n1").mustRead(0, want)
				c.close()
			})
		})
	}
}

func TestRequestsOfAClientThatIsGoneAreDropped(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 1<<20, 3, "client")
		c.view.MinCopies = 2
		c.promote("n1")
		far, near := c.session("client"), c.session("n1")
		a, b := pattern(1, 4096), pattern(2, 4096)
		far.mustWrite(0, a)
		c.stop("n2")
		c.stop("n3")
		time.Sleep(3 * time.Second) // no quorum, no lease
		w, r, x := far.write(0, b, false), near.startRead(0, 4096), near.write(8192, b, false)
		time.Sleep(time.Second)
		for _, ch := range []<-chan error{w, r, x} {
			if len(ch) > 0 {
				t.Fatalf("answered without a quorum: %v", <-ch)
			}
		}
		far.s.Close()
		near.s.Close()
		for i, ch := range []<-chan error{w, r} {
			if err := <-ch; err == nil {
				t.Errorf("request %d succeeded after its client was gone", i)
			}
		}
		// What is in the log already has its fate there.
		c.start("n2")
		c.start("n3")
		c.promote("n1")
		<-x
		c.session("client").mustRead(8192, b)
		c.close()
	})
}

func (ts *testSession) startRead(off uint64, n int) <-chan error {
	return ts.start(&Request{Op: OpRead, Offset: off, Length: uint64(n), Data: buf.Get(n)})
}

// Sessions that end because of a fence are not told that writes may be gone, and others are:
// also when a fence comes after a loss, or a loss that they have not seen after a fence.
func TestWhyASessionEnds(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 1<<20, 1, "client")
		c.promote("n1")
		raise := func(loss bool) {
			c.mu.Lock()
			c.view.Generation++
			if c.view.SetVersion++; loss {
				c.view.LossEpoch = c.view.Epoch
			}
			c.mu.Unlock()
		}
		ends := func(what string, want error) {
			t.Helper()
			s := []*testSession{c.session("client"), c.session("n1")}
			c.mu.Lock()
			c.view.Epoch++
			c.mu.Unlock()
			switch what {
			case "a fence":
				raise(false)
			case "a loss":
				raise(true)
			case "both":
				raise(true)
				raise(false)
			}
			c.push()
			for _, s := range s {
				if !errors.Is(s.killed, want) || !errors.Is(s.killed, ErrGeneration) {
					t.Errorf("%s: killed by %v", what, s.killed)
				}
			}
		}
		ends("a fence", ErrFenced)
		ends("a loss", errLostData)
		ends("a fence", ErrFenced)
		ends("both", errLostData)
		c.close()
	})
}

func TestRaisedGenerationEndsSessions(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 1<<20, 1, "client")
		c.promote("n1")
		far, near := c.session("client"), c.session("n1")
		far.mustWrite(0, pattern(1, 4096))
		c.mu.Lock()
		c.view.Generation++
		c.view.SetVersion++
		c.mu.Unlock()
		c.push()
		for _, s := range []*testSession{far, near} {
			if !errors.Is(s.killed, ErrGeneration) {
				t.Errorf("killed by %v", s.killed)
			}
			if err := <-s.write(0, pattern(2, 4096), false); err == nil {
				t.Error("a session from before the loss still writes")
			}
		}
		c.session("client").mustRead(0, pattern(1, 4096))
		c.close()
	})
}

func TestNoQuorumIsAnErrorWhereItIsSaidSo(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 1<<20, 3, "client")
		c.view.HoldNanos = int64(5 * time.Second)
		c.promote("n1")
		far, near := c.session("client"), c.session("n1")
		far.mustWrite(0, pattern(1, 4096))
		c.kill("n2")
		c.kill("n3")
		c.mu.Lock()
		c.view.MinCopies = 2
		c.view.SetVersion++
		c.mu.Unlock()
		c.push()
		time.Sleep(2 * time.Second)
		begin := time.Now()
		for _, ch := range []<-chan error{far.write(0, pattern(2, 4096), false), near.startRead(0, 4096), near.flush()} {
			if err := <-ch; !errors.Is(err, ErrIO) {
				t.Errorf("got %v", err)
			}
		}
		if d := time.Since(begin); d < 4*time.Second || d > 8*time.Second {
			t.Errorf("it took %v", d)
		}
		c.kill("n1") // a clean stop would want a quorum for nothing, but let it crash
		c.close()
	})
}

func TestReplicaExportOfAnotherNode(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 1<<20, 3, "client")
		c.promote("n1")
		s := c.session("client")
		a := pattern(1, 8192)
		s.mustWrite(4096, a)
		s.must(s.flush())
		time.Sleep(time.Second)
		for _, node := range []ident.Node{"n1", "n2", "n3"} {
			ts := &testSession{t: t}
			var err error
			ts.s, err = c.nodes["client"].vol.OpenReplicaSession(t.Context(), node, Client{Local: true, Gone: func() bool { return false }, Kill: func(error) {}})
			if err != nil {
				t.Fatal(err)
			}
			ts.mustRead(4096, a)
			if err := <-ts.write(0, a, false); !errors.Is(err, ErrReadOnly) {
				t.Errorf("write: %v", err)
			}
			r := &Request{Op: OpBlockStatus, Length: 1 << 20}
			ts.must(ts.start(r))
			total := uint64(0)
			for _, e := range r.Extents {
				total += e.Len
			}
			if total != 1<<20 || len(r.Extents) < 2 || r.Extents[0].Flags != ExtentHole|ExtentZero {
				t.Errorf("block status at %s: %+v", node, r.Extents)
			}
			ts.s.Close()
		}
		c.close()
	})
}

func TestForwardThatMakesNoSense(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 1<<20, 1, "client")
		c.promote("n1")
		v := c.nodes["n1"].vol
		for _, f := range []wire.Forward{
			{ID: 1001, Op: 99, Len: 4096},
			{ID: 1002, Op: wire.OpWrite, Flags: wire.ForwardReplica, Len: 4096},
			{ID: 1003, Op: wire.OpTrim, Off: 1 << 40, Len: 4096, Echo: 1},
			{ID: 1004, Op: wire.OpRead, Off: 1<<20 - 512, Len: 4096, Echo: 1},
		} {
			v.Handle("client", wire.Envelope{Volume: testVolume, Msg: &f})
		}
		v.Handle("client", wire.Envelope{Volume: testVolume, Msg: &wire.Reply{ID: 77, Status: wire.StatusOK}})
		c.session("client").mustWrite(0, pattern(1, 4096))
		c.close()
	})
}

func TestLostReplyIsAskedForAgain(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 1<<20, 1, "client")
		c.promote("n1")
		s := c.session("client")
		a := pattern(1, 4096)
		s.mustWrite(0, a)
		// Only what n1 sends is lost, and only n1 hears of it.
		c.setCut("n1", "client", true)
		w, r := s.write(4096, a, false), s.startRead(0, 4096)
		time.Sleep(time.Second)
		c.nodes["n1"].vol.PeerDown("client")
		c.setCut("n1", "client", false)
		c.nodes["n1"].vol.PeerUp("client")
		s.must(w)
		s.must(r)
		s.mustRead(4096, a)
		c.close()
	})
}

func (c *testCluster) setCut(from, to ident.Node, cut bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut[[2]ident.Node{from, to}] = cut
}
