package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// readmitTime is for how long a replica that failed is open again and waits to be
// made primary: some rounds of an operator's failover. Then it has failed as before.
const readmitTime = 45 * time.Second

// readmission is an operator's word that a replica which failed is opened again:
// for one epoch of its volume, and for readmitTime.
type readmission struct {
	epoch ident.Epoch
	until time.Time
	begun bool          // the keeper of the volume has seen it
	done  chan struct{} // closed after err is set
	err   error
}

// Readmit implements raft.Replicas.
func (r replicasOf) Readmit(ctx context.Context, n ident.Node, vol ident.Volume, epoch ident.Epoch) error {
	if n == r.d.self {
		_, err := r.d.serveReadmit(ctx, n, epochCall{vol, epoch})
		return err
	}
	return r.d.rpc.call(ctx, n, "/node/v1/readmit", epochCall{vol, epoch}, nil)
}

// serveReadmit has the keeper of the volume open its replica again, and waits for it.
func (d *Daemon) serveReadmit(ctx context.Context, _ ident.Node, c epochCall) (struct{}, error) {
	r := &readmission{epoch: c.Epoch, until: time.Now().Add(readmitTime), done: make(chan struct{})}
	if !d.beginReadmit(c.Volume, r) {
		return struct{}{}, control.Errorf(control.CodeFailed, "", "%s stops", d.self)
	}
	select {
	case <-r.done:
		return struct{}{}, r.err
	case <-ctx.Done():
		d.endReadmit(c.Volume, r)
		return struct{}{}, control.Errorf(control.CodeTimeout, "", "the replica on %s does not open in time", d.self)
	}
}

func (d *Daemon) beginReadmit(id ident.Volume, r *readmission) bool {
	d.rmu.Lock()
	defer d.rmu.Unlock()
	if d.ctx.Err() != nil {
		return false
	}
	d.readmits[id] = r
	d.wg.Go(func() { d.runReadmit(id, r) })
	d.wake()
	return true
}

// runReadmit ends a readmission when its time is over.
func (d *Daemon) runReadmit(id ident.Volume, r *readmission) {
	if pause(d.ctx, readmitTime) {
		d.endReadmit(id, r)
	}
}

// wake has every volume looked at.
func (d *Daemon) wake() {
	select {
	case d.retune <- struct{}{}:
	default: // it is about to happen
	}
}

func (d *Daemon) endReadmit(id ident.Volume, r *readmission) {
	d.rmu.Lock()
	if d.readmits[id] == r {
		delete(d.readmits, id)
	}
	d.rmu.Unlock()
	d.wake()
}

// readmitting reports whether the replica here is open again at an operator's
// word: to the data layer it has not failed.
func (d *Daemon) readmitting(sv *state.Volume) bool {
	d.rmu.Lock()
	defer d.rmu.Unlock()
	r := d.readmits[sv.ID]
	return r != nil && r.epoch == sv.Epoch && time.Now().Before(r.until)
}

// readmitMark is the file by which a replica that was taken back knows, after a
// restart, the epoch in which it was: its id is that of the one that failed, and
// while raft replays its log, the cluster state here is for a moment that of
// before, in which it has failed.
const readmitMark = "readmitted"

func (d *Daemon) markReadmitted(id ident.Volume, epoch ident.Epoch) error {
	dir := d.replicaDir(id)
	if err := os.WriteFile(filepath.Join(dir, readmitMark), []byte(strconv.FormatUint(uint64(epoch), 10)), 0o600); err != nil {
		return fmt.Errorf("marking the replica: %w", err)
	}
	return d.fs.SyncDir(dir)
}

// outlived reports whether the failure that a cluster state tells of may be one
// from before the replica here was taken back. Once this node has the whole state,
// what that says counts: not what sv says, which was read before, when the whole
// state had perhaps not come yet.
func (d *Daemon) outlived(sv *state.Volume) bool {
	if d.isCurrent() {
		return takenBack(sv, d.state().Volumes[sv.ID], d.self)
	}
	b, err := os.ReadFile(filepath.Join(d.replicaDir(sv.ID), readmitMark))
	if err != nil {
		return false
	}
	epoch, err := strconv.ParseUint(string(b), 10, 64)
	return err == nil && uint64(sv.Epoch) <= epoch
}

// takenBack reports whether a node's replica is the same in two states of a
// volume, and has not failed in the newer one.
func takenBack(old, now *state.Volume, node ident.Node) bool {
	if now == nil {
		return false
	}
	was, is := old.Replica(node), now.Replica(node)
	return was != nil && is != nil && was.Replica == is.Replica && !is.Failed
}

// keepReadmit opens a replica that failed again, when somebody has asked for it.
// It belongs to the keeper of the volume, as all that opens and closes replicas.
func (d *Daemon) keepReadmit(ctx context.Context, v *volume, sv *state.Volume) {
	d.rmu.Lock()
	r := d.readmits[sv.ID]
	if r == nil || r.begun {
		d.rmu.Unlock()
		return
	}
	r.begun = true
	delete(d.failures, sv.ID) // it may fail in the same way once more
	d.rmu.Unlock()
	r.err = d.readmit(ctx, v, sv)
	if r.err != nil {
		d.endReadmit(sv.ID, r)
	}
	close(r.done)
}

func (d *Daemon) readmit(ctx context.Context, v *volume, sv *state.Volume) error {
	rep := sv.Replica(d.self)
	if rep == nil || !rep.Failed {
		return fmt.Errorf("%s has no replica on %s that failed", sv.Name, d.self)
	}
	dir := d.replicaDir(sv.ID)
	if id, err := d.localReplica(dir); err != nil || id != rep.Replica {
		return fmt.Errorf("the replica that failed is not in %s any more: nothing is left to take back", dir)
	}
	if err := os.RemoveAll(filepath.Join(dir, invalidMark)); err != nil {
		return err
	}
	ro, err := d.replicaOptions(ctx, sv, rep)
	if err != nil {
		return err
	}
	if err := d.markReadmitted(sv.ID, sv.Epoch); err != nil {
		return err
	}
	d.showView(v, sv) // in which it has not failed
	v.replica.Store(false)
	if err := v.driver.Readmit(*ro); err != nil {
		return err
	}
	v.replica.Store(true)
	return nil
}
