package replication

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/store"
	"github.com/blockstep/blockstep/replication/wal"
	"github.com/blockstep/blockstep/replication/wire"
)

// readOutcome is what one attempt to read came to.
type readOutcome uint8

const (
	readDone        readOutcome = iota
	readBlocked                 // it needs the disk and was not to wait
	readRaced                   // an entry was applied under it: start over
	readUncommitted             // it overlaps an entry that is not committed
	readClosed                  // no lease, or not the serving primary
	readLost                    // the volume's cache generation moved
	readEarly                   // the session knows a generation, or a size, that this replica has not heard of yet
	readFailed
)

// readScratch is what an attempt needs besides the caller's bytes.
type readScratch struct{ patches []patch }

var readScratches = sync.Pool{New: func() any { return new(readScratch) }}

// readArgs say what is read and by which rules.
type readArgs struct {
	off        uint64
	dst        []byte
	generation uint64 // of the session
	// committed reads this replica's committed content, primary or not, rather
	// than the volume's.
	committed bool
	wait      bool // it may wait for the disk
}

// tryRead makes one attempt. With readUncommitted it names the seq to wait for.
//
// Why it is right (I3, I5): at the first look at the gate the lease holds, so
// nobody else can have answered a write that this replica does not have. The
// overlay is looked at after that; everything that was answered before is in
// it, or in the backing store. What it shows is patched over the store's bytes
// whole, so an entry of it that is being applied meanwhile does not show in
// parts; an entry that it does not show and that may have been applied
// meanwhile is found by touched. The second look at the gate makes sure that
// this replica was primary throughout, so that neither a cut nor a resync has
// changed anything under the read.
func (rp *replica) tryRead(a *readArgs) (readOutcome, ident.Seq, error) {
	g := rp.gate.load()
	if out := rp.judgeGate(a, g); out != readDone {
		return out, 0, nil
	}
	upTo := ^ident.Seq(0)
	if a.committed {
		upTo = g.Commit
	}
	sc, _ := readScratches.Get().(*readScratch)
	end := a.off + uint64(len(a.dst))
	var newest ident.Seq
	sc.patches, newest = rp.overlay.look(a.off, end, upTo, sc.patches[:0])
	var (
		out readOutcome
		err error
		seq ident.Seq
	)
	if n := len(sc.patches); n > 0 && sc.patches[n-1].seq > g.Commit {
		out, seq = readUncommitted, sc.patches[n-1].seq
	} else {
		out, err = rp.readPatched(a, sc.patches)
	}
	releasePatches(sc.patches)
	readScratches.Put(sc)
	if out != readDone {
		return out, seq, err
	}
	if rp.overlay.touched(a.off, end, newest) {
		return readRaced, 0, nil
	}
	g2 := rp.gate.load()
	if out := rp.judgeGate(a, g2); out != readDone {
		return out, 0, nil
	}
	if g2.Epoch != g.Epoch {
		return readRaced, 0, nil
	}
	return readDone, 0, nil
}

// readNoteEvery is how precisely the loop knows when clients read last, in ns.
const readNoteEvery = int64(10 * time.Millisecond)

// judgeGate reports readDone when the gate lets the read pass.
func (rp *replica) judgeGate(a *readArgs, g core.Gate) readOutcome {
	if a.committed {
		if uint64(g.Commit) < rp.blurTo.Load() {
			return readClosed
		}
		return readDone
	}
	now := rp.clock.Boot()
	if !gateOpen(g, now) {
		return readClosed
	}
	if at := int64(now); at > rp.readAt.Load()+readNoteEvery {
		rp.readAt.Store(at) // seldom: the readers share it
	}
	switch {
	case g.Generation > a.generation:
		return readLost
	case g.Generation < a.generation:
		return readEarly
	}
	return readDone
}

// readPatched fills dst from the backing store and the entries.
func (rp *replica) readPatched(a *readArgs, ps []patch) (readOutcome, error) {
	end := a.off + uint64(len(a.dst))
	// Entries before the newest one that covers everything cannot be seen.
	covered := false
	for i := len(ps) - 1; i >= 0; i-- {
		if ps[i].off <= a.off && ps[i].end >= end {
			ps, covered = ps[i:], true
			break
		}
	}
	if !covered {
		if err := rp.readBase(a); err != nil {
			switch {
			case errors.Is(err, vfs.ErrWouldBlock):
				return readBlocked, nil
			case errors.Is(err, store.ErrRange):
				return readEarly, nil // the loop makes it larger in a moment
			}
			return readFailed, fmt.Errorf("read %d bytes at %d of the backing store: %w", len(a.dst), a.off, err)
		}
	}
	for i := range ps {
		p := &ps[i]
		from, to := max(p.off, a.off), min(p.end, end)
		dst := a.dst[from-a.off : to-a.off]
		switch {
		case p.kind != wire.KindData:
			clear(dst)
		case p.payload != nil:
			copy(dst, p.payload.B[from-p.off:])
		case !a.wait:
			return readBlocked, nil // the log is a file too
		default:
			err := rp.log.ReadPayload(p.seq, int(from-p.off), dst)
			if errors.Is(err, wal.ErrTrimmed) {
				return readRaced, nil // applied and recycled since the look
			}
			if err != nil {
				return readFailed, fmt.Errorf("read entry %d of the log: %w", p.seq, err)
			}
		}
	}
	return readDone, nil
}

