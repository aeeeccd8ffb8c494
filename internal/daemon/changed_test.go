package daemon

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/nbd/nbdtest"
	"github.com/blockstep/blockstep/replication"
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
	got := dirtyExtents(b, 9000, 20000, 100)
	want := []nbd.Extent{{Length: 3288, Flags: dirtyFlag}, {Length: 4096}, {Length: 4096, Flags: dirtyFlag}, {Length: 8520}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("extents (-want +got):\n%s", diff)
	}
	if got := dirtyExtents(bitmap.New(), 0, 100, 100); len(got) != 1 || got[0].Length != 100 || got[0].Flags != 0 {
		t.Fatalf("extents of nothing: %v", got)
	}
}

// However much has changed, in however many places, an answer has no more extents
// than a client is sent.
func TestDirtyExtentsAreBounded(t *testing.T) {
	b := bitmap.New()
	const span = 1 << 30
	for off := uint64(0); off < span; off += 2 * bitmap.BlockSize {
		b.Mark(off, bitmap.BlockSize)
	}
	for _, limit := range []int{1, 2, 3, nbd.ExtentsMax} {
		for _, off := range []uint64{0, 4096, 8192 + 512} {
			if got := dirtyExtents(b, off, span-off, limit); len(got) != limit {
				t.Errorf("%d extents from %d on, of a limit of %d", len(got), off, limit)
			}
		}
	}
	for i, n := range []int{1, nbd.ExtentsMax} { // as a client's request has it
		c := &carried{dirty: []*bitmap.Bitmap{b}}
		c.Extents = []replication.Extent{{Len: span}}
		c.takeStatus(&nbd.Request{Op: nbd.OpBlockStatus, Length: span, Contexts: []uint32{1}, ReqOne: i == 0})
		if got := len(c.status[0].Extents); got != n {
			t.Errorf("%d extents, want %d", got, n)
		}
	}
}

// TestDirtySinceIsLive: a block status tells of every write that was answered before
// it came, through whichever node and session, and not only of those from before the
// context was chosen. Without a primary the context is refused in time, with a word
// that is not the one for a position that is lost.
func TestDirtySinceIsLive(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	beta := nodes["beta"]
	if _, err := beta.client.CreateVolume(t.Context(), control.CreateVolume{Name: "db", Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	beta.healthy("db")
	st, err := beta.client.VolumeStatus(t.Context(), "db")
	if err != nil {
		t.Fatal(err)
	}
	since := dirtyContext + st.Position
	sessions := map[string]*nbdtest.Client{}
	for name, n := range nodes {
		c, err := nbdtest.Dial(t.Context(), "unix://"+n.sock("nbd"), "db", nbdtest.Options{MetaContexts: []string{"base:allocation", since}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		sessions[name] = c
	}
	dirty := func(c *nbdtest.Client, at uint64) bool {
		t.Helper()
		m, err := c.BlockStatus(t.Context(), at, 4096)
		if err != nil {
			t.Fatal(err)
		}
		e := m[since]
		if len(e) == 0 || len(m["base:allocation"]) == 0 {
			t.Fatalf("a block status of %v", m)
		}
		return e[0].Flags == dirtyFlag
	}
	for i := range uint64(6) { // 2 MiB apart: what changed is known in steps of 256 KiB
		at := i * 10 << 20
		for name, c := range sessions {
			if dirty(c, at) {
				t.Fatalf("%s: the block at %d has changed before it was written", name, at)
			}
		}
		for name, w := range sessions {
			if err := w.WriteAt(t.Context(), []byte("a write that is answered, and so must be seen"+string(make([]byte, 4096-45))), at); err != nil {
				t.Fatal(err)
			}
			for other, c := range sessions {
				if !dirty(c, at) {
					t.Errorf("%s does not tell that %s has written at %d", other, name, at)
				}
			}
		}
	}

	nodes["alpha"].halt()
	nodes["gamma"].halt()
	beta.eventually(30*time.Second, "the context is refused, since there is no primary", func(ctx context.Context) error {
		c, err := nbdtest.Dial(ctx, "unix://"+beta.sock("nbd"), "db", nbdtest.Options{MetaContexts: []string{since}})
		if err == nil {
			c.Close() // its lease lasts for a moment
			return errors.New("it is not refused")
		}
		var refused *nbdtest.OptionError
		if !errors.As(err, &refused) || refused.Type == nbdtest.RepErrInvalid {
			t.Errorf("without a primary the context is answered with %v", err)
		}
		return nil
	})
}
