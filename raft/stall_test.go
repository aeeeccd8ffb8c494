package raft

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// TestDiskWatch: a write counts as stalled from its start, any that returns is
// progress, and an idle store never stalls.
func TestDiskWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w diskWatch
		check := func(want time.Duration) {
			t.Helper()
			if got := w.stalled(); got != want {
				t.Errorf("stalled for %v, want %v", got, want)
			}
		}
		time.Sleep(time.Hour)
		check(0)
		w.begin()
		time.Sleep(3 * time.Second)
		check(3 * time.Second)
		w.begin()
		time.Sleep(time.Second)
		check(4 * time.Second)
		if err := w.end(io.ErrShortWrite); err != io.ErrShortWrite || w.failure() != err { //nolint:errorlint // the very one
			t.Errorf("a write that failed: %v, then %v", err, w.failure())
		}
		time.Sleep(time.Second)
		check(time.Second)
		if err := w.end(nil); err != nil || w.failure() != nil {
			t.Errorf("a write after it: %v, then %v", err, w.failure())
		}
		time.Sleep(time.Second)
		check(0)
	})
}

// TestALeaderWhoseDiskHangs: when a write to its store has been out for StallTimeout,
// another node leads at once, and not after the silence that the others allow a leader;
// also when the first that it asks is gone. When the write returns it follows.
func TestALeaderWhoseDiskHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		for _, f := range testFounders {
			c.start(f.Name)
		}
		c.apply(event("all is well"))
		for range 4 {
			l := c.waitLeader()
			time.Sleep(5 * time.Second)
			begin := time.Now()
			l.disk.begin()
			until(t, "another leader", func() bool { o := c.other(l); return o != nil })
			if took := time.Since(begin); took < l.opts.StallTimeout || took > l.opts.StallTimeout+200*time.Millisecond {
				t.Errorf("another node leads after %v, with a stall_timeout of %v", took, l.opts.StallTimeout)
			}
			_ = l.disk.end(nil)
			until(t, "it follows", func() bool { o := c.other(l); return o != nil && !l.IsLeader() })
			c.apply(event("another leads"))
		}
	})
}

// TestALeaderWhoseDiskHangsWhileAnotherIsDead: the node that it asks first is dead, and
// does not even refuse a connection. It asks the next one; and when its disk has answered
// meanwhile it does not fall silent.
func TestALeaderWhoseDiskHangsWhileAnotherIsDead(t *testing.T) {
	for _, answers := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			c := newTestCluster(t)
			defer c.stop()
			for _, f := range testFounders {
				c.start(f.Name)
			}
			l := c.waitLeader()
			var others []*Node // in the order in which they are asked
			for _, s := range l.raft.GetConfiguration().Configuration().Servers {
				if n := c.net.node(NodeOf(string(s.ID))); n != l {
					others = append(others, n)
				}
			}
			c.net.die(others[0].opts.Address)
			time.Sleep(5 * time.Second)
			next := others[1]
			term := next.Term()
			l.disk.begin()
			time.Sleep(l.opts.StallTimeout + ioTimeout/2)
			if next.Term() != term {
				t.Error("the one that it asked first is not dead")
			}
			if !answers {
				time.Sleep(ioTimeout)
				if next.Term() == term {
					t.Errorf("%s was not asked", next.opts.Node)
				}
				_ = l.disk.end(nil)
				return
			}
			for range 50 { // what has waited comes as one write after another
				_ = l.disk.end(nil)
				l.disk.begin()
				time.Sleep(ioTimeout / 10)
				if l.stream.mute.context().Err() != nil {
					t.Fatal("it fell silent, though its disk had answered")
				}
			}
			_ = l.disk.end(nil)
		})
	}
}

// TestADeposedLeaderUnseatsNobody: a node that has hung as a whole, and so has been replaced
// as the leader and does not know, hands nothing over: the new leader stays.
func TestADeposedLeaderUnseatsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestCluster(t)
		defer c.stop()
		for _, f := range testFounders {
			c.start(f.Name)
		}
		for range 3 {
			was := c.waitLeader()
			c.net.isolate(was.opts.Address)
			until(t, "another leader", func() bool { o := c.other(was); return o != nil && !was.IsLeader() })
			l := c.other(was)
			time.Sleep(5 * time.Second)
			term := l.Term()
			c.net.heal(was.opts.Address)
			was.offer() // as if it led in its own term
			time.Sleep(5 * time.Second)
			if !l.IsLeader() || l.Term() != term {
				t.Errorf("%s led in term %d; now it is %v, in term %d", l.opts.Node, term, l.raft.State(), l.Term())
			}
			c.apply(event("it leads on"))
		}
	})
}

// other is a leader beside l.
func (c *testCluster) other(l *Node) *Node {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	for _, n := range c.net.nodes {
		if n != l && n.IsLeader() {
			return n
		}
	}
	return nil
}

// TestMuteSwitch: connections from before end when it is switched on, those
// made meanwhile at once, those after it live.
func TestMuteSwitch(t *testing.T) {
	m := newMuteSwitch()
	ended := func(ours, theirs net.Conn) bool {
		defer ours.Close()
		_ = theirs.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, err := theirs.Read(make([]byte, 1))
		return errors.Is(err, io.EOF)
	}
	pipe := func() (ours, theirs net.Conn) {
		a, b := net.Pipe()
		return m.bind(context.Background(), a), b
	}
	ours, theirs := pipe()
	m.set(true)
	if !ended(ours, theirs) {
		t.Error("a connection from before lives on")
	}
	if ours, theirs = pipe(); !ended(ours, theirs) {
		t.Error("a connection made while it is on lives on")
	}
	m.set(false)
	ours, theirs = pipe()
	defer ours.Close()
	go func() { _, _ = theirs.Write([]byte{1}) }()
	if _, err := ours.Read(make([]byte, 1)); err != nil {
		t.Errorf("a connection after it: %v", err)
	}
}
