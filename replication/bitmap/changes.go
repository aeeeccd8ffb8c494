package bitmap

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
)

const (
	// segmentBytes is how much change one segment takes before the next begins:
	// the precision of Since, in bytes of volume.
	segmentBytes = 256 << 10
	// segmentsMax bounds the segments; beyond it the oldest are merged even
	// where somebody may want to tell them apart.
	segmentsMax = 4096
	// historyShare bounds what merging adds to an answer: of what was written since,
	// the share of one in so many. A backup that asks each day is told a day's changes.
	historyShare = 4
	// historyBytes bounds what the segments younger than the oldest take in memory
	// and in a checkpoint for that; a block that lies alone takes two bytes.
	historyBytes = 1 << 20
	// pinBorders is how many segments of what the pins span are told apart.
	pinBorders = segmentsMax / 2
)

// Changes records which blocks changed after which seq, as far back as it was
// begun: the dirty bitmap of every absent replica at once. Each replica keeps
// one, and marks it as it applies the log, so all replicas know the same and a
// failover loses nothing. It is a list of segments, each a bitmap of what
// changed in a run of seqs. Since(seq) is exact to a segment; old segments are
// merged, the more of them the older they are, except where a pin asks for the border.
type Changes struct {
	segs []segment
	// pins are the seqs that absent replicas will ask for: one in each span.
	pins map[string]span
	// merged is the horizon of the last Merge.
	merged uint64
}

// span is a run of seqs, both ends included.
type span struct{ from, to uint64 }

type segment struct {
	after uint64 // it covers the seqs above after, to the next segment's after
	bytes int64
	bits  *Bitmap
}

// NewChanges begins a record that knows everything after the seq.
func NewChanges(after uint64) *Changes {
	return &Changes{segs: []segment{{after: after, bits: New()}}, pins: map[string]span{}}
}

// Floor returns the seq after which everything is known.
func (c *Changes) Floor() uint64 { return c.segs[0].after }

// Mark records that the entry seq changed the byte range. Seqs do not fall,
// except that a replay after a crash marks again what was marked before.
func (c *Changes) Mark(seq, off, length uint64) {
	s := &c.segs[len(c.segs)-1]
	if s.bytes >= segmentBytes && seq > s.after+1 {
		c.segs = append(c.segs, segment{after: seq - 1, bits: New()})
		s = &c.segs[len(c.segs)-1]
	}
	s.bits.Mark(off, length)
	s.bytes += int64(min(length, 1<<40)) + BlockSize/8
}

// Since returns the blocks that changed after seq, perhaps a few more. ok is
// false when the record does not reach back that far.
func (c *Changes) Since(seq uint64) (b *Bitmap, ok bool) {
	if seq < c.Floor() {
		return nil, false
	}
	b = New()
	for i := len(c.segs) - 1; i >= 0; i-- {
		b.Union(c.segs[i].bits)
		if c.segs[i].after <= seq {
			break
		}
	}
	return b, true
}

// Pin keeps the borders from one seq to another, both included, for the named
// replica: the log that it holds ends at one of them.
func (c *Changes) Pin(name string, from, to uint64) {
	c.pins[name] = span{from: from, to: max(from, to)}
}

// Unpin ends the Pins of the names that are to go.
func (c *Changes) Unpin(goes func(name string) bool) {
	maps.DeleteFunc(c.pins, func(name string, _ span) bool { return goes(name) })
}

// Pinned reports whether the name has a pin.
func (c *Changes) Pinned(name string) bool { _, ok := c.pins[name]; return ok }

// Merge joins segments that begin at or below the horizon, unless the answer for a
// pin, or for the horizon itself, begins there: a replica whose log ends at the
// horizon may yet go away. What is joined is a quarter at the most of what was
// written after it, so that an answer for any other seq is so much larger at the
// most; all that is older than historyBytes have room for is joined. Of what the
// pins span at most pinBorders borders are kept, as many for each.
func (c *Changes) Merge(horizon uint64) {
	if len(c.segs) < 3 || horizon == c.merged && len(c.segs) <= segmentsMax {
		return
	}
	c.merged = horizon
	keep := make([]bool, len(c.segs))
	border := func(s span) {
		first, last := c.holds(s.from), c.holds(s.to)
		step := (last-first)/max(pinBorders/max(len(c.pins), 1), 1) + 1
		for i := first; i <= last; i += step {
			keep[i] = true
		}
	}
	border(span{from: horizon, to: horizon})
	for _, s := range c.pins {
		border(s)
	}
	over := len(c.segs) - segmentsMax
	if over > 0 {
		over += segmentsMax / 8 // so that it is not done again for the next one
	}
	var later, held int64
	at := len(c.segs) - 1 // from here on it is done: [at] may take what is older
	for i := at - 1; i >= 0; i-- {
		s, young := c.segs[i], &c.segs[at]
		goes := i+1 <= over || young.after <= horizon &&
			(held > historyBytes || young.bytes+s.bytes <= later/historyShare)
		if keep[i+1] || !goes {
			later += young.bytes
			held += young.bits.size()
			at--
			c.segs[at] = s
			continue
		}
		// The smaller goes into the larger: what is added is added bit by bit.
		if s.bits.Blocks() < young.bits.Blocks() {
			s.bits, young.bits = young.bits, s.bits
		}
		s.bits.Union(young.bits)
		s.bytes += young.bytes
		*young = s
	}
	c.segs = slices.Delete(c.segs, 0, at)
}

