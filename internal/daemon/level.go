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
	// primary, is shown as it is.
	levelTime = time.Second
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
// now, if it is in the in-sync set.
func (d *Daemon) level(ctx context.Context, sv *state.Volume, at ident.Node) {
	if sv.Primary == "" || sv.Primary == at || !slices.Contains(sv.InSync, at) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, levelTime)
	defer cancel()
	ask := func(n ident.Node, c committedCall) (reply committedReply, err error) {
		if n == d.self {
			return d.serveCommitted(ctx, d.self, c)
		}
		return reply, d.rpc.call(ctx, n, "/node/v1/committed", c, &reply)
	}
	now, err := ask(sv.Primary, committedCall{Volume: sv.ID})
	if err == nil {
		_, err = ask(at, committedCall{Volume: sv.ID, AtLeast: now.Seq})
	}
	if err != nil {
		d.log.Debug("a replica is shown as it is", "volume", sv.Name, "node", at, "err", err)
	}
}
