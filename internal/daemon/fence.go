package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft"
	"github.com/blockstep/blockstep/raft/state"
)

// fenceAgain is what to do about a fence that may not be in force.
const fenceAgain = "run blockstep fence %s again, which is safe at any time; blockstep status %[1]s says what is missing"

// lackingNext says what to do about nodes that may not understand a fence.
func lackingNext(nodes []ident.Node) string {
	var names []string
	for _, n := range nodes {
		names = append(names, string(n))
	}
	return fmt.Sprintf("nothing was begun: upgrade blockstepd on %s; where it is up to date, restart it, and it says so; then fence again", strings.Join(names, ", "))
}

// Fence implements control.Backend.
func (b backend) Fence(ctx context.Context, name string) (control.FenceResult, error) {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	sv, err := b.find(ctx, name)
	if err != nil {
		return control.FenceResult{}, err
	}
	if err := b.awaitLeader(ctx); err != nil {
		return control.FenceResult{}, err
	}
	if lacking := b.d.state().Lacking(state.VersionFence); len(lacking) > 0 {
		return control.FenceResult{}, control.Errorf(control.CodeRefused, lackingNext(lacking), "%v", &raft.LackingError{Nodes: lacking})
	}
	// Who is connected now is ended, and some who come meanwhile.
	ended := b.sessions(ctx, sv)
	res, err := b.d.operate(ctx, operatorCall{Volume: sv.ID, Fence: true})
	if err != nil {
		return control.FenceResult{}, fenceError(name, err)
	}
	now, err := b.d.awaitServing(ctx, sv.ID, res.Epoch)
	if err != nil {
		return control.FenceResult{}, err
	}
	// A node that has not heard of it would open sessions that end at their first request.
	b.d.awaitEverywhere(ctx, sv.ID, func(r volumeReport) bool { return r.View.Generation >= now.Generation })
	out := control.FenceResult{Volume: name, Primary: string(now.Primary), Epoch: uint64(now.Epoch), Generation: now.Generation, Ended: ended}
	if res.Loss != state.LossNone || now.LossEpoch > sv.LossEpoch {
		out.Lost = "its primary was gone, and answered writes may be gone with it: see blockstep events, and check the content"
	}
	return out, nil
}

// fenceError says of a fence that failed how it stands.
func fenceError(name string, err error) error {
	var e *control.Error
	switch {
	case !errors.As(err, &e):
		return err
	case e.Code == control.CodeTimeout:
		return control.Errorf(e.Code, fmt.Sprintf(fenceAgain, name), "whether the fence is in force is not known: %s", e.Message)
	case e.Next == "":
		return control.Errorf(e.Code, fmt.Sprintf(fenceAgain, name), "%s", e.Message)
	}
	return err
}

// awaitServing waits until the primary of an epoch, or of a later one, serves: its marker
// is committed, and with it, before any new write, what it has in its log from before.
func (d *Daemon) awaitServing(ctx context.Context, vol ident.Volume, epoch ident.Epoch) (*state.Volume, error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		sv := d.state().Volumes[vol]
		if sv == nil || sv.Deleted {
			return nil, control.Errorf(control.CodeNotFound, "", "the volume was deleted meanwhile")
		}
		if sv.Epoch >= epoch && d.primaryReport(ctx, sv).serving() {
			return sv, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, control.Errorf(control.CodeTimeout, fmt.Sprintf("blockstep wait %s --for primary; then the fence is in force", sv.Name),
				"the sessions of %s have ended, but %s, its primary, does not serve yet: what it had of them may yet take effect", sv.Name, sv.Primary)
		}
	}
}

// sessions lists who has the volume open, by node; of a node that does not tell in time,
// that it does not.
func (b backend) sessions(ctx context.Context, sv *state.Volume) []control.EndedSessions {
	names := b.d.state().NodeNames()
	out := make([]control.EndedSessions, len(names))
	var wg sync.WaitGroup
	for i, n := range names {
		out[i] = control.EndedSessions{Node: string(n), Clients: []string{}}
		if n != b.d.self && !b.d.linkUp(n) {
			out[i].Error = "it gives no answer"
			continue
		}
		wg.Go(func() {
			a, err := b.d.clientsOf(ctx, n, sv.ID)
			if err != nil {
				out[i].Error = err.Error()
				return
			}
			out[i].Clients = append(out[i].Clients, a.Writers...)
			out[i].Device = a.Device
		})
	}
	wg.Wait()
	return out
}
