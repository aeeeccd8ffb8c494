package raft

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// testCluster is three nodes of real hashicorp/raft and bbolt over pipes.
type testCluster struct {
	t    *testing.T
	net  *testNet
	base string
	dirs map[ident.Node]string
	pace time.Duration // HeartbeatTimeout and ElectionTimeout; 0: the default
}

var testFounders = []Founder{
	{Name: "alpha", Address: "alpha:1"}, {Name: "beta", Address: "beta:1"}, {Name: "gamma", Address: "gamma:1", Witness: true},
}

func newTestCluster(t *testing.T) *testCluster {
	c := &testCluster{t: t, net: newTestNet(), base: t.TempDir(), dirs: map[ident.Node]string{}}
	for _, f := range testFounders {
		c.dirs[f.Name] = filepath.Join(c.base, string(f.Name))
	}
	return c
}

func testLogger(t *testing.T) *slog.Logger {
	if os.Getenv("BLOCKSTEP_TEST_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("test", t.Name())
}

func (c *testCluster) options(name ident.Node) Options {
	address := string(name) + ":1"
	return Options{
		Dir: c.dirs[name], Node: name, Cluster: "prod", Founders: testFounders, Address: address,
		Listener: c.net.listen(address), Dial: c.net.dialer(address), Peers: c.net, Logger: testLogger(c.t).With("node", name),
		HeartbeatTimeout: c.pace, ElectionTimeout: c.pace,
	}
}

func (c *testCluster) start(name ident.Node) *Node {
	c.t.Helper()
	n, err := Open(c.t.Context(), c.options(name))
	if err != nil {
		c.t.Fatalf("open %s: %v", name, err)
	}
	c.net.mu.Lock()
	c.net.nodes[name] = n
	c.net.mu.Unlock()
	c.net.heal(string(name) + ":1")
	return n
}

// kill stops a node with nobody told.
func (c *testCluster) kill(name ident.Node) {
	c.t.Helper()
	c.net.isolate(string(name) + ":1")
	c.net.mu.Lock()
	n := c.net.nodes[name]
	delete(c.net.nodes, name)
	c.net.mu.Unlock()
	if n == nil {
		return
	}
	if err := n.Shutdown(); err != nil {
		c.t.Fatalf("stop %s: %v", name, err)
	}
}

func (c *testCluster) stop() {
	for _, f := range testFounders {
		c.kill(f.Name)
	}
	c.kill("delta")
}

// until waits in the bubble's time.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("never happened: %s", what)
}

func (c *testCluster) leader() *Node {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	for _, n := range c.net.nodes {
		if n.IsLeader() && n.State().ClusterID != "" {
			return n
		}
	}
	return nil
}

func (c *testCluster) waitLeader() *Node {
	c.t.Helper()
	until(c.t, "a leader of a founded cluster", func() bool { return c.leader() != nil })
	return c.leader()
}

func event(text string) state.Command {
	return state.Command{AddEvent: &state.AddEvent{Event: state.Event{Name: "test", Text: text}}}
}

func (c *testCluster) apply(cmd state.Command) state.Result {
	c.t.Helper()
	cmd.ID = NewCommandID()
	var res state.Result
	until(c.t, "the command is applied", func() bool {
		ctx, cancel := context.WithTimeout(c.t.Context(), 5*time.Second)
		defer cancel()
		l := c.leader()
		if l == nil {
			return false
		}
		r, err := l.Apply(ctx, cmd)
		res = r
		return err == nil
	})
	return res
}

