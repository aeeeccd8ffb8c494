package replication

import (
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
)

// A disk that is full takes its replica out; the volume goes on with the
// others, and with room again the replica comes back by itself: also on a disk that
// is so small that roomBytes are never free there.
func TestFullDisk(t *testing.T) {
	for name, capacity := range map[string]int64{"large": 0, "small": roomBytes - 1} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) { fillDisk(t, capacity) })
		})
	}
}

// fillDisk fills a disk, which then has capacity bytes.
func fillDisk(t *testing.T, capacity int64) {
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
	c.nodes["n1"].mem.SetCapacity(capacity)
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
}

// TestLogRoom: what is retained and what is applied between two checkpoints; of a small
// disk at most its shares, and what comes on top while a checkpoint is made.
func TestLogRoom(t *testing.T) {
	for _, tc := range []struct {
		retention   int64
		size        uint64
		total, want int64
	}{
		{0, 1 << 40, 1 << 40, 768 << 20},
		{1 << 30, 1 << 40, 1 << 40, 1536 << 20},
		{0, 1 << 20, 1 << 40, 320 << 20},
		{1 << 20, 1 << 40, 1 << 40, 65 << 20},
		{0, 1 << 40, 4 << 30, 768 << 20},
		{0, 1 << 30, 1 << 30, 448 << 20},
		{0, 1 << 30, 120 << 20, 64 << 20},
		{0, 1 << 30, 0, 64 << 20},
	} {
		if got := LogRoom(tc.retention, tc.size, tc.total); got != tc.want {
			t.Errorf("%+v: %d MiB", tc, got>>20)
		}
	}
}

// TestRoomNeeded: never more than roomBytes, never less than a segment, and a share of
// a small disk.
func TestRoomNeeded(t *testing.T) {
	for _, tc := range []struct{ total, segment, want int64 }{
		{1 << 40, 0, 64 << 20}, {512 << 20, 0, 64 << 20}, {256 << 20, 0, 32 << 20}, {100 << 20, 0, 16 << 20}, {0, 0, 16 << 20}, {64 << 20, 64 << 10, 8 << 20},
	} {
		if got := RoomNeeded(tc.total, tc.segment); got != tc.want {
			t.Errorf("of %d bytes, with segments of %d: %d, want %d", tc.total, tc.segment, got, tc.want)
		}
	}
}
