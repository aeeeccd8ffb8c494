// Package eventfd wakes a goroutine that waits by a thread of its own (eventfd(2)).
// A channel's waiter is found by the scheduler, which wakes a thread for it, and
// that one, once it has found the goroutine, another to look for more work. Here it
// is one system call and one switch to the thread, which goes on where it stood.
//
// The waiter keeps one of the scheduler's processors for as long as it waits, so
// it waits only for what comes soon, for a few milliseconds, and few may at a time.
package eventfd

import (
	"encoding/binary"
	"errors"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// waitersMax is how many goroutines of the process wait at a time: half of the
// processors that are spare where internal/sock is in use.
const waitersMax = 2

var waiters atomic.Int32

// Event is set by any goroutine, and waited for by one at a time.
type Event struct {
	fd int
	// The waiter's: on its stack they would be allocated for each wait.
	poll    [1]unix.PollFd
	timeout unix.Timespec
	count   [8]byte
}

// one is what a Set adds.
var one = binary.NativeEndian.AppendUint64(nil, 1)

// New makes an event that is not set. It takes a file descriptor.
func New() (*Event, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return &Event{fd: fd, poll: [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}}, nil
}

// Set ends the present Wait, or the next.
func (e *Event) Set() {
	_, _ = unix.Write(e.fd, one) // fails only when it is set 2^64-2 times over
}

// Wait returns when the event is set, or after d: which of them it does not say. It
// returns false at once when too many wait already.
func (e *Event) Wait(d time.Duration) bool {
	defer waiters.Add(-1)
	if waiters.Add(1) > waitersMax {
		return false
	}
	e.timeout = unix.NsecToTimespec(int64(max(d, 0)))
	for {
		// A signal ends it too; timeout then says what is left.
		n, err := unix.Ppoll(e.poll[:], &e.timeout, nil)
		if n > 0 {
			_, _ = unix.Read(e.fd, e.count[:]) // takes all that was set
		}
		if !errors.Is(err, unix.EINTR) {
			return true
		}
	}
}

// Close gives the descriptor back. Nobody uses the event any more.
func (e *Event) Close() error { return os.NewSyscallError("close", unix.Close(e.fd)) }
