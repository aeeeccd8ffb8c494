// Package boottime reads CLOCK_BOOTTIME without a system call. Leases are
// measured by it, so it is read several times a request, and Go's runtime has no
// vDSO call for it: where system calls are dear (2 µs on some virtual machines)
// that was a third of what a read cost.
//
// CLOCK_BOOTTIME is CLOCK_MONOTONIC plus the time that the machine has been
// suspended. A suspend moves CLOCK_REALTIME on by as much, but CLOCK_MONOTONIC
// not at all; both of these the runtime reads from the vDSO. So as long as the
// difference between the two is what it was, no suspend has come between, and what
// has to be added is what it was. (Only a wall clock that is set back by what a
// suspend took, to within slop, would hide one, and not for longer than lookEvery.)
package boottime

import (
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// slop is how much the difference between wall and monotonic clock may move
	// before the system call is made: they are read one after the other.
	slop = int64(20 * time.Microsecond)
	// lookEvery is how long a reading is trusted at most.
	lookEvery = int64(100 * time.Millisecond)
	// bracketMax is how far apart two readings of the monotonic clock may be for
	// the one of CLOCK_BOOTTIME between them to count.
	bracketMax = int64(20 * time.Microsecond)
	// triesMax bounds the attempts at such a reading, on a machine that is too
	// busy for it.
	triesMax = 8
)

// Now returns the host's CLOCK_BOOTTIME in nanoseconds, at most bracketMax
// behind it.
func Now() int64 { return host.read() }

var host = newClock(hostTimes(), bootTime)

// clock derives boot time from the other two.
type clock struct {
	times func() (mono, wall int64) // vDSO
	boot  func() int64              // system call

	// offset is what is added to mono. It only grows, and is never more than
	// the truth: so a reading is never ahead of the clock.
	offset atomic.Int64
	// skew is wall - mono at some moment, looked is mono then. offset knows of
	// every suspend before that moment, since it is stored first and skew is
	// measured before it.
	skew   atomic.Int64
	looked atomic.Int64
}

func newClock(times func() (mono, wall int64), boot func() int64) *clock {
	c := &clock{times: times, boot: boot}
	mono, _ := times()
	c.offset.Store(boot() - mono - lookEvery) // far behind, until the first look
	c.looked.Store(mono - 2*lookEvery)
	return c
}

func (c *clock) read() int64 {
	mono, wall := c.times()
	d := wall - mono - c.skew.Load()
	if d > slop || d < -slop || mono-c.looked.Load() > lookEvery {
		return c.look(mono, wall)
	}
	return mono + c.offset.Load()
}

// look makes the system call, and remembers what it says.
func (c *clock) look(mono, wall int64) int64 {
	before := mono
	for range triesMax {
		boot := c.boot()
		after, _ := c.times()
		if after-before > bracketMax {
			before = after
			continue
		}
		// The truth is between boot-after and boot-before.
		for least := boot - after; ; {
			have := c.offset.Load()
			if have >= least || c.offset.CompareAndSwap(have, least) {
				break
			}
		}
		c.skew.Store(wall - mono)
		c.looked.Store(mono)
		return after + c.offset.Load()
	}
	return c.boot()
}

// hostTimes reads both clocks by one call of the runtime.
func hostTimes() func() (mono, wall int64) {
	base := time.Now()
	return func() (int64, int64) {
		now := time.Now()
		return int64(now.Sub(base)), now.UnixNano()
	}
}

func bootTime() int64 {
	var ts unix.Timespec
	// It cannot fail: the clock exists since Linux 2.6.39. It does not block, so the
	// runtime need not be told, which would wake its monitor thread in an idle process.
	_, _, _ = unix.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_BOOTTIME, uintptr(unsafe.Pointer(&ts)), 0)
	return ts.Nano()
}
