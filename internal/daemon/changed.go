package daemon

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
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
	// changedTime bounds the question what changed.
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

// changedCall asks the primary what changed.
type changedCall struct {
	Volume ident.Volume   `json:"volume"`
	Since  ident.Position `json:"since"`
}

type changedReply struct {
	Bits []byte `json:"bits"`
}

func (d *Daemon) serveChanged(ctx context.Context, _ ident.Node, c changedCall) (changedReply, error) {
	v := d.volume(c.Volume)
	if v == nil {
		return changedReply{}, control.Errorf(control.CodeFailed, "", "the volume is not open on %s", d.self)
	}
	b, err := v.driver.Changed(ctx, c.Since)
	if err != nil {
		return changedReply{}, err
	}
	p, err := b.Marshal()
	return changedReply{Bits: p}, err
}

// changed asks the primary of a volume, wherever it is.
func (d *Daemon) changed(id ident.Volume, since ident.Position) (*bitmap.Bitmap, error) {
	ctx, cancel := context.WithTimeout(d.ctx, changedTime)
	defer cancel()
	c := changedCall{Volume: id, Since: since}
	for {
		sv := d.state().Volumes[id]
		if sv == nil || sv.Deleted {
			return nil, errors.New("the volume was deleted")
		}
		var reply changedReply
		var err error
		if sv.Primary == d.self {
			reply, err = d.serveChanged(ctx, d.self, c)
		} else {
			err = d.rpc.call(ctx, sv.Primary, "/node/v1/changed", c, &reply)
		}
		if err == nil {
			return bitmap.Unmarshal(reply.Bits)
		}
		// A position that is not known stays so; a primary that does not serve
		// yet will, or another one.
		if strings.Contains(err.Error(), "is not known") || !pause(ctx, applyPause) {
			return nil, err
		}
	}
}

// dirtyExtents are the runs of changed and unchanged blocks of a range.
func dirtyExtents(b *bitmap.Bitmap, off, length uint64) []nbd.Extent {
	var out []nbd.Extent
	end := off + length
	for at := off; at < end; {
		from, n, ok := b.Next(at, end-at+bitmap.BlockSize)
		from = max(from, at)
		if !ok || from >= end {
			return append(out, nbd.Extent{Length: end - at})
		}
		if from > at {
			out = append(out, nbd.Extent{Length: from - at})
		}
		start := from - from%bitmap.BlockSize
		stop := min(start+n, end)
		out = append(out, nbd.Extent{Length: stop - from, Flags: dirtyFlag})
		at = stop
	}
	return out
}
