package core

import (
	"slices"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// TestOlderBlocksHoldEntriesBack is resync-block-before-older-entry-applied the
// other way round: blocks as of 742 overtake those as of 741. While the older
// ones wait, entry 742 must not be applied, or they would overwrite it; and
// those that the driver is writing keep their place.
func TestOlderBlocksHoldEntriesBack(t *testing.T) {
	c := &Core{applied: 741, applyTo: 741}
	c.t.pending, c.t.writing = []*wire.Blocks{{ID: 1, AsOf: 741}}, 1
	for _, b := range []*wire.Blocks{{ID: 6, AsOf: 742}, {ID: 7, AsOf: 744}, {ID: 2, AsOf: 741}, {ID: 8, AsOf: 742}} {
		c.t.queue(b)
	}
	var got []uint64
	for _, b := range c.t.pending {
		got = append(got, b.ID)
	}
	if want := []uint64{1, 2, 6, 8, 7}; !slices.Equal(got, want) {
		t.Fatalf("in the order %v, want %v", got, want)
	}
	for _, step := range []struct {
		done uint64 // the blocks that are written now
		hold ident.Seq
	}{{1, 741}, {2, 742}, {6, 742}, {8, 744}} {
		c.t.writing = 1
		c.BlocksWritten(1, step.done)
		if hold := c.blocksHold(); hold != step.hold {
			t.Fatalf("after blocks %d entries may be applied to %d, want %d", step.done, hold, step.hold)
		}
	}
}
