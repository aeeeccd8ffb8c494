package peer

import (
	"sync"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// hangs is a recorder whose Settle hangs for volume 1, like the disk of one
// volume, until it is let go.
type hangs struct {
	*recorder
	held chan struct{}
	free chan struct{}
	wg   sync.WaitGroup
}

func (h *hangs) Settle(_ ident.Node, vols []ident.Volume) {
	if vols[0] == 1 {
		h.wg.Add(1)
		defer h.wg.Done()
		h.held <- struct{}{}
		<-h.free
	}
}

// One volume whose disk hangs, on the goroutine that reads the link, keeps
// nobody from hearing what the peer says about the others, nor its pings.
func TestHungSettleHoldsUpNoOtherVolume(t *testing.T) {
	n := newNetwork(t, false)
	ra := newRecorder()
	h := &hangs{recorder: newRecorder(), held: make(chan struct{}, 10), free: make(chan struct{})}
	a := n.add("alpha", ra, nil)
	b := n.add("beta", h, nil)
	a.SetPeers([]ident.Node{"beta"})
	b.SetPeers([]ident.Node{"alpha"})
	ra.want(t, "up beta")

	send := func(vol ident.Volume, id uint64) {
		a.Send("beta", vol, &wire.Forward{ID: id, Op: wire.OpFlush})
		a.Flush()
	}
	want := func(vol ident.Volume, id uint64) {
		t.Helper()
		e := h.next(t)
		f, ok := e.Msg.(*wire.Forward)
		if !ok || e.Volume != vol || f.ID != id {
			t.Fatalf("volume %d: %+v, want volume %d, request %d", e.Volume, e.Msg, vol, id)
		}
		e.Free()
	}
	// Twice: the goroutine that took the reading over may be held up as well.
	for round := range uint64(2) {
		send(1, 10*round)
		want(1, 10*round)
		<-h.held
		for i := uint64(1); i < 5; i++ {
			send(2, 10*round+i)
		}
		for i := uint64(1); i < 5; i++ {
			want(2, 10*round+i)
		}
		heard := b.Echo("alpha")
		await(t, func() bool { return b.Echo("alpha") != heard })
	}
	close(h.free)
	h.wg.Wait()
	for i := uint64(0); i < 100; i++ {
		send(2, 100+i)
		want(2, 100+i)
	}
	for _, s := range b.Status() {
		if !s.Heard || s.Connects == 0 {
			t.Errorf("the link is %+v", s)
		}
	}
}

func await(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); {
		if time.Now().After(end) {
			t.Fatal("it does not come")
		}
		time.Sleep(time.Millisecond)
	}
}
