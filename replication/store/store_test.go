package store

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/blockstep/blockstep/internal/vfs"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// each runs a test on both file systems, in an empty directory.
func each(t *testing.T, f func(t *testing.T, fs vfs.FS, dir string)) {
	t.Run("os", func(t *testing.T) { f(t, vfs.OS(), t.TempDir()) })
	t.Run("mem", func(t *testing.T) {
		m := vfs.NewMem(1)
		must(t, m.MkdirAll("/d"))
		f(t, m, "/d")
	})
}

func TestStoreReadsWhatWasWritten(t *testing.T) {
	each(t, func(t *testing.T, fs vfs.FS, dir string) {
		path := filepath.Join(dir, "data")
		if _, err := OpenStore(fs, path, 1<<20, false); err == nil {
			t.Fatal("opened a store that is not there")
		}
		s, err := OpenStore(fs, path, 1<<20, true)
		must(t, err)
		must(t, s.WriteAt([]byte("hello"), 5000))
		must(t, s.WritevAt([][]byte{[]byte("ab"), nil, []byte("cde")}, 1<<20-5))
		must(t, s.Sync())
		must(t, s.Close())
		s, err = OpenStore(fs, path, 1<<20, false)
		must(t, err)
		b := make([]byte, 1<<20)
		must(t, s.ReadAt(b, 0))
		want := make([]byte, 1<<20)
		copy(want[5000:], "hello")
		copy(want[1<<20-5:], "abcde")
		if !bytes.Equal(b, want) {
			t.Fatal("content differs")
		}
		if err := s.ReadAtNoWait(b[:10], 5000); err != nil && !errors.Is(err, vfs.ErrWouldBlock) {
			t.Fatal(err)
		}
		for name, err := range map[string]error{
			"read":     s.ReadAt(b[:2], 1<<20-1),
			"no wait":  s.ReadAtNoWait(b[:2], 1<<20-1),
			"write":    s.WriteAt(b[:2], 1<<20-1),
			"writev":   s.WritevAt([][]byte{b[:1], b[:1]}, 1<<20-1),
			"zero":     s.Zero(1<<20, 1, true),
			"overflow": s.Zero(1<<20-1, ^uint64(0), true),
			"extents":  s.Extents(1<<20+1, 0, nil),
		} {
			if !errors.Is(err, ErrRange) {
				t.Errorf("%s over the end: %v", name, err)
			}
		}
		must(t, s.WriteAt(b[:10], 0)) // none of that was a failure of the disk
		must(t, s.Close())
	})
}

func TestExtents(t *testing.T) {
	each(t, func(t *testing.T, fs vfs.FS, dir string) {
		s, err := OpenStore(fs, filepath.Join(dir, "data"), 1<<20, true)
		must(t, err)
		defer func() { must(t, s.Close()) }()
		runs := func(off, n uint64) string {
			out := ""
			must(t, s.Extents(off, n, func(off, n uint64, data bool) error {
				out += fmt.Sprintf("%d+%d:%v ", off/4096, n/4096, data)
				return nil
			}))
			return out
		}
		if got := runs(0, 1<<20); got != "0+256:false " {
			t.Fatalf("empty: %s", got)
		}
		must(t, s.WriteAt(bytes.Repeat([]byte{1}, 64<<10), 64<<10))
		must(t, s.WriteAt(bytes.Repeat([]byte{1}, 64<<10), 512<<10))
		if got := runs(0, 1<<20); got != "0+16:false 16+16:true 32+96:false 128+16:true 144+112:false " {
			t.Fatalf("two runs: %s", got)
		}
		if got := runs(68<<10, 512<<10); got != "17+15:true 32+96:false 128+16:true 144+1:false " {
			t.Fatalf("a part: %s", got)
		}
		must(t, s.Zero(64<<10, 64<<10, true))
		must(t, s.Zero(900<<10, 8<<10, false))
		must(t, s.Sync())
		if got := runs(0, 512<<10); got != "0+128:false " {
			t.Fatalf("after a hole: %s", got)
		}
		b := make([]byte, 64<<10)
		must(t, s.ReadAt(b, 64<<10))
		if !bytes.Equal(b, make([]byte, 64<<10)) {
			t.Fatal("a hole does not read as zeroes")
		}
		stop := errors.New("stop")
		if err := s.Extents(0, 1<<20, func(uint64, uint64, bool) error { return stop }); !errors.Is(err, stop) {
			t.Fatalf("error of the callback: %v", err)
		}
	})
}

