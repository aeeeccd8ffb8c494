package replication

import (
	"testing"
	"testing/synctest"
	"time"
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
