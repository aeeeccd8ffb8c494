package replication

import (
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
)

// A disk that is full takes its replica out; the volume goes on with the
// others, and with room again the replica comes back by itself.
func TestFullDisk(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := makeTestCluster(t, true, 8<<20, 3, "client")
		c.promote("n1")
		s := c.session("client")
		c.nodes["n1"].mem.SetCapacity(c.nodes["n1"].mem.Used() + 1<<20)
		for i := range 64 {
			w := s.write(uint64(i)*65536, pattern(byte(i), 65536), i%8 == 0)
			for waited := 0; len(w) == 0; waited++ {
				if waited > 100 {
					t.Fatalf("write %d: no answer", i)
				}
				if c.promote("n2"); len(w) == 0 {
					time.Sleep(100 * time.Millisecond)
				}
			}
			s.must(w)
		}
		if len(c.fails) > 0 {
			t.Fatalf("a full disk is no broken one: %v", c.fails)
		}
		if st := c.nodes["n1"].vol.Status(); st.Core.State != "Failed" {
			t.Fatalf("n1 is %s with a full disk", st.Core.State)
		}
		c.nodes["n1"].mem.SetCapacity(0)
		time.Sleep(2 * time.Minute)
		for _, name := range []ident.Node{"n1", "n2", "n3"} {
			got := make([]byte, 65536)
			for i := range 64 {
				if _, err := c.nodes[name].vol.ReadReplica(got, uint64(i)*65536); err != nil || string(got) != string(pattern(byte(i), 65536)) {
					t.Fatalf("%s, block %d: %v", name, i, err)
				}
			}
		}
		if len(c.view.Set) != 3 {
			t.Errorf("in sync: %v", c.view.Set)
		}
		c.close()
	})
}
