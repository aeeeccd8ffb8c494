package core

import (
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// history is the epochs of a log since the volume's beginning, and where each
// begins. Both fields rise. It reaches below the log's base, so that two
// replicas can tell where they parted even when the entries are gone.
type history []ident.EpochStart

// at returns the epoch of the entry seq.
func (h history) at(seq ident.Seq) ident.Epoch {
	for i := len(h) - 1; i >= 0; i-- {
		if h[i].First <= seq {
			return h[i].Epoch
		}
	}
	return 0
}

// start returns where the epoch of seq begins in h.
func (h history) start(seq ident.Seq) ident.Seq {
	for i := len(h) - 1; i >= 0; i-- {
		if h[i].First <= seq {
			return h[i].First
		}
	}
	return 0
}

// cut drops what begins after seq.
func (h history) cut(seq ident.Seq) history {
	for len(h) > 0 && h[len(h)-1].First > seq {
		h = h[:len(h)-1]
	}
	return h
}

// divergence returns the highest seq at which two logs hold, or held, the same
// entry: the point that both share and after which they may differ (log
// matching: same seq and epoch, same prefix). ok is false when the histories do
// not reach back far enough to tell.
func divergence(a history, aLast ident.Seq, b history, bLast ident.Seq) (ident.Seq, bool) {
	seq := min(aLast, bLast)
	var floor ident.Seq
	if len(a) > 0 && len(b) > 0 {
		floor = max(a[0].First, b[0].First)
	}
	for seq >= floor {
		ea, eb := a.at(seq), b.at(seq)
		if ea == eb {
			return seq, true
		}
		// The side with the newer epoch cannot share an entry of it.
		from := a.start(seq)
		if eb > ea {
			from = b.start(seq)
		}
		if from == 0 {
			return 0, false
		}
		seq = from - 1
	}
	return 0, false
}

// entryRing holds the newest entries with their payloads, contiguous, so that
// a run of them is one slice. It is bounded by bytes; what fell out is read
// from the log again when a lagging peer needs it.
type entryRing struct {
	ents  []wire.Entry
	head  int // ents[head] is the first that is held
	bytes int
	limit int
}

func (r *entryRing) len() int { return len(r.ents) - r.head }

// first returns the lowest seq that is held; the caller has checked len.
func (r *entryRing) first() ident.Seq { return r.ents[r.head].Pos.Seq }

// push takes over one reference of e's payload.
func (r *entryRing) push(e wire.Entry) {
	if r.head > 1024 && r.head > len(r.ents)/2 {
		n := copy(r.ents, r.ents[r.head:])
		clear(r.ents[n:])
		r.ents = r.ents[:n]
		r.head = 0
	}
	r.ents = append(r.ents, e)
	r.bytes += e.PayloadLen()
}

// shrink drops the oldest entries: those up to sent, that no peer waits for, down
// to a short tail; and beyond the limit all but those after keep, which are not
// handed to the driver yet.
func (r *entryRing) shrink(sent, keep ident.Seq) {
	tail := min(r.limit/ringTailShare, ringTailMax)
	for r.len() > 0 {
		many := r.bytes > r.limit || r.len() > ringEntriesMax
		if !(many && r.first() <= keep) && !(r.bytes > tail && r.first() <= min(sent, keep)) {
			break
		}
		e := &r.ents[r.head]
		r.bytes -= e.PayloadLen()
		e.Payload.Release()
		*e = wire.Entry{}
		r.head++
	}
	if r.head == len(r.ents) {
		r.ents, r.head = r.ents[:0], 0
	}
}

// cut drops every entry after seq.
func (r *entryRing) cut(seq ident.Seq) {
	for r.len() > 0 {
		e := &r.ents[len(r.ents)-1]
		if e.Pos.Seq <= seq {
			return
		}
		r.bytes -= e.PayloadLen()
		e.Payload.Release()
		*e = wire.Entry{}
		r.ents = r.ents[:len(r.ents)-1]
	}
	r.ents, r.head = r.ents[:0], 0
}

// from returns the held entries from seq on, or nil if seq is not held.
func (r *entryRing) from(seq ident.Seq) []wire.Entry {
	if r.len() == 0 || seq < r.first() {
		return nil
	}
	i := r.head + int(seq-r.first())
	if i >= len(r.ents) {
		return nil
	}
	return r.ents[i:]
}

// extentRing holds what each entry changes that is not applied yet.
type extentRing struct {
	first ident.Seq // of ents[head]
	ents  []extent
	head  int
	total int // bytes of log
}

type extent struct {
	off, len uint64
	cost     uint32 // bytes of log
}

func (x *extent) overlaps(off, length uint64) bool {
	return x.len > 0 && x.off < off+length && off < x.off+x.len
}

func (s *extentRing) push(seq ident.Seq, x extent) {
	if s.head == len(s.ents) {
		s.ents, s.head, s.first = s.ents[:0], 0, seq
	} else if s.head > 1024 && s.head > len(s.ents)/2 {
		n := copy(s.ents, s.ents[s.head:])
		s.ents, s.head = s.ents[:n], 0
	}
	s.ents = append(s.ents, x)
	s.total += int(x.cost)
}

// pop drops the oldest if it is not after seq.
func (s *extentRing) pop(seq ident.Seq) (extent, ident.Seq, bool) {
	if s.head == len(s.ents) || s.first > seq {
		return extent{}, 0, false
	}
	x, at := s.ents[s.head], s.first
	s.total -= int(x.cost)
	s.head++
	s.first++
	return x, at, true
}

// after returns the extents of the entries after seq.
func (s *extentRing) after(seq ident.Seq) []extent {
	if s.head == len(s.ents) {
		return nil
	}
	i := s.head
	if seq >= s.first {
		i += int(seq - s.first + 1)
	}
	return s.ents[min(i, len(s.ents)):]
}

// cost returns the bytes of log of the entries after from, up to to.
func (s *extentRing) cost(from, to ident.Seq) int {
	if s.head == len(s.ents) || to < s.first {
		return 0
	}
	n := 0
	for i := s.head + int(max(from+1, s.first)-s.first); i < len(s.ents) && s.first+ident.Seq(i-s.head) <= to; i++ {
		n += int(s.ents[i].cost)
	}
	return n
}

// cut drops the extents after seq.
func (s *extentRing) cut(seq ident.Seq) {
	for len(s.ents) > s.head && s.first+ident.Seq(len(s.ents)-s.head)-1 > seq {
		s.total -= int(s.ents[len(s.ents)-1].cost)
		s.ents = s.ents[:len(s.ents)-1]
	}
}
