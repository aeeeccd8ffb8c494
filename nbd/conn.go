package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/sock"
)

// conn is one client's connection. It has two goroutines: runReader, which
// owns the connection's life, and runWriter, which writes what could not be
// written at once by whoever completed the requests.
type conn struct {
	srv      *Server
	log      *slog.Logger
	listener *listener
	raw      net.Conn                  // the socket
	stream   net.Conn                  // the socket, or TLS upon it
	sock     syscall.RawConn           // nil on pipes
	fd       syscall.RawConn           // for writes that do not block: sock, or nil under TLS
	source   io.Reader                 // where requests come from: stream, or thread
	thread   atomic.Pointer[sock.Conn] // the socket, once a thread of its own reads it: raw is closed then
	remote   string
	local    bool
	since    time.Time

	// Set by negotiation, then constant.
	export   string
	secure   bool
	session  Session
	gate     gate
	contexts []uint32 // the session's ids of the negotiated contexts
	in       *buf.Buf // the reader's buffer: see reader.go
	inStart  int
	inEnd    int
	lean     bool // the last payload was large: little is read ahead of the next

	out replyWriter // owned by whoever holds the writer's role

	// work wakes the writer goroutine, which then holds the writer's role.
	work chan struct{}
	// wake wakes the reader from waiting for room or for the last request.
	wake chan struct{}
	// done is closed when the connection is being torn down.
	done     chan struct{}
	closed   sync.Once
	reason   error // set once, before done is closed
	draining atomic.Bool
	serving  atomic.Bool // negotiated; what is set before is constant
	// sentBytes and readBytes show the janitor that the connection moves.
	sentBytes, readBytes atomic.Uint64
	midRequest           atomic.Bool // the reader waits for the rest of a request
	sending              atomic.Bool // the writer waits for the client to take bytes
	watch                stallWatch  // the janitor's

	mu struct {
		sync.Mutex
		queue      []*request // completed, not yet in a writer's hands
		spare      []*request // the other half of a double buffer
		free       []*request
		submitting *request // the reader is, or was a moment ago, inside Submit
		writing    bool     // somebody holds the writer's role
		dead       bool     // write nothing more
		lost       bool     // the session ended: close once all is answered
		why        error    // of lost, as far as it is known
		waiting    bool     // the reader waits on wake
		admitting  bool     // for room: it does not see the client go
		inflight   int      // requests from admitted to answered
		bytes      int64    // their payload
	}
}

// request is a Request with what its reply needs. It belongs to its
// connection and is used again.
type request struct {
	Request
	c            *conn
	cookie       uint64
	dontFragment bool
	admitted     int64 // payload bytes that count against the limits
	start        int64 // nanoseconds on the server's clock
	err          error
	body         *buf.Buf // an encoded block status
	ctxs         [contextsMax]uint32
}

// complete is Request.Complete.
func complete(r *Request, err error) {
	q := r.Server.(*request)
	q.c.completed(q, err, true)
}

func (c *conn) newRequest() *request {
	q := &request{c: c}
	q.Complete = complete
	q.Server = q
	return q
}

// completed queues a reply. With flush it is sent at once, by this goroutine
// if the writer's role is free and the socket takes it without blocking;
// unless it was completed inside Submit, since the reader then sends the
// replies of all requests that it had read together.
func (c *conn) completed(q *request, err error, flush bool) {
	q.err = err
	c.mu.Lock()
	c.mu.queue = append(c.mu.queue, q)
	if !flush || c.mu.writing || c.mu.submitting == q {
		c.mu.Unlock()
		return
	}
	c.mu.writing = true
	c.mu.Unlock()
	c.write(false)
}

// Flush sends what is queued. It implements Flusher.
func (c *conn) Flush() {
	c.mu.Lock()
	if c.mu.writing || len(c.mu.queue) == 0 {
		c.mu.Unlock()
		return
	}
	c.mu.writing = true
	c.mu.Unlock()
	c.write(false)
}

// kill ends the connection without answering what is in flight.
func (c *conn) kill(reason error) {
	c.closed.Do(func() {
		c.reason = reason
		// dead before done: whoever hands the writer's role over does so under
		// the lock and while not dead, so runWriter finds it before it ends.
		c.mu.Lock()
		c.mu.dead = true
		c.mu.Unlock()
		close(c.done)
		c.close()
	})
}