// holds returns the segment in which the answer for seq begins, 0 if none does.
func (c *Changes) holds(seq uint64) int {
	i, exact := slices.BinarySearchFunc(c.segs, seq, cmpAfter)
	if !exact {
		i--
	}
	return max(i, 0)
}

func cmpAfter(s segment, seq uint64) int { return cmp.Compare(s.after, seq) }

// Segments returns how many segments there are, for tests and metrics.
func (c *Changes) Segments() int { return len(c.segs) }

// Marshal encodes the record in at most MarshalMax bytes and a little. If it
// takes more, the segments that are the oldest are merged in the encoding: what it
// is decoded to may say of more blocks that they changed.
//
//	u32 segments { u64 after, u32 n, n bytes of bitmap } u32 pins { u16 n, n bytes of name, u64 seq }
//
// The end of a pin's span is a pin of its own, its name the pin's and a zero byte:
// a version that knows no spans keeps two borders then.
func (c *Changes) Marshal() ([]byte, error) { return c.marshal(MarshalMax) }

func (c *Changes) marshal(limit int) ([]byte, error) {
	segs := c.segs
	var bits [][]byte
	for {
		total := 0
		bits = bits[:0]
		for _, s := range segs {
			p, err := s.bits.marshal(uint64(limit))
			if err != nil {
				return nil, err
			}
			total += len(p) + segmentOverhead
			bits = append(bits, p)
		}
		if total <= limit && len(segs) <= 2*segmentsMax || len(segs) == 1 {
			break
		}
		segs = halved(segs)
	}
	p := binary.LittleEndian.AppendUint32(nil, uint32(len(segs)))
	for i, s := range segs {
		p = binary.LittleEndian.AppendUint64(p, s.after)
		p = binary.LittleEndian.AppendUint32(p, uint32(len(bits[i])))
		p = append(p, bits[i]...)
	}
	names := slices.Sorted(maps.Keys(c.pins))
	p = binary.LittleEndian.AppendUint32(p, 2*uint32(len(names)))
	for _, n := range names {
		p = appendPin(p, n, c.pins[n].from)
		p = appendPin(p, n+pinEnd, c.pins[n].to)
	}
	return p, nil
}

// pinEnd is what the name of a span's end has beside the pin's.
const pinEnd = "\x00"

func appendPin(p []byte, name string, seq uint64) []byte {
	p = binary.LittleEndian.AppendUint16(p, uint16(len(name)))
	p = append(p, name...)
	return binary.LittleEndian.AppendUint64(p, seq)
}

// segmentOverhead is what an encoded segment takes beside its bitmap, in bytes.
const segmentOverhead = 12

// halved returns the segments with the older half of them, at the least two, as
// one. The given ones stay as they are.
func halved(segs []segment) []segment {
	n := max(len(segs)/2, 2)
	first := segment{after: segs[0].after, bits: New()}
	for _, s := range segs[:n] {
		first.bits.Union(s.bits)
		first.bytes += s.bytes
	}
	return append([]segment{first}, segs[n:]...)
}

// UnmarshalChanges decodes what Marshal made.
func UnmarshalChanges(p []byte) (*Changes, error) {
	d := decoder{p: p}
	n := d.u32()
	if n == 0 || n > 2*segmentsMax {
		return nil, fmt.Errorf("%w: %d segments", ErrCorrupt, n)
	}
	c := &Changes{pins: map[string]span{}}
	for range n {
		after := d.u64()
		bits, err := Unmarshal(d.bytes(int(d.u32())))
		if err != nil {
			return nil, err
		}
		if len(c.segs) > 0 && after <= c.segs[len(c.segs)-1].after {
			return nil, fmt.Errorf("%w: segment after %d out of order", ErrCorrupt, after)
		}
		c.segs = append(c.segs, segment{after: after, bits: bits, bytes: bits.Bytes()})
	}
	for range d.u32() {
		name, end := strings.CutSuffix(string(d.bytes(int(d.u16()))), pinEnd)
		seq := d.u64()
		if d.short {
			break
		}
		begun, ok := c.pins[name]
		switch {
		case !end:
			c.pins[name] = span{from: seq, to: seq}
		case ok:
			c.pins[name] = span{from: begun.from, to: max(begun.from, seq)}
		}
	}
	if d.short || len(d.p) != 0 {
		return nil, fmt.Errorf("%w: change record is cut or has bytes left over", ErrCorrupt)
	}
	return c, nil
}

// decoder reads little-endian fields; short is set once there are too few bytes.
type decoder struct {
	p     []byte
	short bool
}

func (d *decoder) bytes(n int) []byte {
	if n < 0 || n > len(d.p) {
		d.short, d.p = true, nil
		return nil
	}
	b := d.p[:n]
	d.p = d.p[n:]
	return b
}

func (d *decoder) u16() uint16 {
	if b := d.bytes(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (d *decoder) u32() uint32 {
	if b := d.bytes(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if b := d.bytes(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}
