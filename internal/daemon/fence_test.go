package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/nbd/attach"
	"github.com/blockstep/blockstep/nbd/nbdtest"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication"
)

// understands waits until a node knows of each node that it understands a fence.
func (n *testNode) understands() {
	n.t.Helper()
	n.eventually(20*time.Second, "it knows of each node which commands it understands", func(context.Context) error {
		if lacking := n.daemon.Load().state().Lacking(state.VersionFence); len(lacking) > 0 {
			return fmt.Errorf("%v do not", lacking)
		}
		return nil
	})
}

// TestFence: sessions from before end, through each node, and those from afterwards work;
// the primary stays, nothing that was answered is lost, and nobody is told that it may be.
func TestFence(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha, beta := nodes["alpha"], nodes["beta"]
	before := alpha.create("db", 16<<20)
	beta.healthy("db")
	beta.understands()
	old := map[string]*nbdtest.Client{}
	for name, n := range nodes {
		old[name] = n.open("db")
		if err := old[name].WriteAt(t.Context(), []byte(name), uint64(len(old))*4096); err != nil {
			t.Fatal(err)
		}
	}
	one := alpha.open("db@beta")
	res, err := beta.client.Fence(t.Context(), "db")
	if err != nil {
		t.Fatal(err)
	}
	if res.Volume != "db" || res.Primary != before.Primary || res.Epoch <= before.Epoch || res.Generation != before.Generation+1 || res.Lost != "" || len(res.Ended) != 3 {
		t.Errorf("%+v, after %+v", res, before)
	}
	for _, e := range res.Ended {
		if len(e.Clients) != 1 || e.Error != "" {
			t.Errorf("ended: %+v", e)
		}
	}
	for name, c := range old {
		if err := c.WriteAt(t.Context(), []byte("late"), 0); err == nil {
			t.Errorf("a session from before, through %s, writes", name)
		}
	}
	if err := one.ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
		t.Errorf("who reads one replica: %v", err)
	}
	for name, n := range nodes {
		c := n.open("db")
		if err := c.WriteAt(t.Context(), []byte("new"), 0); err != nil {
			t.Errorf("a session from afterwards, through %s: %v", name, err)
		}
		var all []string
		for i := range len(old) {
			p := make([]byte, 5)
			if err := c.ReadAt(t.Context(), p, uint64(i+1)*4096); err != nil {
				t.Fatal(err)
			}
			all = append(all, string(bytes.TrimRight(p, "\x00")))
		}
		if slices.Sort(all); !slices.Equal(all, []string{"alpha", "beta", "gamma"}) {
			t.Errorf("answered before: %q", all)
		}
		if log := n.log.String(); !strings.Contains(log, replication.ErrFenced.Error()) || strings.Contains(log, "lost unflushed data") {
			t.Errorf("the log of %s does not say that it was a fence", name)
		}
	}
	// A kernel device from before does not go on, not even after a restart of its daemon.
	d := alpha.daemon.Load()
	rec := attach.Record{Volume: "db", ID: volumeIDText(d.state().Volume("db").ID), Generation: before.Generation, Epoch: before.Epoch}
	if err := d.checkAttachment(rec); !errors.Is(err, attach.ErrLost) || !strings.Contains(err.Error(), "was fenced") {
		t.Errorf("a device from before: %v", err)
	}
	rec.Generation, rec.Epoch = res.Generation, res.Epoch
	if err := d.checkAttachment(rec); err != nil {
		t.Errorf("a device from afterwards: %v", err)
	}
	var told []string
	if err := beta.client.Events(t.Context(), "", false, func(e control.Event) error {
		if e.Kind == "fenced" {
			told = append(told, e.Text)
		}
		return nil
	}); err != nil || len(told) != 1 || !strings.Contains(told[0], "fenced by an operator") {
		t.Errorf("events %q, %v", told, err)
	}
	var e *control.Error
	if _, err := beta.client.Fence(t.Context(), "nosuch"); !errors.As(err, &e) || e.Code != control.CodeNotFound {
		t.Errorf("%v", err)
	}
}

