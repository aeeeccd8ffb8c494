package replication

import (
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/store"
	"github.com/blockstep/blockstep/replication/wal"
	"github.com/blockstep/blockstep/replication/wire"
)

// The files of a replica in its directory.
const (
	lockFile       = "lock"
	metaFile       = "meta"
	checkpointFile = "checkpoint"
	logDir         = "log"
	storeFile      = "data"
	deviceFile     = "device" // which disk it was made on, where the backing store is one
)

// replica is this node's replica of a volume.
type replica struct {
	v           *Volume
	opt         ReplicaOptions
	clock       Clock
	logger      *slog.Logger
	id          ident.Replica
	incarnation atomic.Uint64

	lock        vfs.Unlocker
	metas       *store.MetaFile
	checkpoints *store.CheckpointFile
	store       *store.Store
	log         *wal.Log

	overlay *overlay
	gate    gateBox
	// blurTo is the last entry that may have been applied before a crash, while
	// nobody knows up to where: until the commit index has reached it, the
	// backing store may be ahead of any content that can be told.
	blurTo     atomic.Uint64
	holdNanos  atomic.Int64
	inSet      atomic.Int64 // size of the in-sync set
	readAt     atomic.Int64 // when a client read here last, to readNoteEvery
	failing    atomic.Bool
	stopping   atomic.Bool // its files may be closed at any moment
	reopening  atomic.Bool // it was stopped because its disk was full, and is to be opened anew
	lastStatus atomic.Pointer[core.Status]
	restsUntil atomic.Int64 // core.Instant: until then a beat of the pulse is nothing
	wakesAt    atomic.Int64 // core.Instant: then one is, whenever ticks come; 0: whenever they come

	in           *inbox
	syncer       *syncer
	applier      *applier
	applyMu      sync.Mutex // held while a round of the applier runs
	checkpointer *checkpointer
	checkpointMu sync.Mutex    // held while a checkpoint is written
	resets       atomic.Uint64 // how often the log has begun anew
	readers      readPool
	disk         diskWatch
	room         int64 // bytes of the file system of the log, free or not; 0: not known

	ctx      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup // all but the loop
	loopDone chan struct{}

	// What follows belongs to who has the turn.
	nextTick   core.Instant
	nextStatus core.Instant
	core       *core.Core
	effects    core.Effects
	published  core.Gate
	syncTo     ident.Seq // to be fsynced at once, from the end of the batch on
	meta       store.Meta
	appliedFed ident.Seq // the last that the core has been told
	failedWith error
	muted      bool // stopping: answers are given, nothing else is done
	probe      commitProbe
	done       completions
	// afterEffects are called when the next effects have been performed.
	afterEffects []func()
	barriers     map[uint64]*Request
	forgotten    map[uint64]struct{} // sessions dropped in this batch
	seals        map[uint64]func(ident.SealAnswer)
	drains       map[uint64]func()
	barrierID    uint64
	sealID       uint64
	drainID      uint64
}

// Defaults of ReplicaOptions that a Pulse shares.
const (
	heartbeatDefault = 250 * time.Millisecond
	stallDefault     = 3 * time.Second
)

func (o *ReplicaOptions) setDefaults() {
	def(&o.Store, filepath.Join(o.Dir, storeFile))
	def(&o.Heartbeat, heartbeatDefault)
	def(&o.LeaseFor, time.Second)
	def(&o.StallTimeout, stallDefault)
	def(&o.DriftPPM, 1000)
	def(&o.RetryAfter, time.Second)
	def(&o.LogRetention, logRetentionDefault)
	def(&o.LagMax, 2*o.LogRetention)
	def(&o.ResyncMin, 4<<20)
	def(&o.ResyncChunk, 1<<20)
}

// CreateReplica makes the files of a new, empty replica of size bytes, durably,
// and returns its id, to be registered in the cluster state. It returns an
// error that wraps fs.ErrExist when there is a replica already; what a crash
// has left of an earlier CreateReplica is made anew. A device, or a file that was
// there, is made to read as zeroes first, which may take as long as writing them.
func CreateReplica(ctx context.Context, o Options, size uint64) (ident.Replica, error) {
	ro := *o.Replica
	ro.setDefaults()
	fs := ro.FS
	if err := vfs.MakeDir(fs, ro.Dir); err != nil {
		return 0, fmt.Errorf("make %s: %w", ro.Dir, err)
	}
	lock, err := fs.Lock(filepath.Join(ro.Dir, lockFile))
	if err != nil {
		return 0, fmt.Errorf("lock %s: %w", ro.Dir, err)
	}
	defer func() { _ = lock.Close() }()
	if mf, err := store.OpenMeta(fs, filepath.Join(ro.Dir, metaFile)); err == nil {
		_ = mf.Close()
		return 0, fmt.Errorf("%s holds a replica: %w", ro.Dir, iofs.ErrExist)
	}
	id := ident.Replica(randomID())
	if err := createFiles(ctx, &o, &ro, id, size); err != nil {
		return 0, fmt.Errorf("make a replica of volume %s in %s: %w", o.Name, ro.Dir, err)
	}
	return id, nil
}

