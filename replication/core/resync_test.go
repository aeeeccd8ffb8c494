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

// A checkpoint that began before blocks were doubted does not make them durable:
// the replica goes on lacking them until the next one.
func TestDoubtOutlivesACheckpointUnderWay(t *testing.T) {
	c := New(Config{Node: "b", Replica: 2, Incarnation: 1}, Start{Fresh: true}, 1)
	c.View(1, View{
		Epoch: 1, Primary: "a", Set: []ident.Node{"a"}, SetVersion: 1, Size: 1 << 20,
		Members: []Member{{Node: "a", Replica: 1}, {Node: "b", Replica: 2}},
	})
	var e Effects
	c.Message(2, "a", &wire.Append{Epoch: 1, Stream: 1})
	c.Ready(&e)
	checkpoint := func() {
		t.Helper()
		s, err := c.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		c.Checkpointed(3, s.Applied.Seq)
	}
	if _, err := c.Snapshot(); err != nil { // … whose fsync takes its time
		t.Fatal(err)
	}
	if !c.Doubt(3, 0, 4096) {
		t.Fatal("the doubt is refused")
	}
	c.Message(3, "a", &wire.Blocks{Epoch: 1, Stream: 1, ID: 1, Blocks: []wire.Block{{Len: 4096}}})
	c.Ready(&e)
	if len(e.WriteBlocks) != 1 {
		t.Fatalf("blocks to write: %v", e.WriteBlocks)
	}
	c.BlocksWritten(3, 1)
	c.Checkpointed(3, 0)
	if !c.inconsistent() {
		t.Error("it is whole by a checkpoint that has not fsynced the block")
	}
	checkpoint()
	if c.inconsistent() {
		t.Error("it is not whole after a checkpoint that has")
	}
}
