// Package sock reads a busy socket by a thread of its own. Go's poller wakes a
// thread that waits in epoll, which finds out whose bytes they are, wakes the
// goroutine, and mostly another thread that looks for more work; at one small
// message at a time that costs more than the message. The reader of a Conn that is
// busy waits in read(2) for its own socket, and goes on where it stood: one system
// call and one wake-up a message, and it keeps its processor while it waits.
//
// It costs a thread for each Conn whose reader waits, so it is for connections
// that are few; and one of the scheduler's processors, which such a thread keeps
// for up to 10 ms. When none is left, whoever comes back from a system call waits
// until the runtime's monitor takes one away from somebody, which may be 10 ms
// later. So GOMAXPROCS rises with the number of Conns: those who wait need none of
// the machine's.
//
// The monitor looks every 20 µs for as long as a processor was taken away, or kept
// by who waits, a moment ago: where a wake-up is dear that costs as much as the
// work. So a reader that is busy lets others have its processor before the monitor
// would take it, and the monitor soon looks every 10 ms only. And a reader that is
// not busy waits by Go's poller as any other does: it keeps nothing.
package sock

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/blockstep/blockstep/internal/yield"
)

// closedBit marks a Conn whose Close has been called; below it is counted who
// uses the descriptor.
const closedBit = 1 << 32

const (
	// keepFor is how long a busy reader goes on without a turn of the scheduler,
	// and readFor how long it waits in one read, which the kernel rounds up to its
	// ticks of up to 4 ms: together less than the monitor's 10 ms.
	keepFor = 4 * time.Millisecond
	readFor = 4 * time.Millisecond
	// A reader is busy once busyReads reads have come with no more than busyGap
	// between two of them, and until one is idleGap late.
	busyReads = 16
	busyGap   = 5 * time.Millisecond
	idleGap   = 20 * time.Millisecond
	// quietMax is the most that a reader which is not busy takes without telling the
	// runtime: some 50 µs, and what it reads most often, so that it is soon known
	// to be busy.
	quietMax = 256 << 10
)

// Use says what a Conn is for: there is a limit for each.
type Use int

// The uses.
const (
	Link   Use = iota // between two nodes: only read from, by somebody who waits until the end
	Client            // of a server: read and written, with deadlines
	uses
)

// Conn is a TCP or unix connection that Take has taken out of the runtime's
// poller. One goroutine reads at a time; any may Close, and set the deadline of a
// Client.
type Conn struct {
	fd   int
	use  Use
	refs atomic.Int64 // users, Close's own included; closedBit
	full bool         // the last read took all there was room for: there may be more
	busy bool         // the descriptor blocks, for readFor

	// What a wait is for: the socket, and for a Client an eventfd that ends the
	// wait, since a deadline may be set from elsewhere.
	poll     [2]unix.PollFd
	deadline atomic.Int64 // of reads, Unix nanoseconds; 0: none

	// What Go's poller knows of the Conn: an epoll that has what poll has, while
	// the reader is not busy. So the socket itself is no longer the runtime's.
	idle  *os.File
	quiet syscall.RawConn // of idle
	ready func(fd uintptr) bool

	// The reader's.
	zero   unix.Timespec // ppoll(2) may write to it
	armed  bool          // idle has the socket
	turn   time.Time     // when others last had its processor
	last   time.Time     // when there was something to read
	streak int           // of reads that came close together
}

// Take takes the connection over from c, which it closes. It returns nil, and
// leaves c alone, when c is no socket or there are enough Conns of that use
// already. The caller is the only user of c, but for such as may close it at any
// moment.
func Take(c net.Conn, use Use) *Conn {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil || !threads.take(use) {
		return nil
	}
	s := &Conn{fd: -1, use: use}
	s.refs.Store(1)
	s.poll[1].Fd = -1
	err = raw.Control(func(old uintptr) {
		if dup, err := unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			s.fd = dup
		}
	})
	if err == nil && s.fd >= 0 {
		err = s.open()
	}
	if err != nil || s.fd < 0 {
		s.release()
		return nil
	}
	// The runtime's poller would go on waking a thread for each message.
	_ = c.Close() // the descriptor: the connection lives on in ours
	return s
}

