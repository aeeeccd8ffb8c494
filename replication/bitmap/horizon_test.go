package bitmap

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// A replica whose log ends at the trim horizon goes away: what changed since is
// what was written after it, however often the record is merged before anybody
// pins the border (found end to end: a resync of 64 MiB where 8 were dirty).
func TestMergeKeepsTheHorizonsBorder(t *testing.T) {
	c := NewChanges(0)
	for seq := uint64(1); seq <= 200; seq++ {
		c.Mark(seq, seq*segmentBytes, segmentBytes)
	}
	c.Merge(195)
	for seq := uint64(201); seq <= 204; seq++ {
		c.Mark(seq, 0, segmentBytes)
		c.Merge(195)
	}
	dirty, ok := c.Since(195)
	if want := int64(6 * segmentBytes); !ok || dirty.Bytes() != want {
		t.Errorf("since the horizon %d bytes changed (known: %v), want %d", dirty.Bytes(), ok, want)
	}
	if c.Segments() > 50 {
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
	pinned := c.Segments()
	if pinned > 30 {
		t.Errorf("%d segments of 40 are left: nothing was merged", pinned)
	}
	c.Unpin(func(n string) bool { return n == "beta" })
	c.Merge(40)
	if n := c.Segments(); n > pinned-10 {
		t.Errorf("%d segments without a pin, %d with it", n, pinned)
	}
}

// Nobody has a pin at the position of a backup. What changed since is known to a
// quarter of what was written since, also long after, through checkpoints, and for
// little memory (found end to end: a backup copied all of a volume when 16 MiB had
// been written since the one before).
func TestMergeForgetsByAndBy(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	const written, volume = 64 << 10, 64 << 30
	c := NewChanges(0)
	for seq := uint64(1); seq <= written; seq++ {
		c.Mark(seq, rng.Uint64N(volume/BlockSize)*BlockSize, BlockSize)
		if seq%500 != 0 {
			continue
		}
		c.Merge(seq)
		p, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if c, err = UnmarshalChanges(p); err != nil {
			t.Fatal(err)
		}
	}
	if n := c.Segments(); n > 100 {
		t.Errorf("%d segments are left", n)
	}
	for ago := uint64(1); ago < written; ago += ago/8 + 1 {
		dirty, ok := c.Since(written - ago)
		if most := (int64(ago)*BlockSize*5/4 + 2*segmentBytes); !ok || dirty.Bytes() > most {
			t.Errorf("since %d blocks were written, %d bytes changed (known: %v), at most %d", ago, dirty.Bytes(), ok, most)
		}
	}
}

// However large a volume is, and however long it is written to, its history takes
// little beside what has changed at all.
func TestHistoryKeepsToItsLimit(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	c := NewChanges(0)
	for seq := uint64(1); seq <= 3<<19; seq++ { // lone blocks, of two bytes each
		c.Mark(seq, rng.Uint64N(256<<30), 1)
		if seq%(1<<15) == 0 {
			c.Merge(seq)
		}
	}
	young := int64(0)
	for _, s := range c.segs[2:] { // the oldest has no limit, and the one after it had room when it was begun
		young += s.bits.size()
	}
	if young > historyBytes {
		t.Errorf("the history takes %d bytes in %d segments", young, c.Segments())
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
	if got := c.Segments(); got > pinBorders+10 {
		t.Errorf("%d segments of %d are left, at most %d", got, n, pinBorders+10)
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
