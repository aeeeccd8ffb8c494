package store

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// A device, or a file that was there before, holds bytes that nobody has written
// to the volume. Replicas that show them differ, and a volume that is made anew
// shows what was deleted. So whatever a store takes in is made to read as zeroes:
// what lies in a hole costs nothing, and the rest what the device takes for it.

// clearChunk is how much is made zero between two looks at whether to go on: a
// disk that writes its zeroes takes less than a second for it.
const clearChunk = 64 << 20

// Clear makes the whole store read as zeroes, durably. It is for one that is
// being made: nobody else uses it.
func (s *Store) Clear(ctx context.Context) error {
	var err error
	for at := uint64(0); at < s.Size(); {
		if at, err = s.clear(at, s.Size()); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("store: clear %s: %w", s.path, err)
		}
	}
	return s.done("sync", s.file.Sync())
}

// Prepare makes what lies behind the store's end, up to size, read as zeroes, so
// that Resize has it done. The store is in use meanwhile.
func (s *Store) Prepare(ctx context.Context, size uint64) error {
	have, err := s.file.Size()
	if err != nil {
		return fmt.Errorf("store: size of %s: %w", s.path, err)
	}
	for end := min(size, uint64(have)); ctx.Err() == nil; {
		if done, err := s.prepareNext(end); done || err != nil {
			return err
		}
	}
	return fmt.Errorf("store: clear %s: %w", s.path, ctx.Err())
}

// prepareNext does one chunk. It looks anew at where the store ends: what Resize
// has taken in meanwhile may have been written to.
func (s *Store) prepareNext(end uint64) (done bool, err error) {
	s.growing.Lock()
	defer s.growing.Unlock()
	at := max(s.Size(), s.cleared)
	if at >= end {
		return true, nil
	}
	if at, err = s.clear(at, end); err == nil {
		s.cleared = at
	}
	return false, err
}

// clear makes the next bytes from off on, up to end, read as zeroes, and returns
// up to where they do.
func (s *Store) clear(off, end uint64) (uint64, error) {
	data, err := s.file.SeekData(int64(off))
	switch {
	case errors.Is(err, io.EOF):
		return end, nil // holes all the way
	case err != nil:
		return off, fmt.Errorf("store: find what is in %s: %w", s.path, err)
	}
	if off = max(off, uint64(data)); off >= end {
		return end, nil
	}
	n := min(end-off, clearChunk)
	return off + n, s.done("clear", s.file.PunchHole(int64(off), int64(n)))
}