// open makes what the reader waits by.
func (c *Conn) open() error {
	c.poll[0] = unix.PollFd{Fd: int32(c.fd), Events: unix.POLLIN}
	if c.use == Client {
		wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return err
		}
		c.poll[1] = unix.PollFd{Fd: int32(wake), Events: unix.POLLIN}
	}
	timeout := unix.NsecToTimeval(int64(readFor))
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return err
	}
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return err
	}
	c.idle = os.NewFile(uintptr(fd), "epoll")
	if c.quiet, err = c.idle.SyscallConn(); err != nil {
		return err
	}
	c.ready = func(uintptr) bool {
		n, err := c.look()
		return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
	}
	if c.use == Client {
		return c.watch(unix.EPOLL_CTL_ADD, c.poll[1].Fd)
	}
	return nil
}

// watch adds a descriptor to those that Go's poller knows of, or takes it out.
func (c *Conn) watch(op int, fd int32) error {
	var err error
	cerr := c.quiet.Control(func(ep uintptr) {
		err = unix.EpollCtl(int(ep), op, int(fd), &unix.EpollEvent{Events: unix.EPOLLIN, Fd: fd})
	})
	return errors.Join(err, cerr)
}

// Read waits for bytes. It returns io.EOF at the end, net.ErrClosed after Close,
// os.ErrDeadlineExceeded after the deadline.
func (c *Conn) Read(p []byte) (int, error) { return c.read(p, 0) }

// ReadMost reads as Read does, but may wait for a moment so that p is filled.
func (c *Conn) ReadMost(p []byte) (int, error) { return c.read(p, unix.MSG_WAITALL) }

func (c *Conn) read(p []byte, flags int) (int, error) {
	if !c.begin() {
		return 0, net.ErrClosed
	}
	defer c.end()
	for len(p) > 0 {
		if err := c.prepare(); err != nil {
			return 0, err
		}
		n, errno := c.recv(p, flags)
		if n > 0 && c.busy && !c.full {
			c.came()
		}
		c.full = n == len(p)
		switch {
		case n > 0:
			return n, nil
		case c.refs.Load()&closedBit != 0:
			return 0, net.ErrClosed
		case errno == 0:
			return 0, io.EOF
		case errno == unix.EAGAIN:
			if c.busy && time.Since(c.last) > idleGap {
				c.streak = 0
			}
		case errno != unix.EINTR:
			return 0, os.NewSyscallError("recvfrom", errno)
		}
	}
	return 0, nil
}

