package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sort"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OS returns the file system of this machine.
func OS() FS { return osFS{} }

type osFS struct{}

const (
	dirMode  = 0o700 // replicas hold client data: nobody else reads them
	fileMode = 0o600
	// iovMax is the kernel's UIO_MAXIOV: more buffers need another call.
	iovMax = 1024
	// zeroChunk is how much is written at a time where no system call zeroes.
	zeroChunk = 1 << 20
)

func (osFS) Open(path string, flags Flag) (File, error) {
	mode := unix.O_CLOEXEC
	if flags&ReadOnly != 0 {
		mode |= unix.O_RDONLY
	} else {
		mode |= unix.O_RDWR
	}
	if flags&Create != 0 {
		mode |= unix.O_CREAT
	}
	if flags&Exclusive != 0 {
		mode |= unix.O_EXCL
	}
	fd, err := openRetry(path, mode)
	if flags&Claim != 0 {
		err = inUse(err) // some kernels let nobody write to a device that is mounted
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if flags&Claim != 0 {
		if fd, err = claim(fd, path, mode, st.Mode&unix.S_IFMT == unix.S_IFBLK); err != nil {
			return nil, &fs.PathError{Op: "claim", Path: path, Err: err}
		}
	}
	f := &osFile{fd: fd, path: path}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFBLK:
		f.block = true
	default:
		_ = unix.Close(fd)
		return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("neither a regular file nor a block device")}
	}
	f.refs.Store(1)
	return f, nil
}

// claim makes an open file ours alone, among those who claim it. It gives another
// descriptor for a device, and none with an error.
func claim(fd int, path string, mode int, block bool) (int, error) {
	if block {
		// Without O_CREAT it claims a device, as a mount does.
		_ = unix.Close(fd)
		fd, err := openRetry(path, mode&^unix.O_CREAT|unix.O_EXCL)
		return fd, inUse(err)
	}
	err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return fd, nil
	}
	_ = unix.Close(fd)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrLocked
	}
	return -1, err
}

// inUse says what EBUSY means for a device.
func inUse(err error) error {
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("it is mounted, or in use by something else: %w", ErrLocked)
	}
	return err
}

func openRetry(path string, mode int) (int, error) {
	for {
		fd, err := unix.Open(path, mode, fileMode)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

func (osFS) MkdirAll(path string) error           { return os.MkdirAll(path, dirMode) }
func (osFS) Rename(oldPath, newPath string) error { return os.Rename(oldPath, newPath) }
func (osFS) Remove(path string) error             { return os.Remove(path) }

func (osFS) List(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	sort.Strings(names)
	return names, nil
}

func (osFS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if e := d.Close(); err == nil {
		err = e
	}
	return err
}

func (osFS) Total(dir string) (int64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(s.Blocks) * s.Bsize, nil
}

func (osFS) Lock(path string) (Unlocker, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, fileMode)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrLocked, path)
		}
		return nil, &fs.PathError{Op: "flock", Path: path, Err: err}
	}
	return f, nil
}

// osFile is a descriptor with a count of its users: a bare descriptor number
// would name another file as soon as it is closed, and a late write would go
// there.
type osFile struct {
	fd     int
	path   string
	block  bool
	refs   atomic.Int64 // 1 for the open handle, 1 for each call in flight
	closed atomic.Bool
}

func (f *osFile) enter(op string) error {
	for {
		n := f.refs.Load()
		if n <= 0 || f.closed.Load() {
			return &fs.PathError{Op: op, Path: f.path, Err: fs.ErrClosed}
		}
		if f.refs.CompareAndSwap(n, n+1) {
			return nil
		}
	}
}

func (f *osFile) leave() error {
	if f.refs.Add(-1) == 0 {
		return f.fail("close", unix.Close(f.fd))
	}
	return nil
}

func (f *osFile) fail(op string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: f.path, Err: err}
}

func (f *osFile) Close() error {
	if f.closed.Swap(true) {
		return f.fail("close", fs.ErrClosed)
	}
	return f.leave()
}

// do runs one system call until it is not interrupted.
func (f *osFile) do(op string, call func(fd int) error) error {
	if err := f.enter(op); err != nil {
		return err
	}
	defer func() { _ = f.leave() }()
	for {
		if err := call(f.fd); err != unix.EINTR { //nolint:errorlint // a bare errno
			return f.fail(op, err)
		}
	}
}

