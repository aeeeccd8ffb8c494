package replication

import (
	"runtime"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
)

// TestSyncerCountsWhatAnFsyncCovered: the loop writes an entry, an fsync that
// covers it begins and ends, and the loop tells of the entry in between. The
// next entry must wake the syncer again, or nothing is ever fsynced, applied
// and, once the backlog is full, accepted.
func TestSyncerCountsWhatAnFsyncCovered(t *testing.T) {
	var l Limits
	l.setDefaults()
	s := newSyncer(0, 0)
	woken := func() bool {
		select {
		case <-s.wake:
			return true
		default:
			return false
		}
	}
	s.wrote(1, 4096, 1)
	now, _, gen := s.due(1+1<<40, &l)
	if !now || !woken() {
		t.Fatal("the first entry is not due")
	}
	s.wrote(2, 4096, 2)
	s.done(2, gen) // entry 2 was in the file when the fsync began
	woken()
	if now, left, _ := s.due(3, &l); now || left != 0 {
		t.Fatalf("due %v, left %v with all durable", now, left)
	}
	s.wrote(3, 4096, 4)
	if !woken() {
		t.Fatal("an entry after the fsync wakes nobody")
	}
	if _, left, _ := s.due(4, &l); left != 100*time.Millisecond {
		t.Fatalf("the entry may wait %v, want 100ms", left)
	}
}

// TestSyncerParked: a syncer that waits by a thread of its own misses no demand,
// whenever it comes, and is woken for nothing else that can wait.
func TestSyncerParked(t *testing.T) {
	s := newSyncer(0, 0)
	defer s.close()
	s.demand(1) // before it parks
	if woken, ok := s.park(time.Minute); !woken || !ok {
		t.Fatalf("woken %v, ok %v for a demand that came before", woken, ok)
	}
	if woken, ok := s.park(time.Millisecond); woken || !ok {
		t.Fatalf("woken %v, ok %v without a demand", woken, ok)
	}
	parked := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.parked
	}
	for seq := ident.Seq(2); seq < 200; seq++ {
		done := make(chan bool)
		go func() {
			woken, ok := s.park(time.Minute)
			done <- woken && ok
		}()
		for seq%2 == 0 && !parked() { // half of them come when they come
			runtime.Gosched()
		}
		s.wrote(seq, 4096, 1)
		s.demand(seq)
		if !<-done {
			t.Fatalf("the demand of entry %d woke nobody", seq)
		}
		select {
		case <-s.wake: // the entry was there before it parked
		default:
		}
	}
	if woken, ok := s.park(time.Millisecond); woken && ok {
		t.Fatal("woken by a demand that was seen before")
	}
}
