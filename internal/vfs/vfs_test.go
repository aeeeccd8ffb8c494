package vfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	"pgregory.net/rapid"
)

// each runs a test on both file systems, in an empty directory.
func each(t *testing.T, f func(t *testing.T, fs FS, dir string)) {
	t.Run("os", func(t *testing.T) { f(t, OS(), t.TempDir()) })
	t.Run("mem", func(t *testing.T) {
		m := NewMem(1)
		must(t, m.MkdirAll("/d"))
		f(t, m, "/d")
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, fs FS, path string, flags Flag) File {
	t.Helper()
	f, err := fs.Open(path, flags)
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func content(t testing.TB, f File) []byte {
	t.Helper()
	n, err := f.Size()
	must(t, err)
	b := make([]byte, n)
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return b
}

func TestFilesAndDirectories(t *testing.T) {
	each(t, func(t *testing.T, fs FS, dir string) {
		p := func(s string) string { return filepath.Join(dir, s) }
		if _, err := fs.Open(p("none"), 0); !errors.Is(err, iofs.ErrNotExist) {
			t.Fatalf("open of nothing: %v", err)
		}
		if _, err := fs.Open(p("no/dir"), Create); !errors.Is(err, iofs.ErrNotExist) {
			t.Fatalf("create without a directory: %v", err)
		}
		f := open(t, fs, p("a"), Create)
		if _, err := fs.Open(p("a"), Create|Exclusive); !errors.Is(err, iofs.ErrExist) {
			t.Fatalf("exclusive: %v", err)
		}
		_, err := f.WriteAt([]byte("hello"), 3)
		must(t, err)
		must(t, fs.MkdirAll(p("x/y")))
		must(t, fs.MkdirAll(p("x/y")))
		if err := fs.MkdirAll(p("a/b")); err == nil {
			t.Fatal("made a directory below a file")
		}
		must(t, fs.Rename(p("a"), p("x/b")))
		must(t, fs.SyncDir(p("x")))
		if n, err := fs.Total(p("x")); err != nil || n <= 0 {
			t.Fatalf("the file system has %d bytes: %v", n, err)
		}
		if _, err := fs.Total(p("none")); !errors.Is(err, iofs.ErrNotExist) {
			t.Fatalf("the file system of nothing: %v", err)
		}
		names, err := fs.List(p("x"))
		must(t, err)
		if !slices.Equal(names, []string{"b", "y"}) {
			t.Fatalf("list: %v", names)
		}
		if err := fs.Remove(p("x")); err == nil {
			t.Fatal("removed a directory that is not empty")
		}
		if got := content(t, open(t, fs, p("x/b"), ReadOnly)); string(got) != "\x00\x00\x00hello" {
			t.Fatalf("content %q", got)
		}
		if _, err := open(t, fs, p("x/b"), ReadOnly).WriteAt([]byte("x"), 0); err == nil {
			t.Fatal("wrote through a read-only handle")
		}
		must(t, fs.Remove(p("x/b")))
		must(t, f.Close())
		if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, iofs.ErrClosed) {
			t.Fatalf("write after close: %v", err)
		}
	})
}

func TestWritevSplits(t *testing.T) {
	each(t, func(t *testing.T, fs FS, dir string) {
		f := open(t, fs, filepath.Join(dir, "f"), Create)
		var bufs [][]byte
		var want []byte
		for i := range 2*1024 + 17 { // more than the kernel takes at once
			b := bytes.Repeat([]byte{byte(i)}, i%5)
			bufs = append(bufs, b)
			want = append(want, b...)
		}
		n, err := f.WritevAt(bufs, 0)
		must(t, err)
		if n != len(want) || !bytes.Equal(content(t, f), want) {
			t.Fatalf("wrote %d bytes of %d, or others", n, len(want))
		}
		n, err = f.WritevAt([][]byte{nil, {}}, 0)
		if n != 0 || err != nil {
			t.Fatalf("nothing to write: %d, %v", n, err)
		}
	})
}

func TestHoles(t *testing.T) {
	each(t, func(t *testing.T, fs FS, dir string) {
		f := open(t, fs, filepath.Join(dir, "f"), Create)
		const mib = 1 << 20
		must(t, f.Truncate(4*mib))
		if _, err := f.SeekData(0); !errors.Is(err, io.EOF) {
			t.Fatalf("data in an empty file: %v", err)
		}
		_, err := f.WriteAt(bytes.Repeat([]byte{1}, mib), mib)
		must(t, err)
		runs := func() string {
			data, err := f.SeekData(0)
			if errors.Is(err, io.EOF) {
				return "none"
			}
			must(t, err)
			hole, err := f.SeekHole(data)
			must(t, err)
			return fmt.Sprint(data/4096, "-", hole/4096)
		}
		if got := runs(); got != "256-512" {
			t.Fatalf("after a write: %s", got)
		}
		must(t, f.PunchHole(mib, mib/2))
		must(t, f.Sync())
		if got := runs(); got != "384-512" {
			t.Fatalf("after a hole: %s", got)
		}
		must(t, f.ZeroRange(mib+mib/2+100, 1000))
		b := make([]byte, 1200)
		_, err = f.ReadAt(b, mib+mib/2)
		must(t, err)
		for i, c := range b {
			if (c == 0) != (i >= 100 && i < 1100) {
				t.Fatalf("byte %d is %d after zeroing 100 to 1100", i, c)
			}
		}
		must(t, f.PunchHole(3*mib, 8*mib)) // beyond the end
		if n, _ := f.Size(); n != 4*mib {
			t.Fatalf("a hole changed the size to %d", n)
		}
		must(t, f.Allocate(0, 5*mib))
		if n, _ := f.Size(); n != 5*mib {
			t.Fatalf("allocated to %d", n)
		}
		if n, err := f.ReadAt(b, 5*mib-100); n != 100 || !errors.Is(err, io.EOF) {
			t.Fatalf("read over the end: %d, %v", n, err)
		}
	})
}

func TestReadAtNoWait(t *testing.T) {
	each(t, func(t *testing.T, fs FS, dir string) {
		f := open(t, fs, filepath.Join(dir, "f"), Create)
		_, err := f.WriteAt([]byte("0123456789"), 0)
		must(t, err)
		b := make([]byte, 4)
		// Just written, it is in the page cache, unless the file system cannot tell.
		if _, err := f.ReadAtNoWait(b, 2); err == nil && string(b) != "2345" {
			t.Fatalf("read %q", b)
		} else if err != nil && !errors.Is(err, ErrWouldBlock) {
			t.Fatal(err)
		}
		if _, err := f.ReadAtNoWait(b, 8); !errors.Is(err, ErrWouldBlock) {
			t.Fatalf("over the end: %v", err)
		}
	})
}

func TestLock(t *testing.T) {
	each(t, func(t *testing.T, fs FS, dir string) {
		p := filepath.Join(dir, "lock")
		k, err := fs.Lock(p)
		must(t, err)
		if _, err := fs.Lock(p); !errors.Is(err, ErrLocked) {
			t.Fatalf("second lock: %v", err)
		}
		must(t, k.Close())
		k, err = fs.Lock(p)
		must(t, err)
		must(t, k.Close())
	})
}

// Close must not let a late write hit whatever file gets the descriptor next.
func TestCloseUnderWriters(t *testing.T) {
	dir := t.TempDir()
	for i := range 50 {
		a, err := OS().Open(filepath.Join(dir, fmt.Sprint("a", i)), Create)
		must(t, err)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for {
					if _, err := a.WriteAt([]byte("late"), 0); err != nil {
						return
					}
				}
			})
		}
		must(t, a.Close())
		b := open(t, OS(), filepath.Join(dir, fmt.Sprint("b", i)), Create)
		wg.Wait()
		if n, err := b.Size(); err != nil || n != 0 {
			t.Fatalf("a write to a closed file hit another one: %d bytes, %v", n, err)
		}
	}
}

