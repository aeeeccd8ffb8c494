// Package mux lets one TCP port of a node carry raft, the links of replication,
// node-to-node calls and read-only admin. A connection says what it is with its
// first eight bytes: a preface that names the protocol and its version, or the
// start of an HTTP request. Anything else is closed with one line in the log.
//
//	0               4               6               8
//	+---------------+---------------+---------------+
//	|     'BSxxxx': blockstep and the protocol      |  four letters: RAFT, PEER, NODE
//	|                               | version '01'  |  two digits
//	+---------------+---------------+---------------+
//
// Nothing is answered: a preface is one way, and what follows it belongs to the
// protocol that it names.
package mux

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/sock"
)

// The prefaces of our protocols.
const (
	PrefaceRaft = "BSRAFT01" // hashicorp/raft's transport
	PrefacePeer = "BSPEER01" // package replication/peer
	PrefaceNode = "BSNODE01" // HTTP between nodes
)

const (
	prefaceLen = 8
	// sniffTimeout is how long a connection may take to say what it is.
	sniffTimeout = 5 * time.Second
	// sniffsMax bounds the connections that have not said so yet; beyond it new
	// ones are closed. Founding a large cluster needs a few dozen.
	sniffsMax = 256
	// backlogMax bounds the connections that wait for a protocol's Accept.
	backlogMax = 64
	// acceptPause is how long accepting rests after a passing error, such as
	// too many open files.
	acceptPause = 50 * time.Millisecond
)

// Mux hands the connections of one listener to one listener a protocol.
type Mux struct {
	l      net.Listener
	logger *slog.Logger
	http   *sub
	subs   map[string]*sub
	sniffs chan struct{} // a slot for each connection that is being sniffed
	wg     sync.WaitGroup

	done chan struct{} // closed by Close

	mu     sync.Mutex            // guards what follows
	conns  map[net.Conn]struct{} // being sniffed, to be closed at the end
	closed bool
}

// New returns a Mux over l, which it takes over. Serve starts it.
func New(l net.Listener, logger *slog.Logger) *Mux {
	m := &Mux{
		l:      l,
		logger: logger,
		subs:   map[string]*sub{},
		sniffs: make(chan struct{}, sniffsMax),
		done:   make(chan struct{}),
		conns:  map[net.Conn]struct{}{},
	}
	m.http = newSub(l.Addr(), "")
	for _, p := range []string{PrefaceRaft, PrefacePeer, PrefaceNode} {
		m.subs[p] = newSub(l.Addr(), p)
	}
	return m
}

// Listener returns the listener of one of the prefaces. Its connections begin
// just after the preface.
func (m *Mux) Listener(preface string) net.Listener { return m.subs[preface] }

// HTTP returns the listener of the connections that begin with an HTTP method.
func (m *Mux) HTTP() net.Listener { return m.http }

// Serve accepts until Close, and returns nil then.
func (m *Mux) Serve() error {
	for {
		conn, err := m.l.Accept()
		switch {
		case err == nil:
		case errors.Is(err, net.ErrClosed):
			return nil
		default:
			m.logger.Warn("accepting a connection failed", "address", m.l.Addr(), "err", err)
			select {
			case <-m.done:
				return nil
			case <-time.After(acceptPause):
			}
			continue
		}
		select {
		case m.sniffs <- struct{}{}:
		default:
			m.logger.Warn("closed a connection: too many have not said what they are", "remote", conn.RemoteAddr(), "limit", sniffsMax)
			conn.Close()
			continue
		}
		if !m.track(conn) {
			conn.Close()
			<-m.sniffs
			return nil
		}
		go m.runSniff(conn)
	}
}

// Close stops accepting, closes every listener and what waits in them, and
// waits for the mux's goroutines. Connections that were accepted stay.
func (m *Mux) Close() error {
	m.mu.Lock()
	if !m.closed {
		m.closed = true
		close(m.done)
	}
	for c := range m.conns {
		c.Close()
	}
	m.mu.Unlock()
	err := m.l.Close()
	m.http.close()
	for _, s := range m.subs {
		s.close()
	}
	m.wg.Wait()
	return err
}

// track counts a connection for Close, which closes it and waits for its
// runSniff; false once Close has begun.
func (m *Mux) track(conn net.Conn) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return false
	}
	m.conns[conn] = struct{}{}
	m.wg.Add(1) // under mu, so that it is never beside the Wait of Close
	return true
}

func (m *Mux) untrack(conn net.Conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.conns, conn)
}

