package peer

import (
	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// piece is a part of the outgoing bytes: slab bytes of a batch's slab, and then
// a payload, if there is one. A frame is one piece or more.
type piece struct {
	slab  int
	buf   *buf.Buf
	last  bool   // of its frame
	order *order // of a frame that has one; with last
}

// order counts one volume's frames that wait in each lane and must not be
// overtaken by later ones of that volume.
type order [lanes]int

// lane returns the lane for a further frame of the volume that would like to
// go by want: that one, or the slowest lane in which an earlier frame waits.
func (o *order) lane(want int) int {
	for i := lanes - 1; i > want; i-- {
		if o[i] > 0 {
			return i
		}
	}
	return want
}

// batch is frames in the order in which they go out: headers, bodies and small
// payloads in one slab, larger payloads by reference.
type batch struct {
	slab   []byte
	pieces []piece
	// Taken so far:
	slabAt, pieceAt int
}

func (b *batch) empty() bool { return b.pieceAt == len(b.pieces) }

// reset makes the batch ready for reuse. All of it must have been taken, and
// nobody may look at the slab any more.
func (b *batch) reset() {
	b.slab, b.pieces = b.slab[:0], b.pieces[:0]
	b.slabAt, b.pieceAt = 0, 0
	if cap(b.slab) > slabKeep {
		b.slab, b.pieces = nil, nil
	}
}

// lane is a queue of frames. What is pushed goes to back; front is being sent.
// There are two batches because the socket may still read front's slab while
// back grows.
type lane struct {
	front, back batch
}

// push adds m's frame and returns its bytes. The lane then owns one reference
// of each payload; on an error it owns none. o, if not nil, is told when the
// frame is taken.
func (l *lane) push(version uint8, vol ident.Volume, m wire.Message, o *order, scratch *[]*buf.Buf) (int, error) {
	b := &l.back
	start := len(b.slab)
	slab, payloads, err := wire.AppendFrameAs(version, b.slab, (*scratch)[:0], vol, m)
	if err != nil {
		return 0, err
	}
	*scratch = payloads
	size := len(slab) - start
	from := start
	for i, p := range payloads {
		size += len(p.B)
		if len(p.B) <= inlinePayload {
			slab = append(slab, p.B...)
			p.Release()
		} else {
			b.pieces = append(b.pieces, piece{slab: len(slab) - from, buf: p})
			from = len(slab)
		}
		payloads[i] = nil
	}
	if len(slab) > from {
		b.pieces = append(b.pieces, piece{slab: len(slab) - from})
	}
	end := &b.pieces[len(b.pieces)-1]
	end.last, end.order = true, o
	b.slab = slab
	return size, nil
}

// drop releases every payload that is queued.
func (l *lane) drop() {
	for _, b := range []*batch{&l.front, &l.back} {
		for i := b.pieceAt; i < len(b.pieces); i++ {
			b.pieces[i].buf.Release()
		}
		*b = batch{}
	}
}

// round is what one or several writes put on the socket before the next choice
// between the lanes is made.
type round struct {
	vec    [][]byte
	held   []*buf.Buf // released when all is written
	at     int        // vec[at:] is not written yet
	bytes  int
	frames int
}

// take moves whole frames from l, which is lane number which, until the round
// has limit bytes, but at least one. The round before must be done.
func (r *round) take(l *lane, which, limit int) {
	if l.front.empty() {
		l.front.reset()
		l.front, l.back = l.back, l.front
	}
	b := &l.front
	joined := false // the last of vec is slab bytes just before those that come
	for first := true; b.pieceAt < len(b.pieces) && (first || r.bytes < limit); first = false {
		for {
			p := &b.pieces[b.pieceAt]
			b.pieceAt++
			if p.slab > 0 {
				part := b.slab[b.slabAt : b.slabAt+p.slab]
				if joined {
					n := len(r.vec) - 1
					r.vec[n] = b.slab[b.slabAt-len(r.vec[n]) : b.slabAt+p.slab]
				} else {
					r.vec = append(r.vec, part)
				}
				b.slabAt += p.slab
				r.bytes += p.slab
				joined = true
			}
			if p.buf != nil {
				r.vec = append(r.vec, p.buf.B)
				r.held = append(r.held, p.buf)
				r.bytes += len(p.buf.B)
				p.buf = nil
				joined = false
			}
			if p.last {
				if p.order != nil {
					p.order[which]--
				}
				break
			}
		}
		r.frames++
	}
}

// advance notes that n more bytes are on the socket.
func (r *round) advance(n int) {
	for n > 0 {
		part := r.vec[r.at]
		if n < len(part) {
			r.vec[r.at] = part[n:]
			return
		}
		n -= len(part)
		r.at++
	}
}

func (r *round) done() bool { return r.at == len(r.vec) }

// finish releases the payloads and makes r ready for the next round.
func (r *round) finish() {
	for i, p := range r.held {
		p.Release()
		r.held[i] = nil
	}
	clear(r.vec)
	r.vec, r.held = r.vec[:0], r.held[:0]
	r.at, r.bytes, r.frames = 0, 0, 0
}
