package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
)

// TestAloneAfterARestart: a node that is started while the others are down knows
// that it is a member, and does not say that there is no cluster as yet.
func TestAloneAfterARestart(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	alpha.create("db", 8<<20)
	for _, n := range nodes {
		n.halt()
	}
	alpha.start()
	var first error
	alpha.eventually(20*time.Second, "it answers", func(ctx context.Context) error {
		_, first = alpha.client.Status(ctx)
		if errors.Is(first, control.ErrUnreachable) {
			return first
		}
		return nil
	})
	// Nobody may have been looked for by then: that the others are gone is not said.
	if first == nil || !strings.Contains(first.Error(), "is looking for the cluster") || strings.Contains(first.Error(), "recover") {
		t.Errorf("at first it says: %v", first)
	}
	alpha.eventually(20*time.Second, "it says what it waits for", func(ctx context.Context) error {
		_, err := alpha.client.Status(ctx)
		if err == nil {
			return errors.New("it knows all")
		}
		if !strings.Contains(err.Error(), "has not heard the cluster state since its start") || !strings.Contains(err.Error(), "start the nodes that are down") {
			return fmt.Errorf("it says: %w", err)
		}
		return nil
	})
}

// TestAnAnswerRightAfterAStart: what is asked of a node that has just started waits
// until it has found the others, which are up.
func TestAnAnswerRightAfterAStart(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	alpha.create("db", 8<<20)
	alpha.healthy("db")
	alpha.halt()
	alpha.start()
	alpha.eventually(20*time.Second, "it answers", func(ctx context.Context) error {
		_, err := alpha.client.VolumeStatus(ctx, "db")
		if errors.Is(err, control.ErrUnreachable) {
			return err
		}
		if err != nil && !strings.Contains(err.Error(), "is looking for the cluster") { // a slow machine
			t.Errorf("at first it says: %v", err)
		}
		return nil
	})
}

// TestARestartedNodeIsToldAtOnce: a node that comes back serves its clients as soon
// as it has found the Raft leader, however long that would have kept silent by itself.
func TestARestartedNodeIsToldAtOnce(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	for _, n := range nodes {
		n.halt()
		n.quiet = time.Hour
	}
	for _, n := range nodes {
		n.start()
	}
	nodes["alpha"].eventually(20*time.Second, "there is a leader", func(ctx context.Context) error {
		_, err := nodes["alpha"].client.Nodes(ctx)
		return err
	})
	nodes["alpha"].create("db", 8<<20)
	nodes["alpha"].healthy("db")
	for _, n := range nodes {
		n.halt()
		n.start()
		n.healthy("db")
		n.read("db", 0, 512)
	}
}

// roundTrip is an http.RoundTripper.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestALeaderThatDiesWhenItIsAsked: a node that has just started does not wait for the
// answer of a Raft leader that hangs, or is dead: there will be another one to ask.
func TestALeaderThatDiesWhenItIsAsked(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	var running *Daemon // at a follower
	nodes["alpha"].eventually(20*time.Second, "there is a leader, and one that follows", func(context.Context) error {
		for _, n := range nodes {
			running = n.daemon.Load()
			if leader, _ := running.raft.Leader(); leader != "" && leader != running.self {
				return nil
			}
		}
		return errors.New("not yet")
	})
	asked := make(chan struct{}, 100)
	d := &Daemon{cfg: running.cfg, self: running.self, log: running.log, raft: running.raft, current: make(chan struct{})}
	d.rpc = &rpcClient{self: running.self, http: &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
		asked <- struct{}{}
		<-r.Context().Done()
		return nil, r.Context().Err()
	})}}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		d.runHear(ctx)
	}()
	for range 2 {
		select {
		case <-asked:
		case <-time.After(20 * time.Second):
			t.Fatal("it asks once and no more")
		}
	}
	close(d.current)
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("it goes on when the node is current")
	}
}
