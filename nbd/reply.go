package nbd

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/blockstep/blockstep/internal/buf"
)

// encodeReply appends the vectors of one reply. There is room for hdrRoom
// bytes of headers and 2*holeRunsMax+4 vectors.
func (c *conn) encodeReply(w *replyWriter, q *request) {
	if q.err == nil && q.Op == OpBlockStatus {
		q.err = c.encodeStatus(q)
	}
	from := len(w.hdr)
	switch {
	case q.err != nil:
		c.encodeError(w, q)
	case q.Op == OpRead:
		c.encodeRead(w, q)
		return
	case q.Op == OpBlockStatus:
		w.payload(q.body.B)
		return
	case c.gate.extended:
		w.hdr = appendChunk(w.hdr, true, chunkDone, chunkNone, q.cookie, q.Offset, 0)
	default:
		// With structured replies a simple one is still right for a reply
		// without payload, and four bytes shorter.
		w.hdr = appendSimpleReply(w.hdr, 0, q.cookie)
	}
	w.commit(from)
}

// encodeError appends an error: with a text where the client understands one.
func (c *conn) encodeError(w *replyWriter, q *request) {
	errno := errnoOf(q.err, q.Op)
	if !c.gate.structured {
		w.hdr = appendSimpleReply(w.hdr, errno, q.cookie)
		return
	}
	text := cutText(q.err.Error())
	w.hdr = appendChunk(w.hdr, c.gate.extended, chunkDone, chunkError, q.cookie, q.Offset, uint32(6+len(text)))
	w.hdr = binary.BigEndian.AppendUint32(w.hdr, errno)
	w.hdr = binary.BigEndian.AppendUint16(w.hdr, uint16(len(text)))
	w.hdr = append(w.hdr, text...)
}

// encodeRead appends data: simple, as one chunk, or as chunks of data and
// holes.
func (c *conn) encodeRead(w *replyWriter, q *request) {
	from := len(w.hdr)
	if !c.gate.structured {
		w.hdr = appendSimpleReply(w.hdr, 0, q.cookie)
		w.commit(from)
		w.payload(q.Data.B)
		return
	}
	if !q.sparse() {
		c.encodeData(w, q, 0, q.Length, chunkDone)
		return
	}
	at := uint64(0)
	for i, run := range q.Holes {
		flags := uint16(0)
		if i == len(q.Holes)-1 {
			flags = chunkDone
		}
		if run.Flags&StateZero == 0 {
			c.encodeData(w, q, at, run.Length, flags)
		} else {
			from := len(w.hdr)
			w.hdr = appendChunk(w.hdr, c.gate.extended, flags, chunkOffsetHole, q.cookie, q.Offset, 12)
			w.hdr = binary.BigEndian.AppendUint64(w.hdr, q.Offset+at)
			w.hdr = binary.BigEndian.AppendUint32(w.hdr, uint32(run.Length))
			w.commit(from)
		}
		at += run.Length
	}
}

func (c *conn) encodeData(w *replyWriter, q *request, at, length uint64, flags uint16) {
	from := len(w.hdr)
	w.hdr = appendChunk(w.hdr, c.gate.extended, flags, chunkOffsetData, q.cookie, q.Offset, uint32(8+length))
	w.hdr = binary.BigEndian.AppendUint64(w.hdr, q.Offset+at)
	w.commit(from)
	w.payload(q.Data.B[at : at+length])
}

// sparse reports whether the read is answered in runs: not with DF, not in too
// many, and only if they cover the data exactly.
func (q *request) sparse() bool {
	if q.dontFragment || len(q.Holes) == 0 || len(q.Holes) > holeRunsMax {
		return false
	}
	var sum uint64
	for _, run := range q.Holes {
		if run.Length == 0 || run.Length > q.Length-sum {
			return false
		}
		sum += run.Length
	}
	return sum == q.Length
}

// encodeStatus encodes all chunks of a block status into q.body: one chunk a
// context, in the order in which they were asked for.
func (c *conn) encodeStatus(q *request) error {
	size := 0
	for i, id := range q.Contexts {
		s := q.status(id)
		if s == nil {
			return fmt.Errorf("%w: no status for context %d", ErrIO, id)
		}
		if err := c.clip(q, s); err != nil {
			return err
		}
		for _, before := range q.Contexts[:i] {
			if before == id {
				return fmt.Errorf("%w: context %d twice", ErrIO, id)
			}
		}
		size += extReplyBytes + 8 + 16*len(s.Extents)
	}
	body := buf.Get(size)
	b := body.B[:0]
	for i, id := range q.Contexts {
		flags := uint16(0)
		if i == len(q.Contexts)-1 {
			flags = chunkDone
		}
		b = c.appendStatus(b, q, q.status(id), flags)
	}
	body.B = b
	q.body = body
	return nil
}

