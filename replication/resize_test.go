package replication

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
)

// A secondary hears of the new size later than of a write behind the old one: the
// write is the news (resize-write-before-view). It must not take it for a disk
// that failed.
func TestAWriteComesBeforeTheNewSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const old, grown = 1 << 20, 4 << 20
		c := newTestCluster(t, old, 3)
		defer c.close()
		prim := c.promote("n1")
		c.mu.Lock()
		c.view.Size = grown
		view := c.view
		c.mu.Unlock()
		c.nodes[prim].volume().SetView(view) // the others have not heard
		s := c.session(prim)
		want := pattern(5, 8192)
		s.mustWrite(grown-8192, want)
		s.must(s.flush())
		time.Sleep(15 * time.Second) // applied, and in a checkpoint
		for _, name := range c.names {
			if st := c.nodes[name].volume().Status().Core; st.State == "Failed" {
				t.Errorf("%s failed: %s", name, st.Reason)
			}
		}
		for _, name := range c.names {
			if name == prim {
				continue
			}
			got := make([]byte, len(want))
			if _, err := c.nodes[name].volume().ReadReplica(got, grown-8192); err != nil {
				t.Errorf("%s: %v", name, err)
			} else if string(got) != string(want) {
				t.Errorf("%s has other bytes", name)
			}
			// It is known after a crash too.
			c.kill(name)
			c.start(name)
		}
		c.push()
		time.Sleep(5 * time.Second)
		s.mustRead(grown-8192, want)
		if len(c.fails) > 0 {
			t.Errorf("failed: %v", c.fails)
		}
	})
}

// The primary hears of the new size later than the node of a client: a request
// behind the old end waits for it, and is no error.
func TestARequestBehindTheOldEndWaitsForTheNews(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		const old, grown = 1 << 20, 4 << 20
		c := newTestCluster(t, old, 1, "client")
		c.promote("n1")
		c.session("client").mustWrite(0, pattern(1, 4096))
		c.mu.Lock()
		c.view.Size = grown
		view := c.view
		c.mu.Unlock()
		c.nodes["client"].volume().SetView(view) // the primary has not heard
		s := c.session("client")
		want := pattern(5, 8192)
		w := s.write(grown-8192, want, false)
		time.Sleep(time.Second)
		select {
		case err := <-w:
			t.Fatalf("it is answered before the primary has heard: %v", err)
		default:
		}
		c.push()
		s.must(w)
		s.mustRead(grown-8192, want)
		c.close()
	})
}

// A primary elsewhere hears of the new size later than the node of a client that
// writes behind the old one: the request waits, and does not fail.
func TestAWriteComesBeforeThePrimaryHears(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const old, grown = 1 << 20, 4 << 20
		c := newTestCluster(t, old, 3)
		defer c.close()
		if prim := c.promote("n1"); prim != "n1" {
			t.Fatalf("the primary is %s", prim)
		}
		c.mu.Lock()
		c.view.Size = grown
		view := c.view
		c.mu.Unlock()
		c.nodes["n2"].volume().SetView(view) // the primary has not heard
		s := c.session("n2")
		time.AfterFunc(10*time.Second, c.push)
		want := pattern(5, 8192)
		s.mustWrite(grown-8192, want)
		s.mustRead(grown-8192, want)
		if len(c.fails) > 0 {
			t.Errorf("failed: %v", c.fails)
		}
	})
}

// A node takes requests by the new size a moment before its replica has grown: a
// read, or a block status, behind the old end waits for that, and is no sign of a
// disk that failed (read-before-grow).
func TestAReadComesBeforeTheStoreHasGrown(t *testing.T) {
	const old, grown = 1 << 20, 4 << 20
	for name, at := range map[string]struct {
		node    ident.Node // whose replica has not grown
		replica bool       // read by VOLUME@NODE
		from    ident.Node // where the client is
		op      Op
	}{
		"volume":           {"n1", false, "n1", OpRead},
		"volume, status":   {"n1", false, "n1", OpBlockStatus},
		"volume, far":      {"n1", false, "n3", OpRead},
		"replica":          {"n2", true, "n2", OpRead},
		"replica, far":     {"n2", true, "n3", OpRead},
		"replica, status":  {"n2", true, "n2", OpBlockStatus},
		"resync or verify": {"n2", false, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newTestCluster(t, old, 3)
				defer c.close()
				c.promote("n1")
				c.session("n1").mustWrite(0, pattern(1, 4096))
				v := c.nodes[at.node].volume()
				// The loop is in its disk.
				release := make(chan struct{})
				v.rep().in.push(input{kind: inCall, call: func(core.Instant) { <-release }})
				synctest.Wait()
				c.mu.Lock()
				c.view.Size = grown
				c.mu.Unlock()
				c.push()
				synctest.Wait()
				if at.op == 0 {
					if _, err := v.ReadReplica(make([]byte, 4096), grown-4096); !errors.Is(err, errNotKnown) {
						t.Errorf("reading the replica: %v", err)
					}
					close(release)
				} else {
					done := c.openAt(at.from, at.node, at.replica).start(&Request{
						Op: at.op, Offset: grown - 4096, Length: 4096, Data: buf.Get(4096),
					})
					synctest.Wait()
					close(release)
					select {
					case err := <-done:
						if err != nil {
							t.Error(err)
						}
					case <-time.After(10 * time.Second):
						t.Error("no answer")
					}
				}
				c.mu.Lock()
				defer c.mu.Unlock()
				if len(c.fails) > 0 {
					t.Errorf("failed: %v", c.fails)
				}
			})
		})
	}
}

// openAt opens a session at a node: of the volume, or of the replica at of.
func (c *testCluster) openAt(node, of ident.Node, replica bool) *testSession {
	c.t.Helper()
	if !replica {
		return c.session(node)
	}
	s, err := c.nodes[node].volume().OpenReplicaSession(context.Background(), of, Client{Local: true})
	if err != nil {
		c.t.Fatal(err)
	}
	return &testSession{t: c.t, s: s}
}
