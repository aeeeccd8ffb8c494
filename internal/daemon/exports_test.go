package daemon

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/nbd"
)

// TestAnExportIsNotOlderThanTheStart: a daemon that has just started remembers its
// volumes from a snapshot, and shows none before it has heard how they are now;
// without a Raft leader as it remembers them, after a time.
func TestAnExportIsNotOlderThanTheStart(t *testing.T) {
	t.Parallel()
	const old, grown = 8 << 20, 16 << 20
	alpha := newCluster(t, "")["alpha"]
	alpha.create("db", old)
	alpha.healthy("db")
	running := alpha.daemon.Load()
	// As it is before it has heard: by its state a volume of before it grew.
	d := &Daemon{cfg: running.cfg, raft: running.raft, current: make(chan struct{})}
	e := exports{d: d, old: time.Now().Add(time.Hour)}
	is := func(ctx context.Context, e exports, size uint64) {
		t.Helper()
		if x, err := e.await(ctx, "db"); err != nil || x.info.Size != size {
			t.Errorf("%d bytes (%v), want %d", x.info.Size, err, size)
		}
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	is(over, e, old)                           // a wait that is over
	is(t.Context(), exports{d: d}, old)        // the wait for all that is over
	_, err := exports{d: d}.await(over, "web") // not known
	if !errors.Is(err, nbd.ErrNoExport) || !errors.As(err, new(notYet)) {
		t.Errorf("a volume that is not known: %v", err)
	}

	done := make(chan struct{})
	go func() {
		defer close(done)
		is(t.Context(), e, grown)
	}()
	if _, err := alpha.client.ResizeVolume(t.Context(), "db", control.Resize{Size: grown}); err != nil {
		t.Error(err)
	}
	alpha.eventually(20*time.Second, "it has heard", func(context.Context) error {
		if d.state().Volume("db").Size != grown {
			return errors.New("not yet")
		}
		return nil
	})
	close(d.current)
	<-done
}
