package daemon

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/store"
)

const (
	// openRetry is how long opening a volume rests after an error.
	openRetry = time.Second
	// registerTime bounds one attempt to register a new replica.
	registerTime = 10 * time.Second
	// volumesDir is where replicas lie, below data_dir; one directory a volume,
	// named by its id: a name may be used again, an id never.
	volumesDir = "volumes"
)

// volume is one open volume on this node.
type volume struct {
	id      ident.Volume
	name    string
	replica atomic.Bool // this node has a replica of it, and it is open
	driver  *replication.Volume
	view    core.View // the newest that the driver has
}

func (v *volume) tellPeer(n ident.Node, up bool) {
	if up {
		v.driver.PeerUp(n)
	} else {
		v.driver.PeerDown(n)
	}
}

// volume finds an open volume; nil when it is not open.
func (d *Daemon) volume(id ident.Volume) *volume {
	d.vmu.RLock()
	defer d.vmu.RUnlock()
	return d.vols[id]
}

// volumeName is for logs and events.
func (d *Daemon) volumeName(id ident.Volume) string {
	if v := d.state().Volumes[id]; v != nil {
		return v.Name
	}
	return fmt.Sprintf("%016x", uint64(id))
}

// runVolumes keeps the open volumes in line with the cluster state: one
// goroutine a volume follows it, so that a slow disk of one holds up no other.
func (d *Daemon) runVolumes(ctx context.Context) {
	changed, stop := d.raft.Watch()
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	keepers := map[ident.Volume]chan struct{}{}
	current := d.current
	for {
		d.setPeers()
		for id := range d.state().Volumes {
			wake := keepers[id]
			if wake == nil {
				wake = make(chan struct{}, 1)
				keepers[id] = wake
				wg.Go(func() { d.runVolume(ctx, id, wake) })
			}
			select {
			case wake <- struct{}{}:
			default: // it has a wake-up waiting that covers this one
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-d.retune:
		case <-current:
			current = nil
		}
	}
}

// runVolume follows one volume until ctx ends.
func (d *Daemon) runVolume(ctx context.Context, id ident.Volume, wake <-chan struct{}) {
	said := ""
	for {
		err := d.keepVolume(ctx, id)
		var retry <-chan time.Time
		if err != nil && ctx.Err() == nil {
			timer := time.NewTimer(openRetry)
			retry = timer.C
			if said != err.Error() && !errors.Is(err, errNotCurrent) {
				said = err.Error()
				if errors.Is(err, errStillInSet) {
					d.log.Info("the replica here waits to be made anew", "volume", d.volumeName(id), "reason", err)
				} else {
					d.log.Error("volume cannot be opened as it should", "volume", d.volumeName(id), "err", err)
				}
			}
		}
		d.setProblem(id, err)
		select {
		case <-ctx.Done():
			return
		case <-wake:
		case <-retry:
		}
	}
}

// keepVolume brings one volume in line with the cluster state.
func (d *Daemon) keepVolume(ctx context.Context, id ident.Volume) error {
	sv := d.state().Volumes[id]
	v := d.volume(id)
	if sv == nil || sv.Deleted {
		if v != nil {
			d.closeVolume(v)
			d.local.add(control.Event{Node: string(d.self), Volume: v.name, Kind: "closed", Text: string(d.self) + ": volume was deleted, its replica here is removed"})
		}
		return d.removeReplicaDir(id)
	}
	if v == nil {
		v, problem := d.openVolume(ctx, sv)
		if v != nil {
			d.showView(v, sv)
			d.keepReadmit(ctx, v, sv)
		}
		return problem
	}
	d.keepReadmit(ctx, v, sv)
	problem := d.keepReplica(ctx, v, sv)
	if now := d.state().Volumes[id]; now != nil {
		sv = now
	}
	d.showView(v, sv)
	return problem
}

// keepReplica brings this node's replica of an open volume in line with the
// cluster state. Clients of the volume notice none of it.
func (d *Daemon) keepReplica(ctx context.Context, v *volume, sv *state.Volume) error {
	rep := sv.Replica(d.self)
	// It was removed and is wanted again, and was open before that was seen here. One
	// that has failed comes back only as another one.
	again := v.replica.Load() && rep != nil && rep.Replica == 0 && d.isCurrent()
	anew := again && !sv.InSet(d.self) && v.driver.Status().Core.Role == core.RoleFailed
	if v.replica.Load() && (rep == nil || anew || d.shallRemake(sv.ID, rep)) {
		v.replica.Store(false)
		if err := v.driver.StopReplica(); err != nil {
			d.log.Warn("the replica that goes did not stop cleanly", "volume", v.name, "err", err)
		}
	}
	if anew {
		if err := d.removeReplicaDir(sv.ID); err != nil {
			return err
		}
	}
	switch {
	case rep == nil && !d.isCurrent():
		return nil
	case rep == nil:
		return d.removeReplicaDir(sv.ID)
	case again && !anew:
		local, err := d.localReplica(d.replicaDir(sv.ID))
		if err != nil {
			return err
		}
		return d.register(ctx, sv, local, 0)
	case v.replica.Load():
		return nil
	}
	ro, err := d.replicaOptions(ctx, sv, rep)
	if err != nil {
		return err
	}
	if now := d.state().Volumes[sv.ID]; now != nil {
		d.showView(v, now) // with the id of the new replica, before it is there
	}
	if err := v.driver.SetReplica(*ro); err != nil {
		return d.replicaLost(sv, rep, err)
	}
	v.replica.Store(true)
	return nil
}

// replicaLost words the error of a replica that does not open.
func (d *Daemon) replicaLost(sv *state.Volume, rep *state.Replica, err error) error {
	if dev := waitsFor(rep.Device, err); dev != nil {
		return dev
	}
	return fmt.Errorf("%w; if its disk is lost: blockstep invalidate %s --node %s", err, sv.Name, d.self)
}

// openVolume opens a volume. When its replica here cannot be, the volume is
// opened for clients alone, and the error says what is wrong with the replica.
func (d *Daemon) openVolume(ctx context.Context, sv *state.Volume) (*volume, error) {
	view := d.viewOf(sv)
	opts := replication.Options{
		Volume: sv.ID, Name: sv.Name, Node: d.self,
		Links: d.links, Cluster: clusterOf{d}, Logger: d.log, Alive: d.alive, Pulse: d.pulse, View: &view,
		Limits: replication.Limits{Memory: d.cfg.Memory.Volume},
	}
	var problem error
	rep := sv.Replica(d.self)
	if rep != nil {
		opts.Replica, problem = d.replicaOptions(ctx, sv, rep)
	}
	driver, err := replication.Open(ctx, opts)
	if err != nil && opts.Replica != nil {
		problem = d.replicaLost(sv, rep, err)
		opts.Replica = nil
		driver, err = replication.Open(ctx, opts)
	}
	if err != nil {
		return nil, err
	}
	v := &volume{id: sv.ID, name: sv.Name, driver: driver, view: view}
	v.replica.Store(opts.Replica != nil)
	d.vmu.Lock()
	if err := d.ctx.Err(); err != nil {
		// Who stops the volumes has been there, perhaps.
		d.vmu.Unlock()
		return nil, errors.Join(err, driver.Stop())
	}
	d.vols[v.id] = v
	for n, up := range d.up {
		if up {
			v.tellPeer(n, true)
		}
	}
	d.vmu.Unlock()
	d.setMemory()
	d.log.Info("volume is open", "volume", sv.Name, "replica", v.replica.Load())
	return v, problem
}

func (d *Daemon) closeVolume(v *volume) {
	d.vmu.Lock()
	delete(d.vols, v.id)
	d.vmu.Unlock()
	defer d.setMemory() // when it holds nothing more
	if err := v.driver.Stop(); err != nil {
		d.log.Error("volume did not stop cleanly", "volume", v.name, "err", err)
	}
}

// stopVolumes stops every volume at once: each makes a checkpoint.
func (d *Daemon) stopVolumes() {
	d.vmu.RLock()
	vols := make([]*volume, 0, len(d.vols))
	for _, v := range d.vols {
		vols = append(vols, v)
	}
	d.vmu.RUnlock()
	var wg sync.WaitGroup
	for _, v := range vols {
		wg.Go(func() { d.closeVolume(v) })
	}
	wg.Wait()
}

// showView hands the driver what the cluster state says, if it is news.
func (d *Daemon) showView(v *volume, sv *state.Volume) {
	view := d.viewOf(sv)
	if sameView(v.view, view) {
		return
	}
	v.view = view
	v.driver.SetView(view)
	select {
	case d.resized <- struct{}{}:
	default: // it is to be looked at already
	}
}

func sameView(a, b core.View) bool {
	as, bs, am, bm := a.Set, b.Set, a.Members, b.Members
	a.Set, b.Set, a.Members, b.Members = nil, nil, nil, nil
	return fmt.Sprint(a) == fmt.Sprint(b) && slices.Equal(as, bs) && slices.Equal(am, bm)
}

// setResync puts new bounds on the copying of blocks in force, for resyncs under
// way too: from a configuration that was read anew. It returns at once.
func (d *Daemon) setResync(r config.Resync) {
	d.resync.Store(&r)
	d.wake()
}

// ratesOf are the bounds of a volume's resyncs: its own where it has some, else
// those of this node's configuration.
func (d *Daemon) ratesOf(sv *state.Volume) core.Rates {
	r := core.Rates{Set: true}
	if c := d.resync.Load(); c != nil {
		r.Max, r.Min = c.RateMax, c.RateMin
	}
	if o := sv.Options; o.ResyncRateMax > 0 || o.ResyncRateMin > 0 {
		r.Max, r.Min = o.ResyncRateMax, o.ResyncRateMin
	}
	return r
}

// viewOf is the cluster state of a volume as the data layer sees it.
func (d *Daemon) viewOf(sv *state.Volume) core.View {
	view := core.View{
		Epoch: sv.Epoch, Primary: sv.Primary, Incarnation: sv.PrimaryIncarnation, Position: sv.PrimaryPosition,
		Set: slices.Clone(sv.InSync), SetVersion: sv.SetVersion, MinCopies: sv.Options.MinCopies,
		Generation: sv.Generation, LossEpoch: sv.LossEpoch, Size: sv.Size, Deleted: sv.Deleted,
		Rates: d.ratesOf(sv),
	}
	switch sv.Options.Ack {
	case state.AckQuorum:
		view.Ack = core.AckQuorum
	case state.AckDurable:
		view.Ack = core.AckDurable
	case state.AckLocal:
		view.Ack = core.AckLocal
	}
	if sv.Options.OnNoQuorum == state.NoQuorumError {
		view.HoldNanos = max(sv.Options.ErrorAfterMillis, 1) * int64(time.Millisecond)
	}
	for _, r := range sv.Replicas {
		failed := r.Failed && !(r.Node == d.self && (d.readmitting(sv) || d.outlived(sv)))
		view.Members = append(view.Members, core.Member{Node: r.Node, Replica: r.Replica, Failed: failed, Leaving: r.Leaving})
	}
	return view
}

// replicaDir is where this node's replica of a volume lies.
func (d *Daemon) replicaDir(id ident.Volume) string {
	return filepath.Join(d.cfg.DataDir, volumesDir, fmt.Sprintf("%016x", uint64(id)))
}

func (d *Daemon) removeReplicaDir(id ident.Volume) error {
	dir := d.replicaDir(id)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("removing the replica in %s: %w", dir, err)
	}
	return d.fs.SyncDir(filepath.Dir(dir))
}

