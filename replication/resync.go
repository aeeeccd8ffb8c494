package replication

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"path"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/bitmap"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/store"
	"github.com/blockstep/blockstep/replication/wire"
)

// blurAll is blurTo of a replica that lacks blocks: no commit index makes its
// content one that can be told.
const blurAll = ^uint64(0)

// errNotKnown is returned while nobody knows what of this replica's content is
// committed.
var errNotKnown = fmt.Errorf("%w: the content is not known yet", ErrIO)

// zeroGrain is the unit in which a block read looks for zeroes.
const zeroGrain = 4096

// reset lets the log begin anew at what the snapshot says: this replica is a
// resync target from here on.
func (rp *replica) reset(s *core.Snapshot) error {
	rp.blurTo.Store(blurAll)
	if file, err := rp.saveDiscarded(rp.appliedFed); err != nil {
		rp.logger.Warn("save discarded entries", "after", rp.appliedFed, "error", err)
	} else if file != "" {
		rp.event(core.Event{Name: "discarded", From: rp.log.Last().String(), To: path.Base(file), Rule: "the log begins anew for a resync; what was not applied is kept in a file", Pos: rp.log.Last()})
	}
	// Nothing is being applied, or the core would not have asked; a checkpoint
	// that is under way is waited for, one that was begun before finds the
	// generation changed and is given up.
	rp.applyMu.Lock()
	defer rp.applyMu.Unlock()
	rp.checkpointMu.Lock()
	defer rp.checkpointMu.Unlock()
	rp.resets.Add(1)
	cp := toCheckpoint(s)
	if len(s.Remaining) == 0 {
		// It says all the same that a log which ends before it is not corrupt.
		none, err := bitmap.New().Marshal()
		if err != nil {
			return err
		}
		cp.Bitmaps = append(cp.Bitmaps, store.Bitmap{Node: bitmapRemaining, Data: none})
	}
	if err := rp.writeCheckpoint(cp); err != nil {
		return err
	}
	at := s.Applied.Seq
	rp.overlay.reset(at)
	rp.syncer.reset(at)
	rp.applier.reset(at)
	rp.appliedFed = at
	if err := rp.log.Reset(s.Applied); err != nil {
		return fmt.Errorf("begin the log anew after %v: %w", s.Applied, err)
	}
	return nil
}

// writeBlocks brings blocks of a resync to the backing store. It runs on the
// applier, which applies nothing meanwhile.
func (rp *replica) writeBlocks(list []*wire.Blocks) error {
	for _, m := range list {
		for i := range m.Blocks {
			b := &m.Blocks[i]
			var err error
			if b.Payload == nil {
				err = rp.store.Zero(b.Off, b.Len, true)
			} else {
				err = rp.store.WriteAt(b.Payload.B, b.Off)
			}
			if err != nil {
				return fmt.Errorf("write a block of the resync at %d: %w", b.Off, err)
			}
		}
	}
	return nil
}

// runBlockRead reads an extent of this replica's committed content for a resync
// target, and hands it to the core as blocks.
func (rp *replica) runBlockRead(q core.BlockRead) {
	defer rp.wg.Done()
	data := buf.Get(int(q.Len))
	err := rp.readCommitted(q.Off, data.B)
	var blocks []wire.Block
	if err == nil {
		blocks = splitBlocks(q.Off, data.B)
	} else if !errors.Is(err, context.Canceled) {
		rp.logger.Warn("read a block for a resync", "peer", q.Peer, "offset", q.Off, "error", err)
		if !errors.Is(err, errNotKnown) && !rp.alone() {
			rp.fail(fmt.Errorf("read a block for %s: %w", q.Peer, err))
		}
	}
	data.Release()
	release := func() {
		for i := range blocks {
			blocks[i].Payload.Release()
		}
	}
	ok := rp.in.push(input{kind: inCall, call: func(now core.Instant) {
		rp.core.BlocksRead(now, q, blocks, err == nil)
		// The core lends them to the next effects.
		rp.afterEffects = append(rp.afterEffects, release)
	}})
	if !ok {
		release()
	}
}

// readCommitted reads this replica's committed content and waits for the disk.
func (rp *replica) readCommitted(off uint64, dst []byte) error {
	a := readArgs{off: off, dst: dst, committed: true, wait: true}
	for tries := 0; rp.ctx.Err() == nil; tries++ {
		hold := tries >= readTriesMax
		if hold {
			rp.applyMu.Lock()
		}
		out, _, err := rp.tryRead(&a)
		if hold {
			rp.applyMu.Unlock()
		}
		switch out {
		case readDone:
			return nil
		case readFailed:
			return err
		case readRaced, readBlocked:
		case readUncommitted, readClosed, readLost, readEarly:
			return errNotKnown
		}
	}
	return rp.ctx.Err()
}

// splitBlocks cuts data into runs of zeroes, which travel without their bytes,
// and the rest.
func splitBlocks(off uint64, data []byte) []wire.Block {
	var blocks []wire.Block
	for at := 0; at < len(data); {
		end := min(at+zeroGrain, len(data))
		zero := allZero(data[at:end])
		for end < len(data) && allZero(data[end:min(end+zeroGrain, len(data))]) == zero {
			end = min(end+zeroGrain, len(data))
		}
		b := wire.Block{Off: off + uint64(at), Len: uint64(end - at)}
		if !zero {
			b.Payload = buf.Get(end - at)
			copy(b.Payload.B, data[at:end])
			b.CRC = crc32.Checksum(b.Payload.B, castagnoli)
		}
		blocks = append(blocks, b)
		at = end
	}
	return blocks
}

func allZero(p []byte) bool {
	for len(p) >= 8 {
		if p[0]|p[1]|p[2]|p[3]|p[4]|p[5]|p[6]|p[7] != 0 {
			return false
		}
		p = p[8:]
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// Doubt makes this node's replica a resync target of the byte range: it is
// copied from the primary anew. It reports false when this replica is the
// primary or has failed.
func (v *Volume) Doubt(ctx context.Context, off, length uint64) (bool, error) {
	if v.rep() == nil {
		return false, ErrNoReplica
	}
	ok := false
	err := v.rep().call(ctx, func(now core.Instant) { ok = v.rep().core.Doubt(now, off, length) })
	return ok, err
}

// Pause makes this node's replica, if it is the primary, hold new requests back
// for d; 0 ends it.
func (v *Volume) Pause(ctx context.Context, d time.Duration) error {
	if v.rep() == nil {
		return nil
	}
	return v.rep().call(ctx, func(now core.Instant) { v.rep().core.Pause(now, now+core.Instant(d)) })
}

// Committed returns up to where this node's replica knows the log to be
// committed; 0 without a replica. At the primary that covers every write that
// was answered.
func (v *Volume) Committed() ident.Seq {
	if rp := v.rep(); rp != nil {
		return rp.gate.load().Commit
	}
	return 0
}

// ReadReplica reads the committed content of this node's replica, as VOLUME@NODE
// shows it, and returns a position that the content is not older than. It waits
// for the disk.
func (v *Volume) ReadReplica(p []byte, off uint64) (ident.Seq, error) {
	if v.rep() == nil {
		return 0, ErrNoReplica
	}
	commit := v.rep().gate.load().Commit
	return commit, v.rep().readCommitted(off, p)
}
