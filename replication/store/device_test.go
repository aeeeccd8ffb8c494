package store

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blockstep/blockstep/internal/vfs"
)

// loopDevice makes a block device of n bytes.
func loopDevice(t *testing.T, n int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: a loop device cannot be made")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("no /dev/loop-control: the kernel has no loop devices here")
	}
	image := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, n))
	out, err := exec.Command("losetup", "--find", "--show", image).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

func TestBlockDevice(t *testing.T) {
	const size = 8 << 20
	dev := loopDevice(t, size)
	if _, err := OpenStore(vfs.OS(), dev, size+512, true); !errors.Is(err, ErrSize) {
		t.Fatalf("a device that is too small: %v", err)
	}
	s, err := OpenStore(vfs.OS(), dev, 0, false)
	must(t, err)
	if s.Size() != size {
		t.Fatalf("size %d, want %d", s.Size(), size)
	}
	if _, err := OpenStore(vfs.OS(), dev, 0, true); !errors.Is(err, ErrBusy) || !errors.Is(err, vfs.ErrLocked) {
		t.Fatalf("a device that another store has: %v", err)
	}
	must(t, s.Close())
	s, err = OpenStore(vfs.OS(), dev, size/2, true) // a device may have more
	must(t, err)
	want := bytes.Repeat([]byte("block dev"), 1<<20)[:size/2]
	must(t, s.WriteAt(want, 0))
	for _, z := range []struct {
		off, n uint64
		punch  bool
	}{{64 << 10, 128 << 10, true}, {1 << 20, 1 << 20, false}, {3<<20 + 100, 1000, true}, {3<<20 + 8192 + 7, 5, false}, {size/2 - 512, 512, true}} {
		must(t, s.Zero(z.off, z.n, z.punch))
		clear(want[z.off : z.off+z.n])
	}
	must(t, s.Sync())
	got := make([]byte, size/2)
	must(t, s.ReadAt(got, 0))
	if !bytes.Equal(got, want) {
		t.Fatal("content differs")
	}
	covered := uint64(0)
	must(t, s.Extents(0, size/2, func(off, n uint64, data bool) error {
		if off != covered || !data {
			t.Fatalf("extent %d+%d data=%v: a device is all data", off, n, data)
		}
		covered += n
		return nil
	}))
	if covered != size/2 {
		t.Fatalf("extents cover %d bytes", covered)
	}
	must(t, s.Resize(size))
	if err := s.Resize(size + 4096); !errors.Is(err, ErrSize) {
		t.Fatalf("a device does not grow: %v", err)
	}
	must(t, s.WriteAt([]byte{1}, size-1))
	must(t, s.Close())
	// Made anew, it shows nothing of all that, nor does what it grows by.
	s, err = OpenStore(vfs.OS(), dev, size/2, true)
	must(t, err)
	must(t, s.Clear(t.Context()))
	must(t, s.Resize(size))
	got = make([]byte, size)
	must(t, s.ReadAt(got, 0))
	if !bytes.Equal(got, make([]byte, size)) {
		t.Fatal("a device that was cleared does not read as zeroes")
	}
	must(t, s.Close())
}
