package peer

import (
	"io"
	"net"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/blockstep/blockstep/internal/sock"
)

// writer puts a round on a connection. It is for one goroutine at a time.
type writer struct {
	conn net.Conn
	raw  syscall.RawConn // nil if the connection has none: then nothing is written without blocking
	call func(fd uintptr) bool

	// Arguments and results of call, which is made once so that a write
	// allocates nothing.
	vec   [][]byte
	wait  bool
	n     int
	errno syscall.Errno
	iov   []unix.Iovec
}

func newWriter(conn net.Conn) *writer {
	w := &writer{conn: conn}
	if c, ok := conn.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			w.raw = raw
			w.iov = make([]unix.Iovec, 0, 64)
			w.call = w.writev
		}
	}
	return w
}

// tune sets what a link wants of its socket. A socket that lacks an option
// (a unix socket in a test) still carries the link.
func (w *writer) tune(lost time.Duration) {
	if w.raw == nil {
		return
	}
	_ = w.raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(lost.Milliseconds()))
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, notSentBytes)
	})
}

// try writes as much of r as the socket takes at once. It returns nil also
// when that is not all.
func (w *writer) try(r *round) error {
	if w.raw == nil {
		return nil
	}
	return w.write(r, false)
}

// finish writes all of r, and waits for the socket.
func (w *writer) finish(r *round) error {
	if w.raw != nil {
		return w.write(r, true)
	}
	for !r.done() {
		n, err := w.conn.Write(r.vec[r.at])
		r.advance(n)
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) write(r *round, wait bool) error {
	for !r.done() {
		w.vec, w.wait = r.vec[r.at:], wait
		w.n, w.errno = 0, 0
		err := w.raw.Write(w.call)
		w.vec = nil
		if err != nil {
			return err
		}
		switch {
		case w.errno == unix.EAGAIN:
			return nil
		case w.errno != 0:
			return os.NewSyscallError("writev", w.errno)
		case w.n == 0:
			return io.ErrUnexpectedEOF
		}
		r.advance(w.n)
	}
	return nil
}

// writev is called by the runtime with the descriptor locked against closing.
// It returns false to be called again when the socket is writable.
func (w *writer) writev(fd uintptr) bool {
	w.iov = w.iov[:0]
	bytes := 0
	for _, part := range w.vec[:min(len(w.vec), iovecMax)] {
		v := unix.Iovec{Base: unsafe.SliceData(part)}
		v.SetLen(len(part))
		w.iov = append(w.iov, v)
		bytes += len(part)
	}
	w.n, w.errno = sock.Writev(fd, w.iov, bytes)
	return w.errno != unix.EAGAIN || !w.wait
}
