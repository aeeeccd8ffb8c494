package bitmap

import (
	"slices"
	"testing"
)

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

// A replica goes away and the log that it holds ends somewhere between the trim
// horizon of then and the log's end of then: what changed since is exact to a
// segment, also once the horizon has moved on, and through a checkpoint (found end
// to end: a resync of 64 MiB where 8 were dirty).
func TestMergeKeepsWhatAPinSpans(t *testing.T) {
	c := NewChanges(0)
	for seq := uint64(1); seq <= 40; seq++ {
		c.Mark(seq, seq*segmentBytes, segmentBytes)
		if seq == 20 {
			c.Pin("beta", 5, 20)
		}
	}
	merge := func(horizon uint64) {
		t.Helper()
		c.Merge(horizon)
		for at := uint64(5); at <= 20; at++ {
			if dirty, ok := c.Since(at); !ok || dirty.Bytes() != int64(40-at)*segmentBytes {
				t.Errorf("horizon %d: since %d %d bytes changed (known: %v), want %d", horizon, at, dirty.Bytes(), ok, (40-at)*segmentBytes)
			}
		}
	}
	merge(15)
	p, err := c.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if c, err = UnmarshalChanges(p); err != nil {
		t.Fatal(err)
	}
	merge(35)
	if n := c.Segments(); n != 1+16+5 {
		t.Errorf("%d segments: of 40, one before the span, 16 of it and 5 from the horizon on are to be left", n)
	}
	c.Unpin(func(n string) bool { return n == "beta" })
	c.Merge(40)
	if n := c.Segments(); n != 2 {
		t.Errorf("%d segments without a pin, want 2", n)
	}
}

// A span as long as a log that went on for long costs no more than pinBorders.
func TestASpanIsBounded(t *testing.T) {
	const n = 3 * pinBorders
	c := NewChanges(0)
	for seq := uint64(1); seq <= n; seq++ {
		c.Mark(seq, seq*segmentBytes, segmentBytes)
	}
	c.Pin("beta", 0, n)
	c.Merge(n)
	if got := c.Segments(); got > pinBorders+2 {
		t.Errorf("%d segments of %d are left, at most %d", got, n, pinBorders+2)
	}
	for _, at := range []uint64{0, 1, n / 2, n - 1} {
		dirty, ok := c.Since(at)
		if most := int64(n-at+4) * segmentBytes; !ok || dirty.Bytes() > most {
			t.Errorf("since %d %d bytes changed (known: %v), at most %d", at, dirty.Bytes(), ok, most)
		}
	}
}

// A version that knows no spans reads them as two pins, and may drop the first: its
// record is read as well.
func TestPinsOfAnOlderVersion(t *testing.T) {
	c := NewChanges(0)
	c.Mark(1, 0, segmentBytes)
	c.pins = map[string]span{"beta": {5, 5}, "gamma" + pinEnd: {9, 9}}
	p, err := c.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := UnmarshalChanges(p)
	if err != nil {
		t.Fatal(err)
	}
	if want := (span{5, 5}); got.pins["beta"] != want || got.Pinned("gamma") || !slices.Equal(got.segs[0].bits.r.ToArray(), c.segs[0].bits.r.ToArray()) {
		t.Errorf("the pins are %v, want beta at %v alone", got.pins, want)
	}
}

// However many replicas are away, and however busy the volume is, what is written can
// be read again.
func TestManyPinsAreBounded(t *testing.T) {
	c := NewChanges(0)
	seq := uint64(0)
	write := func(n int) {
		for range n {
			seq++
			c.Mark(seq, (seq%4096)*segmentBytes, segmentBytes)
		}
	}
	for name := 'a'; name < 'p'; name++ {
		from := seq
		write(1023)
		c.Pin(string(name), from, seq)
		c.Merge(seq)
	}
	trim := seq
	write(7000)
	c.Merge(trim)
	if c.Segments() > segmentsMax+pinBorders {
		t.Errorf("%d segments", c.Segments())
	}
	write(5000) // and a Merge comes later
	p, err := c.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := UnmarshalChanges(p); err != nil {
		t.Error(err)
	}
}
