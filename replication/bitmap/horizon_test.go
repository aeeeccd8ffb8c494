package bitmap

import "testing"

// A replica whose log ends at the trim horizon goes away: what changed since is
// what was written after it, however often the record is merged before anybody
// pins the border (found end to end: a resync of 64 MiB where 8 were dirty).
func TestMergeKeepsTheHorizonsBorder(t *testing.T) {
	c := NewChanges(0)
	for seq := uint64(1); seq <= 10; seq++ {
		c.Mark(seq, seq*segmentBytes, segmentBytes)
	}
	c.Merge(10)
	for seq := uint64(11); seq <= 14; seq++ {
		c.Mark(seq, 0, segmentBytes)
		c.Merge(10)
	}
	dirty, ok := c.Since(10)
	if !ok || dirty.Bytes() != segmentBytes {
		t.Errorf("since the horizon %d bytes changed (known: %v), want %d", dirty.Bytes(), ok, segmentBytes)
	}
	if c.Segments() > 6 {
		t.Errorf("%d segments: nothing was merged", c.Segments())
	}
}
