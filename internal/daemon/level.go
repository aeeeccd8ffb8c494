package daemon

import (
	"context"
	"slices"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// A secondary learns what is committed with the next entry, or a moment later
// when none follows. Who opens VOLUME@NODE just after a write was answered
// expects to find it there; so the opening waits until that replica has caught
// up with what the primary knows to be committed.

const (
	// levelTime bounds the wait: a replica that cannot be reached, or has no
	// primary for longer than a failover takes, is shown as it is.
	levelTime = 3 * time.Second
	levelPoll = 2 * time.Millisecond
)

// committedCall asks a node up to where a volume's log is committed, as far as
// its replica knows; with AtLeast it waits for that seq.
type committedCall struct {
	Volume  ident.Volume `json:"volume"`
	AtLeast ident.Seq    `json:"at_least,omitempty"`
}

type committedReply struct {
	Seq ident.Seq `json:"seq"`
}

func (d *Daemon) serveCommitted(ctx context.Context, _ ident.Node, c committedCall) (committedReply, error) {
	v := d.volume(c.Volume)
	if v == nil {
		return committedReply{}, control.Errorf(control.CodeFailed, "", "the volume is not open on %s", d.self)
	}
	for {
		if seq := v.driver.Committed(); seq >= c.AtLeast || !pause(ctx, levelPoll) {
			return committedReply{Seq: seq}, ctx.Err()
		}
	}
}

// level waits until the replica of a volume at a node holds what is committed
// now, if it is in the in-sync set. It asks a primary that serves: one that has taken
// office and does not serve yet, and one that another has followed, do not know all
// that was answered.
func (d *Daemon) level(ctx context.Context, id ident.Volume, at ident.Node) {
	ctx, cancel := context.WithTimeout(ctx, levelTime)
	defer cancel()
	for {
		sv := d.state().Volumes[id]
		if sv == nil || sv.Deleted || sv.Primary == "" || !slices.Contains(sv.InSync, at) {
			return
		}
		if r := d.primaryReport(ctx, sv); r.servingAt(sv.Epoch) {
			if at != sv.Primary {
				d.awaitCommitted(ctx, sv, at, r.Core.Commit)
			}
			return
		}
		if !pause(ctx, levelPoll) {
			d.log.Debug("a replica is shown as it is", "volume", sv.Name, "node", at, "err", "the primary does not serve")
			return
		}
	}
}

// awaitCommitted waits until the replica at a node knows that the log is committed up
// to a seq.
func (d *Daemon) awaitCommitted(ctx context.Context, sv *state.Volume, at ident.Node, seq ident.Seq) {
	c, err := committedCall{Volume: sv.ID, AtLeast: seq}, error(nil)
	if at == d.self {
		_, err = d.serveCommitted(ctx, d.self, c)
	} else {
		err = d.rpc.call(ctx, at, "/node/v1/committed", c, nil)
	}
	if err != nil {
		d.log.Debug("a replica is shown as it is", "volume", sv.Name, "node", at, "err", err)
	}
}