// shallRemake reports whether an operator has given the replica here up, and it may
// be made anew.
func (d *Daemon) shallRemake(id ident.Volume, rep *state.Replica) bool {
	sv := d.state().Volumes[id]
	return rep != nil && rep.Failed && sv != nil && !sv.InSet(d.self) && !d.readmitting(sv) && d.invalidated(id, rep)
}

const (
	// invalidReason is why a replica failed that an operator invalidated.
	invalidReason = "invalidated by an operator"
	// invalidMark is the file by which an operator's invalidate of one that had
	// failed before, or is not the one that the cluster knows, outlives a restart.
	invalidMark = "invalidated"
)

func (d *Daemon) invalidated(id ident.Volume, rep *state.Replica) bool {
	dir := d.replicaDir(id)
	if _, err := os.Stat(filepath.Join(dir, invalidMark)); err == nil {
		return true
	}
	if rep.Reason != invalidReason {
		return false
	}
	// Not the one that was made in its stead, and may not be registered yet.
	local, err := d.localReplica(dir)
	return err == nil && local == rep.Replica
}

// errStillInSet is returned (wrapped) where a replica that has failed is to be made
// anew, and cannot be yet: for a moment after node replace, or for as long as there is
// no primary.
var errStillInSet = errors.New("a new one is made by itself once the in-sync set is without the old one")

