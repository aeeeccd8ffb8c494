package replication

import (
	"errors"
	"fmt"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/store"
	"github.com/blockstep/blockstep/replication/wire"
)

// errEnough ends a walk over extents that has found as many as it may return.
var errEnough = errors.New("enough extents")

// tryStatus makes one attempt at a block status: the backing store's holes with
// the overlay laid over them. It gives the gate the same two looks as a read,
// but does not mind an entry that is not committed or is applied meanwhile: a
// range that is called allocated is merely read.
func (rp *replica) tryStatus(a *readArgs, r *Request) (readOutcome, error) {
	g := rp.gate.load()
	if out := rp.judgeGate(a, g); out != readDone {
		return out, nil
	}
	end := r.Offset + r.Length
	sc, _ := readScratches.Get().(*readScratch)
	sc.patches, _ = rp.overlay.look(r.Offset, end, ^ident.Seq(0), sc.patches[:0])
	list, err := rp.extents(r.Offset, end, sc.patches, r.Extents[:0], r.ReqOne)
	releasePatches(sc.patches)
	readScratches.Put(sc)
	r.Extents = list
	switch {
	case errors.Is(err, store.ErrRange):
		return readEarly, nil
	case err != nil:
		return readFailed, fmt.Errorf("find the holes of the backing store: %w", err)
	}
	if out := rp.judgeGate(a, rp.gate.load()); out != readDone {
		return out, nil
	}
	return readDone, nil
}

// extents appends the runs from off on to dst. A range with an entry that is
// not applied yet counts as allocated when the entry brings data, else as what
// lies below it; an entry of zeroes or a trim does not make a hole before it
// has been applied, so that what is called a hole surely reads as zeroes. What has
// room but no data (NO_HOLE) reads as zeroes and is no hole.
func (rp *replica) extents(off, end uint64, ps []patch, dst []Extent, one bool) ([]Extent, error) {
	limit := blockStatusExtentsMax
	if one {
		limit = 1
	}
	add := func(n uint64, flags uint32) error {
		if k := len(dst); k > 0 && dst[k-1].Flags == flags {
			dst[k-1].Len += n
			return nil
		}
		if len(dst) == limit {
			return errEnough
		}
		dst = append(dst, Extent{Len: n, Flags: flags})
		return nil
	}
	err := rp.store.Extents(off, end-off, func(at, n uint64, data bool) error {
		if data {
			return add(n, 0)
		}
		for stop := at + n; at < stop; {
			room, k, err := rp.store.Unwritten(at, stop)
			if err != nil {
				return err
			}
			if k == 0 {
				room = stop
			}
			if err := addHole(ps, at, room, ExtentHole|ExtentZero, add); err != nil {
				return err
			}
			if err := addHole(ps, room, room+k, ExtentZero, add); err != nil {
				return err
			}
			at = room + k
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return dst, err
}

// addHole adds the runs of a range without data: as flags say, but where an entry
// that is not applied yet covers it.
func addHole(ps []patch, at, stop uint64, flags uint32, add func(n uint64, flags uint32) error) error {
	for at < stop {
		next, covered := nextPatch(ps, at, stop)
		f := flags
		if covered {
			f = 0
		}
		if err := add(next-at, f); err != nil {
			return err
		}
		at = next
	}
	return nil
}

// nextPatch returns up to where the range from at on is, or is not, covered by
// an entry with data, or with zeroes that keep their room.
func nextPatch(ps []patch, at, stop uint64) (next uint64, covered bool) {
	next = stop
	for i := range ps {
		p := &ps[i]
		if p.kind != wire.KindData && !p.noHole {
			continue
		}
		switch {
		case p.off <= at && at < p.end:
			if !covered {
				next, covered = at, true
			}
			next = max(next, min(p.end, stop))
		case !covered && p.off > at:
			next = min(next, p.off)
		}
	}
	return next, covered
}
