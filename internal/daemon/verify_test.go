package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
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

// TestVerifiesAreBounded: through one node so many volumes are compared at a time, and
// what is too much waits and says so. One volume is compared once at a time in the whole
// cluster, also by a run that waits; and whoever comes when that has ended is let in.
func TestVerifiesAreBounded(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha, beta := nodes["alpha"], nodes["beta"]
	alpha.create("db", 8<<20)
	alpha.healthy("db")
	runs := alpha.daemon.Load().verifies
	none := func([]string) error { return errors.New("it waits") }
	for i := range verifyRunsMax {
		if err := runs.enter(t.Context(), fmt.Sprint("v", i), none); err != nil {
			t.Fatal(err)
		}
	}
	waits, done := make(chan string, 9), make(chan error, 1)
	go func() {
		last := control.VerifyProgress{}
		err := alpha.client.Verify(t.Context(), "db", control.Verify{}, func(p control.VerifyProgress) error {
			if last = p; p.Waits != "" {
				waits <- p.Waits
			}
			return nil
		})
		if err == nil && (!last.Done || last.DoneBytes != 8<<20) {
			err = fmt.Errorf("it ended with %+v", last)
		}
		done <- err
	}()
	select {
	case said := <-waits:
		if !strings.Contains(said, "v0 or of v1") || !strings.Contains(said, "alpha") {
			t.Errorf("it says: %s", said)
		}
	case err := <-done:
		t.Fatalf("it did not wait: %v", err)
	}
	for _, n := range nodes {
		var e *control.Error
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		err := n.client.Verify(ctx, "db", control.Verify{Repair: true}, func(control.VerifyProgress) error { return nil })
		cancel()
		if !errors.As(err, &e) || e.Code != control.CodeRefused || !strings.Contains(e.Message, "are being compared already, through alpha") {
			t.Errorf("a second one, through %s: %v", n.name, err)
		}
	}
	runs.leave("v0")
	if err := <-done; err != nil {
		t.Error(err)
	}
	for range 2 { // one after the other
		for _, n := range []*testNode{beta, alpha} {
			if err := n.client.Verify(t.Context(), "db", control.Verify{}, func(control.VerifyProgress) error { return nil }); err != nil {
				t.Errorf("afterwards, through %s: %v", n.name, err)
			}
		}
	}
}

// TestAVerifysClaim: it is one run's until that gives it back, or is not heard of.
func TestAVerifysClaim(t *testing.T) {
	v, now := newVerifyRuns(), time.Now()
	if got := v.claim(verifyCall{Volume: 1, Run: "a", For: time.Minute}, "alpha", now); got != (verifyReply{}) {
		t.Errorf("the first: %+v", got)
	}
	if got := v.claim(verifyCall{Volume: 2, Run: "b"}, "beta", now); got != (verifyReply{}) {
		t.Errorf("another volume: %+v", got)
	}
	now = now.Add(verifyClaimLife)
	for _, end := range []bool{false, true} {
		if got := v.claim(verifyCall{Volume: 1, Run: "b", End: end}, "beta", now); got != (verifyReply{"alpha", time.Minute + verifyClaimLife}) {
			t.Errorf("another run: %+v", got)
		}
	}
	if got := v.claim(verifyCall{Volume: 1, Run: "a", For: time.Minute + verifyClaimLife}, "alpha", now); got != (verifyReply{}) {
		t.Errorf("the first again: %+v", got)
	}
	now = now.Add(verifyClaimLife + 1)
	if got := v.claim(verifyCall{Volume: 1, Run: "b"}, "beta", now); got != (verifyReply{}) {
		t.Errorf("another run, when the first has not been heard of: %+v", got)
	}
	if got := v.claim(verifyCall{Volume: 1, Run: "a"}, "alpha", now); got.Node != "beta" {
		t.Errorf("the first, too late: %+v", got)
	}
	v.claim(verifyCall{Volume: 1, Run: "b", End: true}, "beta", now)
	if got := v.claim(verifyCall{Volume: 1, Run: "a"}, "alpha", now); got != (verifyReply{}) || len(v.claims) != 1 {
		t.Errorf("given back: %+v, %d claims", got, len(v.claims))
	}
}