// failedHere reports whether the replica in dir has failed: if the cluster state does
// not say so, it was removed since, and is wanted again as another one.
func (d *Daemon) failedHere(dir string) bool {
	m, err := d.localMeta(dir)
	return err == nil && m.Failed != ""
}

// replicaOptions finds this node's replica, making and registering it when the
// cluster state expects a new one. It never makes one in the place of another
// that the cluster counts on: an empty disk must not answer for a full one.
func (d *Daemon) replicaOptions(ctx context.Context, sv *state.Volume, rep *state.Replica) (*replication.ReplicaOptions, error) {
	dir := d.replicaDir(sv.ID)
	ro := &replication.ReplicaOptions{
		FS: d.fs, Cluster: d.cfg.Cluster, Dir: dir, Store: rep.Device, BootID: d.bootID,
		Heartbeat: d.cfg.Volume.Heartbeat, LeaseFor: d.cfg.Volume.Lease, StallTimeout: d.cfg.Volume.StallTimeout,
		LogRetention: d.cfg.Volume.LogRetention,
	}
	if sv.Options.LogRetention > 0 {
		ro.LogRetention = sv.Options.LogRetention
	}
	local, err := d.localReplica(dir)
	replace := rep.Failed && !sv.InSet(d.self)
	switch {
	case err == nil && rep.Replica == local && !d.shallRemake(sv.ID, rep):
		if errors.Is(deviceHere(rep.Device, 0), errFileHere) {
			return nil, &deviceError{rep.Device, errFileHere}
		}
		return ro, nil
	case !d.isCurrent():
		return nil, errNotCurrent
	case d.shallRemake(sv.ID, rep), err == nil && rep.Replica == 0 && !sv.InSet(d.self) && d.failedHere(dir):
		if err := d.removeReplicaDir(sv.ID); err != nil {
			return nil, err
		}
		if local, err = d.makeReplica(ctx, sv, ro); err != nil {
			return nil, err
		}
	case err == nil && rep.Replica != 0 && !replace:
		return nil, fmt.Errorf("the replica in %s is %016x and the cluster knows %016x: another disk is mounted, or an old one; mount the right data_dir, or: blockstep invalidate %s --node %s", dir, uint64(local), uint64(rep.Replica), sv.Name, d.self)
	case err == nil:
		// Made, and not registered before the last stop.
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("reading the replica in %s: %w", dir, err)
	case rep.Replica != 0 && rep.Failed && !replace:
		return nil, fmt.Errorf("the replica that was in %s is gone (%s): %w", dir, rep.Reason, errStillInSet)
	case rep.Replica != 0 && !replace:
		return nil, fmt.Errorf("the replica that was in %s is gone (the disk was wiped or replaced); it does not count until it is copied anew: blockstep invalidate %s --node %s", dir, sv.Name, d.self)
	default:
		if local, err = d.makeReplica(ctx, sv, ro); err != nil {
			return nil, err
		}
	}
	was := ident.Replica(0)
	if replace {
		was = rep.Replica
	}
	if err := d.register(ctx, sv, local, was); err != nil {
		return nil, err
	}
	return ro, nil
}

