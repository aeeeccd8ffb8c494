package daemon

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
)

// backing is the path of the backing store of a node's only replica.
func (n *testNode) backing() string {
	n.t.Helper()
	files, err := filepath.Glob(filepath.Join(n.dir, volumesDir, "*", "data"))
	if err != nil || len(files) != 1 {
		n.t.Fatalf("backing stores: %q, %v", files, err)
	}
	return files[0]
}

// TestVerifyOfMuch: more ranges differ than are reported. A comparison says how far
// it came; a repair goes on to the end, and leaves nothing.
func TestVerifyOfMuch(t *testing.T) {
	nodes := newCluster(t, "")
	alpha, gamma := nodes["alpha"], nodes["gamma"]
	const size = 3 * verifyFoundMax * 2 * verifyBlock // every second block differs
	alpha.create("db", size)
	alpha.healthy("db")
	if _, err := alpha.client.Switchover(t.Context(), "db", control.Switchover{To: "alpha"}); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	for i, r := 0, rand.New(rand.NewPCG(1, 2)); i < size; i += verifyBlock {
		want[i] = byte(1 + r.IntN(255))
	}
	c := alpha.open("db")
	for off := 0; off < size; off += 1 << 20 {
		if err := c.WriteAt(t.Context(), want[off:min(off+1<<20, size)], uint64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	alpha.healthy("db")
	alpha.eventually(20*time.Second, "gamma has applied it", func(context.Context) error {
		got, err := os.ReadFile(gamma.backing())
		if err == nil && !bytes.Equal(got, want) {
			err = fmt.Errorf("%d bytes that differ", len(got))
		}
		return err
	})
	f, err := os.OpenFile(gamma.backing(), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off := int64(0); off < size; off += 2 * verifyBlock {
		if _, err := f.WriteAt([]byte{0}, off); err != nil {
			t.Fatal(err)
		}
	}

	verify := func(repair bool) (last control.VerifyProgress) {
		t.Helper()
		err := alpha.client.Verify(t.Context(), "db", control.Verify{Repair: repair}, func(p control.VerifyProgress) error { last = p; return nil })
		if err != nil || !last.Done {
			t.Fatalf("verify, repair %v: %+v, %v", repair, last, err)
		}
		return last
	}
	p := verify(false)
	if n := int64(len(p.Found)); n < verifyFoundMax || p.More != 0 || p.DoneBytes >= size || p.DoneBytes < n*2*verifyBlock-verifyChunk {
		t.Errorf("compared %d of %d, %d ranges, %d more", p.DoneBytes, p.TotalBytes, n, p.More)
	}
	p = verify(true)
	if n := int64(len(p.Found)); n > verifyFoundMax || n+p.More != 3*verifyFoundMax || p.DoneBytes != size {
		t.Errorf("repaired up to %d of %d, %d ranges, %d more", p.DoneBytes, p.TotalBytes, n, p.More)
	}
	for _, e := range p.Found {
		if !e.Repaired || e.Node != "gamma" {
			t.Fatalf("%+v", e)
		}
	}
	if p = verify(false); len(p.Found) != 0 || p.DoneBytes != size {
		t.Errorf("after the repair, compared %d: %d ranges differ", p.DoneBytes, len(p.Found))
	}
	if got := gamma.read("db@gamma", 0, size); !bytes.Equal(got, want) {
		t.Error("gamma's replica is not what was written")
	}
}
