package replication

import (
	"slices"
	"testing"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/vfs"
)

// TestNoHoleIsNoHole: zeroes that keep their room are no hole in a block status,
// neither before they are applied nor after, where they read as zeroes besides.
func TestNoHoleIsNoHole(t *testing.T) {
	const size = 1 << 20
	v, s := openLoneWith(t, 4*size, Options{Replica: &ReplicaOptions{FS: vfs.OS()}})
	do := func(op Op, off, length uint64, noHole bool) []Extent {
		t.Helper()
		done := make(chan error, 1)
		r := &Request{Op: op, Offset: off, Length: length, NoHole: noHole, Complete: func(_ *Request, err error) { done <- err }}
		if op == OpWrite {
			r.Data = buf.Get(int(length))
			defer r.Data.Release()
			copy(r.Data.B, slices.Repeat([]byte{7}, int(length)))
		}
		s.Submit(r)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		return r.Extents
	}
	do(OpZero, size, size, true)
	for _, e := range do(OpBlockStatus, size, size, false) {
		if e.Flags&ExtentHole != 0 {
			t.Fatalf("a hole before it is applied: %+v", e)
		}
	}
	awaitApplied(t, v)
	const hole = ExtentHole | ExtentZero
	want := []Extent{{Len: size, Flags: hole}, {Len: size, Flags: ExtentZero}, {Len: 2 * size, Flags: hole}}
	if _, n, err := v.rep().store.Unwritten(size, 2*size); err != nil || n == 0 {
		t.Logf("the file system does not tell room without data from none (%v)", err)
		want = nil
	}
	if got := do(OpBlockStatus, 0, 4*size, false); want != nil && !slices.Equal(got, want) {
		t.Errorf("applied: %+v, not %+v", got, want)
	}

	do(OpTrim, size+size/2, size/4, false)
	do(OpWrite, size, 8192, false)
	awaitApplied(t, v)
	want = []Extent{
		{Len: size, Flags: hole},
		{Len: 8192},
		{Len: size/2 - 8192, Flags: ExtentZero},
		{Len: size / 4, Flags: hole},
		{Len: size / 4, Flags: ExtentZero},
		{Len: 2 * size, Flags: hole},
	}
	if _, n, err := v.rep().store.Unwritten(size, 2*size); err != nil || n == 0 {
		want = nil
	}
	if got := do(OpBlockStatus, 0, 4*size, false); want != nil && !slices.Equal(got, want) {
		t.Errorf("after a write and a trim: %+v, not %+v", got, want)
	}
}