// recv is recvfrom(2) without an address.
func (c *Conn) recv(p []byte, flags int) (int, unix.Errno) {
	if !c.busy && flags == 0 && len(p) <= quietMax {
		return recvNow(c.fd, p)
	}
	n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(c.fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), uintptr(flags), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// prepare makes the next read one that waits, when the reader is busy, or else
// waits itself until there is something to read, or the connection is closed.
func (c *Conn) prepare() error {
	busy := c.streak >= busyReads && c.deadline.Load() == 0
	if busy != c.busy {
		if err := unix.SetNonblock(c.fd, !busy); err != nil {
			return err
		}
		c.busy = busy
	}
	if !busy {
		if c.full && c.deadline.Load() == 0 {
			return nil
		}
		return c.wait()
	}
	if c.armed {
		if err := c.watch(unix.EPOLL_CTL_DEL, c.poll[0].Fd); err != nil {
			return err
		}
		c.armed = false
	}
	if now := time.Now(); now.Sub(c.turn) >= keepFor {
		c.turn = now
		yield.Turn()
	}
	return nil
}

// wait returns when the socket can be read, or the connection is closed.
func (c *Conn) wait() error {
	for {
		left := time.Duration(-1)
		if d := c.deadline.Load(); d != 0 {
			if left = time.Until(time.Unix(0, d)); left <= 0 {
				return os.ErrDeadlineExceeded
			}
		}
		n, err := c.waitQuiet(left)
		switch {
		case c.refs.Load()&closedBit != 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case n > 0 && c.poll[1].Revents != 0:
			var b [8]byte
			_, _ = unix.Read(int(c.poll[1].Fd), b[:]) // it only wakes: the deadline says why
		case n > 0:
			c.came()
			return nil
		}
	}
}

// waitQuiet waits by Go's poller. There may be nothing when it returns.
func (c *Conn) waitQuiet(left time.Duration) (int, error) {
	if !c.armed {
		if err := c.watch(unix.EPOLL_CTL_ADD, c.poll[0].Fd); err != nil {
			return 0, err
		}
		c.armed = true
	}
	if c.use == Client {
		var until time.Time
		if left >= 0 {
			until = time.Now().Add(left)
		}
		if err := c.idle.SetReadDeadline(until); err != nil {
			return 0, err
		}
	}
	if err := c.quiet.Read(c.ready); err != nil {
		return 0, err
	}
	return c.look()
}

// came notes that there is something to read.
func (c *Conn) came() {
	now := time.Now()
	switch gap := now.Sub(c.last); {
	case gap <= busyGap:
		c.streak = min(c.streak+1, busyReads)
	case gap > idleGap || c.streak < busyReads:
		c.streak = 0
	}
	c.last = now
}

// look polls without waiting.
func (c *Conn) look() (int, error) {
	fds := c.poll[:1]
	if c.use == Client {
		fds = c.poll[:]
	}
	return pollNow(fds, &c.zero)
}

// SetReadDeadline bounds a Client's Read, the present one too; a zero time takes
// the bound away.
func (c *Conn) SetReadDeadline(t time.Time) error {
	if !c.begin() {
		return net.ErrClosed
	}
	defer c.end()
	d := int64(0)
	if !t.IsZero() {
		d = t.UnixNano()
	}
	c.deadline.Store(d)
	_, err := unix.Write(int(c.poll[1].Fd), []byte{1, 0, 0, 0, 0, 0, 0, 0})
	return err
}

// CloseWrite ends the sending direction.
func (c *Conn) CloseWrite() error {
	if !c.begin() {
		return net.ErrClosed
	}
	defer c.end()
	return unix.Shutdown(c.fd, unix.SHUT_WR)
}

// Raw gives access to the descriptor. Whether it blocks changes: who writes says
// MSG_DONTWAIT.
func (c *Conn) Raw() syscall.RawConn { return (*raw)(c) }

// raw is a Conn as the runtime would show it; it is read by Conn.Read alone.
type raw Conn

// Control calls f with the descriptor.
func (r *raw) Control(f func(fd uintptr)) error {
	c := (*Conn)(r)
	if !c.begin() {
		return net.ErrClosed
	}
	defer c.end()
	f(uintptr(c.fd))
	return nil
}

// Write calls f until it returns true, each time that there may be room.
func (r *raw) Write(f func(fd uintptr) (done bool)) error {
	c := (*Conn)(r)
	if !c.begin() {
		return net.ErrClosed
	}
	defer c.end()
	for !f(uintptr(c.fd)) {
		fds := []unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLOUT}}
		if _, err := unix.Ppoll(fds, nil, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if c.refs.Load()&closedBit != 0 {
			return net.ErrClosed
		}
	}
	return nil
}

// Read is not for use.
func (r *raw) Read(func(fd uintptr) (done bool)) error { return errors.ErrUnsupported }

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

// begin counts one more user, but none once it is closed: the last one that ends
// gives the descriptor back, and that happens once.
func (c *Conn) begin() bool {
	for {
		n := c.refs.Load()
		if n&closedBit != 0 {
			return false
		}
		if c.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (c *Conn) end() {
	if c.refs.Add(-1) == closedBit {
		c.release()
	}
}

// release gives back what Take has taken.
func (c *Conn) release() {
	if c.idle != nil {
		_ = c.idle.Close()
	}
	for _, fd := range []int{c.fd, int(c.poll[1].Fd)} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	threads.give(c.use)
}

const (
	// linksMax is how many links there are at a time in a process: a cluster has
	// a few nodes, and each links to all others. Take refuses what is beyond.
	linksMax = 16
	// clientsMax is how many clients have threads: with more of them busy at a
	// time, the runtime's poller finds several ready at once and is the cheaper.
	clientsMax = 8
	// spareProcs are for those who wait in other system calls, in an fsync say.
	spareProcs = 4
)

// threads counts the Conns of the process.
var threads threadCount

type threadCount struct {
	mu    sync.Mutex
	live  [uses]int
	procs int // GOMAXPROCS before the first Conn; 0: there was none yet
}

// most returns how many Conns of a use there may be.
func (u Use) most() int {
	if u == Client {
		return clientsMax
	}
	return linksMax
}

// take counts one more and sees that there are processors for all; false when
// there are too many already. GOMAXPROCS does not fall again: to change it stops
// the world for a moment.
func (t *threadCount) take(use Use) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.live[use] == use.most() {
		return false
	}
	t.live[use]++
	if t.procs == 0 {
		t.procs = runtime.GOMAXPROCS(0)
	}
	if need := t.procs + t.live[Link] + t.live[Client] + spareProcs; need > runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(need)
	}
	return true
}

func (t *threadCount) give(use Use) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.live[use]--
}
