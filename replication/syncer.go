package replication

import (
	"context"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/eventfd"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/yield"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/store"
)

const (
	// syncPatience is how often a syncer whom somebody has waited for waits by a
	// thread of its own without being wanted, and syncPark for how long each
	// time, and between two turns of the scheduler: together less than the 10 ms
	// after which the runtime's monitor would take its processor.
	syncPatience = 5
	syncPark     = 4 * time.Millisecond
)

// syncer decides when the log is fsynced: at once when somebody waits for it,
// else in the background, soon enough that applying and trimming never stop.
type syncer struct {
	mu      sync.Mutex
	wake    chan struct{}
	written ident.Seq
	durable ident.Seq
	want    ident.Seq // demanded
	bytes   int64     // written and not fsynced
	ahead   int64     // of them, written since the last write-out began
	since   core.Instant
	cuts    uint64 // generation of the log: a cut begins a new one

	event  *eventfd.Event // wakes who is parked; nil until somebody is
	parked bool
}

func newSyncer(durable, last ident.Seq) *syncer {
	s := &syncer{wake: make(chan struct{}, 1), written: last, durable: durable}
	if durable < last {
		s.bytes = 1
	}
	return s
}

// wrote says that entries up to seq are in the log file.
func (s *syncer) wrote(seq ident.Seq, bytes int64, now core.Instant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bytes == 0 {
		s.since = now
		if !s.parked { // else it soon looks by itself
			signal(s.wake) // arms the timer
		}
	}
	s.written = seq
	s.bytes += bytes + 1 // so that entries without a payload count too
	if s.ahead += bytes; s.ahead >= writeOutBytes {
		s.wakeLocked()
	}
}

// wakeLocked wakes the syncer, however it waits. Under mu, which one that is parked
// takes at once: so it does not come before the caller is done here, and on a machine
// of few processors does not take the caller's (5 to 10 % of FLUSHes, measured).
func (s *syncer) wakeLocked() {
	if s.parked {
		s.parked = false
		s.event.Set()
		return
	}
	signal(s.wake)
}

// park waits until the syncer is woken, but for d at the most, by a thread of its
// own, which is quicker than a channel where FLUSH follows FLUSH. It returns false
// when there is no thread for it, and then it has not waited.
func (s *syncer) park(d time.Duration) bool {
	s.mu.Lock()
	if s.event == nil {
		e, err := eventfd.New()
		if err != nil {
			s.mu.Unlock()
			return false
		}
		s.event = e
	}
	select {
	case <-s.wake: // since it last looked
		s.mu.Unlock()
		return true
	default:
	}
	s.parked = true
	s.mu.Unlock()
	ok := s.event.Wait(d)
	s.mu.Lock()
	defer s.mu.Unlock()
	woken := !s.parked
	s.parked = false
	return ok || woken
}

// close gives back what park has opened, when nobody parks any more.
func (s *syncer) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.event != nil {
		_ = s.event.Close()
		s.event = nil
	}
}

// writeOut reports whether a write-out is to begin now, and notes that it does.
func (s *syncer) writeOut() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ahead < writeOutBytes {
		return false
	}
	s.ahead = 0
	return true
}

// waited reports whether somebody waits for an fsync.
func (s *syncer) waited() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.want > s.durable
}

// demand asks for an fsync of everything up to seq at once.
func (s *syncer) demand(seq ident.Seq) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if seq > s.want {
		s.want = seq
		s.wakeLocked()
	}
}

// cut says that the log ends at seq now.
func (s *syncer) cut(seq ident.Seq) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cuts++
	s.written, s.durable, s.want = min(s.written, seq), min(s.durable, seq), min(s.want, seq)
}

// reset says that the log begins anew after seq.
func (s *syncer) reset(seq ident.Seq) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cuts++
	s.written, s.durable, s.want, s.bytes = seq, seq, 0, 0
}

func (s *syncer) generation() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cuts
}

func (s *syncer) durableSeq() ident.Seq {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.durable
}

