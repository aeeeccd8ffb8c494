package replication

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"math"
	"path/filepath"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/store"
	"github.com/blockstep/blockstep/replication/wal"
	"github.com/blockstep/blockstep/replication/wire"
)

// failedError says that the replica's files cannot be trusted any more: it
// stays failed, under this id, for ever.
type failedError struct {
	id     ident.Replica
	reason string
}

// Error implements error.
func (e *failedError) Error() string { return "replica failed: " + e.reason }

// openReplica recovers a replica from its files (design sections 2 and 5).
func openReplica(v *Volume, ro ReplicaOptions) (_ *replica, err error) {
	ro.setDefaults()
	rp := &replica{
		v: v, opt: ro, clock: v.clock, logger: v.logger,
		in: newInbox(), loopDone: make(chan struct{}),
		checkpointer: &checkpointer{wake: make(chan struct{}, 1)},
		barriers:     make(map[uint64]*Request),
		forgotten:    make(map[uint64]struct{}),
		seals:        make(map[uint64]func(ident.SealAnswer)),
		drains:       make(map[uint64]func()),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, rp.close())
		}
	}()
	if rp.lock, err = ro.FS.Lock(filepath.Join(ro.Dir, lockFile)); err != nil {
		return nil, fmt.Errorf("lock %s: %w", ro.Dir, err)
	}
	if rp.room, err = ro.FS.Total(ro.Dir); err != nil {
		return nil, fmt.Errorf("look at the disk: %w", err)
	}
	if err := rp.openMeta(); err != nil {
		return nil, err
	}
	rp.checkpointer.limit(rp.checkpointMax(rp.meta.Size))
	if err := rp.openStore(); err != nil {
		return nil, err
	}
	fresh, err := rp.noteStart()
	if err != nil {
		return nil, err
	}
	start, err := rp.openFiles()
	if err != nil {
		return nil, rp.judgeOpen(err)
	}
	start.Fresh = fresh
	rp.core = core.New(rp.coreConfig(), start, rp.clock.Boot())
	rp.published = rp.core.Gate()
	rp.gate.store(rp.published)
	return rp, nil
}

// ErrDevice is returned (wrapped, with the cause) when the backing device of a
// replica, which lies elsewhere than its other files, cannot be had: it is not
// there, too small, another one, or somebody else's. Nothing was written, and the replica is
// what it was: to open it again later is all that it takes.
var ErrDevice = errors.New("the backing device cannot be had")

// openMeta reads who the replica is. It changes nothing.
func (rp *replica) openMeta() (err error) {
	if rp.metas, err = store.OpenMeta(rp.opt.FS, filepath.Join(rp.opt.Dir, metaFile)); err != nil {
		return fmt.Errorf("open the replica's meta in %s: %w", rp.opt.Dir, err)
	}
	m := rp.metas.Load()
	if m.Volume != rp.v.opts.Volume || m.Node != rp.v.opts.Node {
		return fmt.Errorf("%s holds a replica of volume %q (%x) of node %s, not of %q (%x) of %s: check data_dir",
			rp.opt.Dir, m.Name, uint64(m.Volume), m.Node, rp.v.opts.Name, uint64(rp.v.opts.Volume), rp.v.opts.Node)
	}
	if m.Failed != "" {
		return &failedError{id: m.Replica, reason: m.Failed}
	}
	rp.meta = m
	rp.id = m.Replica
	rp.logger = rp.logger.With("replica", fmt.Sprintf("%x", uint64(m.Replica)))
	return nil
}

// openStore claims the backing store. It comes before the start is noted: a
// replica that waits for its device is asked each second, and has not started.
func (rp *replica) openStore() (err error) {
	rp.store, err = store.OpenStore(rp.opt.FS, rp.opt.Store, rp.meta.Size, false)
	switch {
	case err != nil && rp.opt.device():
		return fmt.Errorf("%w: %w", ErrDevice, err)
	case err != nil:
		return rp.judgeOpen(err)
	case !rp.opt.device():
		return nil
	}
	err = store.CheckIdentity(rp.opt.FS, filepath.Join(rp.opt.Dir, deviceFile), rp.opt.Store)
	var foreign *store.ForeignError
	if errors.As(err, &foreign) {
		return fmt.Errorf("%w: %w", ErrDevice, err)
	}
	return rp.judgeOpen(err)
}

