package daemon

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/replication/bitmap"
)

func TestParsePosition(t *testing.T) {
	got, err := parsePosition("3:41")
	if want := (ident.Position{Epoch: 3, Seq: 41}); err != nil || got != want {
		t.Fatalf("parsePosition(3:41) = %v, %v; want %v", got, err, want)
	}
	for _, bad := range []string{"", "3", "3:", ":4", "3:4:5", "-1:2", "a:b"} {
		if got, err := parsePosition(bad); err == nil {
			t.Errorf("parsePosition(%q) = %v, want an error", bad, got)
		}
	}
}

func TestDirtyExtentsCoverTheRangeExactly(t *testing.T) {
	b := bitmap.New()
	b.Mark(8192, 4096)
	b.Mark(20000, 1) // the block at 16384
	got := dirtyExtents(b, 9000, 20000)
	want := []nbd.Extent{{Length: 3288, Flags: dirtyFlag}, {Length: 4096}, {Length: 4096, Flags: dirtyFlag}, {Length: 8520}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("extents (-want +got):\n%s", diff)
	}
	if got := dirtyExtents(bitmap.New(), 0, 100); len(got) != 1 || got[0].Length != 100 || got[0].Flags != 0 {
		t.Fatalf("extents of nothing: %v", got)
	}
}
