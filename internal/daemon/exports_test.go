package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/replication"
)

// TestAnExportIsNotOlderThanTheStart: a daemon that has just started remembers its
// volumes from a snapshot, and shows none before it has heard how they are now;
// without a Raft leader as it remembers them, after a time.
func TestAnExportIsNotOlderThanTheStart(t *testing.T) {
	t.Parallel()
	const old, grown = 8 << 20, 16 << 20
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
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
	_, err := exports{d: d}.await(over, "web") // not known
	if !errors.Is(err, nbd.ErrNoExport) || !errors.As(err, new(notYet)) {
		t.Errorf("a volume that is not known: %v", err)
	}

	var waiting sync.WaitGroup
	waiting.Go(func() { is(t.Context(), e, grown) })
	waiting.Go(func() { is(t.Context(), exports{d: d}, grown) }) // there is a leader
	time.Sleep(5 * exportPause)                                  // a wait that is none ends here
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
	waiting.Wait()

	nodes["beta"].halt()
	nodes["gamma"].halt()
	alpha.eventually(20*time.Second, "it has no leader", func(context.Context) error {
		if leader, _ := running.raft.Leader(); leader != "" {
			return errors.New("not yet")
		}
		return nil
	})
	d = &Daemon{cfg: running.cfg, raft: running.raft, current: make(chan struct{})}
	is(t.Context(), exports{d: d}, grown) // the wait for all that is over
}

// TestAnExportIsAsLargeAsItsVolume: the volume hears of its new size after the node
// has, and no client comes between them.
func TestAnExportIsAsLargeAsItsVolume(t *testing.T) {
	t.Parallel()
	const old, grown = 8 << 20, 16 << 20
	alpha := newCluster(t, "")["alpha"]
	alpha.create("db", old)
	alpha.healthy("db")
	e := alpha.daemon.Load().exports()
	x, err := e.await(t.Context(), "db")
	if err != nil {
		t.Fatal(err)
	}
	heard := *x.volume
	heard.Size = grown
	x.volume = &heard

	over, cancel := context.WithCancel(t.Context())
	cancel()
	size := func(wait context.Context) uint64 {
		s, err := e.open(t.Context(), wait, x, replication.Client{})
		if err != nil {
			t.Error(err)
			return 0
		}
		defer s.Close()
		return s.Size()
	}
	if n := size(over); n != old {
		t.Errorf("a wait that is over: %d bytes, want %d", n, old)
	}
	var waiting sync.WaitGroup
	waiting.Go(func() {
		if n := size(t.Context()); n != grown {
			t.Errorf("%d bytes, want %d", n, grown)
		}
	})
	time.Sleep(5 * exportPause)
	if _, err := alpha.client.ResizeVolume(t.Context(), "db", control.Resize{Size: grown}); err != nil {
		t.Error(err)
	}
	waiting.Wait()
}

// TestAReplicaOfANewPrimary: a primary that does not serve yet does not know all that
// was answered, so what is asked of it, and of others by its word, waits until it does.
func TestAReplicaOfANewPrimary(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	sv := alpha.create("db", 8<<20)
	alpha.healthy("db")
	to := nodes["beta"]
	if sv.Primary == to.name {
		to = nodes["gamma"]
	}
	for _, n := range nodes {
		if n != to { // its marker is not committed
			n.faults.on(errHang, "/log/", vfs.OpWrite, vfs.OpWriteOut)
			defer n.faults.off()
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var waiting sync.WaitGroup
	defer waiting.Wait()
	defer cancel()
	waiting.Go(func() { _, _ = alpha.client.Switchover(ctx, "db", control.Switchover{To: to.name}) })
	d := to.daemon.Load()
	to.eventually(20*time.Second, "it is in office", func(context.Context) error {
		if v := d.state().Volume("db"); string(v.Primary) != to.name {
			return errors.New("not yet")
		}
		return nil
	})
	id, level := d.state().Volume("db").ID, make(chan struct{})
	go func() {
		defer close(level)
		d.level(ctx, id, d.self)
	}()
	select {
	case <-level:
		t.Error("the replica is shown before its node knows what was answered")
	case <-time.After(300 * time.Millisecond):
	}
	for _, n := range nodes {
		n.faults.off()
	}
	<-level
}

// TestClientsOfAVolume: who uses a volume is known of every node, also of one that
// does not answer, and those of another volume are not among them.
func TestClientsOfAVolume(t *testing.T) {
	nodes := newCluster(t, "", "gamma")
	alpha := nodes["alpha"]
	alpha.create("db", 16<<20)
	alpha.create("db2", 16<<20)
	nodes["gamma"].open("db")
	nodes["gamma"].open("db@alpha")
	alpha.open("db2")
	is := func(want string) func(context.Context) error {
		return func(ctx context.Context) error {
			list, err := alpha.client.VolumeClients(ctx, "db")
			if err != nil {
				return err
			}
			got := ""
			for _, n := range list {
				got += fmt.Sprintf("%s %d %v ", n.Node, len(n.Clients), n.Error != "")
				for _, c := range n.Clients {
					if !strings.HasPrefix(c, "unix:pid=") {
						got += c + " "
					}
				}
			}
			if got != want {
				return fmt.Errorf("%q, want %q", got, want)
			}
			return nil
		}
	}
	alpha.eventually(10*time.Second, "the witness's two clients", is("alpha 0 false beta 0 false gamma 2 false "))
	nodes["gamma"].halt()
	alpha.eventually(10*time.Second, "a node that is down", is("alpha 0 false beta 0 false gamma 0 true "))
	if _, err := alpha.client.VolumeClients(t.Context(), "nosuch"); err == nil {
		t.Error("a volume that is not there has clients")
	}
}