func (q *request) status(id uint32) *Status {
	for i := range q.Status {
		if q.Status[i].Context == id {
			return &q.Status[i]
		}
	}
	return nil
}

func (c *conn) appendStatus(b []byte, q *request, s *Status, flags uint16) []byte {
	id := uint32(0)
	for i, have := range c.contexts {
		if have == s.Context {
			id = wireContext(i)
			break
		}
	}
	if c.gate.extended {
		b = appendChunk(b, true, flags, chunkBlockStatusExt, q.cookie, q.Offset, uint32(8+16*len(s.Extents)))
		b = binary.BigEndian.AppendUint32(b, id)
		b = binary.BigEndian.AppendUint32(b, uint32(len(s.Extents)))
		for _, e := range s.Extents {
			b = binary.BigEndian.AppendUint64(b, e.Length)
			b = binary.BigEndian.AppendUint64(b, uint64(e.Flags))
		}
		return b
	}
	b = appendChunk(b, false, flags, chunkBlockStatus, q.cookie, q.Offset, uint32(4+8*len(s.Extents)))
	b = binary.BigEndian.AppendUint32(b, id)
	for _, e := range s.Extents {
		b = binary.BigEndian.AppendUint32(b, uint32(e.Length))
		b = binary.BigEndian.AppendUint32(b, e.Flags)
	}
	return b
}

// extent32Max is the longest extent that a compact header can carry; a
// multiple of every block size.
const extent32Max = math.MaxUint32 &^ (1<<16 - 1)

// clip brings the extents of a context into the form that the protocol asks
// for: none empty, none beyond the request, neighbours of one state joined,
// one only with REQ_ONE, 32-bit lengths with compact headers.
func (c *conn) clip(q *request, s *Status) error {
	if c.gate.blockMin > 1 {
		s.Extents = alignExtents(s.Extents, c.gate.blockMin, s.Context == ContextAllocation)
	}
	most := min(ExtentsMax, int(c.gate.payloadMax/16))
	left := q.Length
	out := s.Extents[:0]
	for _, e := range s.Extents {
		if left == 0 || len(out) == most {
			break
		}
		e.Length = min(e.Length, left)
		if e.Length == 0 {
			continue
		}
		left -= e.Length
		if last := len(out) - 1; last >= 0 && out[last].Flags == e.Flags {
			out[last].Length += e.Length
			continue
		}
		if q.ReqOne && len(out) == 1 {
			break
		}
		out = append(out, e)
	}
	if len(out) == 0 {
		return fmt.Errorf("%w: an empty block status", ErrIO)
	}
	if !c.gate.extended {
		for i := range out {
			if out[i].Length > extent32Max {
				// Shorter than asked for is allowed: the client asks on.
				out[i].Length = extent32Max
				out = out[:i+1]
				break
			}
		}
	}
	s.Extents = out
	return nil
}

// alignExtents moves the borders of extents to multiples of the minimum block
// size, as the protocol demands. A block in which states meet gets what is
// true of all of it: for the allocation the flags that all parts have, for
// other contexts (dirty) those that any part has.
func alignExtents(in []Extent, blockMin uint64, all bool) []Extent {
	out := make([]Extent, 0, 2*len(in))
	var mixed Extent // the block under way
	for _, e := range in {
		if mixed.Length > 0 {
			n := min(e.Length, blockMin-mixed.Length)
			mixed.Length += n
			e.Length -= n
			if all {
				mixed.Flags &= e.Flags
			} else {
				mixed.Flags |= e.Flags
			}
			if mixed.Length < blockMin {
				continue
			}
			out = append(out, mixed)
			mixed = Extent{}
		}
		if whole := e.Length / blockMin * blockMin; whole > 0 {
			out = append(out, Extent{Length: whole, Flags: e.Flags})
			e.Length -= whole
		}
		if e.Length > 0 {
			mixed = e
		}
	}
	if mixed.Length > 0 {
		// The answer ends within a block. What is not known of it counts as
		// data that may have changed.
		flags := uint32(0)
		if !all {
			flags = mixed.Flags
		}
		out = append(out, Extent{Length: blockMin, Flags: flags})
	}
	return out
}
