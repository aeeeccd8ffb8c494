package e2e

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/blockstep/blockstep/internal/vfs"
)

// crashDisk is a disk that really loses what was not fsynced: a FUSE mount over
// vfs.Mem, whose Crash keeps a random subset of the unsynced sectors, sizes and
// names. The mount writes through, so what a daemon has written is in Mem as
// soon as its system call returns. It can also hang or fail chosen calls.
type crashDisk struct {
	t      *testing.T
	dir    string // where it is mounted
	mem    *vfs.Mem
	files  vfs.FS // mem behind the hook
	hook   atomic.Pointer[vfs.Hook]
	server *fuse.Server
}

// newCrashDisk mounts an empty disk at dir, which it makes.
func newCrashDisk(t *testing.T, dir string, seed uint64) *crashDisk {
	t.Helper()
	needTool(t, "fusermount3")
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Fatalf("a disk that loses writes is a FUSE mount: %v (modprobe fuse; in a container: --device /dev/fuse)", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	d := &crashDisk{t: t, dir: dir, mem: vfs.NewMem(seed)}
	d.files = vfs.Inject(d.mem, func(c vfs.Call) error {
		if hook := d.hook.Load(); hook != nil {
			return (*hook)(c)
		}
		return nil
	})
	d.mount()
	return d
}

func (d *crashDisk) mount() {
	d.t.Helper()
	server, err := fusefs.Mount(d.dir, &diskNode{d: d}, &fusefs.Options{
		MountOptions: fuse.MountOptions{
			DirectMount: os.Geteuid() == 0, FsName: "crashdisk", Name: "crashdisk",
			MaxWrite: 1 << 20, DisableXAttrs: true, MaxBackground: 64,
		},
	})
	if err != nil {
		d.t.Fatalf("mount a disk that loses writes: %v", err)
	}
	d.server = server
}

func (d *crashDisk) unmount() {
	d.t.Helper()
	d.obey(nil)
	if err := d.server.Unmount(); err != nil {
		d.t.Errorf("unmount %s: %v", d.dir, err)
	}
	d.server.Wait()
}

// obey sets what is asked before each call: nil for a disk in good health.
func (d *crashDisk) obey(hook vfs.Hook) {
	if hook == nil {
		d.hook.Store(nil)
		return
	}
	d.hook.Store(&hook)
}

// powerCut loses a random part of what was not fsynced. Nobody may have a file
// open: the machine is dead.
func (d *crashDisk) powerCut() {
	d.t.Helper()
	d.unmount() // the kernel's page cache goes with it
	d.mem.Crash()
	d.mount()
}

// stall hangs the calls that match until release is called.
func (d *crashDisk) stall(match func(vfs.Call) bool) (release func()) {
	gate := make(chan struct{})
	d.obey(func(c vfs.Call) error {
		if match(c) {
			<-gate
		}
		return nil
	})
	return sync.OnceFunc(func() { d.obey(nil); close(gate) })
}

// diskNode is a file or directory of a crashDisk.
type diskNode struct {
	fusefs.Inode
	d *crashDisk
}

// diskFile is an open file.
type diskFile struct{ f vfs.File }

func (n *diskNode) path(names ...string) string {
	return path.Join(append([]string{"/", n.Path(nil)}, names...)...)
}

func errno(err error) syscall.Errno {
	var e syscall.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e
	case errors.Is(err, fs.ErrNotExist):
		return syscall.ENOENT
	case errors.Is(err, fs.ErrExist):
		return syscall.EEXIST
	}
	return syscall.EIO
}

// attr finds what is at a path: a directory, or a file of a size.
func (n *diskNode) attr(at string, out *fuse.Attr) syscall.Errno {
	if _, err := n.d.mem.List(at); err == nil {
		out.Mode = syscall.S_IFDIR | 0o700
		return 0
	}
	f, err := n.d.mem.Open(at, vfs.ReadOnly)
	if err != nil {
		return errno(err)
	}
	defer f.Close()
	return fileAttr(f, out)
}

func fileAttr(f vfs.File, out *fuse.Attr) syscall.Errno {
	size, err := f.Size()
	if err != nil {
		return errno(err)
	}
	out.Mode, out.Size, out.Blocks = syscall.S_IFREG|0o600, uint64(size), uint64(size+511)/512
	return 0
}

func (n *diskNode) child(ctx context.Context, mode uint32) *fusefs.Inode {
	return n.NewInode(ctx, &diskNode{d: n.d}, fusefs.StableAttr{Mode: mode & syscall.S_IFMT})
}

func (n *diskNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	if e := n.attr(n.path(name), &out.Attr); e != 0 {
		return nil, e
	}
	if known := n.GetChild(name); known != nil && known.Mode() == out.Attr.Mode&syscall.S_IFMT {
		return known, 0
	}
	return n.child(ctx, out.Attr.Mode), 0
}

func (n *diskNode) Getattr(_ context.Context, h fusefs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	if f, ok := h.(*diskFile); ok {
		return fileAttr(f.f, &out.Attr)
	}
	return n.attr(n.path(), &out.Attr)
}

