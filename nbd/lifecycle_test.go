package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/nbd/nbdtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// held is an export whose requests wait until release.
type held struct {
	*nbdtest.Interceptor
	mu      sync.Mutex
	waiting []func()
	now     atomic.Int64
	opened  chan nbd.Client
	closed  chan string
	arrived chan struct{}
}

func hold(e nbd.Exports) *held {
	h := &held{opened: make(chan nbd.Client, 16), closed: make(chan string, 16), arrived: make(chan struct{}, 1<<16)}
	h.Interceptor = &nbdtest.Interceptor{
		Exports: e,
		OnOpen:  func(_ string, c nbd.Client) { h.opened <- c },
		OnClose: func(name string) { h.closed <- name },
		OnSubmit: func(r *nbd.Request, next func(*nbd.Request)) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.waiting = append(h.waiting, func() { next(r) })
			h.now.Add(1)
			h.arrived <- struct{}{}
		},
	}
	return h
}

func (h *held) release() {
	h.mu.Lock()
	waiting := h.waiting
	h.waiting = nil
	h.mu.Unlock()
	h.now.Add(-int64(len(waiting)))
	for _, next := range waiting {
		next()
	}
}

// eventually waits for a condition that other goroutines bring about.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
		<-time.After(2 * time.Millisecond)
	}
}

// settled waits until a figure has stopped to change, and returns it.
func settled(figure func() int64) int64 {
	last := figure()
	for same := 0; same < 20; {
		<-time.After(5 * time.Millisecond)
		if now := figure(); now != last {
			last, same = now, 0
		} else {
			same++
		}
	}
	return last
}

