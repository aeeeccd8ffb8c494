package core

import "github.com/blockstep/blockstep/internal/ident"

const (
	// dedupFirst is how many requests a dedupRing has room for at first, and
	// dedupGrowth by how much it grows each time.
	dedupFirst  = 256
	dedupGrowth = 4
)

// dedupRing remembers which request the newest entries answered. Looking one
// up is a scan: only a replay is looked up, and replays are rare.
type dedupRing struct {
	ents  []DedupEntry // a ring: all of it is room
	head  int          // of the oldest
	n     int          // how many there are
	max   int
	floor ident.Position // of the newest that was forgotten
}

func newDedupRing(limit int, list []DedupEntry, floor ident.Position) dedupRing {
	d := dedupRing{max: limit, floor: floor}
	d.resize(max(len(list), min(dedupFirst, limit)))
	d.n = copy(d.ents, list)
	return d
}

// at returns the i-th, the oldest being the first.
func (d *dedupRing) at(i int) *DedupEntry {
	if i += d.head; i >= len(d.ents) {
		i -= len(d.ents)
	}
	return &d.ents[i]
}

func (d *dedupRing) push(e DedupEntry, hist history) {
	if d.n >= d.max {
		old := d.at(0).Seq
		d.floor = ident.Position{Epoch: hist.at(old), Seq: old}
		if d.head++; d.head == len(d.ents) {
			d.head = 0
		}
		d.n--
	}
	if d.n == len(d.ents) {
		d.resize(min(dedupGrowth*d.n, d.max))
	}
	*d.at(d.n) = e
	d.n++
}

func (d *dedupRing) resize(room int) {
	ents := make([]DedupEntry, room)
	for i := range d.n {
		ents[i] = *d.at(i)
	}
	d.ents, d.head = ents, 0
}

func (d *dedupRing) cut(seq ident.Seq) {
	for d.n > 0 && d.at(d.n-1).Seq > seq {
		d.n--
	}
}

func (d *dedupRing) find(session, request uint64) (ident.Seq, bool) {
	for i := d.n - 1; i >= 0; i-- {
		if e := d.at(i); e.Request == request && e.Session == session {
			return e.Seq, true
		}
	}
	return 0, false
}

// list returns those of entries up to a seq, the oldest first.
func (d *dedupRing) list(upTo ident.Seq) []DedupEntry {
	n := d.n
	for n > 0 && d.at(n-1).Seq > upTo {
		n--
	}
	out := make([]DedupEntry, n)
	for i := range out {
		out[i] = *d.at(i)
	}
	return out
}