// end is Client.Kill.
func (c *conn) end(reason error) {
	if !errors.Is(reason, ErrSessionLost) {
		c.kill(reason)
		return
	}
	c.mu.Lock()
	c.mu.lost, c.mu.why = true, reason
	c.mu.Unlock()
	c.drain()
}

// drain makes the reader take no more requests from the socket and end the
// connection once those in flight are answered.
func (c *conn) drain() {
	c.draining.Store(true)
	c.raw.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // a closed socket needs no draining
	if t := c.thread.Load(); t != nil {
		t.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // likewise
	}
	c.wakeReader()
}

func (c *conn) wakeReader() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// gone reports whether the client has closed its end.
func (c *conn) gone() bool {
	select {
	case <-c.done:
		return true
	default:
	}
	return peerGone(c.socket())
}

// socket gives access to the descriptor; nil on pipes.
func (c *conn) socket() syscall.RawConn {
	if t := c.thread.Load(); t != nil {
		return t.Raw()
	}
	return c.sock
}

// takeThread gives the connection's reader a thread of its own, if there are not
// too many that have one.
func (c *conn) takeThread() {
	if c.fd == nil {
		return
	}
	t := sock.Take(c.raw, sock.Client)
	if t == nil {
		return
	}
	c.source, c.fd = t, t.Raw()
	c.thread.Store(t)
	select {
	case <-c.done:
		t.Close() //nolint:errcheck // kill has come before it could know of t
	default:
	}
}

// close closes the socket.
func (c *conn) close() {
	c.raw.Close()
	if t := c.thread.Load(); t != nil {
		t.Close() //nolint:errcheck // nothing more is wanted of it
	}
}

// Why a connection's reader ended, when it was not an error.
var (
	errDisconnected = errors.New("nbd: the client disconnected")
	errDraining     = errors.New("nbd: the server is stopping")
)

// run serves the connection until it ends. It returns when no request of it is
// in flight any more, its session is closed and its goroutines have ended.
func (c *conn) run(ctx context.Context) {
	defer c.close()
	if err := c.handshake(ctx); err != nil {
		c.endHandshake(err)
		return
	}
	c.log = c.log.With("export", c.export)
	c.log.Debug("nbd: session opened", "tls", c.secure, "extended", c.gate.extended)
	var wg sync.WaitGroup
	wg.Go(c.runWriter)
	err := c.runReader()
	c.uncork()
	drain := c.srv.limits.Drain
	switch {
	case errors.Is(err, errDisconnected):
		// What is in flight is answered first. The client may have gone already,
		// which kills the connection; what it had asked for is done all the same.
		c.waitIdle(drain, nil)
	case errors.Is(err, errDraining):
		if !c.waitIdle(drain, c.done) {
			c.kill(err) // before Close answers errors, which a client takes for good
		}
	case errors.Is(err, ErrSessionLost): // Close answers
	default:
		c.kill(err)
	}
	c.session.Close()
	if !c.waitIdle(drain, c.done) {
		c.kill(err)
		c.waitIdle(0, nil)
	}
	c.hangUp(err)
	wg.Wait()
	c.in.Release()
	c.endLog(err)
}

// hangUp closes the connection once all is answered; TLS is ended first.
func (c *conn) hangUp(reason error) {
	c.mu.Lock()
	dead := c.mu.dead
	c.mu.Unlock()
	if !dead {
		c.linger(errors.Is(reason, errDisconnected))
	}
	c.kill(reason)
}

// linger ends the sending side and, unless the client has said that it sends
// nothing more, waits until it has the last answers. A TCP socket that is closed
// while requests of the client are unread is reset, and what was not delivered
// by then is lost.
func (c *conn) linger(done bool) {
	if t, ok := c.stream.(*tls.Conn); ok {
		t.CloseWrite() //nolint:errcheck // as good as can be: the connection ends
	}
	var tcp interface {
		io.Reader
		CloseWrite() error
		SetReadDeadline(t time.Time) error
	}
	tcp, ok := c.raw.(*net.TCPConn)
	if !ok || done {
		return
	}
	if t := c.thread.Load(); t != nil {
		tcp = t
	}
	tcp.CloseWrite() //nolint:errcheck // it is gone already, then
	buf := make([]byte, 4096)
	began := time.Now()
	for quiet := began; ; {
		tcp.SetReadDeadline(time.Now().Add(lingerQuiet / 4)) //nolint:errcheck // closed: Read says so
		n, err := tcp.Read(buf)
		now := time.Now()
		switch {
		case n > 0:
			quiet = now
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return // the client has closed, or kill has
		}
		if now.Sub(began) >= lingerMax || now.Sub(quiet) >= lingerQuiet && unsent(c.socket()) == 0 {
			return
		}
	}
}

