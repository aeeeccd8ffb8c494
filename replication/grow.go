package replication

import (
	"context"
	"errors"
	"fmt"

	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/store"
)

// ErrNoRoom is returned by Grow when the backing store cannot become as large.
var ErrNoRoom = errors.New("the backing store cannot grow")

// Grow makes the backing store of this node's replica, if it has one, large
// enough for a volume of size bytes, before the volume is made so: a replica
// that finds only afterwards that there is no room has failed. It returns
// ErrNoRoom, and changes nothing, when the file system or the device has none.
func (v *Volume) Grow(ctx context.Context, size uint64) error {
	rp := v.rep()
	if rp == nil {
		return nil
	}
	if err := rp.store.Prepare(ctx, size); err != nil {
		return fmt.Errorf("grow the replica of volume %s: %w", v.opts.Name, err)
	}
	var refused error
	err := rp.call(ctx, func(core.Instant) {
		err := rp.grow(size)
		if errors.Is(err, store.ErrSize) {
			refused = fmt.Errorf("%w: %w", ErrNoRoom, err)
		} else if err != nil && rp.failing.CompareAndSwap(false, true) {
			rp.failNow(err)
		}
	})
	if err != nil {
		return fmt.Errorf("grow the replica of volume %s: %w", v.opts.Name, err)
	}
	return refused
}