func TestFoundingInAnyOrder(t *testing.T) {
	for _, order := range [][]ident.Node{{"alpha", "beta", "gamma"}, {"gamma", "beta", "alpha"}, {"beta", "alpha", "gamma"}} {
		t.Run(string(order[0]), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newTestCluster(t)
				defer c.stop()
				for i, name := range order {
					n := c.start(name)
					time.Sleep(3 * time.Second)
					if i < 2 {
						if s := n.Founding(); s.Done || s.Waiting == "" {
							t.Fatalf("%s with %d of 3 up: %+v, want it to wait and to say for whom", name, i+1, s)
						}
						if c.leader() != nil {
							t.Fatal("a leader before all founders were heard")
						}
					}
				}
				l := c.waitLeader()
				s := l.State()
				if len(s.Nodes) != 3 || !s.Nodes["gamma"].Witness || s.Nodes["alpha"].Witness {
					t.Fatalf("nodes: %+v", s.Nodes)
				}
				until(t, "everyone knows the cluster", func() bool {
					for _, n := range c.net.nodes {
						if n.State().ClusterID != s.ClusterID || !n.Founding().Done {
							return false
						}
						if name, _ := n.Leader(); name != l.opts.Node {
							return false
						}
					}
					return true
				})
			})
		})
	}
}

func TestLeaderDiesAndComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		for _, f := range testFounders {
			c.start(f.Name)
		}
		old := c.waitLeader().opts.Node
		if r := c.apply(event("one")); !r.OK {
			t.Fatal(r.Err())
		}
		begin := time.Now()
		c.kill(old)
		c.waitLeader()
		if d := time.Since(begin); d > 5*time.Second {
			t.Errorf("a new leader took %v", d)
		}
		if r := c.apply(event("two")); !r.OK {
			t.Fatal(r.Err())
		}
		n := c.start(old)
		until(t, "it has both events", func() bool {
			e, _ := n.State().EventsSince(1)
			return len(e) == 2 && e[0].Text == "one" && e[1].Text == "two"
		})
	})
}

// A leader sends heartbeats half as often as hashicorp/raft would for what followers
// wait for; who leads no more is soon a follower like all others.
func TestPaceOfHeartbeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		for _, f := range testFounders {
			c.start(f.Name)
		}
		paced := func(l *Node) func() bool {
			return func() bool {
				c.net.mu.Lock()
				defer c.net.mu.Unlock()
				for _, n := range c.net.nodes {
					rc, want := n.raft.ReloadableConfig(), n.opts.HeartbeatTimeout
					if n == l {
						want *= leaderPace
					}
					if rc.HeartbeatTimeout != want || rc.ElectionTimeout < want {
						return false
					}
				}
				return true
			}
		}
		old := c.waitLeader()
		until(t, "the leader's pace, and only its", paced(old))
		terms := old.Term()
		time.Sleep(time.Minute)
		if c.leader() != old || old.Term() != terms {
			t.Errorf("within a quiet minute the term went from %d to %d", terms, old.Term())
		}
		c.net.isolate(string(old.opts.Node) + ":1")
		until(t, "another leader", func() bool {
			c.net.mu.Lock()
			defer c.net.mu.Unlock()
			for _, n := range c.net.nodes {
				if n != old && n.IsLeader() {
					return !old.IsLeader()
				}
			}
			return false
		})
		c.net.heal(string(old.opts.Node) + ":1")
		until(t, "one leader's pace", func() bool { return paced(c.leader())() })
	})
}

// With short heartbeats a leader is as patient, and sends as often, as the library has it.
func TestShortHeartbeatsAreNotThinnedOut(t *testing.T) {
	for heartbeat, want := range map[time.Duration]time.Duration{
		0: 560 * time.Millisecond, time.Second: 800 * time.Millisecond, 100 * time.Millisecond: 100 * time.Millisecond,
	} {
		o := newTestCluster(t).options("alpha")
		o.HeartbeatTimeout = heartbeat
		if err := checkOptions(&o); err != nil {
			t.Fatal(err)
		}
		if o.LeaderLeaseTimeout != want {
			t.Errorf("heartbeat %v: a leader steps down after %v, not %v", heartbeat, o.LeaderLeaseTimeout, want)
		}
	}
}

func TestApplyAtAFollowerNamesTheLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		for _, f := range testFounders {
			c.start(f.Name)
		}
		l := c.waitLeader()
		for name, n := range c.net.nodes {
			if n == l {
				continue
			}
			until(t, "it knows the leader", func() bool { who, _ := n.Leader(); return who == l.opts.Node })
			_, err := n.Apply(t.Context(), event("x"))
			var nl *NotLeaderError
			if !errors.As(err, &nl) || !errors.Is(err, ErrNotLeader) || nl.Leader != l.opts.Node || nl.Address != string(l.opts.Node)+":1" {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

// Founders whose configurations differ found nothing, and say what differs; when it is
// corrected they go on.
func TestFoundersThatDiffer(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Options)
		says   string
	}{
		"cluster":   {func(o *Options) { o.Cluster = "rw" }, `beta does not fit: it belongs to cluster "rw", this node to "prod"`},
		"nodes":     {func(o *Options) { o.Founders = o.Founders[:2] }, "beta does not fit: its configuration names other nodes (alpha@alpha:1, beta@beta:1) than this node's (alpha@alpha:1, beta@beta:1, gamma@gamma:1)"},
		"witnesses": {func(o *Options) { o.Founders = slices.Clone(o.Founders); o.Founders[1].Witness = true }, "beta does not fit: its configuration has other witnesses (beta, gamma) than this node's (gamma)"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newTestCluster(t)
				defer c.stop()
				o := c.options("beta")
				tc.change(&o)
				b, err := Open(t.Context(), o)
				if err != nil {
					t.Fatal(err)
				}
				c.net.mu.Lock()
				c.net.nodes["beta"] = b
				c.net.mu.Unlock()
				a := c.start("alpha")
				c.start("gamma")
				until(t, "alpha says what differs", func() bool { s := a.Founding(); return s.Waiting == tc.says && s.Next != "" && s.For == "beta" })
				time.Sleep(time.Minute)
				if c.leader() != nil {
					t.Error("a cluster was founded all the same")
				}
				c.kill("beta")
				c.dirs["beta"] = filepath.Join(c.base, "corrected")
				c.start("beta")
				c.waitLeader()
			})
		})
	}
}

// A release that tells no witnesses is believed.
func TestFoundersOfAnOlderRelease(t *testing.T) {
	n := &Node{opts: Options{Cluster: "prod", Founders: testFounders}}
	old := FoundInfo{Node: "beta", Cluster: "prod", Founders: n.founderList()}
	if err := n.fits("beta", old); err != nil {
		t.Error(err)
	}
	old.Witnesses = []string{}
	if err := n.fits("beta", old); !errors.Is(err, ErrDisagrees) {
		t.Error(err)
	}
}

// A node whose data_dir was lost comes up under its old name and address. It
// must neither vote nor be filled under the lost one's id.
func TestWipedNodeIsRefusedUntilReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		for _, f := range testFounders {
			c.start(f.Name)
		}
		l := c.waitLeader()
		var victim, third ident.Node
		for _, f := range testFounders {
			switch {
			case f.Name == l.opts.Node:
			case victim == "":
				victim = f.Name
			default:
				third = f.Name
			}
		}
		c.kill(victim)
		c.dirs[victim] = filepath.Join(c.base, "fresh")
		n := c.start(victim)
		until(t, "the wiped node is refused", func() bool { return n.Founding().Refused != nil })
		if msg := n.Founding().Refused.Error(); !strings.Contains(msg, "node replace "+string(victim)) {
			t.Errorf("the refusal names no way out: %s", msg)
		}

		// With the third gone, its vote would make a majority. It has none.
		c.kill(third)
		time.Sleep(20 * time.Second)
		if c.leader() != nil {
			t.Fatal("a leader with one member of three: the wiped node voted")
		}
		if len(n.State().Nodes) != 0 {
			t.Fatal("the wiped node was filled under the id of the lost one")
		}
		c.start(third)
		l = c.waitLeader()

		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := l.ReplaceNode(ctx, victim, n.RaftID(), ""); err != nil {
			t.Fatal(err)
		}
		until(t, "the new data_dir is a member", func() bool { return n.Founding().Done && n.State().ClusterID != "" })
		if got := len(l.members()); got != 3 {
			t.Errorf("%d members after replace, want 3", got)
		}
		c.kill(third)
		if r := c.apply(event("the replaced node counts")); !r.OK {
			t.Fatal(r.Err())
		}
	})
}

func TestAddAndRemoveNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		for _, f := range testFounders {
			c.start(f.Name)
		}
		c.waitLeader()
		c.dirs["delta"] = filepath.Join(c.base, "delta")
		n := c.start("delta")
		until(t, "it says how to add it", func() bool {
			s := n.Founding()
			return s.Refused != nil && strings.Contains(s.Refused.Error(), "node add delta --address delta:1")
		})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := c.waitLeader().AddNode(ctx, state.Node{Name: "delta", Address: "delta:1", RaftID: n.RaftID()}); err != nil {
			t.Fatal(err)
		}
		until(t, "it is a member", func() bool { return n.Founding().Done && n.State().Nodes["delta"] != nil })

		until(t, "the leader is removed by another", func() bool {
			l := c.leader()
			if l == nil || l.opts.Node == "beta" {
				return l != nil && l.TransferLeadership(ctx) == nil && false
			}
			err := l.RemoveNode(ctx, "beta")
			return err == nil
		})
		until(t, "three are left", func() bool {
			l := c.leader()
			return l != nil && len(l.members()) == 3 && l.State().Nodes["beta"] == nil
		})
	})
}

func TestDataDirOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		for _, f := range testFounders {
			c.start(f.Name)
		}
		c.waitLeader()
		c.kill("alpha")
		o := c.options("alpha")
		o.Cluster = "test"
		if _, err := Open(t.Context(), o); err == nil || !strings.Contains(err.Error(), `"prod"`) || !strings.Contains(err.Error(), `"test"`) {
			t.Errorf("another cluster: %v", err)
		}
		o = c.options("beta")
		o.Dir = c.dirs["alpha"]
		if _, err := Open(t.Context(), o); err == nil || !strings.Contains(err.Error(), `"alpha"`) || !strings.Contains(err.Error(), `"beta"`) {
			t.Errorf("another node: %v", err)
		}
	})
}

// A data_dir that was made under a wrong name, and with which nothing was founded,
// takes the right one, as a new node; one that holds anything does not.
func TestNamesCorrectedBeforeTheFounding(t *testing.T) {
	for what, tc := range map[string]struct {
		wrong   func(*Options)
		spoil   func(t *testing.T, o Options)
		refused bool
	}{
		"cluster": {wrong: func(o *Options) { o.Cluster = "prud" }},
		"node":    {wrong: func(o *Options) { o.Node = "gama" }},
		"it has voted": {
			wrong: func(o *Options) { o.Cluster = "prud" }, refused: true,
			spoil: func(t *testing.T, o Options) { setTerm(t, o.Dir, 1) },
		},
		"it has replicas": {
			wrong: func(o *Options) { o.Cluster = "prud" }, refused: true,
			spoil: func(t *testing.T, o Options) {
				if err := os.MkdirAll(filepath.Join(o.Dir, "volumes", "1"), 0o700); err != nil {
					t.Fatal(err)
				}
			},
		},
		"its Raft log cannot be read": {
			wrong: func(o *Options) { o.Cluster = "prud" }, refused: true,
			spoil: func(t *testing.T, o Options) {
				if err := os.WriteFile(filepath.Join(o.Dir, raftDir, boltFile), make([]byte, 1<<16), 0o600); err != nil {
					t.Fatal(err)
				}
			},
		},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newTestCluster(t)
				defer c.stop()
				c.start("alpha")
				c.start("beta")
				wrong := c.options("gamma")
				wrong.Address = "gamma:1"
				tc.wrong(&wrong)
				n, err := Open(t.Context(), wrong)
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(2 * foundingEvery)
				id := n.RaftID()
				if err := n.Shutdown(); err != nil {
					t.Fatal(err)
				}
				right := c.options("gamma")
				if tc.spoil != nil {
					tc.spoil(t, right)
				}
				err = CheckDir(fsOf(&right), right.Dir, right.Cluster, right.Node)
				if tc.refused {
					if err == nil || !strings.Contains(err.Error(), `"prud"`) {
						t.Errorf("CheckDir: %v", err)
					}
					if _, err := Open(t.Context(), right); err == nil || !strings.Contains(err.Error(), `"prud"`) {
						t.Errorf("Open: %v", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if n = c.start("gamma"); n.RaftID() == id || NodeOf(n.RaftID()) != "gamma" {
					t.Errorf("Raft id %s, was %s", n.RaftID(), id)
				}
				if got := len(c.waitLeader().State().Nodes); got != 3 {
					t.Errorf("%d nodes", got)
				}
			})
		})
	}
}

