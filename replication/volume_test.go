package replication

import (
	"bytes"
	"testing"
	"testing/synctest"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
)

// inBubble runs a test in fake time.
func inBubble(t *testing.T, fn func(t *testing.T)) { synctest.Test(t, fn) }

func TestOneReplicaWritesReadsAndComesBack(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 16<<20, 1)
		c.promote("n1")
		s := c.session("n1")
		a, b := pattern(1, 4096), pattern(2, 65536)
		s.mustWrite(0, a)
		s.mustRead(0, a)
		s.mustWrite(2048, b)
		s.mustRead(2048, b)
		s.must(s.flush())
		s.must(s.start(&Request{Op: OpTrim, Offset: 4096, Length: 4096}))
		want := append(bytes.Clone(a[:2048]), b...)
		clear(want[4096:8192])
		s.mustRead(0, want)
		time.Sleep(time.Second) // everything is applied
		s.mustRead(0, want)
		c.kill("n1")
		c.start("n1")
		c.promote("n1")
		s = c.session("n1")
		s.mustRead(0, want)
		c.stop("n1")
		c.start("n1")
		c.promote("n1")
		s = c.session("n1")
		s.mustRead(0, want)
		c.close()
	})
}

func TestThreeReplicasFailover(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 16<<20, 3, "client")
		if p := c.promote("n1"); p != "n1" {
			t.Fatalf("promoted %s", p)
		}
		s, far := c.session("n2"), c.session("client")
		a := pattern(1, 4096)
		s.mustWrite(0, a)
		far.mustRead(0, a)
		far.mustWrite(8192, a)
		s.mustRead(8192, a)
		s.must(s.flush())
		c.kill("n1")
		b := pattern(2, 4096)
		w, g := far.write(0, b, true), s.write(4096, b, false)
		time.Sleep(100 * time.Millisecond)
		p := c.promote("n2")
		far.must(w)
		s.must(g)
		s.mustRead(0, b)
		far.mustRead(4096, b)
		far.mustRead(8192, a)
		c.start("n1")
		time.Sleep(5 * time.Second)
		waitContent(t, c, map[uint64][]byte{0: b, 4096: b, 8192: a})
		t.Logf("primary %s, status %+v", p, c.nodes[p].vol.Status())
		c.close()
	})
}

// waitContent checks that every replica has the bytes.
func waitContent(t *testing.T, c *testCluster, want map[uint64][]byte) {
	t.Helper()
	for name, n := range c.nodes {
		if n.vol == nil || n.vol.rep() == nil {
			continue
		}
		for off, w := range want {
			got := make([]byte, len(w))
			var err error
			for range 100 {
				if _, err = n.vol.ReadReplica(got, off); err == nil && bytes.Equal(got, w) {
					break
				}
				time.Sleep(100 * time.Millisecond)
			}
			if err != nil || !bytes.Equal(got, w) {
				t.Errorf("replica at %s, offset %d: %v, got % x…", name, off, err, got[:8])
			}
		}
	}
	_ = ident.Node("")
}