// device reports whether the backing store lies elsewhere than in the replica's
// directory. What is not there then may come yet: a disk, a logical volume, a
// mount.
func (o *ReplicaOptions) device() bool { return o.Store != filepath.Join(o.Dir, storeFile) }

// noteStart notes this start, in one durable write before anything else happens:
// a new boot without a clean stop before it has made the replica amnesiac, and
// the mark of a clean stop is gone before the first append. It reports whether
// the replica is started for the first time.
func (rp *replica) noteStart() (fresh bool, err error) {
	m := rp.meta
	sameBoot := m.BootID == rp.opt.BootID && m.BootID != ""
	if !sameBoot && !m.Clean {
		m.Amnesiac = true
	}
	m.BootID, m.Clean = rp.opt.BootID, false
	m.Incarnation++
	m.LeaseMaxNanos = max(m.LeaseMaxNanos, int64(rp.opt.LeaseFor))
	rp.meta = m
	if err := rp.writeMeta(); err != nil {
		return false, err
	}
	rp.incarnation.Store(uint64(m.Incarnation))
	return m.Incarnation == 1, nil
}

// openFiles opens log and checkpoint, brings the overlay back, and returns what
// the core starts with.
func (rp *replica) openFiles() (core.Start, error) {
	var (
		start core.Start
		err   error
	)
	if rp.checkpoints, err = store.OpenCheckpoint(rp.opt.FS, filepath.Join(rp.opt.Dir, checkpointFile)); err != nil {
		return start, err
	}
	cp := rp.checkpoints.Load()
	if err := fromCheckpoint(&cp, &start); err != nil {
		return start, err
	}
	target := start.Remaining != nil // also if nothing remains: see reset
	log, rec, err := rp.openLog(cp.Applied, target)
	if err != nil {
		return start, err
	}
	rp.log = log
	start = core.Start{
		Promise: rp.meta.Promise, Base: rec.Base, Last: rec.Last, Durable: log.Durable(), Amnesiac: rp.meta.Amnesiac,
	}
	if err := fromCheckpoint(&cp, &start); err != nil {
		return start, err
	}
	// The checkpoint remembers the epochs since the volume's beginning, the log
	// those since its base.
	for _, h := range rec.History {
		if n := len(start.History); n == 0 || h.Epoch > start.History[n-1].Epoch {
			start.History = append(start.History, h)
		}
	}
	rp.overlay = newOverlay(cp.Applied.Seq, rp.v.opts.Limits.OverlayBytes)
	rp.overlay.loadMax = rp.v.opts.Limits.loadMax()
	err = log.Scan(cp.Applied.Seq+1, func(e *wire.Entry) error {
		rp.overlay.addRef(e)
		start.Tail = append(start.Tail, *e)
		if e.Session != 0 || e.Request != 0 {
			start.Dedup = append(start.Dedup, core.DedupEntry{Session: e.Session, Request: e.Request, Seq: e.Pos.Seq})
		}
		return nil
	})
	if err != nil {
		return start, err
	}
	rp.syncer = newSyncer(start.Durable, rec.Last.Seq)
	rp.applier = newApplier(cp.Applied.Seq)
	rp.appliedFed = cp.Applied.Seq
	rp.blurTo.Store(uint64(rec.Last.Seq))
	if target {
		rp.blurTo.Store(blurAll)
	}
	rp.logger.Info("replica opened", "incarnation", rp.meta.Incarnation, "position", rec.Last, "applied", cp.Applied,
		"cut_bytes", rec.CutBytes, "amnesiac", rp.meta.Amnesiac)
	return start, nil
}

// retention is how much of the log is kept for peers that are away: a share of a small
// disk at the most, which it would fill otherwise, sooner or later.
func (rp *replica) retention() int64 { return min(rp.opt.LogRetention, rp.share(retentionShare)) }

// lagMax is how far a member of the in-sync set may lag behind, and be away, before it is
// evicted: until then the log is kept for it.
func (rp *replica) lagMax() int64 { return min(rp.opt.LagMax, rp.share(retentionShare)) }

