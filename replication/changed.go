package replication

import (
	"context"
	"errors"
	"fmt"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/bitmap"
	"github.com/blockstep/blockstep/replication/core"
)

// Errors of Changed.
var (
	// ErrNotPrimary is returned by a node that is not the serving primary.
	ErrNotPrimary = errors.New("this node is not the serving primary")
	// ErrUnknownPosition is returned for a position that the volume's log never
	// had, or from which nobody knows any more what changed.
	ErrUnknownPosition = errors.New("what changed since that position is not known: take a whole backup")
)

// Changed returns the blocks that changed after the position since, for an
// incremental backup, and the end of the log at which that is so; no blocks (nil)
// when the log ends at have still. The serving primary alone answers, since its log
// holds every answered write. Blocks are of bitmap.BlockSize; some more than changed
// may be named, never fewer.
func (v *Volume) Changed(ctx context.Context, since, have ident.Position) (*bitmap.Bitmap, ident.Position, error) {
	rp := v.rep()
	if rp == nil {
		return nil, have, ErrNotPrimary
	}
	var b *bitmap.Bitmap
	var at ident.Position
	known, serves := false, false
	err := rp.call(ctx, func(core.Instant) {
		g := rp.core.Gate()
		if serves, at = gateOpen(g, rp.clock.Boot()), g.Last; serves && at != have {
			b, known = rp.core.ChangedAfter(since)
		}
	})
	switch {
	case err != nil:
		return nil, have, err
	case !serves:
		return nil, have, ErrNotPrimary
	case at != have && !known:
		return nil, have, fmt.Errorf("position %v: %w", since, ErrUnknownPosition)
	}
	return b, at, nil
}
