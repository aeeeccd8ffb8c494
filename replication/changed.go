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

// Changed returns the blocks that changed after the position, for an
// incremental backup. The serving primary alone answers, since its log holds
// every answered write. Blocks are of bitmap.BlockSize; some more than changed
// may be named, never fewer.
func (v *Volume) Changed(ctx context.Context, since ident.Position) (*bitmap.Bitmap, error) {
	rp := v.rep()
	if rp == nil {
		return nil, ErrNotPrimary
	}
	var b *bitmap.Bitmap
	known, serves := false, false
	err := rp.call(ctx, func(core.Instant) {
		if serves = gateOpen(rp.core.Gate(), rp.clock.Boot()); serves {
			b, known = rp.core.ChangedAfter(since)
		}
	})
	switch {
	case err != nil:
		return nil, err
	case !serves:
		return nil, ErrNotPrimary
	case !known:
		return nil, fmt.Errorf("position %v: %w", since, ErrUnknownPosition)
	}
	return b, nil
}