// Mem reads as the OS does, whatever is done to a file.
func TestMemIsLikeOS(t *testing.T) {
	dir := t.TempDir()
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		m := NewMem(7)
		a, err := m.Open("/f", Create)
		must(t, err)
		b, err := OS().Open(filepath.Join(dir, fmt.Sprint(n)), Create)
		must(t, err)
		defer func() { _ = b.Close() }()
		both := func(op string, f func(File) error) {
			if ea, eb := f(a), f(b); (ea == nil) != (eb == nil) {
				rt.Fatalf("%s: mem %v, os %v", op, ea, eb)
			}
		}
		for range rapid.IntRange(1, 20).Draw(rt, "steps") {
			off := rapid.Int64Range(0, 20000).Draw(rt, "off")
			k := rapid.Int64Range(1, 9000).Draw(rt, "len")
			switch op := rapid.SampledFrom([]string{"write", "punch", "zero", "truncate", "sync", "allocate"}).Draw(rt, "op"); op {
			case "write":
				p := bytes.Repeat([]byte{byte(off)}, int(k))
				both(op, func(f File) error { _, err := f.WriteAt(p, off); return err })
			case "punch":
				both(op, func(f File) error { return f.PunchHole(off, k) })
			case "zero":
				both(op, func(f File) error { return f.ZeroRange(off, k) })
			case "truncate":
				both(op, func(f File) error { return f.Truncate(off) })
			case "allocate":
				both(op, func(f File) error { return f.Allocate(off, k) })
			case "sync":
				both(op, File.Datasync)
			}
			if ca, cb := content(t, a), content(t, b); !bytes.Equal(ca, cb) {
				rt.Fatalf("mem has %d bytes, os %d, or they differ", len(ca), len(cb))
			}
		}
	})
}

