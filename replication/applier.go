package replication

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/yield"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

const (
	// applyDelay is how long the applier lets entries gather. Readers find them
	// in the overlay meanwhile; a block that is overwritten within it is
	// written to the backing store once.
	applyDelay = 10 * time.Millisecond
	// applyEager is the number of entries that it does not wait with.
	applyEager = 256
	// A calm applier has little to do, so it does a little at a time, applyPace
	// apart: what comes with an fsync of the log, and on a machine of few
	// processors, would else keep them from the writes that are under way, on
	// all nodes at once. It is calm up to applyCalmEntries and applyCalmBytes.
	applyPace        = 8 * time.Millisecond
	applyPaceEntries = 256
	applyPaceBytes   = 2 << 20
	applyCalmEntries = 4096
	applyCalmBytes   = 16 << 20
	// applyZeroMax is how many bytes are zeroed in one call: some tenths of a second
	// for a disk that has no quick way to do it.
	applyZeroMax = 16 << 20
	// applyTurn is for how long pieces are written before others may have the
	// processor: less than the 10 ms after which the runtime takes it away.
	applyTurn = 2 * time.Millisecond
	// applyVectorMax is the number of buffers in one writev (UIO_MAXIOV is 1024).
	applyVectorMax = 512
)

// applier brings entries that are committed and durable to the backing store,
// in order.
type applier struct {
	mu      sync.Mutex
	wake    chan struct{}
	to      ident.Seq // allowed
	applied ident.Seq
	blocks  []*wire.Blocks // of a resync, to be written now
}

// reset says that the log begins anew after seq. Nothing is being applied.
func (a *applier) reset(seq ident.Seq) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.to, a.applied = seq, seq
}

// write hands over blocks of a resync.
func (a *applier) write(list []*wire.Blocks) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.blocks = append(a.blocks, list...)
	signal(a.wake)
}

func (a *applier) takeBlocks() []*wire.Blocks {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := a.blocks
	a.blocks = nil
	return list
}

func newApplier(applied ident.Seq) *applier {
	return &applier{wake: make(chan struct{}, 1), to: applied, applied: applied}
}

// allow lets entries up to seq be applied.
func (a *applier) allow(seq ident.Seq) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if seq <= a.to {
		return
	}
	// It waits for the first of several, and then until there are many or some
	// time has passed: to wake it for each in between is a thread's work.
	before, now := a.to-a.applied, seq-a.applied
	a.to = seq
	if before == 0 || before < applyEager && now >= applyEager {
		signal(a.wake)
	}
}

func (a *applier) target() (to, applied ident.Seq) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.to, a.applied
}

func (a *applier) advance(seq ident.Seq) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.applied = seq
}

// runApplier applies until ctx ends.
func (rp *replica) runApplier(ctx context.Context) {
	defer rp.wg.Done()
	w := &applyWork{rp: rp}
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	since := time.Time{} // when the oldest entry that may be applied was seen
	next := time.Time{}  // when a calm applier goes on
	for ctx.Err() == nil {
		if list := rp.applier.takeBlocks(); len(list) > 0 {
			if err := rp.writeBlocks(list); err != nil {
				rp.fail(err)
				return
			}
			last := list[len(list)-1].ID
			rp.checkpointer.note(blockSize)
			rp.in.push(input{kind: inCall, call: func(now core.Instant) { rp.core.BlocksWritten(now, last) }})
		}
		to, applied := rp.applier.target()
		pause := time.Hour
		if to > applied {
			if since.IsZero() {
				since = time.Now()
			}
			pause = applyDelay - time.Since(since)
			if to-applied >= applyEager {
				pause = 0
			}
			pause = max(pause, time.Until(next))
			if behind, moved := rp.checkpointer.behind(); behind && rp.holds() {
				pause = max(pause, time.Until(moved.Add(applyHoldMax)))
			}
		}
		if pause > 0 {
			timer.Reset(pause)
			select {
			case <-ctx.Done():
			case <-rp.applier.wake:
			case <-timer.C:
			}
			continue
		}
		since = time.Time{}
		gen := rp.resets.Load()
		calm := rp.overlay.calm()
		seq, bytes, err := w.round(to, calm)
		if err != nil {
			rp.fail(fmt.Errorf("apply entries after %d to the backing store: %w", applied, err))
			return
		}
		rp.applier.advance(seq)
		rp.checkpointer.note(bytes)
		rp.in.pushQuiet(input{kind: inApplied, seq: seq, id: gen})
		rp.turn(false)
		if calm {
			next = time.Now().Add(applyPace)
		}
	}
}

// piece is a run of bytes that one entry leaves behind when the later entries
// of the round have been laid over it.
type piece struct {
	off, end uint64
	kind     wire.Kind
	flags    uint8
	data     []byte
}

// applyWork is what a round needs, kept from one to the next.
type applyWork struct {
	rp      *replica
	batch   []applyEntry
	loaded  []*buf.Buf
	pieces  []piece
	covered []span
	gaps    []span
	vec     [][]byte
}

