// Package store keeps one replica's bytes: the backing store (a sparse file or
// a block device), the meta file (the replica's small durable state) and the
// checkpoint (how far the log is applied, and what must be known at that
// point). The formats are described in docs/format/store.md.
package store

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/blockstep/blockstep/internal/vfs"
)

// The errors. Each is returned wrapped, with what was found and where.
var (
	// ErrCorrupt is returned when a file that was durable does not verify.
	ErrCorrupt = errors.New("file is corrupt")
	// ErrNewer is returned when a file was written by a newer version.
	ErrNewer = errors.New("file was written by a newer version of blockstep")
	// ErrBusy is returned when somebody else has claimed a backing store: another
	// replica, or a mount.
	ErrBusy = errors.New("backing store is in use")
	// ErrSize is returned when a backing store is smaller than its volume.
	ErrSize = errors.New("backing store is too small")
	// ErrRange is returned for an extent beyond the end of the store.
	ErrRange = errors.New("beyond the end of the backing store")
	// ErrFailed is returned by every change after one that failed: the kernel
	// may have dropped dirty pages, so nothing later can be trusted.
	ErrFailed = errors.New("backing store has failed and stays failed")
)

// Store is the backing store of one replica. All methods may be called from
// several goroutines; who needs an order between two calls keeps it.
type Store struct {
	fs      vfs.FS
	path    string
	file    vfs.File
	size    atomic.Uint64
	failure atomic.Pointer[error]
	dirtied dirtied

	growing sync.Mutex // held while what lies behind size is cleared, or taken in
	cleared uint64     // up to here the bytes behind size read as zeroes; guarded by growing
}

// OpenStore opens the backing store at path. With create, a file that is not
// there is made, sparse, with its directory entry durable; an existing file or
// block device must have at least size bytes, or be a file that can grow.
// Without create one that has fewer is ErrSize: it has lost its end, which no
// zeroes replace. Size 0 takes the size that is there. What somebody else has
// claimed (another replica, a mount) is ErrBusy.
func OpenStore(fs vfs.FS, path string, size uint64, create bool) (*Store, error) {
	flags := vfs.Claim
	if create {
		flags |= vfs.Create
	}
	f, err := fs.Open(path, flags)
	if errors.Is(err, vfs.ErrLocked) {
		return nil, fmt.Errorf("store: %w: %w", ErrBusy, err)
	}
	if err != nil {
		return nil, fmt.Errorf("store: open the backing store: %w", err)
	}
	s := &Store{fs: fs, path: path, file: f}
	if err := s.open(size, create); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}

func (s *Store) open(size uint64, create bool) error {
	have, err := s.file.Size()
	if err != nil {
		return fmt.Errorf("store: size of %s: %w", s.path, err)
	}
	if size == 0 {
		size = uint64(have)
	}
	switch {
	case uint64(have) >= size:
	case !create:
		return fmt.Errorf("store: %w: %s has %d bytes, and the volume %d", ErrSize, s.path, have, size)
	default:
		if err := s.file.Truncate(int64(size)); err != nil {
			return fmt.Errorf("store: %w: %s has %d bytes, the volume %d, and it cannot grow: %w", ErrSize, s.path, have, size, err)
		}
	}
	s.size.Store(size)
	if !create {
		return nil
	}
	if err := s.file.Sync(); err != nil {
		return fmt.Errorf("store: sync %s: %w", s.path, err)
	}
	if err := s.fs.SyncDir(filepath.Dir(s.path)); err != nil {
		return fmt.Errorf("store: sync the directory of %s: %w", s.path, err)
	}
	return nil
}

// Size returns the bytes of the volume.
func (s *Store) Size() uint64 { return s.size.Load() }

// ReadAt fills p from byte off on.
func (s *Store) ReadAt(p []byte, off uint64) error {
	if err := s.check(off, uint64(len(p))); err != nil {
		return err
	}
	if _, err := s.file.ReadAt(p, int64(off)); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF // somebody has cut the file under us
		}
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

// ReadAtNoWait is ReadAt when the page cache has all of p, and returns
// vfs.ErrWouldBlock (unwrapped, without allocating) when it does not.
func (s *Store) ReadAtNoWait(p []byte, off uint64) error {
	if err := s.check(off, uint64(len(p))); err != nil {
		return err
	}
	_, err := s.file.ReadAtNoWait(p, int64(off))
	return err
}

// WriteAt writes p at byte off. Like all changes it is durable after Sync.
func (s *Store) WriteAt(p []byte, off uint64) error {
	if err := s.change(off, uint64(len(p))); err != nil {
		return err
	}
	_, err := s.file.WriteAt(p, int64(off))
	s.dirtied.note(off, uint64(len(p)))
	return s.done("write", err)
}