// createFiles makes the files, the meta last: with it the replica exists.
func createFiles(ctx context.Context, o *Options, ro *ReplicaOptions, id ident.Replica, size uint64) error {
	fs := ro.FS
	logs := filepath.Join(ro.Dir, logDir)
	if names, err := fs.List(logs); err == nil {
		for _, n := range names {
			if err := fs.Remove(filepath.Join(logs, n)); err != nil {
				return err
			}
		}
	}
	log, err := wal.Create(fs, logs, ident.Position{}, wal.Options{Volume: o.Volume, Replica: id, SegmentBytes: ro.LogSegment, Inline: true})
	if err != nil {
		return err
	}
	if err := log.Close(); err != nil {
		return err
	}
	st, err := store.OpenStore(fs, ro.Store, size, true)
	if err != nil {
		return err
	}
	if err := errors.Join(st.Clear(ctx), st.Close()); err != nil {
		return err
	}
	if ro.device() {
		if err := store.NoteIdentity(fs, filepath.Join(ro.Dir, deviceFile), ro.Store); err != nil {
			return err
		}
	}
	cf, err := store.CreateCheckpoint(fs, filepath.Join(ro.Dir, checkpointFile), store.Checkpoint{})
	if err != nil {
		return err
	}
	if err := cf.Close(); err != nil {
		return err
	}
	mf, err := store.CreateMeta(fs, filepath.Join(ro.Dir, metaFile), store.Meta{
		Cluster: ro.Cluster, Node: o.Node, Name: o.Name, Volume: o.Volume, Replica: id, Size: size, Path: ro.Store,
		LeaseMaxNanos: int64(ro.LeaseFor), BootID: ro.BootID, Clean: true,
	})
	if err != nil {
		return err
	}
	return mf.Close()
}

// start starts the goroutines.
func (rp *replica) start() {
	rp.ctx, rp.cancel = context.WithCancel(context.Background())
	rp.disk.looked = rp.clock.Boot()
	rp.wg.Add(3)
	if rp.v.opts.Pulse == nil {
		rp.wg.Add(1)
		go rp.runStallWatch(rp.ctx)
	}
	go rp.runSyncer(rp.ctx)
	go rp.runApplier(rp.ctx)
	go rp.runCheckpointer(rp.ctx)
	go func() {
		defer close(rp.loopDone)
		rp.runLoop(rp.ctx)
	}()
	if p := rp.v.opts.Pulse; p != nil {
		p.join(rp)
	}
}

// stop ends the goroutines and closes the files; when clean, everything is
// made durable first and the replica is marked so.
func (rp *replica) stop(clean bool) error {
	if rp.stopping.Swap(true) {
		return nil // it ended when it had no room
	}
	if p := rp.v.opts.Pulse; p != nil {
		p.leave(rp)
	}
	_ = rp.call(context.Background(), func(now core.Instant) {
		// As far as its requests are concerned, a core that has failed is one
		// that has stopped: it answers them all.
		rp.muted = true
		rp.core.Failed(now, "stopped")
	})
	rp.in.close()
	rp.cancel()
	rp.closeReaders()
	<-rp.loopDone
	rp.wg.Wait()
	rp.dropInputs()
	var err error
	if clean && rp.failedWith == nil {
		err = rp.finishClean()
	}
	return errors.Join(err, rp.close())
}

// dropInputs ends what was left in the inbox or waits for a barrier.
func (rp *replica) dropInputs() {
	for _, in := range rp.in.rest() {
		in.env.Free()
		if in.req != nil {
			rp.v.finishOp(in.req, wire.StatusRetry, ident.Position{}, nil)
		}
	}
	for id, r := range rp.barriers {
		delete(rp.barriers, id)
		rp.v.finishOp(r, wire.StatusRetry, ident.Position{}, nil)
	}
	rp.v.opts.Links.Flush()
}

// finishClean makes everything durable and leaves the mark of a clean stop,
// after the fsync that makes it true.
func (rp *replica) finishClean() error {
	if _, err := rp.log.Sync(); err != nil {
		return fmt.Errorf("fsync the log: %w", err)
	}
	w := &applyWork{rp: rp}
	for to, applied := rp.applier.target(); applied < to; to, applied = rp.applier.target() {
		seq, _, err := w.round(to, false)
		if err != nil {
			return fmt.Errorf("apply the log: %w", err)
		}
		rp.applier.advance(seq)
	}
	_, rp.appliedFed = rp.applier.target()
	rp.core.Applied(rp.clock.Boot(), rp.appliedFed)
	snap, err := rp.core.Snapshot()
	if err != nil {
		return err
	}
	if err := rp.writeCheckpoint(toCheckpoint(&snap)); err != nil {
		return err
	}
	rp.meta.Clean = true
	return rp.writeMeta()
}

func (rp *replica) writeMeta() error {
	if err := rp.metas.Write(rp.meta); err != nil {
		return fmt.Errorf("write the replica's meta: %w", err)
	}
	return nil
}

// close closes the files.
func (rp *replica) close() error {
	var errs []error
	// Not a plain list: an interface that holds a nil pointer is not nil.
	add := func(open bool, c io.Closer) {
		if open {
			errs = append(errs, c.Close())
		}
	}
	add(rp.log != nil, rp.log)
	add(rp.store != nil, rp.store)
	add(rp.checkpoints != nil, rp.checkpoints)
	add(rp.metas != nil, rp.metas)
	add(rp.lock != nil, rp.lock)
	return errors.Join(errs...)
}

func (rp *replica) storageStatus() StorageStatus {
	n, bytes := rp.overlay.stats()
	s := StorageStatus{
		ReplicaID: rp.id, Incarnation: ident.Incarnation(rp.incarnation.Load()), LogBytes: rp.log.Bytes(), OverlayEntries: n, OverlayBytes: bytes,
	}
	return s
}