// A cluster.json that names another cluster than the Raft log beside it is
// refused at the start, by the log and by a snapshot, and by a recovery; and a
// running node stops when the leader's state is another cluster's.
func TestForeignClusterID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		var n *Node // beta's
		for _, f := range testFounders {
			if o := c.start(f.Name); f.Name == "beta" {
				n = o
			}
		}
		own := c.waitLeader().State().ClusterID
		known := func() bool {
			n.idMu.Lock()
			defer n.idMu.Unlock()
			return n.identity.ClusterID == own && n.State().ClusterID == own
		}
		refused := func(what string, err error) {
			t.Helper()
			if !errors.Is(err, errForeign) || !strings.Contains(err.Error(), own) || !strings.Contains(err.Error(), "deadbeef") {
				t.Errorf("%s: %v", what, err)
			}
		}
		for _, snapshot := range []bool{false, true} {
			until(t, "beta knows the cluster", known)
			if snapshot {
				if err := n.raft.Snapshot().Error(); err != nil {
					t.Fatal(err)
				}
			}
			c.kill("beta")
			o := c.options("beta")
			id, err := loadIdentity(fsOf(&o), o.Dir, o.Cluster, o.Node, o.Logger)
			if err != nil || id.ClusterID != own {
				t.Fatalf("%+v, %v", id, err)
			}
			id.ClusterID = "deadbeef"
			if err := writeIdentity(fsOf(&o), o.Dir, id); err != nil {
				t.Fatal(err)
			}
			_, err = Open(t.Context(), o)
			refused("start", err)
			_, err = Recover(Recovery{Dir: o.Dir, Cluster: o.Cluster, Node: o.Node, Keep: []ident.Node{"beta"}, Preview: true})
			refused("recover", err)
			id.ClusterID = own
			if err := writeIdentity(fsOf(&o), o.Dir, id); err != nil {
				t.Fatal(err)
			}
			n = c.start("beta")
		}
		until(t, "beta knows the cluster", known)
		n.idMu.Lock()
		other := *n.identity
		other.ClusterID = "deadbeef"
		n.identity = &other
		n.idMu.Unlock()
		n.watch.wake()
		<-n.Halted()
		refused("running", n.Err())
	})
}

// Whom a recovery gave up no later one keeps; it says so once, and changes nothing.
func TestRecoverKeepsNobodyWhoWasGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		for _, f := range testFounders {
			c.start(f.Name)
		}
		c.waitLeader()
		until(t, "alpha knows the cluster", func() bool { return c.net.nodes["alpha"].State().ClusterID != "" })
		for _, f := range testFounders {
			c.kill(f.Name)
		}
		o := c.options("alpha")
		recovered := func(keep ...ident.Node) (Recovered, error) {
			return Recover(Recovery{Dir: o.Dir, Cluster: o.Cluster, Node: "alpha", Keep: keep})
		}
		if _, err := recovered("alpha"); err != nil {
			t.Fatal(err)
		}
		if _, err := recovered("alpha", "beta"); err == nil || !strings.Contains(err.Error(), "was given up by an earlier recovery") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v", err)
		}
		n := c.start("alpha")
		until(t, "alpha leads alone", n.IsLeader)
	})
}

