package vfs

// Op names a call, for a Hook.
type Op string

// The calls that a Hook sees.
const (
	OpOpen     Op = "open"
	OpMkdir    Op = "mkdir"
	OpRename   Op = "rename"
	OpRemove   Op = "remove"
	OpList     Op = "list"
	OpSyncDir  Op = "syncdir"
	OpLock     Op = "lock"
	OpRead     Op = "read"
	OpWrite    Op = "write"
	OpSync     Op = "sync" // Sync and Datasync
	OpWriteOut Op = "writeout"
	OpTruncate Op = "truncate"
	OpAllocate Op = "allocate"
	OpZero     Op = "zero" // PunchHole and ZeroRange
	OpSeek     Op = "seek"
	OpSize     Op = "size"
	OpClose    Op = "close"
)

// Mutates reports whether a call changes bytes, names or what is durable.
func (o Op) Mutates() bool {
	switch o {
	case OpMkdir, OpRename, OpRemove, OpSyncDir, OpWrite, OpSync, OpTruncate, OpAllocate, OpZero:
		return true
	case OpOpen, OpLock, OpList, OpRead, OpSeek, OpSize, OpClose, OpWriteOut:
	}
	return false
}

// Call is one call that is about to be made.
type Call struct {
	Op   Op
	Path string
	Off  int64
	Len  int64 // bytes
}

// Hook is asked before each call. An error is returned to the caller instead
// of the call's result, and the call is not made. A hook may block: that is a
// slow disk. It is called from the caller's goroutine, so several at a time.
type Hook func(Call) error

// Short makes a write that a Hook fails write its first N bytes nevertheless.
type Short struct {
	N   int
	Err error
}

// Error implements error.
func (s *Short) Error() string { return s.Err.Error() }

// Unwrap gives the error that the caller asked for.
func (s *Short) Unwrap() error { return s.Err }

// Inject returns fs with a hook before every call.
func Inject(fs FS, hook Hook) FS { return &injectFS{fs, hook} }

type injectFS struct {
	fs   FS
	hook Hook
}

func (i *injectFS) Open(path string, flags Flag) (File, error) {
	if err := i.hook(Call{Op: OpOpen, Path: path}); err != nil {
		return nil, err
	}
	f, err := i.fs.Open(path, flags)
	if err != nil {
		return nil, err
	}
	return &injectFile{f, path, i.hook}, nil
}

func (i *injectFS) do(c Call, call func() error) error {
	if err := i.hook(c); err != nil {
		return err
	}
	return call()
}

func (i *injectFS) MkdirAll(path string) error {
	return i.do(Call{Op: OpMkdir, Path: path}, func() error { return i.fs.MkdirAll(path) })
}

func (i *injectFS) Rename(oldPath, newPath string) error {
	return i.do(Call{Op: OpRename, Path: oldPath}, func() error { return i.fs.Rename(oldPath, newPath) })
}

func (i *injectFS) Remove(path string) error {
	return i.do(Call{Op: OpRemove, Path: path}, func() error { return i.fs.Remove(path) })
}

func (i *injectFS) SyncDir(dir string) error {
	return i.do(Call{Op: OpSyncDir, Path: dir}, func() error { return i.fs.SyncDir(dir) })
}

func (i *injectFS) Total(dir string) (int64, error) { return i.fs.Total(dir) }

func (i *injectFS) List(dir string) (names []string, err error) {
	err = i.do(Call{Op: OpList, Path: dir}, func() error { names, err = i.fs.List(dir); return err })
	return names, err
}

func (i *injectFS) Lock(path string) (u Unlocker, err error) {
	err = i.do(Call{Op: OpLock, Path: path}, func() error { u, err = i.fs.Lock(path); return err })
	return u, err
}

type injectFile struct {
	f    File
	path string
	hook Hook
}

func (f *injectFile) ask(op Op, off, n int64) error {
	return f.hook(Call{Op: op, Path: f.path, Off: off, Len: n})
}

func (f *injectFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.ask(OpRead, off, int64(len(p))); err != nil {
		return 0, err
	}
	return f.f.ReadAt(p, off)
}

func (f *injectFile) ReadAtNoWait(p []byte, off int64) (int, error) {
	if err := f.ask(OpRead, off, int64(len(p))); err != nil {
		return 0, err
	}
	return f.f.ReadAtNoWait(p, off)
}

func (f *injectFile) WriteAt(p []byte, off int64) (int, error) {
	return f.WritevAt([][]byte{p}, off)
}

func (f *injectFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	if err := f.ask(OpWrite, off, int64(n)); err != nil {
		done := 0
		if s, ok := err.(*Short); ok { //nolint:errorlint // a hook returns it bare
			for _, b := range bufs {
				k, e := f.f.WriteAt(b[:max(min(len(b), s.N-done), 0)], off+int64(done))
				done += k
				if e != nil {
					return done, e
				}
			}
		}
		return done, err
	}
	return f.f.WritevAt(bufs, off)
}

func (f *injectFile) Datasync() error {
	if err := f.ask(OpSync, 0, 0); err != nil {
		return err
	}
	return f.f.Datasync()
}

func (f *injectFile) Sync() error {
	if err := f.ask(OpSync, 0, 0); err != nil {
		return err
	}
	return f.f.Sync()
}

func (f *injectFile) WriteOut(off, n int64, wait bool) error {
	if err := f.ask(OpWriteOut, off, n); err != nil {
		return err
	}
	return f.f.WriteOut(off, n, wait)
}

func (f *injectFile) Truncate(size int64) error {
	if err := f.ask(OpTruncate, size, 0); err != nil {
		return err
	}
	return f.f.Truncate(size)
}

func (f *injectFile) Allocate(off, n int64) error {
	if err := f.ask(OpAllocate, off, n); err != nil {
		return err
	}
	return f.f.Allocate(off, n)
}

func (f *injectFile) PunchHole(off, n int64) error {
	if err := f.ask(OpZero, off, n); err != nil {
		return err
	}
	return f.f.PunchHole(off, n)
}

func (f *injectFile) ZeroRange(off, n int64) error {
	if err := f.ask(OpZero, off, n); err != nil {
		return err
	}
	return f.f.ZeroRange(off, n)
}

func (f *injectFile) SeekData(off int64) (int64, error) {
	if err := f.ask(OpSeek, off, 0); err != nil {
		return 0, err
	}
	return f.f.SeekData(off)
}

func (f *injectFile) SeekHole(off int64) (int64, error) {
	if err := f.ask(OpSeek, off, 0); err != nil {
		return 0, err
	}
	return f.f.SeekHole(off)
}

func (f *injectFile) Unwritten(off, n int64) (at, length int64, err error) {
	if err := f.ask(OpSeek, off, n); err != nil {
		return 0, 0, err
	}
	return f.f.Unwritten(off, n)
}

func (f *injectFile) Size() (int64, error) {
	if err := f.ask(OpSize, 0, 0); err != nil {
		return 0, err
	}
	return f.f.Size()
}

// Close asks the hook, and closes in any case.
func (f *injectFile) Close() error {
	err := f.ask(OpClose, 0, 0)
	if e := f.f.Close(); err == nil {
		err = e
	}
	return err
}