func TestResize(t *testing.T) {
	each(t, func(t *testing.T, fs vfs.FS, dir string) {
		path := filepath.Join(dir, "data")
		s, err := OpenStore(fs, path, 1<<20, true)
		must(t, err)
		must(t, s.WriteAt([]byte{1}, 1<<20-1))
		must(t, s.Resize(2<<20))
		must(t, s.WriteAt([]byte{2}, 2<<20-1))
		if err := s.Resize(1 << 20); !errors.Is(err, ErrSize) {
			t.Fatalf("shrunk: %v", err)
		}
		if s.Size() != 2<<20 {
			t.Fatalf("size %d", s.Size())
		}
		must(t, s.Close())
		s, err = OpenStore(fs, path, 0, false)
		must(t, err)
		if s.Size() != 2<<20 {
			t.Fatalf("reopened with size %d", s.Size())
		}
		must(t, s.Close())
	})
}

// What was in a file or on a device before reads as zeroes, in a new store and
// where one grows; what has been written stays.
func TestWhatWasThereBefore(t *testing.T) {
	each(t, func(t *testing.T, fs vfs.FS, dir string) {
		path := filepath.Join(dir, "data")
		junk := bytes.Repeat([]byte("junk"), 1<<20)
		f, err := fs.Open(path, vfs.Create)
		must(t, err)
		_, err = f.WriteAt(junk, 0)
		must(t, err)
		must(t, f.Close())
		s, err := OpenStore(fs, path, 1<<20, true)
		must(t, err)
		must(t, s.Clear(t.Context()))
		b := make([]byte, 1<<20)
		zero := func(off uint64) {
			t.Helper()
			must(t, s.ReadAt(b, off))
			if !bytes.Equal(b, make([]byte, len(b))) {
				t.Errorf("at %d it does not read as zeroes", off)
			}
		}
		zero(0)
		must(t, s.WriteAt(junk[:1<<20], 0))
		must(t, s.Resize(2<<20))
		zero(1 << 20)
		must(t, s.Prepare(t.Context(), 3<<20))
		must(t, s.Resize(5<<20))
		must(t, s.WriteAt(junk[:1<<20], 3<<20))
		must(t, s.Prepare(t.Context(), 5<<20))
		zero(2 << 20)
		zero(4 << 20)
		for _, off := range []uint64{0, 3 << 20} {
			must(t, s.ReadAt(b, off))
			if !bytes.Equal(b, junk[:1<<20]) {
				t.Errorf("at %d what was written is gone", off)
			}
		}
		must(t, s.Close())
	})
}

// Whatever fails, nothing is tried again: the second fsync proves nothing.
func TestStoreFailedStaysFailed(t *testing.T) {
	for _, op := range []vfs.Op{vfs.OpWrite, vfs.OpSync, vfs.OpZero} {
		broken := errors.New("broken disk")
		armed, calls := false, 0
		fs := vfs.Inject(vfs.NewMem(1), func(c vfs.Call) error {
			if armed && c.Op.Mutates() {
				calls++
				if c.Op == op {
					return broken
				}
			}
			return nil
		})
		s, err := OpenStore(fs, "/data", 1<<20, true)
		must(t, err)
		armed = true
		for _, f := range []func() error{
			func() error { return s.WriteAt([]byte{1}, 0) },
			func() error { return s.Zero(0, 4096, true) },
			s.Sync,
		} {
			if err = f(); err != nil {
				break
			}
		}
		if !errors.Is(err, ErrFailed) || !errors.Is(err, broken) {
			t.Fatalf("%s: %v, want ErrFailed and the cause", op, err)
		}
		before := calls
		for name, err := range map[string]error{
			"write": s.WriteAt([]byte{1}, 0), "zero": s.Zero(0, 1, false), "sync": s.Sync(), "resize": s.Resize(2 << 20),
		} {
			if !errors.Is(err, ErrFailed) {
				t.Errorf("%s after a failed %s: %v", name, op, err)
			}
		}
		if calls != before {
			t.Fatalf("%s: the disk was asked again", op)
		}
	}
}
