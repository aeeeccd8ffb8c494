package raft

import (
	"bytes"
	"context"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/blockstep/blockstep/internal/ident"
)

func streams(t *testing.T, n *testNet, cluster, raftID, address string, id ...string) *boundStream {
	o := &Options{Cluster: cluster, Listener: n.listen(address), Dial: n.dialer(address), Logger: testLogger(t)}
	return newBoundStream(t.Context(), o, raftID, address, func() string { return strings.Join(id, "") })
}

// acceptAll lets in whom the stream lets in, until it is closed.
func acceptAll(s *boundStream) {
	for {
		c, err := s.Accept()
		if err != nil {
			return
		}
		c.Close()
	}
}

func TestConnectionsAreBoundToRaftIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		a := streams(t, n, "prod", "a/1", "a:1")
		b := streams(t, n, "prod", "b/1", "b:1")
		x := streams(t, n, "other", "x/1", "x:1")
		defer a.Close()
		defer b.Close()
		defer x.Close()
		go acceptAll(b)
		if c, err := a.Dial("b/1@b:1", time.Second); err != nil {
			t.Error(err)
		} else {
			c.Close()
		}
		for target, say := range map[string]string{
			"b/2@b:1": "its data_dir is another one",
			"x/1@x:1": `belongs to cluster "other"`,
			"b:1":     "names no Raft id",
			"z/1@z:1": "unreachable",
		} {
			if _, err := a.Dial(hraft.ServerAddress(target), time.Second); err == nil || !strings.Contains(err.Error(), say) {
				t.Errorf("%s: %v", target, err)
			}
		}
	})
}

// Two clusters may have one name. Whoever knows no id yet, or is of a release that
// sends none, is let in by the name.
func TestConnectionsAreBoundToClusterIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		to := map[string]*boundStream{"": streams(t, n, "prod", "b/1", "b:1"), "7": streams(t, n, "prod", "b/7", "b:7", "7")}
		for id, b := range to {
			defer b.Close()
			go acceptAll(b)
			for _, own := range []string{"", "7", "8"} {
				a := streams(t, n, "prod", "a/1", "a:1", own)
				c, err := a.Dial(hraft.ServerAddress(b.self+"@"+b.address), time.Second)
				if want := own == "" || id == "" || own == id; (err == nil) != want || !want && !strings.Contains(err.Error(), "of id 7, not to that of id 8") {
					t.Errorf("cluster id %q to %q: %v", own, id, err)
				}
				if err == nil {
					c.Close()
				}
				a.Close()
			}
		}
	})
}

// A connection that says nothing, or nonsense, costs nobody anything.
func TestSilentConnectionsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		b := streams(t, n, "prod", "b/1", "b:1")
		defer b.Close()
		dial := n.dialer("a:1")
		var conns []net.Conn
		for range greetingsMax + 5 {
			c, err := dial(t.Context(), "b:1")
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, c)
		}
		time.Sleep(greetingTimeout + time.Second)
		for _, c := range conns {
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("a silent connection is still open")
			}
		}
	})
}

func FuzzGreeting(f *testing.F) {
	var b bytes.Buffer
	if err := writeJSON(&b, greeting{V: 1, Cluster: "prod", From: "a/1", To: "b/1"}); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add([]byte{0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		var g greeting
		if err := readJSON(bytes.NewReader(b), &g); err == nil && len(b) < 2 {
			t.Error("a greeting without a length")
		}
	})
}

// The controller acts at whichever real node leads, and nowhere else.
func TestControllerFollowsTheLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		replicas := &fakeReplicas{of: map[ident.Node]*fakeReplica{}}
		ctl := map[ident.Node]*Controller{}
		ctx, cancel := context.WithCancel(t.Context())
		ends := make(chan error, 3)
		for _, f := range testFounders {
			own := NewController(ControllerOptions{Cluster: c.start(f.Name), Replicas: replicas, Logger: testLogger(t)})
			ctl[f.Name] = own
			go func() { ends <- own.Run(ctx) }()
		}
		defer func() {
			cancel()
			for range 3 {
				<-ends
			}
		}()
		c.waitLeader()
		for i, n := range []ident.Node{"alpha", "beta"} {
			replicas.of[n] = &fakeReplica{id: ident.Replica(i + 1)}
		}
		if r := c.apply(createTwo()); !r.OK {
			t.Fatal(r.Err())
		}
		for i, n := range []ident.Node{"alpha", "beta"} {
			if r := c.apply(register(n, ident.Replica(i+1))); !r.OK {
				t.Fatal(r.Err())
			}
		}
		until(t, "a first primary", func() bool { return c.waitLeader().State().Volumes[1].Epoch == 1 })
		old := c.waitLeader().opts.Node
		c.kill(old)
		l := c.waitLeader()
		if name := l.opts.Node; ctl[name].Waiting(1) != "" {
			t.Errorf("%s waits for %q", name, ctl[name].Waiting(1))
		}
		until(t, "a switchover at the new leader", func() bool {
			return ctl[c.waitLeader().opts.Node].Switchover(ctx, 1, "beta") == nil
		})
		if v := c.waitLeader().State().Volumes[1]; v.Primary != "beta" {
			t.Errorf("%+v", v)
		}
		if err := ctl[old].Switchover(ctx, 1, "alpha"); err == nil {
			t.Error("a node that is gone moved a primary")
		}
	})
}