// TestFencesAtOnce: through all nodes, while somebody writes. Each is in force when it
// returns, and the volume serves afterwards.
func TestFencesAtOnce(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	v := alpha.create("db", 16<<20)
	for _, n := range nodes {
		n.healthy("db")
		n.understands()
	}
	c := alpha.open("db")
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for i := uint64(0); c.WriteAt(t.Context(), bytes.Repeat([]byte{byte(i)}, 4096), i%100*4096) == nil; i++ {
		}
	}()
	var wg sync.WaitGroup
	for name, n := range nodes {
		wg.Go(func() {
			if _, err := n.client.Fence(t.Context(), "db"); err != nil {
				t.Errorf("through %s: %v", name, err)
			}
		})
	}
	wg.Wait()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("a session from before still writes")
	}
	if now := alpha.status("db"); now.Generation < v.Generation+1 || now.Generation > v.Generation+3 {
		t.Errorf("generation %d, was %d", now.Generation, v.Generation)
	}
	if err := alpha.open("db").WriteAt(t.Context(), []byte("new"), 0); err != nil {
		t.Error(err)
	}
}

// TestFenceWithoutThePrimary: its node is gone, and the fence is in force all the same,
// when that node comes back too.
func TestFenceWithoutThePrimary(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	v := alpha.create("db", 16<<20)
	for _, n := range nodes {
		n.healthy("db")
		n.understands()
	}
	gone := nodes[v.Primary]
	var rest []*testNode
	for name, n := range nodes {
		if name != v.Primary {
			rest = append(rest, n)
		}
	}
	old := rest[0].open("db")
	if err := old.WriteAt(t.Context(), []byte("before"), 4096); err != nil {
		t.Fatal(err)
	}
	gone.halt()
	res, err := rest[1].client.Fence(t.Context(), "db")
	if err != nil || res.Primary == v.Primary || res.Lost != "" {
		t.Fatalf("%+v, %v", res, err)
	}
	if err := old.WriteAt(t.Context(), []byte("late"), 4096); err == nil {
		t.Error("a session from before writes")
	}
	if got := rest[0].read("db", 4096, 6); string(got) != "before" {
		t.Errorf("%q", got)
	}
	gone.start()
	rest[0].healthy("db")
	if got := gone.read("db", 4096, 6); string(got) != "before" {
		t.Errorf("%q", got)
	}
}

// TestFenceIsUnderstoodByAll: a node that may be of a release before gets no fence to see.
func TestFenceIsUnderstoodByAll(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	v := alpha.create("db", 16<<20)
	for _, n := range nodes {
		n.healthy("db")
		n.understands()
	}
	d := alpha.daemon.Load()
	if _, err := d.apply(t.Context(), state.Command{AddEvent: &state.AddEvent{Event: state.Event{Name: "node-started", Node: "gamma", Text: "node gamma started, blockstep v1"}}}); err != nil {
		t.Fatal(err)
	}
	c := alpha.open("db")
	var e *control.Error
	if _, err := alpha.client.Fence(t.Context(), "db"); !errors.As(err, &e) || e.Code != control.CodeRefused || !strings.Contains(e.Next, "upgrade blockstepd on gamma") {
		t.Errorf("%v", err)
	}
	reply, err := d.operateOnce(t.Context(), operatorCall{Volume: d.state().Volume("db").ID, Fence: true})
	if err != nil || reply.Again || !strings.Contains(reply.Next, "upgrade blockstepd on gamma") {
		t.Errorf("the leader: %+v, %v", reply, err)
	}
	if err := c.WriteAt(t.Context(), []byte("on"), 0); err != nil {
		t.Error(err)
	}
	if now := alpha.status("db"); now.Epoch != v.Epoch {
		t.Errorf("epoch %d, was %d", now.Epoch, v.Epoch)
	}
}
