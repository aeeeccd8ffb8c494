package daemon

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/replication/bitmap"
)

const (
	// dirtyContext is the meta context for incremental backups. Its parameter
	// is a position, EPOCH:SEQ, as `blockstep status` shows it.
	dirtyContext = "blockstep:dirty-since:"
	// dirtyFlag is set on extents that changed, as in qemu's dirty bitmaps.
	dirtyFlag = 1
	// changedTime bounds the question what changed, of a block status.
	changedTime = 10 * time.Second
)

// parsePosition reads EPOCH:SEQ.
func parsePosition(s string) (ident.Position, error) {
	epoch, seq, ok := strings.Cut(s, ":")
	e, err1 := strconv.ParseUint(epoch, 10, 64)
	n, err2 := strconv.ParseUint(seq, 10, 64)
	if !ok || err1 != nil || err2 != nil {
		return ident.Position{}, fmt.Errorf("position %q: want EPOCH:SEQ, as blockstep status shows it", s)
	}
	return ident.Position{Epoch: ident.Epoch(e), Seq: ident.Seq(n)}, nil
}

// changedCall asks the primary what changed, if its log does not end at Have.
type changedCall struct {
	Volume ident.Volume   `json:"volume"`
	Since  ident.Position `json:"since"`
	Have   ident.Position `json:"have"`
}

// changedReply has no bits when the log ends at Have. At is zero from a release that
// does not know of it, and then never the end of a log.
type changedReply struct {
	Bits []byte         `json:"bits"`
	At   ident.Position `json:"at"`
}

func (d *Daemon) serveChanged(ctx context.Context, _ ident.Node, c changedCall) (changedReply, error) {
	v := d.volume(c.Volume)
	if v == nil {
		return changedReply{}, control.Errorf(control.CodeFailed, "", "the volume is not open on %s", d.self)
	}
	b, at, err := v.driver.Changed(ctx, c.Since, c.Have)
	if err != nil || b == nil {
		return changedReply{At: at}, err
	}
	p, err := b.Marshal()
	return changedReply{Bits: p, At: at}, err
}

// errNotAnswered is returned when no primary has said what changed.
var errNotAnswered = errors.New("no primary has said what changed; try again later")

// changed asks the primary of a volume, wherever it is, for some time at the most.
func (d *Daemon) changed(c changedCall, patience time.Duration) (changedReply, error) {
	ctx, cancel := context.WithTimeout(d.ctx, patience)
	defer cancel()
	for {
		sv := d.state().Volumes[c.Volume]
		if sv == nil || sv.Deleted {
			return changedReply{}, errors.New("the volume was deleted")
		}
		var reply changedReply
		var err error
		if sv.Primary == d.self {
			reply, err = d.serveChanged(ctx, d.self, c)
		} else {
			err = d.rpc.call(ctx, sv.Primary, "/node/v1/changed", c, &reply)
		}
		switch {
		case err == nil:
			return reply, nil
		case strings.Contains(err.Error(), "is not known"): // and stays so
			return reply, fmt.Errorf("%w: %w", nbd.ErrInvalid, err)
		case !pause(ctx, applyPause): // a primary that does not serve yet will, or another one
			return reply, fmt.Errorf("%w (%w)", errNotAnswered, err)
		}
	}
}

// changes is a dirty-since context of one session.
type changes struct {
	since ident.Position
	mu    sync.Mutex
	at    ident.Position // the end of the log at which bits are right
	bits  *bitmap.Bitmap // nil: not known, so all of it
}

// update asks what changed up to now. It keeps no answer that may be of the past: what
// was answered to any client before a block status came must be in it.
func (c *changes) update(d *Daemon, id ident.Volume, patience time.Duration) (*bitmap.Bitmap, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	reply, err := d.changed(changedCall{Volume: id, Since: c.since, Have: c.at}, patience)
	switch {
	case err != nil:
		return nil, err
	case reply.Bits == nil && c.bits != nil:
		return c.bits, nil
	}
	b, err := bitmap.Unmarshal(reply.Bits)
	if err != nil {
		return nil, err
	}
	c.bits, c.at = b, reply.At
	return b, nil
}

// dirtyExtents are the first runs, as many as limit says, of changed and unchanged
// blocks of a range; all of it has changed when that is not known (nil).
func dirtyExtents(b *bitmap.Bitmap, off, length uint64, limit int) []nbd.Extent {
	if b == nil {
		return []nbd.Extent{{Length: length, Flags: dirtyFlag}}
	}
	var out []nbd.Extent
	end := off + length
	for at := off; at < end && len(out) < limit; {
		from, n, ok := b.Next(at, end-at+bitmap.BlockSize)
		from = max(from, at)
		if !ok || from >= end {
			return append(out, nbd.Extent{Length: end - at})
		}
		if from > at {
			out = append(out, nbd.Extent{Length: from - at})
			at = from
			continue
		}
		start := from - from%bitmap.BlockSize
		stop := min(start+n, end)
		out = append(out, nbd.Extent{Length: stop - from, Flags: dirtyFlag})
		at = stop
	}
	return out
}
