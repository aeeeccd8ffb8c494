package daemon

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication"
)

// growTime is how long a node is given to make room: a device may have to write
// zeroes. What it has not done by then it does when it hears of the new size.
const growTime = 20 * time.Second

// growCall asks a node to make room for a larger volume.
type growCall struct {
	Volume ident.Volume `json:"volume"`
	Size   uint64       `json:"size"`
}

// growReplicas makes room at every replica before the volume is said to be
// larger: once that is in the cluster state there is no way back, and a replica
// without the room has failed, all of them at once if none has it. A node that
// does not answer is not waited for: its replica grows when it is back.
func (d *Daemon) growReplicas(ctx context.Context, sv *state.Volume, size uint64) error {
	var mu sync.Mutex
	var wg sync.WaitGroup
	var without []string
	for _, r := range sv.Replicas {
		if r.Failed {
			continue
		}
		wg.Go(func() {
			c := growCall{sv.ID, size}
			var err error
			if r.Node == d.self {
				_, err = d.serveGrow(ctx, d.self, c)
			} else {
				ctx, cancel := context.WithTimeout(ctx, growTime)
				defer cancel()
				err = d.rpc.call(ctx, r.Node, "/node/v1/grow", c, nil)
			}
			var e *control.Error
			if errors.As(err, &e) && e.Code == control.CodeRefused {
				mu.Lock()
				defer mu.Unlock()
				without = append(without, e.Message)
			} else if err != nil {
				d.log.Info("a replica is not asked for room: it grows when it is back", "volume", sv.Name, "node", r.Node, "err", err)
			}
		})
	}
	wg.Wait()
	if len(without) == 0 {
		return nil
	}
	slices.Sort(without)
	return control.Errorf(control.CodeRefused, "nothing has changed: give a smaller size, or make the disks larger first",
		"%s cannot grow: %s", sv.Name, strings.Join(without, "; "))
}

func (d *Daemon) serveGrow(ctx context.Context, _ ident.Node, c growCall) (struct{}, error) {
	v := d.volume(c.Volume)
	if v == nil {
		return struct{}{}, control.Errorf(control.CodeFailed, "", "the volume is not open on %s", d.self)
	}
	if err := v.driver.Grow(ctx, c.Size); errors.Is(err, replication.ErrNoRoom) {
		return struct{}{}, control.Errorf(control.CodeRefused, "", "%s has no room: %v", d.self, err)
	} else if err != nil {
		return struct{}{}, control.Errorf(control.CodeFailed, "", "%v", err)
	}
	return struct{}{}, nil
}