// WritevAt writes the buffers one behind the other, in one system call.
func (s *Store) WritevAt(bufs [][]byte, off uint64) error {
	n := uint64(0)
	for _, b := range bufs {
		n += uint64(len(b))
	}
	if err := s.change(off, n); err != nil {
		return err
	}
	_, err := s.file.WritevAt(bufs, int64(off))
	s.dirtied.note(off, n)
	return s.done("write", err)
}

// Zero makes an extent read as zeroes. With punch its room is given back where
// the file system can; without, it stays allocated.
func (s *Store) Zero(off, n uint64, punch bool) error {
	if err := s.change(off, n); err != nil || n == 0 {
		return err
	}
	if punch {
		return s.done("punch a hole", s.file.PunchHole(int64(off), int64(n)))
	}
	return s.done("zero", s.file.ZeroRange(int64(off), int64(n)))
}

// Extents calls fn for each run of an extent, in order: data, or a hole that
// reads as zeroes. Runs next to one another differ in kind. An error from fn
// ends it and is returned.
func (s *Store) Extents(off, n uint64, fn func(off, n uint64, data bool) error) error {
	if err := s.check(off, n); err != nil {
		return err
	}
	for end := off + n; off < end; {
		data, err := s.file.SeekData(int64(off))
		switch {
		case errors.Is(err, io.EOF):
			data = int64(end)
		case err != nil:
			return fmt.Errorf("store: %w", err)
		}
		if at := min(uint64(data), end); at > off {
			if err := fn(off, at-off, false); err != nil {
				return err
			}
			off = at
			continue
		}
		hole, err := s.file.SeekHole(int64(off))
		if err != nil {
			return fmt.Errorf("store: %w", err)
		}
		// The two answers are not of one moment: always get on.
		at := min(max(uint64(hole), off+1), end)
		if err := fn(off, at-off, true); err != nil {
			return err
		}
		off = at
	}
	return nil
}

// Unwritten returns the first run within a hole (of Extents) that has room all the
// same, as Zero without punch leaves it: a write there needs none. n is 0 when there
// is no such run.
func (s *Store) Unwritten(off, end uint64) (at, n uint64, err error) {
	if err := s.check(off, end-off); err != nil {
		return 0, 0, err
	}
	from, length, err := s.file.Unwritten(int64(off), int64(end-off))
	if err != nil {
		return 0, 0, fmt.Errorf("store: %w", err)
	}
	return uint64(from), uint64(length), nil
}

// Sync makes all changes that returned before the call durable. A failure is
// final.
func (s *Store) Sync() error {
	if e := s.failure.Load(); e != nil {
		return *e
	}
	return s.done("sync", s.file.Datasync())
}

// Resize makes the store larger, durably; what comes in reads as zeroes. It
// returns ErrSize for a device that has not that much room, and for a size below
// the present one.
func (s *Store) Resize(size uint64) error {
	if e := s.failure.Load(); e != nil {
		return *e
	}
	s.growing.Lock()
	defer s.growing.Unlock()
	old := s.Size()
	if size < old {
		return fmt.Errorf("store: %w: a volume does not shrink (from %d to %d)", ErrSize, old, size)
	}
	if size == old {
		return nil
	}
	have, err := s.file.Size()
	if err != nil {
		return fmt.Errorf("store: size of %s: %w", s.path, err)
	}
	if uint64(have) < size {
		if err := s.file.Truncate(int64(size)); err != nil {
			return fmt.Errorf("store: %w: %s has %d bytes, and it cannot grow to %d: %w", ErrSize, s.path, have, size, err)
		}
	}
	for at := max(old, s.cleared); at < size; {
		if at, err = s.clear(at, size); err != nil {
			return err
		}
	}
	if err := s.done("sync", s.file.Sync()); err != nil {
		return err
	}
	s.size.Store(size)
	return nil
}

// Close closes the store. It syncs nothing.
func (s *Store) Close() error { return s.file.Close() }

func (s *Store) check(off, n uint64) error {
	if size := s.Size(); off > size || n > size-off {
		return fmt.Errorf("store: %w: bytes %d to %d of %d", ErrRange, off, off+n, size)
	}
	return nil
}

func (s *Store) change(off, n uint64) error {
	if e := s.failure.Load(); e != nil {
		return *e
	}
	return s.check(off, n)
}

func (s *Store) done(op string, err error) error {
	if err == nil {
		return nil
	}
	return s.fail(op, err)
}

// fail keeps its argument: apart from done, which then need not allocate one for
// each call that went well.
func (s *Store) fail(op string, err error) error {
	err = fmt.Errorf("store: %w: %s: %w", ErrFailed, op, err)
	if !s.failure.CompareAndSwap(nil, &err) {
		return *s.failure.Load()
	}
	return err
}