func (f *osFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.enter("read"); err != nil {
		return 0, err
	}
	defer func() { _ = f.leave() }()
	done := 0
	for done < len(p) {
		n, err := unix.Pread(f.fd, p[done:], off+int64(done))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return done, f.fail("read", err)
		case n == 0:
			return done, io.EOF
		}
		done += n
	}
	return done, nil
}

func (f *osFile) ReadAtNoWait(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := f.enter("read"); err != nil {
		return 0, err
	}
	defer func() { _ = f.leave() }()
	iov := unix.Iovec{Base: &p[0]}
	iov.SetLen(len(p))
	// The last argument but one is the offset's high half, which 64-bit
	// kernels take from the low one.
	n, _, errno := unix.Syscall6(unix.SYS_PREADV2, uintptr(f.fd), uintptr(unsafe.Pointer(&iov)), 1,
		uintptr(off), uintptr(off>>32), unix.RWF_NOWAIT)
	switch {
	case errno == unix.EAGAIN || errno == unix.EOPNOTSUPP || errno == unix.ENOSYS || errno == unix.EINVAL || errno == unix.EINTR:
		return 0, ErrWouldBlock
	case errno != 0:
		return 0, f.fail("read", errno)
	case int(n) < len(p):
		// Partly cached, or at the end of the file: let the waiting read tell.
		return 0, ErrWouldBlock
	}
	return int(n), nil
}

// writeAlign bounds one system call: no write crosses a multiple of it. The
// kernel's page cache takes a large write into folios as large, and ext4 then
// walks every block of such a folio in each later write into it, however small:
// 4 KiB into folios of 1 MiB cost 11 µs, into those of 256 KiB 4 µs, and the
// large writes themselves gain nothing beyond that.
const writeAlign = 32 << 10

// writeRoom returns how many bytes may be written at off in one call.
func writeRoom(off int64) int { return int(writeAlign - off%writeAlign) }

func (f *osFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.enter("write"); err != nil {
		return 0, err
	}
	defer func() { _ = f.leave() }()
	done := 0
	for done < len(p) {
		at := off + int64(done)
		n, err := unix.Pwrite(f.fd, p[done:min(len(p), done+writeRoom(at))], at)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return done, f.fail("write", err)
		case n == 0:
			return done, f.fail("write", io.ErrShortWrite)
		}
		done += n
	}
	return done, nil
}

// iovPool lends the vectors of WritevAt, which x/sys would allocate anew.
var iovPool = sync.Pool{New: func() any { v := make([]unix.Iovec, 0, 64); return &v }}

func (f *osFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	if err := f.enter("write"); err != nil {
		return 0, err
	}
	defer func() { _ = f.leave() }()
	vec := iovPool.Get().(*[]unix.Iovec)
	defer func() {
		clear(*vec) // the pool must not keep payloads alive
		*vec = (*vec)[:0]
		iovPool.Put(vec)
	}()
	done, first, skip := 0, 0, 0 // skip: bytes of bufs[first] that are written
	for {
		*vec = (*vec)[:0]
		want, room := 0, writeRoom(off+int64(done))
		for i := first; i < len(bufs) && len(*vec) < iovMax && want < room; i++ {
			b := bufs[i]
			if i == first {
				b = b[skip:]
			}
			b = b[:min(len(b), room-want)]
			if len(b) == 0 {
				continue
			}
			v := unix.Iovec{Base: &b[0]}
			v.SetLen(len(b))
			*vec = append(*vec, v)
			want += len(b)
		}
		if want == 0 {
			return done, nil
		}
		n, err := pwritev(f.fd, *vec, off+int64(done))
		if err == unix.EINTR { //nolint:errorlint // a bare errno
			continue
		}
		if err == nil && n == 0 {
			err = io.ErrShortWrite
		}
		if err != nil {
			return done, f.fail("write", err)
		}
		done += n
		for n > 0 {
			if left := len(bufs[first]) - skip; n < left {
				skip += n
				break
			} else {
				n -= left
				first, skip = first+1, 0
			}
		}
	}
}

