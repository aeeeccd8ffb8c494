package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
)

// Config says what a Server serves and within which limits.
type Config struct {
	Exports Exports
	Limits  Limits
	// TLS, if not nil, is offered to clients by STARTTLS. With ClientCAs and
	// RequireAndVerifyClientCert it is mutual; see LoadTLS.
	TLS *tls.Config
	// TLSRequire refuses clients on TCP that do not start TLS. A unix socket
	// has its mode and group instead; see ListenerOptions.TLS.
	TLSRequire bool
	Logger     *slog.Logger // nil logs nothing
}

// TLSMode is what a listener does about TLS.
type TLSMode uint8

// The modes of a listener. All but the first overrule Config.TLSRequire.
const (
	TLSDefault TLSMode = iota // as Config says
	TLSOff                    // refused even if the client asks
	TLSOffered                // the client chooses
	TLSRequired
)

// ListenerOptions says what one listener lets its clients do.
type ListenerOptions struct {
	ReadOnly bool
	// Allow lists the exports to be seen, as path.Match patterns. Empty is all.
	Allow []string
	// Connections bounds those of this listener. 0 leaves it to Limits.
	Connections int
	TLS         TLSMode
	// Grows says that clients learn by other means that an export has grown, as
	// the kernel does by netlink: then its size is not what was negotiated, but
	// what Session.Info says.
	Grows bool
}

// listener is a net.Listener with its options.
type listener struct {
	ListenerOptions
	ln    net.Listener
	conns atomic.Int64
}

func (l *listener) allows(name string) bool {
	if len(l.Allow) == 0 {
		return true
	}
	for _, pattern := range l.Allow {
		if ok, _ := path.Match(pattern, name); ok { // patterns are checked by Serve
			return true
		}
	}
	return false
}

// Server serves exports to NBD clients, on any number of listeners.
type Server struct {
	exports Exports
	limits  Limits
	tls     *tls.Config
	require bool
	log     *slog.Logger
	budget  budget
	stats   serverStats
	epoch   time.Time // now counts from it

	ctx    context.Context // of lookups; ends when Shutdown does
	cancel context.CancelFunc
	wg     sync.WaitGroup // connections and the janitor

	mu struct {
		sync.Mutex
		listeners map[*listener]struct{}
		conns     map[*conn]struct{}
		own       int // of conns: by ServeConn, which no limit refuses
		stopping  bool
		started   bool          // the janitor
		empty     chan struct{} // closed when the last connection has gone, made by Shutdown
	}
}

// NewServer checks the configuration and returns a server that listens nowhere
// yet.
func NewServer(cfg Config) (*Server, error) {
	if cfg.Exports == nil {
		return nil, errors.New("nbd: no exports")
	}
	if cfg.TLSRequire && cfg.TLS == nil {
		return nil, errors.New("nbd: TLS is required but has no certificate: set nbd.tls.cert and nbd.tls.key")
	}
	if err := cfg.Limits.setDefaults(); err != nil {
		return nil, err
	}
	s := &Server{
		exports: cfg.Exports, limits: cfg.Limits, tls: cfg.TLS, require: cfg.TLSRequire,
		log: cfg.Logger, epoch: time.Now(),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.budget.limit, s.budget.exports = s.limits.BytesTotal, make(map[string]int64)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.mu.listeners = make(map[*listener]struct{})
	s.mu.conns = make(map[*conn]struct{})
	return s, nil
}

// now is a monotonic clock in nanoseconds.
func (s *Server) now() int64 { return int64(time.Since(s.epoch)) }

// Serve accepts connections until ctx ends, Shutdown is called or the listener
// fails; only the latter is an error. It closes the listener. Connections
// outlive it: Shutdown ends those.
func (s *Server) Serve(ctx context.Context, ln net.Listener, opts ListenerOptions) error {
	defer ln.Close()
	for _, pattern := range opts.Allow {
		if _, err := path.Match(pattern, ""); err != nil {
			return fmt.Errorf("nbd: allow-list pattern %q: %w", pattern, err)
		}
	}
	if opts.TLS == TLSRequired && s.tls == nil {
		return fmt.Errorf("nbd: listener %s requires TLS: set nbd.tls.cert and nbd.tls.key", ln.Addr())
	}
	l := &listener{ListenerOptions: opts, ln: ln}
	if !s.begin(l) {
		return nil
	}
	defer s.end(l)
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	s.log.Info("nbd: listening", "address", ln.Addr().String(), "read_only", opts.ReadOnly)
	for {
		raw, err := ln.Accept()
		switch {
		case err == nil:
			s.accept(l, raw)
		case ctx.Err() != nil || s.stopping():
			return nil
		case transientAccept(err):
			s.log.Warn("nbd: accept failed, trying again", "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
				return nil
			}
		default:
			return fmt.Errorf("nbd: accept on %s: %w", ln.Addr(), err)
		}
	}
}

// transientAccept reports errors of accept that pass: a client that was gone
// before it was accepted, or no file descriptors left for the moment.
func transientAccept(err error) bool {
	for _, no := range []syscall.Errno{
		syscall.ECONNABORTED, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EINTR,
	} {
		if errors.Is(err, no) {
			return true
		}
	}
	return false
}

func (s *Server) begin(l *listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.stopping {
		return false
	}
	s.mu.listeners[l] = struct{}{}
	if !s.mu.started {
		s.mu.started = true
		s.wg.Go(s.runJanitor)
	}
	return true
}

func (s *Server) end(l *listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.mu.listeners, l)
}

