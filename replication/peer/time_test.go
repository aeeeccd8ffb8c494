package peer

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

func bubbleClock(o *Options) {
	o.Clock = func() int64 { return time.Now().UnixNano() }
	o.Ping, o.Lease = 300*time.Millisecond, 5*time.Second
}

// The first attempts follow at once; then the pause doubles to its limit. A
// call from the peer ends the pause.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var at []time.Duration
		begun := time.Now()
		dials := func() []time.Duration {
			mu.Lock()
			defer mu.Unlock()
			return append([]time.Duration(nil), at...)
		}
		m := NewManager(Options{Self: "alpha", Cluster: "test", Handler: newRecorder(), Dial: func(context.Context, ident.Node) (net.Conn, error) {
			mu.Lock()
			at = append(at, time.Since(begun))
			mu.Unlock()
			return nil, errors.New("no route")
		}})
		defer m.Close()
		m.SetPeers([]ident.Node{"beta"})
		time.Sleep(20 * time.Second)
		synctest.Wait()
		list := dials()
		if len(list) < 18 || len(list) > 45 {
			t.Fatalf("%d attempts in 20 s", len(list))
		}
		if list[0] != 0 || list[1] != 0 {
			t.Errorf("the first attempts at %v and %v", list[0], list[1])
		}
		want := backoffFirst
		for i := 2; i < len(list); i++ {
			if gap := list[i] - list[i-1]; gap < want/2 || gap > want+want/2 {
				t.Errorf("pause %d of %v, want about %v", i, gap, want)
			}
			want = min(2*want, backoffLast)
		}
		// In the middle of a pause, beta calls.
		a, b := net.Pipe()
		defer a.Close()
		m.Accept(b)
		hello, err := wire.EncodeHello(nil, wire.Hello{Min: 1, Max: 1, Instance: 1, Attempt: 1, Cluster: "test", From: "beta", To: "alpha"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Write(hello); err != nil {
			t.Fatal(err)
		}
		if _, err := wire.ReadHello(a); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if again := dials(); again[len(again)-1] != time.Since(begun) {
			t.Errorf("no attempt at once when the peer called, at %v: %v", time.Since(begun), again[len(again)-1])
		}
	})
}

// hole is a connection that swallows what is written to it while dark.
type hole struct {
	net.Conn
	dark *atomic.Bool
}

func (h hole) Write(p []byte) (int, error) {
	if h.dark.Load() {
		return len(p), nil
	}
	return h.Conn.Write(p)
}

// A peer from which nothing comes any more counts as not heard after a few
// pings; after some lease times its connection is closed, so that it dials anew.
func TestSilentPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dark atomic.Bool
		n := newNetwork(t, true)
		ra, rb := newRecorder(), newRecorder()
		a := n.add("alpha", ra, bubbleClock)
		b := n.add("beta", rb, func(o *Options) {
			bubbleClock(o)
			o.Dial = func(ctx context.Context, to ident.Node) (net.Conn, error) {
				c, err := n.dial(ctx, to)
				return hole{c, &dark}, err
			}
		})
		defer b.Close()
		defer a.Close()
		a.SetPeers([]ident.Node{"beta"})
		b.SetPeers([]ident.Node{"alpha"})
		ra.want(t, "up beta")
		rb.want(t, "up alpha")
		time.Sleep(time.Second)
		st := a.Status()[0]
		if !st.Heard || !st.Connected || st.RecvFrames == 0 || st.SentFrames == 0 || st.RecvBytes == 0 || st.SentBytes == 0 || st.QueueFrames != 0 {
			t.Errorf("after a second: %+v", st)
		}
		echo := a.Echo("beta")
		dark.Store(true)
		time.Sleep(2 * time.Second)
		if st := a.Status()[0]; st.Heard || !st.Connected {
			t.Errorf("after two seconds of silence: %+v", st)
		}
		if d := b.EchoAge("alpha", a.Echo("beta")); d < 2*time.Second || d > 3*time.Second || a.Echo("beta") < echo {
			t.Errorf("the last sign of life is %v old", d)
		}
		if len(rb.events) != 0 {
			t.Error("the silent peer lost its link too soon")
		}
		dark.Store(false)
		time.Sleep(time.Second)
		if st := a.Status()[0]; !st.Heard {
			t.Errorf("heard again, but: %+v", st)
		}
		dark.Store(true)
		time.Sleep(9 * time.Second)
		if len(rb.events) != 0 {
			t.Error("the silent peer lost its link too soon")
		}
		time.Sleep(2 * time.Second)
		rb.want(t, "down alpha")
		dark.Store(false)
		time.Sleep(5 * time.Second)
		rb.want(t, "up alpha")
		if !a.Status()[0].Heard || len(ra.events) != 0 {
			t.Errorf("%+v", a.Status())
		}
	})
}

// Two links that have nothing to do send their pings and nothing else.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t, true)
		ra, rb := newRecorder(), newRecorder()
		a, b := n.add("alpha", ra, bubbleClock), n.add("beta", rb, bubbleClock)
		defer b.Close()
		defer a.Close()
		a.SetPeers([]ident.Node{"beta"})
		b.SetPeers([]ident.Node{"alpha"})
		time.Sleep(time.Minute)
		st := a.Status()[0]
		if st.Connects != 1 || st.SentFrames < 190 || st.SentFrames > 210 || st.RecvFrames < 190 || st.RecvFrames > 210 {
			t.Errorf("in a minute: %+v", st)
		}
	})
}
