// Package sock reads a socket by a thread of its own. Go's poller wakes a thread
// that waits in epoll, which finds out whose bytes they are, wakes the goroutine,
// and mostly another thread that looks for more work; at one small message at a
// time that costs more than the message. A Conn's reader waits in poll(2) for its
// own socket, and goes on where it stood: one wake-up a message, and it keeps its
// processor while it waits.
//
// It costs a thread for each Conn whose reader waits, so it is for connections
// that are few and busy; and one of the scheduler's processors, which such a
// thread keeps for up to 10 ms. When none is left, whoever comes back from a
// system call waits until the runtime's monitor takes one away from somebody,
// which may be 10 ms later. So GOMAXPROCS rises with the number of Conns: those
// who wait need none of the machine's.
package sock

import (
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// closedBit marks a Conn whose Close has been called; below it is counted who
// uses the descriptor.
const closedBit = 1 << 32

// Conn is the reading half of a TCP or unix connection that Take has taken out
// of the runtime's poller. One goroutine reads at a time; any may Close.
type Conn struct {
	fd   int
	refs atomic.Int64 // users, Close's own included; closedBit
	poll [1]unix.PollFd
	full bool // the last read took all there was room for: there may be more
}

// Take takes the connection over from c, which it closes. It returns nil, and
// leaves c alone, when c is no socket or there are connsMax already. The caller is the only user of c, but for
// such as may close it at any moment, and only reads from here on.
func Take(c net.Conn) *Conn {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil || !threads.take() {
		return nil
	}
	fd := -1
	err = raw.Control(func(old uintptr) {
		if dup, err := unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			fd = dup
		}
	})
	if err != nil || fd < 0 {
		threads.give()
		return nil
	}
	s := &Conn{fd: fd}
	s.refs.Store(1)
	s.poll[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	// The runtime's poller would go on waking a thread for each message.
	_ = c.Close() // the descriptor: the connection lives on in ours
	return s
}

// Read waits for bytes. It returns io.EOF at the end, net.ErrClosed after Close.
func (c *Conn) Read(p []byte) (int, error) {
	if !c.begin() {
		return 0, net.ErrClosed
	}
	defer c.end()
	for len(p) > 0 {
		if !c.full {
			if _, err := unix.Poll(c.poll[:], -1); err != nil && !errors.Is(err, unix.EINTR) {
				return 0, err
			}
		}
		n, err := unix.Read(c.fd, p)
		c.full = err == nil && n == len(p)
		switch {
		case n > 0:
			return n, nil
		case c.refs.Load()&closedBit != 0:
			return 0, net.ErrClosed
		case err == nil:
			return 0, io.EOF
		case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR):
			return 0, err
		}
	}
	return 0, nil
}

// Close ends the connection, both ways, and a Read that waits. It may be called
// more than once.
func (c *Conn) Close() error {
	if c.refs.Or(closedBit)&closedBit != 0 {
		return nil
	}
	// The descriptor itself goes when its last user is done with it: until then
	// its number must not name another file.
	err := unix.Shutdown(c.fd, unix.SHUT_RDWR)
	c.end()
	if errors.Is(err, unix.ENOTCONN) {
		return nil // the peer was faster
	}
	return err
}

func (c *Conn) begin() bool {
	if c.refs.Add(1)&closedBit != 0 {
		c.end()
		return false
	}
	return true
}

func (c *Conn) end() {
	if c.refs.Add(-1) == closedBit {
		_ = unix.Close(c.fd)
		threads.give()
	}
}

const (
	// connsMax is how many Conns there are at a time in a process: a cluster has
	// a few nodes, and each links to all others. Take refuses what is beyond.
	connsMax = 16
	// spareProcs are for those who wait in other system calls, in an fsync say.
	spareProcs = 4
)

// threads counts the Conns of the process.
var threads threadCount

type threadCount struct {
	mu    sync.Mutex
	live  int
	procs int // GOMAXPROCS before the first Conn; 0: there was none yet
}

// take counts one more and sees that there are processors for all; false when
// there are too many already. GOMAXPROCS does not fall again: to change it stops
// the world for a moment.
func (t *threadCount) take() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.live == connsMax {
		return false
	}
	t.live++
	if t.procs == 0 {
		t.procs = runtime.GOMAXPROCS(0)
	}
	if need := t.procs + t.live + spareProcs; need > runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(need)
	}
	return true
}

func (t *threadCount) give() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.live--
}
