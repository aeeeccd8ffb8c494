// Package vfs is the file system as blockstep may use it: a narrow interface,
// one implementation over Linux system calls, one in memory that can lose
// whatever was not fsynced, and a wrapper that injects errors and delays.
//
// # What a caller may rely on
//
//  1. Bytes written are read back at once by anyone in the same boot, fsynced
//     or not, also after the process was killed.
//  2. After a power cut, of the bytes written since the last Datasync or Sync
//     of the file, any subset at a grain of one sector (512 bytes) may be
//     there. A sector is never half old and half new.
//  3. Datasync makes durable the bytes and the size of the file; it need not
//     touch the inode when neither size nor allocation changed. A directory
//     entry (create, rename, remove) is durable after SyncDir of its directory.
//  4. A failed Datasync or Sync is final: the kernel may have dropped the dirty
//     pages, and a second call that succeeds proves nothing. Nobody retries.
package vfs

import (
	"errors"
	"io/fs"
	"path/filepath"
)

// Flag says how Open opens. Without ReadOnly the file is open for reading and
// writing.
type Flag uint8

// The flags of Open.
const (
	ReadOnly  Flag = 1 << iota // no writes through this handle
	Create                     // make the file when it is not there
	Exclusive                  // with Create: fail with fs.ErrExist when it is there
	// Claim: fail with ErrLocked when somebody else has claimed it. A block device
	// is claimed by a mount, too.
	Claim
)

// ErrWouldBlock is returned when a read without waiting would have had to wait
// for the disk, and when the file system cannot tell.
var ErrWouldBlock = errors.New("vfs: the bytes are not in memory")

// ErrLocked is returned when another process (or this one) holds the lock.
var ErrLocked = errors.New("vfs: locked by another process")

// ErrCrashed is returned by a handle of a Mem that has crashed since the handle
// was opened.
var ErrCrashed = errors.New("vfs: the file system crashed under this handle")

// FS is a file system. Its methods may be called from several goroutines.
// Paths are as for package os; errors match fs.ErrNotExist and fs.ErrExist.
type FS interface {
	// Open opens a file, or a block device where the OS has them.
	Open(path string, flags Flag) (File, error)
	// MkdirAll makes a directory and its parents. Each new entry is durable
	// only after SyncDir of its parent.
	MkdirAll(path string) error
	// Rename replaces newPath atomically.
	Rename(oldPath, newPath string) error
	// Remove removes a file or an empty directory.
	Remove(path string) error
	// List returns the names in a directory, sorted.
	List(dir string) ([]string, error)
	// SyncDir makes the entries of a directory durable.
	SyncDir(dir string) error
	// Total returns how many bytes the file system that a directory is in has, free
	// or not.
	Total(dir string) (int64, error)
	// Lock makes path a file and takes an exclusive lock on it that ends with
	// Close or the process. It returns ErrLocked when somebody has it.
	Lock(path string) (Unlocker, error)
}

// ReplaceFile makes a file hold b, durably: after a crash it holds that or what it
// held before. It writes beside it, to path.new, and renames.
func ReplaceFile(fsys FS, path string, b []byte) error {
	next := path + ".new"
	if err := fsys.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := fsys.Open(next, Create|Exclusive)
	if err != nil {
		return err
	}
	if len(b) > 0 {
		_, err = f.WriteAt(b, 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := fsys.Rename(next, path); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(path))
}

// MakeDir makes a directory and those above it that are missing, all durably:
// it syncs the parent of each new entry. What a crash has left half way may
// be made again.
func MakeDir(fsys FS, dir string) error {
	var made []string
	for d := filepath.Clean(dir); ; d = filepath.Dir(d) {
		_, err := fsys.List(d)
		if err == nil || d == filepath.Dir(d) {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		made = append(made, d)
	}
	if err := fsys.MkdirAll(dir); err != nil {
		return err
	}
	if len(made) == 0 {
		// It may be another's, who was killed before it was synced.
		made = append(made, filepath.Clean(dir))
	}
	for _, d := range made {
		if err := fsys.SyncDir(filepath.Dir(d)); err != nil {
			return err
		}
	}
	return nil
}

// Unlocker gives a lock back.
type Unlocker interface{ Close() error }

// File is an open file or block device. All methods may be called from several
// goroutines; Close waits for nobody, but the descriptor is closed only after
// the calls in flight have returned, so none of them can hit another file.
type File interface {
	// ReadAt is as io.ReaderAt: io.EOF with fewer bytes than asked.
	ReadAt(p []byte, off int64) (int, error)
	// ReadAtNoWait reads only what is in the page cache: all of p, or
	// ErrWouldBlock and nothing that the caller may use.
	ReadAtNoWait(p []byte, off int64) (int, error)
	// WriteAt writes all of p, or returns an error.
	WriteAt(p []byte, off int64) (int, error)
	// WritevAt writes the buffers one behind the other, in as few system calls
	// as the OS allows. It allocates nothing in the steady state, keeps none of
	// the slices, and changes none. Empty buffers are allowed.
	WritevAt(bufs [][]byte, off int64) (int, error)
	Datasync() error
	Sync() error
	// WriteOut begins to send to the disk what was written of a range, so that
	// a later Datasync finds less to do; with wait it returns when the disk has
	// taken it. It makes nothing durable. Its error is final as one of Datasync
	// is: the kernel tells of a lost page only once. Where there is no such call
	// it does nothing.
	WriteOut(off, n int64, wait bool) error
	// Truncate sets the size; a block device refuses.
	Truncate(size int64) error
	// Allocate reserves room for a range and makes the file at least that
	// long; what was not written reads as zeroes. On a file system that cannot
	// reserve it only sets the size.
	Allocate(off, n int64) error
	// PunchHole makes a range read as zeroes and gives its room back where the
	// file system can. It never changes the size.
	PunchHole(off, n int64) error
	// ZeroRange makes a range read as zeroes and keeps it allocated. It never
	// changes the size.
	ZeroRange(off, n int64) error
	// SeekData returns the first offset >= off that holds data, io.EOF when
	// there is none. SeekHole returns the first hole, at the latest the size.
	// A file system without holes is all data.
	SeekData(off int64) (int64, error)
	SeekHole(off int64) (int64, error)
	// Unwritten returns the first run in a range that has room but no data, as
	// Allocate and ZeroRange leave it: SeekHole takes it for a hole. Length 0:
	// there is none, or the file system does not tell.
	Unwritten(off, n int64) (at, length int64, err error)
	// Size returns the size in bytes, of a block device its capacity.
	Size() (int64, error)
	Close() error
}
