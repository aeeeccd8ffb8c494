package sock

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// BriefMax is the most bytes that a call moves which the runtime is not told of:
// while it goes on, its processor is nobody else's, and nothing stops the world.
const BriefMax = 16 << 10

// Brief returns c so that its small reads and writes do not wake the runtime's
// monitor, which a system call does in a process that is idle: the monitor then
// looks every 20 µs for some rounds, and a message each few hundredths of a second
// cost more in it than for itself. It is for connections whose messages are few
// and small. A c without a descriptor is returned as it is.
func Brief(c net.Conn) net.Conn {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return c
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return c
	}
	return &brief{Conn: c, raw: raw}
}

type brief struct {
	net.Conn
	raw syscall.RawConn // of Conn: it waits by the runtime's poller, and knows Conn's deadlines
}

// Read implements net.Conn.
func (b *brief) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	p = p[:min(len(p), BriefMax)]
	var n int
	var errno unix.Errno
	err := b.raw.Read(func(fd uintptr) bool {
		n, errno = recvNow(int(fd), p)
		return errno != unix.EAGAIN
	})
	switch {
	case err != nil || errno != 0:
		return 0, b.error("read", err, errno)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// Write implements net.Conn.
func (b *brief) Write(p []byte) (int, error) {
	if len(p) > BriefMax {
		return b.Conn.Write(p)
	}
	done := 0
	var errno unix.Errno
	err := b.raw.Write(func(fd uintptr) bool {
		for done < len(p) {
			var n int
			if n, errno = sendNow(int(fd), p[done:]); errno != 0 {
				return errno != unix.EAGAIN
			}
			done += n
		}
		return true
	})
	if err != nil || errno != 0 {
		return done, b.error("write", err, errno)
	}
	return done, nil
}

// error is worded as that of an ordinary connection.
func (b *brief) error(op string, err error, errno unix.Errno) error {
	e := &net.OpError{Op: op, Net: b.LocalAddr().Network(), Source: b.LocalAddr(), Addr: b.RemoteAddr(), Err: os.NewSyscallError(op, errno)}
	var raw *net.OpError
	if errors.As(err, &raw) {
		e.Err = raw.Err
	} else if err != nil {
		e.Err = err
	}
	return e
}

// recvNow is recvfrom(2) that does not wait, and that the runtime is not told of.
func recvNow(fd int, p []byte) (int, unix.Errno) {
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			return int(n), 0
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// sendNow is sendto(2) likewise.
func sendNow(fd int, p []byte) (int, unix.Errno) {
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		switch errno {
		case 0:
			return int(n), 0
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// Writev is writev(2) to a socket, which does not wait; the runtime is not told
// of it if bytes, which iov holds in all, are at most BriefMax.
func Writev(fd uintptr, iov []unix.Iovec, bytes int) (int, unix.Errno) {
	for {
		var n uintptr
		var errno unix.Errno
		if bytes <= BriefMax {
			n, _, errno = unix.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
		} else {
			n, _, errno = unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
		}
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// pollNow is ppoll(2) likewise; zero is zero, and may be written to.
func pollNow(fds []unix.PollFd, zero *unix.Timespec) (int, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(unsafe.SliceData(fds))), uintptr(len(fds)), uintptr(unsafe.Pointer(zero)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
