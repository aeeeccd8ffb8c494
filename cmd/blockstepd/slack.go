package main

import (
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// timerSlack is how late the kernel may be with a short sleep. The monitor of
	// Go's runtime sleeps 20 µs at a time while the process is busy, and where a
	// wake-up is dear that costs a tenth of the daemon's work and more. Nothing of
	// ours is timed that finely: the runtime rounds its timers to milliseconds.
	timerSlack = time.Millisecond
	// timerSlackDefault is what Linux gives init, and everybody inherits.
	timerSlackDefault = 50 * time.Microsecond
)

// slacken sets the slack of all threads. A thread has it from the one that made
// it, and the monitor is made before main: so the process executes itself anew,
// which keeps its pid and its slack. A slack that somebody has chosen, such as
// the unit's TimerSlackNSec=, stays. Where it fails the daemon runs all the same.
func slacken() {
	have, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil || time.Duration(have) != timerSlackDefault {
		return
	}
	exe, err := os.Executable()
	if err != nil {
		return
	}
	runtime.LockOSThread() // the thread that executes is the one that is left
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(timerSlack), 0, 0, 0); err != nil {
		return
	}
	_ = unix.Exec(exe, os.Args, os.Environ())
}