func pwritev(fd int, vec []unix.Iovec, off int64) (int, error) {
	var n uintptr
	var errno unix.Errno
	if len(vec) == 1 { // no vector for the kernel to fetch
		n, _, errno = unix.Syscall6(unix.SYS_PWRITE64, uintptr(fd), uintptr(unsafe.Pointer(vec[0].Base)), uintptr(vec[0].Len), uintptr(off), 0, 0)
	} else {
		n, _, errno = unix.Syscall6(unix.SYS_PWRITEV, uintptr(fd), uintptr(unsafe.Pointer(&vec[0])), uintptr(len(vec)),
			uintptr(off), uintptr(off>>32), 0)
	}
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func (f *osFile) Datasync() error { return f.do("fdatasync", unix.Fdatasync) }
func (f *osFile) Sync() error     { return f.do("fsync", unix.Fsync) }

func (f *osFile) WriteOut(off, n int64, wait bool) error {
	if n <= 0 {
		return nil // the kernel would take 0 for all
	}
	flags := unix.SYNC_FILE_RANGE_WRITE
	if wait {
		flags |= unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	}
	err := f.do("sync_file_range", func(fd int) error { return unix.SyncFileRange(fd, off, n, flags) })
	if unsupported(err) {
		return nil
	}
	return err
}

func (f *osFile) Truncate(size int64) error {
	return f.do("truncate", func(fd int) error { return unix.Ftruncate(fd, size) })
}

func (f *osFile) Allocate(off, n int64) error {
	if f.block || n == 0 {
		return nil // a device has all its room
	}
	err := f.do("fallocate", func(fd int) error { return unix.Fallocate(fd, 0, off, n) })
	if !unsupported(err) {
		return err
	}
	size, err := f.Size()
	if err != nil || size >= off+n {
		return err
	}
	return f.Truncate(off + n)
}

func (f *osFile) PunchHole(off, n int64) error {
	if n == 0 {
		return nil
	}
	err := f.do("punch hole", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if !unsupported(err) {
		return err
	}
	return f.zero(off, n)
}

func (f *osFile) ZeroRange(off, n int64) error {
	if n == 0 {
		return nil
	}
	err := f.do("zero range", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if !unsupported(err) {
		return err
	}
	return f.zero(off, n)
}

// zero makes a range read as zeroes where fallocate cannot. BLKDISCARD is not
// among the ways: a device need not read zeroes after it.
func (f *osFile) zero(off, n int64) error {
	if f.block && off%512 == 0 && n%512 == 0 {
		err := f.do("BLKZEROOUT", func(fd int) error {
			span := [2]uint64{uint64(off), uint64(n)}
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&span))); errno != 0 {
				return errno
			}
			return nil
		})
		if !unsupported(err) {
			return err
		}
	}
	size, err := f.Size()
	if err != nil {
		return err
	}
	n = min(n, size-off) // neither call may change the size
	for zeroes := make([]byte, min(max(n, 0), zeroChunk)); n > 0; {
		k := min(n, int64(len(zeroes)))
		if _, err := f.WriteAt(zeroes[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV)
}

func (f *osFile) SeekData(off int64) (int64, error) {
	return f.seek("seek data", off, unix.SEEK_DATA)
}

func (f *osFile) SeekHole(off int64) (int64, error) {
	return f.seek("seek hole", off, unix.SEEK_HOLE)
}

// seek moves the descriptor's own offset, which no other method uses.
func (f *osFile) seek(op string, off int64, whence int) (int64, error) {
	size, err := f.Size()
	if err != nil {
		return 0, err
	}
	if off >= size {
		if whence == unix.SEEK_HOLE {
			return off, nil
		}
		return 0, io.EOF
	}
	var at int64
	err = f.do(op, func(fd int) (err error) { at, err = unix.Seek(fd, off, whence); return err })
	switch {
	case errors.Is(err, unix.ENXIO):
		return 0, io.EOF
	case unsupported(err) && whence == unix.SEEK_DATA:
		return off, nil
	case unsupported(err):
		return size, nil
	}
	return at, err
}

func (f *osFile) Size() (int64, error) {
	var size int64
	err := f.do("size", func(fd int) error {
		if f.block {
			var n uint64
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&n))); errno != 0 {
				return errno
			}
			size = int64(n)
			return nil
		}
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		size = st.Size
		return err
	})
	return size, err
}
