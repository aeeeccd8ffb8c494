package replication

import (
	"bytes"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/vfs"
)

// heldStore is a hook under which the backing store takes no write until it is
// let go.
type heldStore struct {
	mu   sync.Mutex
	wait chan struct{} // nil: it takes them
}

func (h *heldStore) hold() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wait = make(chan struct{})
}

func (h *heldStore) let() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.wait != nil {
		close(h.wait)
		h.wait = nil
	}
}

func (h *heldStore) hook(c vfs.Call) error {
	if c.Op != vfs.OpWrite || filepath.Base(c.Path) != storeFile {
		return nil
	}
	h.mu.Lock()
	wait := h.wait
	h.mu.Unlock()
	if wait != nil {
		<-wait
	}
	return nil
}

// awaitApplied waits until everything that is in the log is in the backing store.
func awaitApplied(t *testing.T, v *Volume) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; runtime.Gosched() {
		if st := v.Status().Core; st.Applied == st.Last.Seq {
			return
		} else if time.Now().After(end) {
			t.Fatalf("applied %d of %d", st.Applied, st.Last.Seq)
		}
	}
}

// TestMemoryIsBounded: while the backing store takes nothing, four times the
// volume's memory is written; all of it is answered and can be read, and no more
// than the volume's memory is held. When the store goes on, next to nothing is.
func TestMemoryIsBounded(t *testing.T) {
	const memory, size, n = 16 << 20, 1 << 20, 64
	var store heldStore
	v, s := openLoneOn(t, n*size, vfs.Inject(vfs.OS(), store.hook), Limits{Memory: memory})
	t.Cleanup(store.let) // before the volume is stopped
	before := buf.InUse()
	store.hold()
	i := byte(0)
	fill := func(r *Request) {
		r.Op, r.Length, r.Offset = OpWrite, size, uint64(i)*size
		r.Data = buf.Get(size)
		i++
		for k := range r.Data.B {
			r.Data.B[k] = i
		}
	}
	runRequests(t, s, n, 4, fill)
	if held := buf.InUse() - before; held > memory {
		t.Errorf("%d MiB are held, %d written: more than the limit of %d", held>>20, n*size>>20, memory>>20)
	}
	overlay, _ := v.Memory()
	if overlay > memory*7/16 || overlay < memory/4 {
		t.Errorf("the overlay holds %d bytes", overlay)
	}
	done := make(chan error, 1)
	r := &Request{Complete: func(_ *Request, err error) { done <- err }, Data: buf.Get(size)}
	for i := range n { // some from memory, some from the log
		r.Op, r.Offset, r.Length = OpRead, uint64(i)*size, size
		s.Submit(r)
		if err := <-done; err != nil || !bytes.Equal(r.Data.B, bytes.Repeat([]byte{byte(i + 1)}, size)) {
			t.Fatalf("read %d: %v, %d", i, err, r.Data.B[0])
		}
	}
	r.Data.Release()
	store.let()
	awaitApplied(t, v)
	if err := v.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	if held := buf.InUse() - before; held > memory/8 {
		t.Errorf("%d bytes are held when all is applied", held)
	}
}

// TestSmallEntriesWaitForTheStore: each entry that is not applied takes some
// memory of its own. Beyond their number requests wait; none fails, and all are
// answered when the store goes on.
func TestSmallEntriesWaitForTheStore(t *testing.T) {
	const limit, n = 200, 300
	var store heldStore
	v, s := openLoneOn(t, 4<<20, vfs.Inject(vfs.OS(), store.hook), Limits{UnappliedEntries: limit})
	t.Cleanup(store.let)
	awaitApplied(t, v)
	store.hold()
	done := make(chan error, n)
	for i := range n {
		r := &Request{Complete: func(r *Request, err error) {
			r.Data.Release()
			done <- err
		}, Op: OpWrite, Offset: uint64(i) * 4096, Length: 4096, Data: buf.Get(4096)}
		s.Submit(r)
	}
	for range limit {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	st := v.Status().Core
	if waiting := n - limit; st.Waiting != waiting || int(st.Last.Seq-st.Applied) > limit {
		t.Errorf("%d requests wait, %d entries are not applied; want %d and %d", st.Waiting, st.Last.Seq-st.Applied, waiting, limit)
	}
	select {
	case err := <-done:
		t.Errorf("more than %d were answered (%v)", limit, err)
	default:
	}
	store.let()
	for range n - limit {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}