// round applies the next entries, up to to, and returns the last of them and
// their bytes in the log: a few when it is calm. However often they overwrite one
// another, the log has them all until a checkpoint covers them.
func (w *applyWork) round(to ident.Seq, calm bool) (ident.Seq, int64, error) {
	rp := w.rp
	rp.applyMu.Lock()
	defer rp.applyMu.Unlock()
	w.batch = rp.overlay.begin(to, calm, w.batch[:0])
	defer w.release()
	defer rp.disk.apply.Store(0)
	if err := w.load(); err != nil {
		return 0, 0, err
	}
	w.plan()
	began := time.Now()
	if err := w.write(); err != nil {
		return 0, 0, err
	}
	rp.v.stages.observe(StageApply, began)
	last, bytes := w.batch[len(w.batch)-1].seq, int64(0)
	for i := range w.batch {
		bytes += entryMemory // about what its record has besides
		if e := &w.batch[i]; e.kind == wire.KindData {
			bytes += int64(e.end - e.off)
		}
	}
	rp.overlay.remove(last)
	return last, bytes, nil
}

func (w *applyWork) release() {
	for i := range w.batch {
		w.batch[i].payload.Release()
	}
	clear(w.batch)
	for i, b := range w.loaded {
		b.Release()
		w.loaded[i] = nil
	}
	w.loaded = w.loaded[:0]
	clear(w.pieces)
	clear(w.vec)
}

// load reads the payloads that memory had no room for.
func (w *applyWork) load() error {
	for i := range w.batch {
		e := &w.batch[i]
		if e.kind != wire.KindData || e.payload != nil {
			continue
		}
		b := buf.Get(int(e.end - e.off))
		w.loaded = append(w.loaded, b)
		w.rp.disk.apply.Store(int64(w.rp.clock.Boot()))
		if err := w.rp.log.ReadPayload(e.seq, 0, b.B); err != nil {
			return fmt.Errorf("read entry %d of the log: %w", e.seq, err)
		}
		e.payload = b.Retain()
	}
	return nil
}

// plan lays the entries over one another, the newest on top, and sorts what can
// be seen of each by offset. The order within a round does not matter to
// anyone: a crash in the middle is healed by the log, and readers see the
// overlay.
func (w *applyWork) plan() {
	w.pieces, w.covered = w.pieces[:0], w.covered[:0]
	for i := len(w.batch) - 1; i >= 0; i-- {
		e := &w.batch[i]
		if e.off == e.end {
			continue
		}
		w.gaps = w.cover(e.off, e.end, w.gaps[:0])
		for _, g := range w.gaps {
			p := piece{off: g.off, end: g.end, kind: e.kind, flags: e.flags}
			if e.kind == wire.KindData {
				p.data = e.payload.B[g.off-e.off : g.end-e.off]
			}
			w.pieces = append(w.pieces, p)
		}
	}
	slices.SortFunc(w.pieces, func(a, b piece) int {
		if a.off < b.off {
			return -1
		}
		return 1
	})
}

// cover adds a range to the sorted, disjoint spans in covered and appends the
// parts of it that were not in them to gaps.
func (w *applyWork) cover(off, end uint64, gaps []span) []span {
	c := w.covered
	// The first span that ends at or behind off.
	i, _ := slices.BinarySearchFunc(c, off, func(s span, off uint64) int {
		if s.end < off {
			return -1
		}
		return 1
	})
	j, at := i, off
	for j < len(c) && c[j].off <= end {
		if at < c[j].off {
			gaps = append(gaps, span{at, c[j].off})
		}
		at = max(at, c[j].end)
		j++
	}
	if at < end {
		gaps = append(gaps, span{at, end})
	}
	merged := span{off, end}
	if j > i {
		merged = span{min(off, c[i].off), max(end, c[j-1].end)}
	}
	w.covered = slices.Replace(c, i, j, merged)
	return gaps
}

// write brings the pieces to the backing store: neighbours with data in one
// call.
func (w *applyWork) write() error {
	turn := time.Now()
	for i := 0; i < len(w.pieces); {
		if now := time.Now(); now.Sub(turn) >= applyTurn {
			turn = now
			yield.Turn()
		}
		w.rp.disk.apply.Store(int64(w.rp.clock.Boot()))
		p := &w.pieces[i]
		if p.kind != wire.KindData {
			// A step at a time: one request may be of GiB, and a slow disk is not one
			// that hangs.
			n := min(p.end-p.off, applyZeroMax)
			if err := w.rp.store.Zero(p.off, n, p.flags&wire.FlagNoHole == 0); err != nil {
				return fmt.Errorf("zero %d bytes at %d: %w", n, p.off, err)
			}
			if p.off += n; p.off == p.end {
				i++
			}
			continue
		}
		w.vec = w.vec[:0]
		at, end := p.off, p.off
		for i < len(w.pieces) && len(w.vec) < applyVectorMax && w.pieces[i].kind == wire.KindData && w.pieces[i].off == end {
			w.vec = append(w.vec, w.pieces[i].data)
			end = w.pieces[i].end
			i++
		}
		if err := w.rp.store.WritevAt(w.vec, at); err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", end-at, at, err)
		}
	}
	return nil
}