func TestWindow(t *testing.T) {
	const window = 16
	h := hold(nbdtest.Exports{"v": nbdtest.NewMemDevice(1 << 20)})
	addr := serve(t, h, nbd.Config{Limits: nbd.Limits{Requests: window}})
	conn := enter(t, addr)
	const sent = 100
	send(t, conn, bytes.Repeat(request(nbdtest.CmdRead, 0, 9, 0, 512), sent))
	eventually(t, "the window is full", func() bool { return h.now.Load() >= window })
	if got := settled(h.now.Load); got != window {
		t.Errorf("%d requests in flight, want %d", got, window)
	}
	got := make(chan error, 1)
	go func() {
		_, err := io.ReadFull(conn, make([]byte, sent*(16+512)))
		got <- err
	}()
	for n := 0; n < sent; n += window {
		eventually(t, "the window fills", func() bool { return h.now.Load() >= int64(min(window, sent-n)) })
		h.release()
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestWindowInBytes(t *testing.T) {
	h := hold(nbdtest.Exports{"v": nbdtest.NewMemDevice(64 << 20)})
	s, addr := serveOn(t, "tcp://127.0.0.1:0", h, nbd.Config{Limits: nbd.Limits{BytesTotal: 64 << 20}})
	var conns []net.Conn
	for range 3 {
		c := enter(t, addr)
		conns = append(conns, c)
		send(t, c, bytes.Repeat(request(nbdtest.CmdRead, 0, 9, 0, 8<<20), 10))
	}
	used := func() int64 { return s.Stats().BudgetUsed }
	eventually(t, "half of the budget is taken", func() bool { return used() >= 32<<20 })
	if got := settled(used); got > 64<<20 {
		t.Errorf("%d MiB of the budget are taken", got>>20)
	}
	// A newcomer with small requests is served all the same.
	small := enter(t, addr)
	send(t, small, request(nbdtest.CmdFlush, 0, 1, 0, 0))
	before := h.now.Load()
	eventually(t, "the newcomer's request arrives", func() bool { return h.now.Load() >= before })
	var wg sync.WaitGroup
	var done atomic.Int32
	for _, c := range conns {
		wg.Go(func() {
			if _, err := io.CopyN(io.Discard, c, 10*(16+8<<20)); err != nil {
				t.Error(err)
			}
			done.Add(1)
		})
	}
	for done.Load() < 3 {
		h.release()
		<-time.After(time.Millisecond)
	}
	wg.Wait()
	h.release()
	read(t, small, 16)
	eventually(t, "all of the budget is given back", func() bool { return used() == 0 })
}

// TestClaimCostsNothing claims 32 MiB on each of many connections and sends
// nothing of them.
func TestClaimCostsNothing(t *testing.T) {
	addr := serve(t, nbdtest.Exports{"v": nbdtest.NewMemDevice(64 << 20)})
	before := buf.InUse()
	for range 20 {
		send(t, enter(t, addr), cat(request(nbdtest.CmdWrite, 0, 1, 0, nbd.PayloadMax), make([]byte, 1000)))
	}
	got := settled(func() int64 { return buf.InUse() - before })
	if most := int64(20 * (1<<20 + 64<<10)); got > most {
		t.Errorf("%d connections hold %d KiB, more than %d", 20, got>>10, most>>10)
	}
}

// TestSlowClient lets one client take no replies: others are not slower for it,
// and what it holds is bounded.
func TestSlowClient(t *testing.T) {
	srv, addr := serveOn(t, "tcp://127.0.0.1:0", nbdtest.Exports{"v": nbdtest.NewMemDevice(64 << 20)})
	slow := enter(t, addr)
	go func() {
		for {
			if _, err := slow.Write(request(nbdtest.CmdRead, 0, 1, 0, 1<<20)); err != nil {
				return
			}
		}
	}()
	held := func() int64 { return srv.Stats().BudgetUsed }
	eventually(t, "the slow client's window is nearly full", func() bool { return held() >= 24<<20 })
	c := dial(t, addr, "v", nbdtest.Options{})
	for i := range uint64(100) {
		if err := c.WriteAt(t.Context(), make([]byte, 4096), 4096*i); err != nil {
			t.Fatal(err)
		}
	}
	p := make([]byte, 16<<20) // more than a connection may always use
	if err := c.ReadAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	// All this was answered while the slow client's replies lay there, and they
	// are no more than one connection may have.
	c.Close()
	if now := held(); now < 16<<20 {
		t.Errorf("only %d MiB are held for the slow client: it was not slow", now>>20)
	}
	eventually(t, "what is held is no more than a window", func() bool { return held() <= nbd.PayloadMax })
	slow.Close()
}

func TestGoneAndKill(t *testing.T) {
	for _, listen := range []string{"tcp://127.0.0.1:0", "unix://" + filepath.Join(t.TempDir(), "s")} {
		h := hold(one())
		_, addr := serveOn(t, listen, h, nbd.Config{Limits: nbd.Limits{Requests: 1}})
		conn := enter(t, addr)
		client := <-h.opened
		if !client.Local || client.Remote == "" {
			t.Errorf("%+v", client)
		}
		// The window is full, so that the server does not read the second one;
		// it still knows that the client has closed.
		send(t, conn, bytes.Repeat(request(nbdtest.CmdRead, 0, 1, 0, 512), 2))
		<-h.arrived
		if client.Gone() {
			t.Error("gone while it is there")
		}
		conn.Close()
		eventually(t, "Gone", client.Gone)
		h.release()
		eventually(t, "both requests have come", func() bool { h.release(); return len(h.closed) > 0 })

		conn = enter(t, addr)
		client = <-h.opened
		client.Kill(errors.New("test"))
		client.Kill(errors.New("again"))
		wantClosed(t, conn)
		eventually(t, "the session ends", func() bool { return len(h.closed) == 2 })
		if !client.Gone() {
			t.Error("killed and not gone")
		}
	}
}

func TestSessionLost(t *testing.T) {
	h := hold(nbdtest.Fail(one(), func(r *nbd.Request) error {
		if r.Op == nbd.OpFlush {
			return nbd.ErrSessionLost
		}
		return nil
	}))
	conn := enter(t, serve(t, h))
	send(t, conn, cat(request(nbdtest.CmdRead, 0, 1, 0, 512), request(nbdtest.CmdFlush, 0, 2, 0, 0)))
	<-h.arrived
	<-h.arrived
	h.release()
	got, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	// Both are answered, in some order, and then it ends.
	if len(got) != 16+512+16 || !bytes.Contains(got, simple(0, 1)) || !bytes.Contains(got, simple(108, 2)) {
		t.Errorf("%d bytes: %.80x", len(got), got)
	}
	<-h.closed
}

// TestStatusCounts: the answers to block status count against the limits, since each
// may be of many extents.
func TestStatusCounts(t *testing.T) {
	h := hold(one())
	s, addr := serveOn(t, "tcp://127.0.0.1:0", h)
	conn := enter(t, addr, nbdtest.OptStructuredReply, nbdtest.OptSetMetaContext)
	const sent, each = 20, 2 * 128 << 10 // two contexts
	send(t, conn, bytes.Repeat(request(nbdtest.CmdBlockStatus, 0, 9, 0, 1<<20), sent))
	send(t, conn, request(nbdtest.CmdBlockStatus, uint16(nbdtest.ReqOne), 9, 0, 1<<20))
	eventually(t, "all have come", func() bool { return h.now.Load() == sent+1 })
	if got := s.Stats().PayloadBytes; got != sent*each {
		t.Errorf("%d KiB are in flight, want %d", got>>10, sent*each>>10)
	}
	h.release()
	eventually(t, "all is given back", func() bool { return s.Stats().PayloadBytes == 0 })
}

// TestGoneWithAFullWindow: the reader waits for room, and so does not see that the
// client goes. What that one holds is given back all the same.
func TestGoneWithAFullWindow(t *testing.T) {
	for _, listen := range []string{"unix://" + filepath.Join(t.TempDir(), "s"), "tcp://127.0.0.1:0"} {
		h := hold(one())
		_, addr := serveOn(t, listen, h, nbd.Config{Limits: nbd.Limits{Requests: 4, Stall: 200 * time.Millisecond}})
		conn := enter(t, addr)
		send(t, conn, bytes.Repeat(request(nbdtest.CmdFlush, 0, 9, 0, 0), 10))
		for range 4 {
			<-h.arrived
		}
		if settled(func() int64 { return int64(len(h.closed)) }) != 0 {
			t.Error("the session of a client that is there is closed")
		}
		conn.Close()
		<-h.closed
		h.release()
	}
}

// TestBudgetAcrossExports: the clients of an export that answers nothing hold all of
// the budget, and another export's large requests are served all the same, one at a
// time.
func TestBudgetAcrossExports(t *testing.T) {
	stuck := hold(nbdtest.Exports{"v": nbdtest.NewMemDevice(64 << 20)})
	both := twoExports{stuck, nbdtest.Exports{"w": nbdtest.NewMemDevice(64 << 20)}}
	const total = 32 << 20
	s, addr := serveOn(t, "tcp://127.0.0.1:0", both, nbd.Config{Limits: nbd.Limits{BytesTotal: total}})
	used := func() int64 { return s.Stats().BudgetUsed }
	var conns []net.Conn
	for range 8 {
		c := enter(t, addr)
		conns = append(conns, c)
		send(t, c, bytes.Repeat(request(nbdtest.CmdRead, 0, 9, 0, 4<<20), 10))
	}
	if got := settled(used); got < total-4<<20 || got > total {
		t.Errorf("%d MiB of the budget are taken", got>>20)
	}
	errs := make(chan error)
	for range 3 {
		c := dial(t, addr, "w", nbdtest.Options{})
		go func() { errs <- c.ReadAt(t.Context(), make([]byte, nbd.PayloadMax), 0) }()
	}
	for range 3 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if got := settled(used); got > total {
		t.Errorf("%d MiB of the budget are taken at the end", got>>20)
	}
	for _, c := range conns {
		c.Close()
	}
	eventually(t, "all is given back", func() bool {
		stuck.release()
		return len(stuck.closed) == len(conns) && used() == 0
	})
}

// twoExports shows v, of the first, and w, of the second.
type twoExports [2]nbd.Exports

func (x twoExports) of(name string) nbd.Exports {
	if name == "v" {
		return x[0]
	}
	return x[1]
}

func (x twoExports) List() []string { return []string{"v", "w"} }

func (x twoExports) Lookup(ctx context.Context, name string) (nbd.Info, error) {
	return x.of(name).Lookup(ctx, name)
}

func (x twoExports) Open(ctx context.Context, name string, c nbd.Client) (nbd.Session, error) {
	return x.of(name).Open(ctx, name, c)
}

// A session that is told of its loss by Client.Kill is ended once what it has in
// flight is answered; one that is idle, at once.
func TestLostSessionAnswers(t *testing.T) {
	lost := fmt.Errorf("%w: test", nbd.ErrSessionLost)
	h := hold(one())
	addr := serve(t, h)
	conn := enter(t, addr)
	client := <-h.opened
	send(t, conn, cat(request(nbdtest.CmdFlush, 0, 1, 0, 0), request(nbdtest.CmdFlush, 0, 2, 0, 0)))
	<-h.arrived
	<-h.arrived
	client.Kill(lost)
	<-h.closed
	h.release()
	got := read(t, conn, 32)
	if !bytes.Contains(got, simple(108, 1)) || !bytes.Contains(got, simple(108, 2)) {
		t.Errorf("%x", got)
	}
	wantClosed(t, conn)

	conn = enter(t, addr)
	client = <-h.opened
	client.Kill(lost)
	wantClosed(t, conn)
	<-h.closed
}

// TestDisconnectDoesAll: a client that has said DISC and is gone has all done that
// it asked for, also when the answer to a part of it finds nobody.
func TestDisconnectDoesAll(t *testing.T) {
	h := hold(one())
	conn := enter(t, serve(t, h))
	send(t, conn, request(nbdtest.CmdFlush, 0, 1, 0, 0))
	<-h.arrived
	h.mu.Lock()
	first := h.waiting[0]
	h.waiting = nil
	h.mu.Unlock()
	send(t, conn, cat(request(nbdtest.CmdFlush, 0, 2, 0, 0), request(nbdtest.CmdDisc, 0, 3, 0, 0)))
	<-h.arrived
	conn.Close()
	first() // its answer finds the socket closed
	if settled(func() int64 { return int64(len(h.closed)) }) != 0 {
		t.Error("the session was closed before the second request was done")
	}
	h.release()
	<-h.closed
}

func TestShutdownAnswers(t *testing.T) {
	h := hold(one())
	s, addr := serveOn(t, "tcp://127.0.0.1:0", h)
	conn := enter(t, addr)
	idle := enter(t, addr)
	send(t, conn, request(nbdtest.CmdRead, 0, 1, 0, 512))
	<-h.arrived
	done := make(chan error, 1)
	go func() { done <- s.Shutdown(t.Context()) }()
	wantClosed(t, idle)
	select {
	case err := <-done:
		t.Fatalf("shut down with a request in flight: %v", err)
	default:
	}
	if _, err := nbdtest.DialConn(t.Context(), addr); err == nil {
		t.Error("still listening")
	}
	h.release()
	read(t, conn, 16+512)
	wantClosed(t, conn)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestShutdownDelivers stops the server while a client has sent more requests
// than are read, and is slow to take its answers. A socket that is closed with
// bytes unread is reset, which throws away what the client has not got yet: every
// answer that was begun must come whole, and then the end.
func TestShutdownDelivers(t *testing.T) {
	const length = 64 << 10
	srv, cli := tlsConfigs(t)
	for name, secure := range map[string]bool{"plain": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			h := hold(one())
			s, addr := serveOn(t, "tcp://127.0.0.1:0", h, nbd.Config{TLS: srv, Limits: nbd.Limits{Requests: 64}})
			hs := begin(t, addr)
			if secure {
				if err := hs.StartTLS(t.Context(), cli); err != nil {
					t.Fatal(err)
				}
			}
			wantAlive(t, hs)
			// More than the server's read buffer holds, so that some stay unread.
			send(t, hs.Conn, bytes.Repeat(request(nbdtest.CmdRead, 0, 1, 0, length), 4000))
			for range 64 {
				<-h.arrived
			}
			done := make(chan error, 1)
			stopped := make(chan struct{})
			go func() { done <- s.Shutdown(t.Context()); close(stopped) }()
			released := make(chan struct{})
			go func() {
				defer close(released)
				for {
					h.release()
					select {
					case <-h.arrived:
					case <-stopped:
						h.release()
						return
					}
				}
			}()
			got, err := io.ReadAll(hs.Conn)
			if answers := len(got) / (16 + length); err != nil || len(got)%(16+length) != 0 || answers < 64 {
				t.Errorf("%d answers and %d bytes, then %v", answers, len(got)%(16+length), err)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			<-released
		})
	}
}

func TestShutdownTimesOut(t *testing.T) {
	h := hold(one())
	s, addr := serveOn(t, "tcp://127.0.0.1:0", h)
	conn := enter(t, addr)
	send(t, conn, request(nbdtest.CmdRead, 0, 1, 0, 512))
	<-h.arrived
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	wantClosed(t, conn) // unanswered
	h.release()
}

func TestHandshakeDuringShutdown(t *testing.T) {
	opening := make(chan struct{})
	goOn := make(chan struct{})
	e := &nbdtest.Interceptor{Exports: one(), OnOpen: func(string, nbd.Client) { close(opening); <-goOn }}
	s, addr := serveOn(t, "tcp://127.0.0.1:0", e)
	h := begin(t, addr)
	if err := h.Send(nbdtest.OptGo, nbdtest.GoData("v")); err != nil {
		t.Fatal(err)
	}
	<-opening
	done := make(chan error, 1)
	go func() { done <- s.Shutdown(t.Context()) }()
	eventually(t, "the listener is closed", func() bool {
		c, err := nbdtest.DialConn(t.Context(), addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	close(goOn)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestConnectionLimits(t *testing.T) {
	for name, limit := range map[string]any{
		"of the listener": nbd.ListenerOptions{Connections: 2},
		"of all":          nbd.Config{Limits: nbd.Limits{Connections: 2}},
	} {
		t.Run(name, func(t *testing.T) {
			_, addr := serveOn(t, "tcp://127.0.0.1:0", one(), limit)
			first := enter(t, addr)
			enter(t, addr)
			wantClosed(t, rawDial(t, addr))
			first.Close()
			eventually(t, "a place comes free", func() bool {
				c, err := nbdtest.DialConn(t.Context(), addr)
				if err != nil {
					return false
				}
				defer c.Close()
				_, err = nbdtest.Begin(c)
				return err == nil
			})
		})
	}
}

// TestStrangersKeepNobodyOut: connections across the network that say nothing leave
// room for local clients; the kernel's own find it also when there is none.
func TestStrangersKeepNobodyOut(t *testing.T) {
	s, remote := serveOn(t, "tcp://127.0.0.1:0", one(), nbd.Config{Limits: nbd.Limits{Connections: 8}})
	local := "unix://" + filepath.Join(t.TempDir(), "s")
	ln, err := nbd.Listen(local, nbd.SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln, nbd.ListenerOptions{}) }()
	for range 6 {
		read(t, rawDial(t, remote), 18)
	}
	wantClosed(t, rawDial(t, remote))
	enter(t, local)
	enter(t, local)
	wantClosed(t, rawDial(t, local)) // now there is no room

	ours, theirs := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- s.ServeConn(ours, nbd.ListenerOptions{}) }() // its handshake is given up
	read(t, theirs, 18)
	theirs.Close()
	<-ended
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := nbd.Listen("unix://"+path, nbd.SocketOptions{Mode: 0o620, Group: "0"})
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o620 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	if _, err := nbd.Listen("unix://"+path, nbd.SocketOptions{}); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a socket that is served: %v", err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	ln.Close()
	if ln, err = nbd.Listen("unix://"+path, nbd.SocketOptions{}); err != nil {
		t.Errorf("a stale socket: %v", err)
	} else {
		ln.Close()
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, addr := range []string{"unix://" + file, "unix://", "udp://x:1", "tcp://nowhere", "/path"} {
		if _, err := nbd.Listen(addr, nbd.SocketOptions{}); err == nil {
			t.Errorf("listens on %s", addr)
		}
	}
	if _, err := os.Stat(file); err != nil {
		t.Error("a file that is no socket was removed")
	}
}

func TestConfigErrors(t *testing.T) {
	for name, cfg := range map[string]nbd.Config{
		"no exports":              {},
		"TLS without a key":       {Exports: one(), TLSRequire: true},
		"too small a window":      {Exports: one(), Limits: nbd.Limits{BytesPerConn: 4096}},
		"too small a budget":      {Exports: one(), Limits: nbd.Limits{BytesTotal: 4096}},
		"negative requests":       {Exports: one(), Limits: nbd.Limits{Requests: -1}},
		"negative time-out":       {Exports: one(), Limits: nbd.Limits{Idle: -1}},
		"too small a buffer":      {Exports: one(), Limits: nbd.Limits{ReadBuffer: 1}},
		"negative of connections": {Exports: one(), Limits: nbd.Limits{Connections: -1}},
	} {
		if _, err := nbd.NewServer(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	s, err := nbd.NewServer(nbd.Config{Exports: one()})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []nbd.ListenerOptions{{Allow: []string{"["}}, {TLS: nbd.TLSRequired}} {
		ln, err := nbd.Listen("tcp://127.0.0.1:0", nbd.SocketOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Serve(t.Context(), ln, o); err == nil {
			t.Errorf("serves with %+v", o)
		}
	}
	if _, err := nbd.LoadTLS("/nothing", "/nothing", ""); err == nil {
		t.Error("TLS without files")
	}
}

// pipes is a listener on pipes, for tests in a bubble of synthetic time.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.done) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

// bubble serves on pipes in synthetic time.
func bubble(t *testing.T, cfg nbd.Config, f func(t *testing.T, dial func() net.Conn)) {
	t.Helper()
	bubbleOf(t, func() nbd.Exports { return one() }, cfg, f)
}

func bubbleOf(t *testing.T, exports func() nbd.Exports, cfg nbd.Config, f func(t *testing.T, dial func() net.Conn)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		cfg.Exports = exports()
		s, err := nbd.NewServer(cfg)
		if err != nil {
			t.Fatal(err)
		}
		p := &pipes{conns: make(chan net.Conn), done: make(chan struct{})}
		go s.Serve(context.Background(), p, nbd.ListenerOptions{}) //nolint:errcheck // ends with the test
		f(t, func() net.Conn {
			here, there := net.Pipe()
			p.conns <- there
			t.Cleanup(func() { here.Close() })
			return here
		})
		if err := s.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// endsAfter checks when the server hangs up.
func endsAfter(t *testing.T, c net.Conn, want time.Duration) {
	t.Helper()
	began := time.Now()
	io.Copy(io.Discard, c) //nolint:errcheck // until it is closed
	if got := time.Since(began); got < want || got > want*3/2 {
		t.Errorf("ended after %v, want about %v", got, want)
	}
}

func TestHandshakeTimeout(t *testing.T) {
	bubble(t, nbd.Config{Limits: nbd.Limits{Handshake: time.Minute}}, func(t *testing.T, dial func() net.Conn) {
		endsAfter(t, dial(), time.Minute)
		c := dial()
		if _, err := nbdtest.Begin(c); err != nil {
			t.Fatal(err)
		}
		endsAfter(t, c, time.Minute)
	})
}

func pipeClient(t *testing.T, c net.Conn) *nbdtest.Handshake {
	t.Helper()
	h, err := nbdtest.Begin(c)
	if err != nil {
		t.Fatal(err)
	}
	wantAlive(t, h)
	return h
}

func TestIdleTimeout(t *testing.T) {
	bubble(t, nbd.Config{Limits: nbd.Limits{Idle: time.Hour}}, func(t *testing.T, dial func() net.Conn) {
		h := pipeClient(t, dial())
		for range 3 {
			time.Sleep(50 * time.Minute)
			send(t, h.Conn, request(nbdtest.CmdFlush, 0, 1, 0, 0))
			read(t, h.Conn, 16)
		}
		endsAfter(t, h.Conn, time.Hour)
	})
	// Without it, a connection may be silent for ever.
	bubble(t, nbd.Config{}, func(t *testing.T, dial func() net.Conn) {
		h := pipeClient(t, dial())
		time.Sleep(1000 * time.Hour)
		send(t, h.Conn, request(nbdtest.CmdFlush, 0, 1, 0, 0))
		read(t, h.Conn, 16)
	})
}

func TestStalledRequest(t *testing.T) {
	for name, b := range map[string][]byte{
		"header":          request(nbdtest.CmdRead, 0, 1, 0, 512)[:20],
		"payload":         cat(request(nbdtest.CmdWrite, 0, 1, 0, 512), make([]byte, 100)),
		"skipped payload": cat(request(nbdtest.CmdWrite, 0, 1, 1<<40, 512), make([]byte, 100)),
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, nbd.Config{Limits: nbd.Limits{Stall: time.Minute}}, func(t *testing.T, dial func() net.Conn) {
				h := pipeClient(t, dial())
				send(t, h.Conn, b)
				endsAfter(t, h.Conn, time.Minute)
			})
		})
	}
}

func TestStalledReply(t *testing.T) {
	closed := 0
	exports := func() nbd.Exports {
		return &nbdtest.Interceptor{Exports: one(), OnClose: func(string) { closed++ }}
	}
	bubbleOf(t, exports, nbd.Config{Limits: nbd.Limits{Stall: time.Minute}}, func(t *testing.T, dial func() net.Conn) {
		h := pipeClient(t, dial())
		for range 3 {
			send(t, h.Conn, request(nbdtest.CmdRead, 0, 1, 0, 512))
			time.Sleep(40 * time.Second) // late, but not too late
			read(t, h.Conn, 16+512)
		}
		send(t, h.Conn, request(nbdtest.CmdRead, 0, 1, 0, 512))
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if closed != 1 {
			t.Error("a client that takes no replies is still served")
		}
	})
}

// TestDrainGivesUp holds a request for ever after DISC.
func TestDrainGivesUp(t *testing.T) {
	var h *held
	inside := func() nbd.Exports { h = hold(one()); return h } // its channels belong to the bubble
	bubbleOf(t, inside, nbd.Config{Limits: nbd.Limits{Drain: time.Minute}}, func(t *testing.T, dial func() net.Conn) {
		c := pipeClient(t, dial())
		send(t, c.Conn, cat(request(nbdtest.CmdRead, 0, 1, 0, 512), request(nbdtest.CmdDisc, 0, 2, 0, 0)))
		began := time.Now()
		if name := <-h.closed; name != "v" || time.Since(began) != time.Minute {
			t.Errorf("%q closed after %v", name, time.Since(began))
		}
		h.release() // answered with an error by the closed session
		read(t, c.Conn, 16)
		wantClosed(t, c.Conn)
	})
}

func TestBatch(t *testing.T) {
	var mu sync.Mutex
	var waiting []*nbd.Request
	arrived := make(chan struct{}, 64)
	e := &nbdtest.Interceptor{Exports: one(), OnSubmit: func(r *nbd.Request, _ func(*nbd.Request)) {
		mu.Lock()
		defer mu.Unlock()
		waiting = append(waiting, r)
		arrived <- struct{}{}
	}}
	addr := serve(t, e)
	conns := []net.Conn{enter(t, addr), enter(t, addr)}
	for i, c := range conns {
		for j := range 10 {
			send(t, c, request(nbdtest.CmdFlush, 0, uint64(100*i+j), 0, 0))
		}
	}
	for range 20 {
		<-arrived
	}
	var b nbd.Batch
	mu.Lock()
	for _, r := range waiting {
		b.Complete(r, nil)
	}
	mu.Unlock()
	b.Flush()
	for i, c := range conns {
		var want []byte
		for j := range 10 {
			want = append(want, simple(0, uint64(100*i+j))...)
		}
		if got := read(t, c, len(want)); !bytes.Equal(got, want) {
			t.Errorf("%x, want %x", got, want)
		}
	}
	// A request that is not the server's is simply completed.
	done := make(chan error, 1)
	r := &nbd.Request{Complete: func(_ *nbd.Request, err error) { done <- err }}
	b.Complete(r, nbd.ErrIO)
	b.Flush()
	if err := <-done; !errors.Is(err, nbd.ErrIO) {
		t.Error(err)
	}
}

func TestStats(t *testing.T) {
	s, addr := serveOn(t, "tcp://127.0.0.1:0", one())
	c := dial(t, addr, "v", nbdtest.Options{})
	if err := errors.Join(c.WriteAt(t.Context(), make([]byte, 4096), 0), c.ReadAt(t.Context(), make([]byte, 512), 0), c.Flush(t.Context())); err != nil {
		t.Fatal(err)
	}
	if err := c.ReadAt(t.Context(), make([]byte, 512), 1<<20); err == nil {
		t.Error("read beyond the end")
	}
	// A request is counted once its reply has left.
	eventually(t, "all are counted", func() bool {
		st := s.Stats().Ops
		return st[nbd.OpRead].Count+st[nbd.OpWrite].Count+st[nbd.OpFlush].Count == 4
	})
	st := s.Stats()
	if w := st.Ops[nbd.OpWrite]; w.Count != 1 || w.Bytes != 4096 || w.Errors != 0 || w.LatencySum <= 0 {
		t.Errorf("%+v", w)
	}
	if r := st.Ops[nbd.OpRead]; r.Count != 2 || r.Bytes != 512 || r.Errors != 1 {
		t.Errorf("%+v", r)
	}
	if st.Connections != 1 || st.Accepted != 1 {
		t.Errorf("%+v", st)
	}
	if cl := s.Clients(); len(cl) != 1 || cl[0].Export != "v" || !strings.HasPrefix(cl[0].Remote, "127.0.0.1:") {
		t.Errorf("%+v", cl)
	}
}