func TestCrashKeepsWhatWasSynced(t *testing.T) {
	kept, lost, gone := 0, 0, 0
	for seed := range uint64(200) {
		m := NewMem(seed)
		must(t, m.MkdirAll("/d"))
		must(t, m.SyncDir("/"))
		f := open(t, m, "/d/f", Create)
		old := bytes.Repeat([]byte{1}, 64<<10)
		_, err := f.WriteAt(old, 0)
		must(t, err)
		must(t, f.Datasync())
		must(t, m.SyncDir("/d"))
		_, err = f.WriteAt(bytes.Repeat([]byte{2}, 32<<10), 8<<10)
		must(t, err)
		open(t, m, "/d/unsynced", Create)
		m.Crash()
		if _, err := f.Size(); !errors.Is(err, ErrCrashed) {
			t.Fatalf("seed %d: a handle survived: %v", seed, err)
		}
		got := content(t, open(t, m, "/d/f", 0))
		for s := 0; s < len(got); s += sectorSize {
			sector := got[s : s+sectorSize]
			if !bytes.Equal(sector, bytes.Repeat(sector[:1], sectorSize)) {
				t.Fatalf("seed %d: sector at %d is torn", seed, s)
			}
			in := s >= 8<<10 && s < 40<<10
			switch {
			case !in && sector[0] != 1, sector[0] == 0:
				t.Fatalf("seed %d: synced sector at %d is %d", seed, s, sector[0])
			case sector[0] == 2:
				kept++
			case in:
				lost++
			}
		}
		if _, err := m.Open("/d/unsynced", 0); err != nil {
			gone++
		}
	}
	if kept == 0 || lost == 0 || gone == 0 || gone == 200 {
		t.Fatalf("kept %d sectors, lost %d, %d of 200 entries: the crash is not random", kept, lost, gone)
	}
}

