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
// whenever it comes, and an entry that can wait does not wake it.
func TestSyncerParked(t *testing.T) {
	const long = time.Minute
	s := newSyncer(0, 0)
	defer s.close()
	park := func(d time.Duration) time.Duration {
		began := time.Now()
		if !s.park(d) {
			t.Error("no thread to wait by")
		}
		return time.Since(began)
	}
	// begin waits in another goroutine, and returns when it does.
	begin := func(d time.Duration) chan time.Duration {
		took := make(chan time.Duration, 1)
		go func() { took <- park(d) }()
		for parked := false; !parked; runtime.Gosched() {
			s.mu.Lock()
			parked = s.parked
			s.mu.Unlock()
		}
		return took
	}
	s.demand(1)
	if took := park(long); took > long/2 {
		t.Fatal("a demand from before it parked did not wake it")
	}
	took := begin(20 * time.Millisecond)
	s.wrote(1, 4096, 1)
	if d := <-took; d < 20*time.Millisecond {
		t.Fatalf("an entry that can wait woke it after %v", d)
	}
	for seq := ident.Seq(2); seq < 200; seq++ {
		took := begin(long)
		s.demand(seq)
		if <-took > long/2 {
			t.Fatalf("the demand of entry %d did not wake it", seq)
		}
	}
	for seq := ident.Seq(200); seq < 400; seq++ {
		took := make(chan time.Duration, 1)
		go func() { took <- park(long) }()
		s.demand(seq) // comes when it comes
		if <-took > long/2 {
			t.Fatalf("the demand of entry %d did not wake it", seq)
		}
	}
	took = begin(long)
	s.wrote(400, writeOutBytes, 1)
	if <-took > long/2 {
		t.Fatal("a write-out that is due did not wake it")
	}
}