// makeReplica makes an empty replica, whole or not at all. It makes no file in
// the place of a device that is not there.
func (d *Daemon) makeReplica(ctx context.Context, sv *state.Volume, ro *replication.ReplicaOptions) (ident.Replica, error) {
	if ro.Store != "" {
		if err := d.checkDevice(ro.Store, sv.Size); err != nil {
			return 0, &deviceError{ro.Store, err}
		}
	}
	ctx, done := d.whileWanted(ctx, sv.ID)
	defer done()
	id, err := replication.CreateReplica(ctx, replication.Options{Volume: sv.ID, Name: sv.Name, Node: d.self, Replica: ro}, sv.Size)
	if dev := waitsFor(ro.Store, err); dev != nil {
		return 0, dev
	}
	if err != nil {
		return 0, err
	}
	d.log.Info("replica made", "volume", sv.Name, "dir", ro.Dir, "replica", fmt.Sprintf("%016x", uint64(id)))
	return id, nil
}

// whileWanted gives a context that ends when the cluster state wants no replica of
// a volume here any more: to make one may take hours, and a device that nobody
// needs is free before that. Whoever asks calls done.
func (d *Daemon) whileWanted(ctx context.Context, id ident.Volume) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		d.until(ctx, func(s *state.State) bool {
			v := s.Volumes[id]
			return v == nil || v.Deleted || v.Replica(d.self) == nil
		})
		cancel()
	})
	return ctx, func() { cancel(); wg.Wait() }
}