func TestCrashOfNames(t *testing.T) {
	for seed := range uint64(100) {
		m := NewMem(seed)
		write := func(path, s string) {
			f := open(t, m, path, Create)
			_, err := f.WriteAt([]byte(s), 0)
			must(t, err)
			must(t, f.Sync())
		}
		write("/a", "old")
		must(t, m.SyncDir("/"))
		write("/a.tmp", "new")
		must(t, m.Rename("/a.tmp", "/a"))
		m.Crash()
		if got := string(content(t, open(t, m, "/a", 0))); got != "old" && got != "new" {
			t.Fatalf("seed %d: a rename left %q", seed, got)
		}
	}
}

func TestKillKeepsEverything(t *testing.T) {
	m := NewMem(3)
	f := open(t, m, "/f", Create)
	_, err := f.WriteAt([]byte("unsynced"), 0)
	must(t, err)
	_, err = m.Lock("/lock")
	must(t, err)
	m.Kill()
	if got := string(content(t, open(t, m, "/f", 0))); got != "unsynced" {
		t.Fatalf("kill lost bytes: %q", got)
	}
	if _, err := m.Lock("/lock"); err != nil {
		t.Fatalf("a lock outlived its process: %v", err)
	}
}

func TestCapacity(t *testing.T) {
	m := NewMem(3)
	m.SetCapacity(8 << 10)
	if n, err := m.Total("/"); n != 8<<10 || err != nil {
		t.Fatalf("%d bytes in all: %v", n, err)
	}
	f := open(t, m, "/f", Create)
	if n, err := f.WriteAt(make([]byte, 16<<10), 0); !errors.Is(err, syscall.ENOSPC) || n != 8<<10 {
		t.Fatalf("wrote %d: %v", n, err)
	}
	must(t, f.Truncate(0))
	must(t, f.Sync())
	if _, err := f.WriteAt(make([]byte, 8<<10), 0); err != nil {
		t.Fatalf("room that was given back: %v", err)
	}
}

func TestInject(t *testing.T) {
	broken := errors.New("broken")
	var calls []Op
	fs := Inject(NewMem(1), func(c Call) error {
		calls = append(calls, c.Op)
		switch {
		case c.Op == OpSync:
			return broken
		case c.Op == OpWrite && c.Off == 100:
			return &Short{N: 3, Err: broken}
		}
		return nil
	})
	f := open(t, fs, "/f", Create)
	_, err := f.WriteAt([]byte("abc"), 0)
	must(t, err)
	if n, err := f.WritevAt([][]byte{[]byte("de"), []byte("fgh")}, 100); n != 3 || !errors.Is(err, broken) {
		t.Fatalf("short write: %d, %v", n, err)
	}
	if err := f.Datasync(); !errors.Is(err, broken) {
		t.Fatalf("sync: %v", err)
	}
	if n, _ := f.Size(); n != 103 {
		t.Fatalf("size %d after a short write", n)
	}
	if want := []Op{OpOpen, OpWrite, OpWrite, OpSync, OpSize}; !slices.Equal(calls, want) {
		t.Fatalf("calls %v, want %v", calls, want)
	}
}

func TestWritevDoesNotAllocate(t *testing.T) {
	f := open(t, OS(), filepath.Join(t.TempDir(), "f"), Create)
	bufs := [][]byte{make([]byte, 128), make([]byte, 4096)}
	if n := testing.AllocsPerRun(100, func() {
		if _, err := f.WritevAt(bufs, 0); err != nil {
			t.Fatal(err)
		}
	}); n >= 1 && !raceEnabled {
		t.Fatalf("%v allocations a write", n)
	}
}

// A file that is claimed is not claimed twice, and free again when it is closed.
func TestClaim(t *testing.T) {
	p := filepath.Join(t.TempDir(), "data")
	f, err := OS().Open(p, Create|Claim)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OS().Open(p, Claim); !errors.Is(err, ErrLocked) {
		t.Errorf("claimed twice: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if f, err = OS().Open(p, Claim); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}