// The crash between the durable mark and the end of the bootstrap ends in the
// same configuration.
func TestFoundingIsEndedAfterACrash(t *testing.T) {
	for _, term := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			c := newTestCluster(t)
			defer c.stop()
			ids := map[ident.Node]string{}
			for _, f := range testFounders {
				n := c.start(f.Name)
				ids[f.Name] = n.RaftID()
				c.kill(f.Name)
			}
			o := c.options("alpha")
			id, err := loadIdentity(fsOf(&o), o.Dir, o.Cluster, o.Node, o.Logger)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range testFounders {
				id.Founding = append(id.Founding, foundingServer{RaftID: ids[f.Name], Address: f.Address})
			}
			if err := writeIdentity(fsOf(&o), o.Dir, id); err != nil {
				t.Fatal(err)
			}
			if term {
				setTerm(t, o.Dir, 1)
			}
			for _, f := range testFounders {
				c.start(f.Name)
			}
			if got := len(c.waitLeader().State().Nodes); got != 3 {
				t.Errorf("%d nodes", got)
			}
		})
	}
}

// TestAllStop: a leader that stops last, with something that the others do not have, does
// not wait for them, however long it would take until it finds out that it leads nobody.
func TestAllStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		c.pace = time.Minute
		for _, f := range testFounders {
			c.start(f.Name)
		}
		time.Sleep(3 * c.pace)
		l := c.waitLeader()
		for _, f := range testFounders {
			if f.Name != l.opts.Node {
				c.kill(f.Name)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := l.Apply(ctx, event("who hears of it?")); !errors.Is(err, ErrUnknownOutcome) {
			t.Errorf("with nobody there: %v", err)
		}
		begin := time.Now()
		c.stop()
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("it takes %v", took)
		}
	})
}

// A log with a command of a newer build stops the node, and loses nothing.
func TestNewerCommandHalts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		for _, f := range testFounders {
			c.start(f.Name)
		}
		l := c.waitLeader()
		before := l.State()
		f := l.raft.Apply([]byte(`{"v":99,"id":"x","time":1,"teleport":{}}`), time.Second)
		_ = f.Error()
		<-l.Halted()
		if !errors.Is(l.Err(), state.ErrNewer) {
			t.Errorf("Err() = %v", l.Err())
		}
		if l.State() != before {
			t.Error("the state moved past a command that was not understood")
		}
	})
}

// TestATransferAsRaftEnds: hashicorp/raft never answers one that comes then, and the
// node ends all the same.
func TestATransferAsRaftEnds(t *testing.T) {
	for range 8 { // it is taken, or refused, at random
		synctest.Test(t, func(t *testing.T) {
			c := newTestCluster(t)
			defer c.stop()
			for _, f := range testFounders {
				c.start(f.Name)
			}
			l := c.waitLeader()
			if err := l.raft.Shutdown().Error(); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if err := l.TransferLeadership(ctx); err != nil {
				t.Errorf("it leads no more, and: %v", err)
			}
		})
	}
}

func TestSnapshotAndRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		for _, f := range testFounders {
			c.start(f.Name)
		}
		c.waitLeader()
		c.apply(event("before"))
		for _, n := range c.net.nodes {
			if err := n.raft.Snapshot().Error(); err != nil {
				t.Fatal(err)
			}
		}
		c.apply(event("after"))
		for _, f := range testFounders {
			c.kill(f.Name)
		}
		for _, f := range testFounders {
			c.start(f.Name)
		}
		l := c.waitLeader()
		until(t, "both events are there", func() bool { e, _ := l.State().EventsSince(1); return len(e) == 2 && e[1].Text == "after" })
	})
}