// localReplica reads the id of the replica in dir; fs.ErrNotExist when there is
// none.
func (d *Daemon) localReplica(dir string) (ident.Replica, error) {
	m, err := d.localMeta(dir)
	return m.Replica, err
}

func (d *Daemon) localMeta(dir string) (m store.Meta, err error) {
	path := filepath.Join(dir, "meta")
	if _, err := os.Stat(path); err != nil {
		return m, err
	}
	mf, err := store.OpenMeta(d.fs, path)
	if err != nil {
		return m, err
	}
	defer func() { _ = mf.Close() }() // it was only read
	return mf.Load(), nil
}

// registration is the command that gives a replica its id. was is the one in whose place
// it comes, and which it names if each node understands that; 0 when there is none.
func registration(st *state.State, vol ident.Volume, node ident.Node, id, was ident.Replica) *state.RegisterReplica {
	c := &state.RegisterReplica{Volume: vol, Node: node, Replica: id, Replace: was != 0}
	if st.Understood(state.VersionCompares) {
		c.Was = was
	}
	return c
}

// register tells the cluster state a replica's id.
func (d *Daemon) register(ctx context.Context, sv *state.Volume, id, was ident.Replica) error {
	ctx, cancel := context.WithTimeout(ctx, registerTime)
	defer cancel()
	res, err := d.apply(ctx, state.Command{
		// Not the replica's id: one that was removed, and is wanted here again before
		// its files went, is registered once more.
		ID:              raft.NewCommandID(),
		RegisterReplica: registration(d.state(), sv.ID, d.self, id, was),
	})
	if err == nil {
		err = res.Err()
	}
	if err != nil {
		return fmt.Errorf("registering the replica of %s: %w", sv.Name, err)
	}
	// The replica must not be told that another one is registered in its place.
	err = d.awaitVolume(ctx, sv.ID, func(v *state.Volume) bool {
		r := v.Replica(d.self)
		return r == nil || r.Replica == id
	})
	if err != nil {
		return fmt.Errorf("registering the replica of %s: it is not seen here: %w", sv.Name, err)
	}
	return nil
}

func randomUint64() uint64 {
	var b [8]byte
	for {
		_, _ = rand.Read(b[:]) // it never fails: it ends the process rather
		if n := binary.LittleEndian.Uint64(b[:]); n != 0 {
			return n
		}
	}
}

// newVolumeID makes a volume's id.
func newVolumeID() ident.Volume { return ident.Volume(randomUint64()) }