func (c *conn) endHandshake(err error) {
	level := slog.LevelInfo
	if errors.Is(err, io.EOF) || errors.Is(err, errDisconnected) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		level = slog.LevelDebug // a port scan, `nbdinfo --list`
	}
	c.srv.stats.handshakesFailed.Add(1)
	c.log.Log(context.Background(), level, "nbd: handshake ended", "reason", err)
}

func (c *conn) endLog(err error) {
	if c.reason != nil && !errors.Is(err, errDisconnected) && !errors.Is(err, errDraining) {
		err = c.reason
	}
	level := slog.LevelInfo
	if errors.Is(err, errDisconnected) || errors.Is(err, io.EOF) {
		level = slog.LevelDebug
	}
	c.log.Log(context.Background(), level, "nbd: session closed", "reason", err, "after", time.Since(c.since).Round(time.Millisecond))
}

// waitIdle waits until no request is in flight, and reports whether that is so:
// done may be closed first, or the time have passed. A time of 0 is none.
func (c *conn) waitIdle(atMost time.Duration, done <-chan struct{}) bool {
	var timeout <-chan time.Time
	if atMost > 0 {
		t := time.NewTimer(atMost)
		defer t.Stop()
		timeout = t.C
	}
	for {
		c.mu.Lock()
		idle := c.mu.inflight == 0
		c.mu.waiting = !idle
		c.mu.Unlock()
		if idle {
			return true
		}
		select {
		case <-c.wake:
		case <-done:
			return false
		case <-timeout:
			return false
		}
	}
}

// admit waits until a request of n payload bytes is within the limits, and
// returns one to fill. It returns an error when the connection ends first.
func (c *conn) admit(n int64) (*request, error) {
	for {
		c.mu.Lock()
		c.mu.admitting = false
		if c.mu.inflight < c.srv.limits.Requests && c.fitsLocked(n) {
			c.mu.inflight++
			c.mu.bytes += n
			var q *request
			if last := len(c.mu.free) - 1; last >= 0 {
				q = c.mu.free[last]
				c.mu.free = c.mu.free[:last]
			} else {
				q = c.newRequest()
			}
			c.mu.submitting = q
			c.mu.Unlock()
			q.admitted = n
			return q, nil
		}
		c.mu.waiting, c.mu.admitting = true, true
		c.mu.Unlock()
		c.uncork() // what has not been started never makes room
		select {
		case <-c.wake:
		case <-c.done:
			return nil, c.reason
		}
	}
}

// fitsLocked takes what n more bytes cost from the shared budget.
func (c *conn) fitsLocked(n int64) bool {
	held := c.mu.bytes
	if held > 0 && held+n > c.srv.limits.BytesPerConn {
		return false
	}
	more := excess(held+n) - excess(held)
	return more == 0 || c.srv.budget.take(c, excess(held), more)
}

// retire takes back requests that have been answered, n of them with the given
// payload bytes in all.
func (c *conn) retire(qs []*request) {
	var bytes int64
	for _, q := range qs {
		bytes += q.admitted
		q.Data.Release()
		q.body.Release()
		q.Data, q.body, q.Status, q.Holes, q.Contexts, q.err = nil, nil, nil, nil, nil, nil
	}
	c.mu.Lock()
	before := excess(c.mu.bytes)
	c.mu.bytes -= bytes
	c.mu.inflight -= len(qs)
	given := before - excess(c.mu.bytes)
	c.mu.free = append(c.mu.free, qs...)
	wake := c.mu.waiting
	c.mu.waiting = false
	c.mu.Unlock()
	if given > 0 {
		c.srv.budget.give(c, given)
	}
	if wake {
		c.wakeReader()
	}
}