func (rp *replica) readBase(a *readArgs) error {
	if a.wait {
		defer rp.v.stages.observe(StageRead, time.Now())
		return rp.store.ReadAt(a.dst, a.off)
	}
	return rp.store.ReadAtNoWait(a.dst, a.off)
}

// read serves a read: at once when the bytes are in memory, else by a reader
// goroutine, else after a barrier. A block status always asks the file system.
func (rp *replica) read(r *Request) {
	if r.Op == OpRead {
		rp.readStep(r, false)
		return
	}
	rp.queueRead(r)
}

// readStep makes attempts until the read is answered or handed on.
func (rp *replica) readStep(r *Request, wait bool) {
	a := readArgs{off: r.Offset, generation: r.generation, committed: r.committed, wait: wait}
	if r.Op == OpRead {
		a.dst = r.Data.B
	}
	for {
		// When entries are applied under it faster than it reads, the applier
		// is held back for once.
		hold := wait && r.tries >= readTriesMax
		if hold {
			rp.applyMu.Lock()
		}
		var (
			out readOutcome
			seq ident.Seq
			err error
		)
		if r.Op == OpRead {
			out, seq, err = rp.tryRead(&a)
		} else {
			out, err = rp.tryStatus(&a, r)
		}
		if hold {
			rp.applyMu.Unlock()
		}
		if out == readRaced {
			r.tries++
			if wait || r.tries < readTriesMax {
				continue
			}
		}
		rp.endRead(r, out, seq, err)
		return
	}
}

// endRead answers a read or hands it on.
func (rp *replica) endRead(r *Request, out readOutcome, seq ident.Seq, err error) {
	switch out {
	case readDone:
		rp.v.finishOp(r, wire.StatusOK, rp.gate.load().Last, nil)
	case readRaced, readBlocked:
		rp.queueRead(r)
	case readUncommitted, readClosed:
		if r.committed {
			// This replica does not know yet what of its log is committed.
			rp.v.finishOp(r, wire.StatusRetry, ident.Position{}, nil)
			return
		}
		if !rp.in.barrier(r, seq) {
			rp.v.finishOp(r, wire.StatusRetry, ident.Position{}, nil)
		}
	case readEarly:
		rp.v.finishOp(r, wire.StatusRetry, ident.Position{}, nil)
	case readLost:
		rp.v.finishOp(r, wire.StatusGeneration, ident.Position{}, nil)
	case readFailed:
		if rp.stopping.Load() {
			rp.v.finishOp(r, wire.StatusRetry, ident.Position{}, err)
			return
		}
		if rp.alone() {
			// Nobody else could serve: one bad sector is not the whole disk.
			rp.v.finishOp(r, wire.StatusIO, ident.Position{}, err)
			return
		}
		rp.fail(err)
		rp.v.finishOp(r, wire.StatusRetry, ident.Position{}, err)
	}
}

// readPool are the goroutines that wait for the disk on behalf of reads. They
// start when there is something to read and end when there is not.
type readPool struct {
	mu      sync.Mutex
	queue   []*Request
	running int
	closed  bool
	// began has, for each goroutine, when its read began, 0 between two.
	began map[uint64]core.Instant
	nth   uint64
}

// queueRead hands a read to a goroutine that may wait for the disk.
func (rp *replica) queueRead(r *Request) {
	p := &rp.readers
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		rp.v.finishOp(r, wire.StatusRetry, ident.Position{}, nil)
		return
	}
	p.queue = append(p.queue, r)
	start := p.running < rp.v.opts.Limits.ReadersMax
	if start {
		p.running++
		p.nth++
		rp.wg.Add(1)
	}
	nth := p.nth
	p.mu.Unlock()
	if start {
		go rp.runReader(nth)
	}
}

// runReader reads until the queue is empty.
func (rp *replica) runReader(nth uint64) {
	defer rp.wg.Done()
	p := &rp.readers
	for {
		p.mu.Lock()
		if len(p.queue) == 0 {
			p.running--
			delete(p.began, nth)
			p.queue = nil
			p.mu.Unlock()
			return
		}
		r := p.queue[0]
		p.queue[0] = nil
		p.queue = p.queue[1:]
		if p.began == nil {
			p.began = make(map[uint64]core.Instant)
		}
		p.began[nth] = rp.clock.Boot()
		p.mu.Unlock()
		rp.readStep(r, true)
		rp.v.opts.Links.Flush()
	}
}

// closeReaders takes no more reads; what waits is sent back.
func (rp *replica) closeReaders() {
	p := &rp.readers
	p.mu.Lock()
	p.closed = true
	left := p.queue
	p.queue = nil
	p.mu.Unlock()
	for _, r := range left {
		rp.v.finishOp(r, wire.StatusRetry, ident.Position{}, nil)
	}
}
