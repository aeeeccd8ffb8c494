package store

import (
	"maps"
	"slices"
	"sync"
	"time"
)

const (
	// granuleBits is the grain in which the store remembers where it was
	// written since the last write-out: 1 MiB.
	granuleBits = 20
	// groupGranules is how much of the file is sent to the disk at a time:
	// enough to keep it busy, and little enough that an fsync of the log which
	// comes meanwhile waits for some milliseconds at most.
	groupGranules = 8
)

// dirtied remembers which granules were written since the last write-out. It
// grows with what was written, not with the device.
type dirtied struct {
	mu   sync.Mutex
	last uint64 // the newest one, plus one: most writes fall next to another
	set  map[uint64]struct{}
}

func (d *dirtied) note(off, n uint64) {
	if n == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for g := off >> granuleBits; g <= (off+n-1)>>granuleBits; g++ {
		if d.last == g+1 {
			continue
		}
		if d.set == nil {
			d.set = make(map[uint64]struct{})
		}
		d.set[g] = struct{}{}
		d.last = g + 1
	}
}

// take returns the granules in order and forgets them.
func (d *dirtied) take() []uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := slices.Sorted(maps.Keys(d.set))
	clear(d.set)
	d.last = 0
	return list
}

// restMax bounds the rest before a wait.
const restMax = 50 * time.Millisecond

// NextRest returns how long to rest before the next wait for the disk, after the
// last one, with the rest before it, has taken so long: most of what is expected,
// so that a rest is seldom longer than the disk.
func NextRest(last, took time.Duration) time.Duration {
	return min((last+took)/2*3/4, restMax)
}

// WriteOut sends to the disk what was written since the last call, a few MiB at
// a time and waiting for each, so that the Sync after it has little left to do
// and what others fsync meanwhile does not queue behind all of it. It makes
// nothing durable.
//
// rest is called with the time that the disk is expected to take, before each
// wait for it, since a wait in the kernel for long makes Go's monitor busy; and
// with 0 between two groups. When it returns false the remainder is left to Sync.
// A failure is final.
func (s *Store) WriteOut(rest func(time.Duration) bool) error {
	if e := s.failure.Load(); e != nil {
		return *e
	}
	expected := time.Duration(0)
	for group := range slices.Chunk(s.dirtied.take(), groupGranules) {
		began := time.Now()
		if err := s.writeOut(group, false); err != nil {
			return err
		}
		if !rest(expected) {
			return nil
		}
		if err := s.writeOut(group, true); err != nil {
			return err
		}
		expected = NextRest(expected, time.Since(began))
		if !rest(0) {
			return nil
		}
	}
	return nil
}

// writeOut begins to send granules to the disk, or waits for them.
func (s *Store) writeOut(group []uint64, wait bool) error {
	for i := 0; i < len(group); {
		j := i + 1
		for j < len(group) && group[j] == group[j-1]+1 {
			j++
		}
		if err := s.file.WriteOut(int64(group[i]<<granuleBits), int64(j-i)<<granuleBits, wait); err != nil {
			return s.done("write out", err)
		}
		i = j
	}
	return nil
}
