package store

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/vfs"
)

// outs opens a store whose write-outs are noted, and fail when err is set.
func outs(t *testing.T, size uint64) (s *Store, list *[]vfs.Call, err *error) {
	t.Helper()
	list, err = new([]vfs.Call), new(error)
	fs := vfs.Inject(vfs.NewMem(1), func(c vfs.Call) error {
		if c.Op != vfs.OpWriteOut {
			return nil
		}
		*list = append(*list, c)
		return *err
	})
	s, e := OpenStore(fs, "/data", size, true)
	if e != nil {
		t.Fatal(e)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s, list, err
}

func (s *Store) mustWrite(t *testing.T, off uint64) {
	t.Helper()
	if err := s.WriteAt(make([]byte, 4096), off); err != nil {
		t.Fatal(err)
	}
}

// TestWriteOutTakesWhatWasWritten: what was written goes out once, neighbours
// in one call, begun before it is waited for.
func TestWriteOutTakesWhatWasWritten(t *testing.T) {
	const mib = 1 << 20
	s, list, _ := outs(t, 64*mib)
	for _, off := range []uint64{5 * mib, 40 * mib, 5*mib + 8192, 6 * mib, 5 * mib, 63*mib + mib - 4096} {
		s.mustWrite(t, off)
	}
	rests := 0
	if err := s.WriteOut(func(time.Duration) bool { rests++; return true }); err != nil {
		t.Fatal(err)
	}
	var got [][2]int64
	for _, c := range *list {
		got = append(got, [2]int64{c.Off / mib, c.Len / mib})
	}
	if want := [][2]int64{{5, 2}, {40, 1}, {63, 1}, {5, 2}, {40, 1}, {63, 1}}; !slices.Equal(got, want) || rests != 2 {
		t.Errorf("wrote out %v with %d rests, want %v", got, rests, want)
	}
	*list = nil
	if err := s.WriteOut(func(time.Duration) bool { return true }); err != nil || len(*list) > 0 {
		t.Errorf("nothing was written since: %v, %v", *list, err)
	}
}

// TestWriteOutIsCutShort: who has no time leaves the rest to Sync.
func TestWriteOutIsCutShort(t *testing.T) {
	s, list, _ := outs(t, 64<<20)
	for g := range uint64(32) {
		s.mustWrite(t, 2*g<<20)
	}
	if err := s.WriteOut(func(time.Duration) bool { return false }); err != nil || len(*list) != groupGranules {
		t.Errorf("%d calls, %v", len(*list), err)
	}
}

// TestWriteOutThatFailsIsFinal: the kernel tells of a lost page only once.
func TestWriteOutThatFailsIsFinal(t *testing.T) {
	s, _, fail := outs(t, 1<<20)
	s.mustWrite(t, 0)
	*fail = errors.New("bad sector")
	if err := s.WriteOut(func(time.Duration) bool { return true }); !errors.Is(err, ErrFailed) || !errors.Is(err, *fail) {
		t.Fatalf("write-out: %v", err)
	}
	*fail = nil
	if err := s.Sync(); !errors.Is(err, ErrFailed) {
		t.Errorf("sync after it: %v", err)
	}
}
