package replication

import (
	"testing"
	"time"
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