func (s *Server) stopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.stopping
}

func (s *Server) snapshot() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*conn, 0, len(s.mu.conns))
	for c := range s.mu.conns {
		list = append(list, c)
	}
	return list
}

// fullLocked reports whether there is no room for c. A quarter of it is not for
// clients across the network that have chosen no export yet: whoever can only reach
// the port keeps no others out.
func (s *Server) fullLocked(c *conn) bool {
	most := s.limits.Connections
	n := len(s.mu.conns) - s.mu.own
	if n >= most || c.unix() || n < most-most/4 {
		return n >= most
	}
	strangers := 0
	for o := range s.mu.conns {
		if !o.unix() && !o.serving.Load() {
			strangers++
		}
	}
	return strangers >= most-most/4
}

// unix reports whether the client came by a unix socket.
func (c *conn) unix() bool {
	_, ok := c.raw.(*net.UnixConn)
	return ok
}

// accept starts a connection, or refuses it when there are too many.
func (s *Server) accept(l *listener, raw net.Conn) {
	s.stats.accepted.Add(1)
	if t, ok := raw.(*net.TCPConn); ok {
		t.SetNoDelay(true) //nolint:errcheck // Go's default already; a socket that refuses still works
	}
	c := s.newConn(l, raw)
	s.mu.Lock()
	full := s.fullLocked(c) || l.Connections > 0 && int(l.conns.Load()) >= l.Connections
	if full || s.mu.stopping {
		s.mu.Unlock()
		s.stats.refused.Add(1)
		s.log.Warn("nbd: connection refused: too many, or stopping", "remote", c.remote, "address", l.ln.Addr().String())
		raw.Close()
		return
	}
	s.mu.conns[c] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	l.conns.Add(1)
	s.stats.connections.Add(1)
	go s.runConn(l, c)
}

func (s *Server) runConn(l *listener, c *conn) {
	defer s.wg.Done()
	c.run(s.ctx)
	l.conns.Add(-1)
	s.stats.connections.Add(-1)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.mu.conns, c)
	if len(s.mu.conns) == 0 && s.mu.empty != nil {
		close(s.mu.empty)
		s.mu.empty = nil
	}
}

func (s *Server) newConn(l *listener, raw net.Conn) *conn {
	c := &conn{
		srv: s, listener: l, raw: raw, stream: raw, since: time.Now(),
		work: make(chan struct{}, 1), wake: make(chan struct{}, 1), done: make(chan struct{}),
		remote: remoteName(raw), local: isLocal(raw),
	}
	if sc, ok := raw.(syscall.Conn); ok {
		if rc, err := sc.SyscallConn(); err == nil {
			c.sock, c.fd = rc, rc
		}
	}
	c.log = s.log.With("remote", c.remote)
	return c
}

// Shutdown stops listening, lets each connection answer what it has in flight,
// and closes it. When ctx ends first, the connections that are left are cut
// off, unanswered, so that their clients may ask another node; the error says
// how many. In no case are errors answered in the place of results.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.mu.stopping = true
	for l := range s.mu.listeners {
		l.ln.Close()
	}
	conns := make([]*conn, 0, len(s.mu.conns))
	for c := range s.mu.conns {
		conns = append(conns, c)
	}
	empty := s.mu.empty
	if len(conns) > 0 && empty == nil {
		empty = make(chan struct{})
		s.mu.empty = empty
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.drain()
	}
	defer s.cancel()
	if empty != nil {
		select {
		case <-empty:
		case <-ctx.Done():
			left := s.snapshot()
			for _, c := range left {
				c.kill(ErrShutdown)
			}
			return fmt.Errorf("nbd: %d connections were cut off with requests in flight: %w", len(left), ctx.Err())
		}
	}
	s.cancel()
	s.wg.Wait()
	return nil
}

