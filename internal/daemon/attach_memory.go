package daemon

import (
	"log/slog"
	"syscall"

	"golang.org/x/sys/unix"
)

// serveOwnHost makes this process fit to serve a device of its own host. When
// memory is short the kernel writes dirty pages to that device to free some, so
// the path from there to the answer must not wait for memory itself:
//
//   - PR_SET_IO_FLUSHER on every thread (new ones inherit it): allocations in
//     the kernel on our behalf do not wait for write-back, and our own writes to
//     files are not throttled because of the dirty pages that we are to clean.
//   - Memory that was touched stays in memory. MCL_ONFAULT: Go reserves far more
//     address space than it uses.
//
// What is missing is logged and no reason to refuse: a host with enough memory
// never notices.
func serveOwnHost(logger *slog.Logger) {
	const next = "run blockstepd by its unit, which grants CAP_SYS_RESOURCE and LimitMEMLOCK=infinity"
	// A cgo build has threads that the runtime does not know: it refuses.
	if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0, 0); errno != 0 {
		logger.Warn("the process is not marked as an I/O flusher: under memory pressure a device of this host may hang", "err", errno, "next", next)
	}
	if !mayLock() {
		logger.Warn("memory is not locked: under memory pressure a device of this host may be slow", "next", next)
		return
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		logger.Warn("memory is not locked: under memory pressure a device of this host may be slow", "err", err, "next", next)
	}
}

// mayLock reports whether all of the process's memory may be locked. With a
// limit, MCL_FUTURE would make a later mmap of the runtime fail, which ends it.
func mayLock() bool {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err == nil && limit.Cur == unix.RLIM_INFINITY {
		return true
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[0].Effective&(1<<unix.CAP_IPC_LOCK) != 0
}