// runSniff reads the first bytes of one connection and hands it on.
func (m *Mux) runSniff(conn net.Conn) {
	defer m.wg.Done()
	defer func() { <-m.sniffs }()
	target, rest, err := m.sniff(conn)
	m.untrack(conn)
	if err != nil {
		if !errors.Is(err, io.EOF) { // a port check, not worth a line
			m.logger.Warn("closed a connection", "remote", conn.RemoteAddr(), "reason", err)
		}
		conn.Close()
		return
	}
	conn = tuned(conn, target.preface)
	if rest != nil {
		conn = &replayed{Conn: conn, head: rest}
	}
	if !target.put(conn) {
		conn.Close()
	}
}

func (m *Mux) sniff(conn net.Conn) (target *sub, rest []byte, err error) {
	SetNoDelay(conn)
	if err := conn.SetReadDeadline(time.Now().Add(sniffTimeout)); err != nil {
		return nil, nil, err
	}
	head := make([]byte, prefaceLen)
	if n, err := io.ReadFull(conn, head); err != nil {
		if n > 0 && errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, nil, fmt.Errorf("it ended after %q, before it said what it is", head[:n])
		}
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
			return nil, nil, io.EOF
		}
		return nil, nil, fmt.Errorf("it did not say what it is: %w", err)
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return nil, nil, err
	}
	if s, ok := m.subs[string(head)]; ok {
		return s, nil, nil
	}
	if isHTTP(string(head)) {
		return m.http, head, nil
	}
	if newer := string(head[:6]); slices.ContainsFunc([]string{PrefaceRaft, PrefacePeer, PrefaceNode}, func(p string) bool { return p[:6] == newer }) {
		return nil, nil, fmt.Errorf("it speaks version %q of %s, and this blockstepd only 01: upgrade this node", head[6:], newer)
	}
	return nil, nil, fmt.Errorf("it speaks no protocol that is known here (it began with %q)", head)
}

// isHTTP reports whether the first eight bytes are those of an HTTP request: a
// method of 3 to 7 capitals and a space.
func isHTTP(head string) bool {
	for _, method := range []string{"GET ", "PUT ", "HEAD ", "POST ", "PATCH ", "DELETE ", "OPTIONS "} {
		if strings.HasPrefix(head, method) {
			return true
		}
	}
	return false
}

// Dial connects to a node's address and says what the connection is for.
func Dial(ctx context.Context, address, preface string) (net.Conn, error) {
	d := net.Dialer{KeepAlive: 15 * time.Second}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	SetNoDelay(conn)
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetWriteDeadline(deadline)
	}
	if _, err := io.WriteString(conn, preface); err != nil {
		conn.Close()
		return nil, fmt.Errorf("greeting %s: %w", address, err)
	}
	_ = conn.SetWriteDeadline(time.Time{})
	return tuned(conn, preface), nil
}

// tuned returns the connection as its protocol is best served. Raft's are those that
// speak while all else is quiet.
func tuned(conn net.Conn, preface string) net.Conn {
	if preface == PrefaceRaft {
		return sock.Brief(conn)
	}
	return conn
}

// SetNoDelay switches Nagle's algorithm off: an ack that waits for more to send
// costs 40 ms.
func SetNoDelay(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetNoDelay(true)
	}
}

// replayed gives back the bytes that were sniffed before it reads on.
type replayed struct {
	net.Conn
	head []byte
}

// Read implements net.Conn.
func (r *replayed) Read(p []byte) (int, error) {
	if len(r.head) > 0 {
		n := copy(p, r.head)
		r.head = r.head[n:]
		return n, nil
	}
	return r.Conn.Read(p)
}

// sub is the listener of one protocol.
type sub struct {
	addr    net.Addr
	preface string // "": HTTP's
	conns   chan net.Conn
	done    chan struct{}
	once    sync.Once
}

func newSub(addr net.Addr, preface string) *sub {
	return &sub{addr: addr, preface: preface, conns: make(chan net.Conn, backlogMax), done: make(chan struct{})}
}

// put hands a connection over; false when nobody takes it.
func (s *sub) put(conn net.Conn) bool {
	select {
	case <-s.done:
		return false
	default:
	}
	select {
	case s.conns <- conn:
		return true
	default: // nobody accepts: the protocol is stopping, or drowning
		return false
	}
}

// Accept implements net.Listener.
func (s *sub) Accept() (net.Conn, error) {
	select {
	case c := <-s.conns:
		return c, nil
	case <-s.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener. What waits in it is closed.
func (s *sub) Close() error {
	s.close()
	return nil
}

func (s *sub) close() {
	s.once.Do(func() { close(s.done) })
	for {
		select {
		case c := <-s.conns:
			c.Close()
		default:
			return
		}
	}
}

// Addr implements net.Listener.
func (s *sub) Addr() net.Addr { return s.addr }
