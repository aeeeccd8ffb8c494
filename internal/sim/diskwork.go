package sim

import (
	"encoding/binary"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// What works on a disk beside the loop: syncer, applier, checkpointer, readers.

func (s *Sim) startSync(n *node) {
	if n.sync.on {
		n.sync.again = true
		return
	}
	n.sync.on, n.sync.again = true, false
	n.sync.seq, n.sync.cuts = n.disk.log.last().Seq, n.disk.log.cuts
	n.core.SyncStarted(s.clock(n))
	s.at(s.fsyncTime(n), event{kind: evSync, node: n.i, gen: n.gen})
}

func (s *Sim) syncDone(n *node) {
	if wait := n.disk.hungTo - s.now; wait > 0 {
		s.at(wait, event{kind: evSync, node: n.i, gen: n.gen})
		return
	}
	n.sync.on = false
	if n.disk.failed {
		s.put(n, input{kind: inFailed})
		return
	}
	if n.disk.log.synced(n.sync.seq, n.sync.cuts) {
		s.put(n, input{kind: inDurable, x: uint64(n.sync.seq), y: uint64(n.sync.cuts)})
	} else {
		s.put(n, input{kind: inSyncEnded})
		n.sync.again = true
	}
}

// applyStep writes a few entries to the backing store, perhaps half of one.
func (s *Sim) applyStep(n *node) {
	n.apply.on = false
	if n.disk.failed {
		s.put(n, input{kind: inFailed}) // as any write that fails
		return
	}
	if wait := n.disk.storeHangs(s.now); wait > 0 {
		n.apply.on = true
		if n.apply.since == 0 {
			n.apply.since = s.clock(n)
		}
		s.at(wait, event{kind: evApply, node: n.i, gen: n.gen})
		return
	}
	n.apply.since = 0
	s.writeBlocks(n)
	for k := 1 + s.rng.IntN(8); k > 0 && n.apply.done < n.apply.to; k-- {
		e := n.disk.log.at(n.apply.done + 1)
		if e == nil {
			s.fail("I4", "node %s is to apply %d, its log has %v..%v", n.name, n.apply.done+1, n.disk.log.base, n.disk.log.last())
		}
		s.chk.apply(s, n, e)
		for b := range s.blocksOf(e) {
			n.disk.store.write(b, e.Pos)
		}
		n.apply.done++
		n.disk.store.applied = max(n.disk.store.applied, n.apply.done)
	}
	s.put(n, input{kind: inApplied, x: uint64(n.apply.done)}) // also when only blocks were written
	if n.apply.done < n.apply.to {
		n.apply.on = true
		s.at(s.delay(20*us, 2*ms), event{kind: evApply, node: n.i, gen: n.gen})
	}
}

// storeHangs returns how long the backing store does not return yet.
func (d *disk) storeHangs(now int64) int64 { return max(d.hungTo, d.storeHungTo) - now }

// blocksOf yields the blocks that an entry writes.
func (s *Sim) blocksOf(e *wire.Entry) func(func(int) bool) {
	return func(yield func(int) bool) {
		if e.Kind == wire.KindMarker {
			return
		}
		for b := e.Off / blockSize; b < e.End()/blockSize; b++ {
			if !yield(int(b)) {
				return
			}
		}
	}
}

// checkpoint makes the backing store durable and records how far it is: a
// snapshot of the core, an fsync of the store, the snapshot written.
func (s *Sim) checkpoint(n *node, phase uint64) {
	if n.disk.failed {
		return
	}
	again := event{kind: evCkpt, node: n.i, gen: n.gen, x: phase}
	switch phase {
	case 0: // the timer
		s.at(s.delay(50*ms, 800*ms), again)
		s.beginCheckpoint(n)
	case 1: // the store's fsync has returned
		if wait := n.disk.storeHungTo - s.now; wait > 0 {
			s.at(wait, again)
			return
		}
		if n.ckpt.cuts == uint32(n.resets) {
			n.disk.store.synced(n.ckpt.dirty)
		}
		again.x = 2
		s.at(s.delay(100*us, 2*ms), again)
	case 2: // the snapshot is on disk
		n.ckpt.on = false
		if n.ckpt.cuts == uint32(n.resets) {
			n.disk.ckpt = n.ckpt.next
			if s.chance(0.2) && len(n.disk.ckpt.Remaining) == 0 {
				s.chk.content(s, n)
			}
			s.put(n, input{kind: inCkpt, x: uint64(n.ckpt.next.Applied.Seq)})
		}
		n.ckpt.next = checkpoint{}
	}
}

// beginCheckpoint takes the snapshot, between two batches.
func (s *Sim) beginCheckpoint(n *node) {
	if n.ckpt.on || n.busy {
		n.ckpt.again = true
		return
	}
	n.ckpt.on, n.ckpt.again = true, false
	n.ckpt.next, n.ckpt.dirty, n.ckpt.cuts = must(n.core.Snapshot()), len(n.disk.store.dirty), uint32(n.resets)
	s.at(s.fsyncTime(n), event{kind: evCkpt, node: n.i, gen: n.gen, x: 1})
}

// reset makes the replica a resync target: checkpoint, then log.
func (s *Sim) reset(n *node, snap *core.Snapshot) {
	s.note(n.i, "reset", "at %v", snap.Applied)
	s.chk.reset(s, n, snap)
	n.resets++
	n.disk.store.synced(len(n.disk.store.dirty))
	n.disk.ckpt = *snap
	if s.crashHere(n) {
		return
	}
	n.disk.log.reset(snap.Applied)
	n.apply.done, n.apply.to, n.apply.on = snap.Applied.Seq, snap.Applied.Seq, false
	n.disk.store.applied = snap.Applied.Seq
	n.commit = snap.Applied.Seq
	n.sync.again = n.sync.on
	n.blocks = n.blocks[:0]
}

// writeBlocks writes blocks of a resync to the backing store.
func (s *Sim) writeBlocks(n *node) {
	for _, m := range n.blocks {
		for i := range m.Blocks {
			b := &m.Blocks[i]
			for k := range int(b.Len / blockSize) {
				n.disk.store.write(int(b.Off/blockSize)+k, content(b, k))
			}
		}
		s.put(n, input{kind: inBlocksWritten, x: m.ID})
	}
	n.blocks = n.blocks[:0]
}

// The payload of a resynced block is the position of its last writer.
func content(b *wire.Block, k int) ident.Position {
	if b.Payload == nil {
		return ident.Position{}
	}
	p := b.Payload.B[k*16:]
	return ident.Position{Epoch: ident.Epoch(binary.LittleEndian.Uint64(p)), Seq: ident.Seq(binary.LittleEndian.Uint64(p[8:]))}
}

// blockRead reads committed content for a resync.
func (s *Sim) blockRead(n *node) {
	if len(n.blockReads) == 0 {
		return
	}
	q := n.blockReads[0]
	n.blockReads = append(n.blockReads[:0], n.blockReads[1:]...)
	b := wire.Block{Off: q.Off, Len: q.Len, Payload: buf.Get(int(q.Len / blockSize * 16))}
	for k := range int(q.Len / blockSize) {
		p := s.lookup(n, int(q.Off/blockSize)+k, n.gate.Commit)
		binary.LittleEndian.PutUint64(b.Payload.B[k*16:], uint64(p.Epoch))
		binary.LittleEndian.PutUint64(b.Payload.B[k*16+8:], uint64(p.Seq))
	}
	// Entries are committed, and applied, between the read and its end.
	n.blocksRead = append(n.blocksRead, input{kind: inBlocksRead, br: q, block: b})
	s.at(s.delay(0, 5*ms), event{kind: evBlockShown, node: n.i, gen: n.gen})
}

func (s *Sim) logRead(n *node) {
	if len(n.logReads) == 0 {
		return
	}
	q := n.logReads[0]
	n.logReads = append(n.logReads[:0], n.logReads[1:]...)
	s.put(n, input{kind: inLogRead, rd: q})
}