// handshake negotiates: on success the connection is ready for runReader.
func (c *conn) handshake(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, c.srv.limits.Handshake)
	defer cancel()
	if err := c.raw.SetDeadline(time.Now().Add(c.srv.limits.Handshake)); err != nil {
		return err
	}
	n := &negotiation{server: &exportView{c: c, ctx: ctx}}
	n.tlsOffered, n.tlsRequired = c.tlsPolicy()
	if err := c.negotiate(ctx, n); err != nil {
		n.abandon()
		return err
	}
	if err := c.raw.SetDeadline(time.Time{}); err != nil {
		n.abandon()
		return err
	}
	c.export, c.session, c.contexts = n.name, n.session, n.ids
	c.gate = gate{
		size: n.info.Size, blockMin: uint64(n.info.BlockMin), payloadMax: uint64(n.info.BlockMax),
		readOnly: n.info.ReadOnly, fastZero: !n.info.ReadOnly,
		extended: n.extended, structured: n.structured, contexts: len(n.ids),
	}
	if c.listener.Grows {
		c.gate.grown = func() uint64 { return c.session.Info().Size }
	}
	c.in = buf.Get(readBufferMin)
	c.out.init()
	c.source = c.stream
	c.takeThread()
	c.serving.Store(true)
	if c.draining.Load() || c.srv.stopping() {
		c.drain() // again: the deadline was just cleared
	}
	return nil
}

// negotiate drives the negotiation over the socket.
func (c *conn) negotiate(ctx context.Context, n *negotiation) error {
	if _, err := c.stream.Write(n.greet()); err != nil {
		return err
	}
	var in, out []byte
	for {
		need := n.need()
		if cap(in) < need {
			in = make([]byte, need)
		}
		if err := readExactly(c.stream, in[:need]); err != nil {
			return err
		}
		var what outcome
		var err error
		out, what, err = n.step(in[:need], out[:0])
		if len(out) > 0 {
			if _, werr := c.stream.Write(out); werr != nil {
				return werr
			}
		}
		switch what {
		case goOn:
		case transmit:
			return nil
		case hangUp:
			c.stream.Close() // ends TLS properly
			if err == nil {
				err = errDisconnected
			}
			return err
		case startTLS:
			t := tls.Server(c.raw, c.srv.tls)
			if err := t.HandshakeContext(ctx); err != nil {
				return fmt.Errorf("nbd: TLS handshake: %w", err)
			}
			c.stream, c.fd, c.secure = t, nil, true
			n.upgraded()
		}
	}
}

func readExactly(r io.Reader, p []byte) error {
	_, err := io.ReadFull(r, p)
	return err
}

// tlsPolicy says whether STARTTLS is answered, and whether it is insisted on.
func (c *conn) tlsPolicy() (offered, required bool) {
	_, tcp := c.raw.(*net.TCPConn)
	switch c.listener.TLS {
	case TLSOff:
		return false, false
	case TLSOffered:
		return c.srv.tls != nil, false
	case TLSRequired:
		return true, true
	case TLSDefault:
	}
	return c.srv.tls != nil, c.srv.require && tcp
}

// exportView is what one connection sees of the exports: a haggler.
type exportView struct {
	c   *conn
	ctx context.Context //nolint:containedctx // lives for one handshake
}

func (v *exportView) stopping() bool { return v.c.srv.stopping() }

func (v *exportView) list() []listed {
	var all []listed
	for _, name := range v.c.srv.exports.List() {
		if info, err := v.lookup(name); err == nil { // one that is gone meanwhile is no longer listed
			all = append(all, listed{name, info.Description})
		}
	}
	return all
}

func (v *exportView) lookup(name string) (Info, error) {
	if !v.c.listener.allows(name) {
		return Info{}, ErrNoExport
	}
	info, err := v.c.srv.exports.Lookup(v.ctx, name)
	info.ReadOnly = info.ReadOnly || v.c.listener.ReadOnly
	return info, err
}

func (v *exportView) open(name string) (Session, error) {
	if !v.c.listener.allows(name) {
		return nil, ErrNoExport
	}
	c := v.c
	s, err := c.srv.exports.Open(v.ctx, name, Client{Remote: c.remote, Local: c.local, Gone: c.gone, Kill: c.end})
	if err != nil {
		return nil, err
	}
	if c.listener.ReadOnly {
		s = readOnlySession{s}
	}
	return s, nil
}

// readOnlySession shows a session on a read-only listener; the gate refuses
// the changes.
type readOnlySession struct{ Session }

func (s readOnlySession) Info() Info {
	info := s.Session.Info()
	info.ReadOnly = true
	return info
}