func (n *diskNode) Setattr(_ context.Context, h fusefs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	f, ok := h.(*diskFile)
	if !ok {
		if n.IsDir() {
			return n.attr(n.path(), &out.Attr)
		}
		opened, err := n.d.files.Open(n.path(), 0)
		if err != nil {
			return errno(err)
		}
		defer opened.Close()
		f = &diskFile{opened}
	}
	if size, ok := in.GetSize(); ok {
		if err := f.f.Truncate(int64(size)); err != nil {
			return errno(err)
		}
	}
	return fileAttr(f.f, &out.Attr)
}

func (n *diskNode) Create(ctx context.Context, name string, flags, _ uint32, out *fuse.EntryOut) (*fusefs.Inode, fusefs.FileHandle, uint32, syscall.Errno) {
	how := vfs.Create
	if flags&syscall.O_EXCL != 0 {
		how |= vfs.Exclusive
	}
	f, err := n.d.files.Open(n.path(name), how)
	if err != nil {
		return nil, nil, 0, errno(err)
	}
	if e := fileAttr(f, &out.Attr); e != 0 {
		return nil, nil, 0, e
	}
	return n.child(ctx, syscall.S_IFREG), &diskFile{f}, 0, 0
}

func (n *diskNode) Open(_ context.Context, flags uint32) (fusefs.FileHandle, uint32, syscall.Errno) {
	how := vfs.Flag(0)
	if flags&syscall.O_ACCMODE == syscall.O_RDONLY {
		how = vfs.ReadOnly
	}
	f, err := n.d.files.Open(n.path(), how)
	if err != nil {
		return nil, 0, errno(err)
	}
	if flags&syscall.O_TRUNC != 0 {
		if err := f.Truncate(0); err != nil {
			return nil, 0, errno(err)
		}
	}
	return &diskFile{f}, 0, 0
}

func (n *diskNode) Release(_ context.Context, h fusefs.FileHandle) syscall.Errno {
	return errno(h.(*diskFile).f.Close())
}

func (n *diskNode) Flush(context.Context, fusefs.FileHandle) syscall.Errno { return 0 }

func (n *diskNode) Read(_ context.Context, h fusefs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	got, err := h.(*diskFile).f.ReadAt(dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, errno(err)
	}
	return fuse.ReadResultData(dest[:got]), 0
}

func (n *diskNode) Write(_ context.Context, h fusefs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	wrote, err := h.(*diskFile).f.WriteAt(data, off)
	return uint32(wrote), errno(err)
}

// Fsync is fsync and fdatasync of a file, and fsync of a directory.
func (n *diskNode) Fsync(_ context.Context, h fusefs.FileHandle, _ uint32) syscall.Errno {
	if f, ok := h.(*diskFile); ok {
		return errno(f.f.Sync())
	}
	return errno(n.d.files.SyncDir(n.path()))
}

func (n *diskNode) Allocate(_ context.Context, h fusefs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	const keepSize, punchHole, zeroRange = 0x1, 0x2, 0x10
	f := h.(*diskFile).f
	switch mode {
	case 0:
		return errno(f.Allocate(int64(off), int64(size)))
	case punchHole | keepSize:
		return errno(f.PunchHole(int64(off), int64(size)))
	case zeroRange | keepSize:
		return errno(f.ZeroRange(int64(off), int64(size)))
	}
	return syscall.EOPNOTSUPP
}

func (n *diskNode) Lseek(_ context.Context, h fusefs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	const seekData, seekHole = 3, 4
	seek := h.(*diskFile).f.SeekHole
	switch whence {
	case seekData:
		seek = h.(*diskFile).f.SeekData
	case seekHole:
	default:
		return 0, syscall.EINVAL
	}
	at, err := seek(int64(off))
	if errors.Is(err, io.EOF) {
		return 0, syscall.ENXIO
	}
	return uint64(at), errno(err)
}

func (n *diskNode) Readdir(context.Context) (fusefs.DirStream, syscall.Errno) {
	names, err := n.d.files.List(n.path())
	if err != nil {
		return nil, errno(err)
	}
	var list []fuse.DirEntry
	for _, name := range names {
		var a fuse.Attr
		if e := n.attr(n.path(name), &a); e != 0 {
			continue // removed meanwhile
		}
		list = append(list, fuse.DirEntry{Name: name, Mode: a.Mode})
	}
	return fusefs.NewListDirStream(list), 0
}

func (n *diskNode) Mkdir(ctx context.Context, name string, _ uint32, out *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	if err := n.d.files.MkdirAll(n.path(name)); err != nil {
		return nil, errno(err)
	}
	out.Attr.Mode = syscall.S_IFDIR | 0o700
	return n.child(ctx, syscall.S_IFDIR), 0
}

func (n *diskNode) Unlink(_ context.Context, name string) syscall.Errno {
	return errno(n.d.files.Remove(n.path(name)))
}

func (n *diskNode) Rmdir(_ context.Context, name string) syscall.Errno {
	return errno(n.d.files.Remove(n.path(name)))
}

func (n *diskNode) Rename(_ context.Context, name string, to fusefs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	if flags != 0 {
		return syscall.EINVAL
	}
	return errno(n.d.files.Rename(n.path(name), to.(*diskNode).path(newName)))
}

func (n *diskNode) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	const block, total = 4096, 64 << 30
	used := uint64(n.d.mem.Used()) / block
	out.Bsize, out.Frsize, out.Blocks = block, block, total/block
	out.Bfree, out.Bavail, out.NameLen = total/block-used, total/block-used, 255
	return 0
}
