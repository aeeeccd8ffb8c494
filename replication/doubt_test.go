package replication

import (
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
)

// A replica whose blocks are doubted is a member of the in-sync set until a
// command has put it out. It cannot be promoted: a SEAL does not count it. And
// what only it and the primary hold is not committed: the primary has begun to
// put it out as soon as it knows, and from then on the majority of the set
// without it is needed too. Were it answered, nobody could serve it when the
// primary is gone, with two of three up.
func TestADoubtedMemberDoesNotCount(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 4<<20, 3)
		defer c.close()
		c.promote("n1")
		s := c.session("n1")
		s.mustWrite(0, pattern(1, 65536))
		s.must(s.flush())
		time.Sleep(15 * time.Second)
		set := func(cut bool, links ...[2]ident.Node) {
			c.mu.Lock()
			defer c.mu.Unlock()
			for _, l := range links {
				c.cut[l] = cut
			}
		}
		// n1 reaches no Raft leader, so the set stays; and n2 does not hear it.
		set(true, [2]ident.Node{"n1", "client"}, [2]ident.Node{"n1", "n2"})
		if ok, err := c.nodes["n3"].volume().Doubt(t.Context(), 0, 4096); !ok || err != nil {
			t.Fatal(ok, err)
		}
		time.Sleep(500 * time.Millisecond)
		w := s.write(0, pattern(2, 4096), false)
		time.Sleep(5 * time.Second)
		select {
		case err := <-w:
			t.Fatalf("a write that only the primary and a doubted replica hold was answered: %v", err)
		default:
		}
		set(false, [2]ident.Node{"n1", "n2"})
		s.must(w) // n2 holds it now
		set(false, [2]ident.Node{"n1", "client"})
		c.healed()
		time.Sleep(15 * time.Second)
		got := make([]byte, 4096)
		if _, err := c.nodes["n3"].volume().ReadReplica(got, 0); err != nil || string(got) != string(pattern(2, 4096)) {
			t.Errorf("the doubted block was not brought back: %v", err)
		}
	})
}
