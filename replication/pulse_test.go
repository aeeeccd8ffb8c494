package replication

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/core"
)

// TestPulseThatHangs: the pulse takes the turn of a volume whose disk then hangs.
// Another volume of the node ticks on by itself: it keeps its lease. When the disk answers, the pulse beats again for both.
func TestPulseThatHangs(t *testing.T) {
	const lease = 400 * time.Millisecond
	pulse := NewPulse(nil, lease/4, 0)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { pulse.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })

	var held, let chan struct{}
	var mu sync.Mutex
	hook := func(c vfs.Call) error {
		mu.Lock()
		h, l := held, let
		mu.Unlock()
		if l != nil && c.Op == vfs.OpWrite && strings.HasSuffix(c.Path, ".seg") {
			select {
			case h <- struct{}{}:
			default:
			}
			<-l
		}
		return nil
	}
	open := func(fs vfs.FS) (*Volume, *Session) {
		return openLoneWith(t, 1<<20, Options{Pulse: pulse, Replica: &ReplicaOptions{FS: fs, Heartbeat: lease / 4, LeaseFor: lease}})
	}
	_, hangs := open(vfs.Inject(vfs.OS(), hook))
	other, _ := open(vfs.OS())
	done := make(chan error, 1)
	request := func(op Op) *Request {
		return &Request{Op: op, Length: 4096, Data: buf.Get(4096), Complete: func(r *Request, err error) {
			r.Data.Release()
			done <- err
		}}
	}
	wait := func(what string) {
		t.Helper()
		select {
		case err := <-done:
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		case <-time.After(time.Minute):
			t.Fatal(errors.New(what + " is not answered"))
		}
	}
	hangs.Submit(request(OpWrite))
	wait("a write before the disk hangs")

	mu.Lock()
	held, let = make(chan struct{}, 1), make(chan struct{})
	mu.Unlock()
	release := sync.OnceFunc(func() { close(let) })
	t.Cleanup(release)
	hangs.Queue(request(OpWrite)) // and no Flush: whoever ticks takes it
	<-held
	// Nobody asks anything of it: only a tick renews its lease.
	until := func() core.Instant { return other.rep().gate.load().LeaseUntil }
	poll := time.NewTicker(lease / 20)
	defer poll.Stop()
	for first, began := until(), time.Now(); until() < first+5*core.Instant(lease); <-poll.C {
		if time.Since(began) > 20*time.Second {
			t.Fatal("the other volume has no tick")
		}
	}
	release()
	wait("the write to the disk that hung")
}

// TestPulseHasWhatRuns: a replica has the pulse from its start to its stop.
func TestPulseHasWhatRuns(t *testing.T) {
	pulse := NewPulse(nil, 20*time.Millisecond, 0)
	v, _ := openLoneWith(t, 1<<20, Options{Pulse: pulse, Replica: &ReplicaOptions{FS: vfs.OS()}})
	if list := pulse.replicas(nil); len(list) != 1 || list[0] != v.rep() {
		t.Errorf("%d replicas have the pulse", len(list))
	}
	if err := v.Stop(); err != nil {
		t.Fatal(err)
	}
	if len(pulse.replicas(nil)) != 0 {
		t.Error("a replica that has stopped still has the pulse")
	}
}

// TestPulseWakesWhereALeaseEnds: a round comes with the next tick of the clock, but
// before that where a primary's lease ends.
func TestPulseWakesWhereALeaseEnds(t *testing.T) {
	clock := testClock{start: time.Now().Add(-time.Hour)}
	p := NewPulse(clock, 10*time.Second, 0)
	rp := &replica{}
	list := []*replica{{}, rp}
	now := clock.Boot()
	tick := now - now%core.Instant(p.every) + core.Instant(p.every)
	for at, want := range map[core.Instant]core.Instant{
		0:                                tick, // of none
		now - core.Instant(time.Second):  tick, // it has been there
		tick + core.Instant(time.Second): tick,
		now + (tick-now)/2 + 1:           now + (tick-now)/2 + 1 + core.Instant(time.Millisecond),
	} {
		rp.wakesAt.Store(int64(at))
		got := clock.Boot() + core.Instant(p.next(list))
		if d := time.Duration(got - want); d < -20*time.Millisecond || d > 20*time.Millisecond {
			t.Errorf("with a lease that ends in %v the next round is %v from where it should be", time.Duration(at-now), d)
		}
	}
}