// due reports whether an fsync is to begin now, and else how long it may wait
// (0: until something is written). When it is due it notes that one begins.
func (s *syncer) due(now core.Instant, l *Limits) (bool, time.Duration, uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bytes == 0 || s.written <= s.durable {
		return false, 0, 0
	}
	left := time.Duration(s.since + core.Instant(l.SyncAge) - now)
	if s.want > s.durable || s.bytes >= l.SyncBytes || left <= 0 {
		s.bytes, s.ahead = 0, 0
		return true, 0, s.cuts
	}
	return false, left, 0
}

// done says that an fsync which began in generation gen covers up to seq.
func (s *syncer) done(seq ident.Seq, gen uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if gen == s.cuts {
		s.durable = max(s.durable, min(seq, s.written))
	}
	switch {
	case s.written <= s.durable:
		// The fsync has also covered what the loop had written but not told us
		// of when it began. Left counted, it would keep wrote from waking us
		// for the next entry.
		s.bytes = 0
	case s.bytes == 0:
		s.bytes = 1 // a cut came between: what was written since needs its own
	}
}

// runSyncer fsyncs the log until ctx ends.
func (rp *replica) runSyncer(ctx context.Context) {
	defer rp.wg.Done()
	defer rp.syncer.close()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	expected := time.Duration(0) // what the disk takes for what has been sent to it
	patience, turn := 0, time.Time{}
	for ctx.Err() == nil {
		now, left, gen := rp.syncer.due(rp.clock.Boot(), &rp.v.opts.Limits)
		if !now && rp.syncer.writeOut() {
			// The disk works while more is written; the fsync then waits for
			// the rest only.
			if err := rp.log.WriteOut(); err != nil {
				rp.fail(&syncError{err})
				return
			}
			continue
		}
		if !now {
			if left == 0 {
				left = time.Hour
			}
			if patience > 0 {
				if now := time.Now(); now.Sub(turn) >= syncPark {
					turn = now
					yield.Turn()
				}
				switch ok := rp.syncer.park(min(left, syncPark)); {
				case !ok:
					patience = 0
				case !rp.syncer.waited():
					patience--
				}
				continue
			}
			timer.Reset(left)
			select {
			case <-ctx.Done():
			case <-rp.syncer.wake:
			case <-timer.C:
			}
			continue
		}
		if rp.syncer.waited() {
			patience = syncPatience
		}
		// Quiet: it is for the watch on a disk that hangs, which the tick keeps.
		rp.in.pushQuiet(input{kind: inSyncStarted})
		rp.disk.sync.Store(int64(rp.clock.Boot()))
		// A wait in the kernel for long makes Go's monitor busy: so when nobody
		// waits for the fsync, most of what it takes is slept through first.
		sent := time.Now()
		err := rp.sendAhead(ctx, timer, expected)
		began, seq := time.Now(), ident.Seq(0)
		if err == nil {
			seq, err = rp.log.Sync()
		}
		rp.disk.sync.Store(0)
		if err != nil {
			rp.in.push(input{kind: inSyncEnded, seq: 0, id: gen})
			rp.fail(&syncError{err})
			return
		}
		rp.v.stages.observe(StageLogSync, began)
		expected = store.NextRest(expected, time.Since(sent))
		rp.syncer.done(seq, gen)
		rp.in.pushQuiet(input{kind: inSyncEnded, seq: seq, id: gen})
		rp.turn(false)
	}
}

// sendAhead sends what is in the log file to the disk, and lets it work for d, or
// until somebody waits for the fsync.
func (rp *replica) sendAhead(ctx context.Context, timer *time.Timer, d time.Duration) error {
	if rp.syncer.waited() {
		return nil // and no timer is to wake anybody
	}
	timer.Reset(d)
	for first := true; ctx.Err() == nil && !rp.syncer.waited(); first = false {
		if rp.syncer.writeOut() || first {
			if err := rp.log.WriteOut(); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
		case <-rp.syncer.wake:
		case <-timer.C:
			return nil
		}
	}
	return nil
}