// setProblem remembers why a volume's replica is not open, for the status.
func (d *Daemon) setProblem(id ident.Volume, err error) {
	d.rmu.Lock()
	defer d.rmu.Unlock()
	if err == nil {
		delete(d.problems, id)
		return
	}
	d.problems[id] = err
}

func (d *Daemon) problemOf(id ident.Volume) error {
	d.rmu.Lock()
	defer d.rmu.Unlock()
	return d.problems[id]
}

// officeWait is how long a command that needs a primary waits for one: some
// failovers.
const officeWait = 5 * time.Second

// awaitOffice waits a while until a volume has a primary in office, serving or
// not, and reports whether it has.
func (d *Daemon) awaitOffice(ctx context.Context, id ident.Volume) bool {
	ctx, cancel := context.WithTimeout(ctx, officeWait)
	defer cancel()
	for {
		sv := d.state().Volumes[id]
		if sv == nil || sv.Deleted {
			return false
		}
		if r := d.primaryReport(ctx, sv); r.Reached && r.Replica && r.Core.Role == core.RolePrimary {
			return true
		}
		if !pause(ctx, applyPause) {
			return false
		}
	}
}

// invalidateHere gives this node's replica up: it leaves the in-sync set, and
// is made anew when it is out.
func (d *Daemon) invalidateHere(ctx context.Context, sv *state.Volume) error {
	rep := sv.Replica(d.self)
	if rep == nil {
		return control.Errorf(control.CodeNotFound, "see blockstep status "+sv.Name, "%s has no replica on %s", sv.Name, d.self)
	}
	if sv.Primary == d.self {
		return control.Errorf(control.CodeRefused, fmt.Sprintf("run blockstep switchover %s --to another node first", sv.Name), "%s is the primary of %s", d.self, sv.Name)
	}
	if !d.awaitOffice(ctx, sv.ID) {
		return control.Errorf(control.CodeRefused, "start the nodes that have the others, or see blockstep failover "+sv.Name+" --help",
			"%s has no primary to copy from: the replica on %s may be the best that is left", sv.Name, d.self)
	}
	dir := d.replicaDir(sv.ID)
	local, err := d.localReplica(dir)
	if known := err == nil && local == rep.Replica && !rep.Failed; !known {
		if err := d.markInvalid(dir); err != nil {
			return fmt.Errorf("marking the replica: %w", err)
		}
	}
	if rep.Replica == 0 || rep.Failed {
		// Nothing else changes in the cluster state, and it is a change that
		// has the replica looked at.
		_, err := d.applyWhole(ctx, state.Command{AddEvent: &state.AddEvent{Event: state.Event{
			Name: "invalidated", Volume: sv.Name, Node: d.self,
			Text: fmt.Sprintf("volume %s: the replica on %s is copied anew, as an operator asked", sv.Name, d.self),
		}}})
		return err
	}
	_, err = d.applyWhole(ctx, state.Command{
		ID:         raft.NewCommandID(),
		MarkFailed: &state.MarkFailed{Volume: sv.ID, Node: d.self, Replica: rep.Replica, Reason: invalidReason},
	})
	if err != nil {
		return err
	}
	// It may have failed by itself just before, and this node have heard of neither.
	var now *state.Volume
	if !d.until(ctx, func(s *state.State) bool {
		if now = s.Volumes[sv.ID]; now == nil {
			return true
		}
		is := now.Replica(d.self)
		return is == nil || is.Replica != rep.Replica || is.Failed
	}) {
		return ctx.Err()
	}
	if now == nil {
		return nil
	}
	if is := now.Replica(d.self); is != nil && is.Replica == rep.Replica && is.Reason != invalidReason {
		return d.invalidateHere(ctx, now)
	}
	return nil
}

// markInvalid writes the invalidMark, if there is anything to mark.
func (d *Daemon) markInvalid(dir string) error {
	if _, err := os.Stat(dir); err != nil {
		return nil //nolint:nilerr // it is made anew anyway
	}
	if err := os.WriteFile(filepath.Join(dir, invalidMark), []byte("by an operator\n"), 0o600); err != nil {
		return err
	}
	return d.fs.SyncDir(dir)
}