// share is a part of the file system of the log, but at least one segment.
func (rp *replica) share(of int64) int64 {
	if rp.room == 0 {
		return math.MaxInt64 // it does not say how much it has
	}
	least := rp.opt.LogSegment
	def(&least, roomLeast)
	return max(rp.room/of, least)
}

// holds reports whether no more is to be applied while a checkpoint is made and the next
// one is due: on a small disk, or where the log has a large part of any.
func (rp *replica) holds() bool {
	return rp.share(checkpointShare) < rp.v.opts.Limits.CheckpointMax || rp.log.Bytes() > rp.share(holdShare)
}

// spareBytes is how much of trimmed segments is kept for a volume of that size: what a
// checkpoint covers, and what is written while it is made. With fewer, a load that
// goes on would have files removed and made anew, of memory and blocks that are new,
// which cost two to four times the CPU time.
func (rp *replica) spareBytes(size uint64) int64 { return rp.checkpointMax(size) * 3 / 2 }

// openLog opens the log behind the checkpoint. A resync target may have crashed
// between the checkpoint that made it one and the log's new beginning: its old
// log then means nothing, and begins anew at the checkpoint.
func (rp *replica) openLog(applied ident.Position, target bool) (*wal.Log, wal.Recovery, error) {
	dir := filepath.Join(rp.opt.Dir, logDir)
	o := wal.Options{
		Volume: rp.v.opts.Volume, Replica: rp.id, RetentionBytes: rp.retention(), SegmentBytes: rp.opt.LogSegment,
		SpareBytes: rp.spareBytes(rp.meta.Size), DurableFloor: applied.Seq, VerifyAfter: applied.Seq,
	}
	if !target {
		return wal.Open(rp.opt.FS, dir, o)
	}
	o.DurableFloor = 0
	log, rec, err := wal.Open(rp.opt.FS, dir, o)
	if err != nil {
		return nil, rec, err
	}
	epoch, ok := log.EpochAt(applied.Seq)
	if rec.Base == applied || (ok && epoch == applied.Epoch) {
		return log, rec, nil
	}
	rp.logger.Info("the log of a resync target begins anew at its checkpoint", "last", rec.Last, "applied", applied)
	if err := log.Reset(applied); err != nil {
		return nil, rec, errors.Join(err, log.Close())
	}
	return log, wal.Recovery{
		Base: applied, Last: applied, CutBytes: rec.CutBytes,
		History: []ident.EpochStart{{Epoch: applied.Epoch, First: applied.Seq}},
	}, nil
}

// judgeOpen tells files that can never be trusted again from a passing trouble,
// as with memory or descriptors, which a later start may not have.
func (rp *replica) judgeOpen(err error) error {
	for _, final := range []error{wal.ErrCorrupt, wal.ErrNoLog, wal.ErrFailed, store.ErrCorrupt, store.ErrSize, store.ErrFailed, iofs.ErrNotExist} {
		if !errors.Is(err, final) {
			continue
		}
		rp.meta.Failed = err.Error()
		if werr := rp.writeMeta(); werr != nil {
			rp.logger.Error("mark the replica failed", "error", werr)
		}
		return &failedError{id: rp.id, reason: err.Error()}
	}
	return err
}

func (rp *replica) coreConfig() core.Config {
	o, l := &rp.opt, &rp.v.opts.Limits
	return core.Config{
		Node: rp.v.opts.Node, Volume: rp.v.opts.Volume, Replica: rp.id, Incarnation: rp.meta.Incarnation,
		Heartbeat: int64(o.Heartbeat), LeaseFor: int64(o.LeaseFor), LeaseMax: rp.meta.LeaseMaxNanos,
		DriftPPM: o.DriftPPM, StallTimeout: int64(o.StallTimeout), RetryAfter: int64(o.RetryAfter),
		WindowBytes: l.window(), RingBytes: l.ring(), AppendBytesMax: appendBytesMax, AppendEntriesMax: appendEntriesMax,
		UnappliedMax: int(min(int64(l.UnappliedMax), rp.share(unappliedShare))), UnappliedEntries: l.UnappliedEntries, DedupMax: dedupMax,
		LagMax: rp.lagMax(), TrimLagMax: min(trimLagMax, rp.share(checkpointShare)),
		ResyncMax: o.ResyncMax, ResyncMin: o.ResyncMin, ResyncChunk: o.ResyncChunk,
	}
}
