package nbd

import (
	"context"
	"errors"
	"syscall"
)

// The errors that a Session and Exports may answer with, wrapped or not. What
// is none of these, and no errno that the protocol knows, becomes EIO.
var (
	// ErrNoExport is returned when no export has the name.
	ErrNoExport = errors.New("no such export: list those that are there with `nbdinfo --list`")
	// ErrRange is returned when an extent reaches beyond the end of the export.
	ErrRange = errors.New("beyond the end of the export")
	// ErrNoSpace is returned when the backing store is full.
	ErrNoSpace = errors.New("no space left: free space in the file system of the backing store")
	// ErrReadOnly is returned when a change is asked of a read-only export.
	ErrReadOnly = errors.New("the export is read-only")
	// ErrIO is returned when a disk failed, or I/O was given up.
	ErrIO = errors.New("input/output error")
	// ErrInvalid is returned when a request makes no sense.
	ErrInvalid = errors.New("invalid request")
	// ErrUnsupported is returned when a request cannot be served here, or,
	// for a fast zero, not fast.
	ErrUnsupported = errors.New("not supported")
	// ErrShutdown is returned when the server is stopping.
	ErrShutdown = errors.New("the server is shutting down")
	// ErrSessionLost is returned when the session cannot go on, because what
	// the client believes to have written may be gone, or because it was fenced. The request is answered
	// with ESHUTDOWN and the connection ends.
	ErrSessionLost = errors.New("the session has ended: connect again")
	// ErrTooLarge is returned when a request is larger than the server takes.
	ErrTooLarge = errors.New("the request is too large: see the block sizes that the server advertises")
	// ErrNoMemory is returned when a limit on memory refuses the request.
	ErrNoMemory = errors.New("out of memory")
)

// errnoOf is the one place where an error becomes a value on the wire. A write
// beyond the end is ENOSPC and any other request there EINVAL (proto.md, Error
// values).
func errnoOf(err error, op Op) uint32 {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, ErrRange):
		if op == OpWrite || op == OpZero {
			return nbdENOSPC
		}
		return nbdEINVAL
	case errors.Is(err, ErrNoSpace):
		return nbdENOSPC
	case errors.Is(err, ErrReadOnly):
		return nbdEPERM
	case errors.Is(err, ErrInvalid), errors.Is(err, ErrNoExport):
		return nbdEINVAL
	case errors.Is(err, ErrUnsupported):
		// ENOTSUP is for a fast zero alone; elsewhere it may confuse a client.
		if op == OpZero {
			return nbdENOTSUP
		}
		return nbdEINVAL
	case errors.Is(err, ErrSessionLost), errors.Is(err, ErrShutdown):
		return nbdESHUTDOWN
	case errors.Is(err, ErrTooLarge):
		return nbdEOVERFLOW
	case errors.Is(err, ErrNoMemory):
		return nbdENOMEM
	case errors.Is(err, ErrIO), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return nbdEIO
	}
	var no syscall.Errno
	if !errors.As(err, &no) {
		return nbdEIO
	}
	switch no {
	case syscall.EPERM, syscall.EROFS, syscall.EACCES:
		return nbdEPERM
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return nbdENOSPC
	case syscall.EINVAL:
		return nbdEINVAL
	case syscall.ENOMEM:
		return nbdENOMEM
	}
	return nbdEIO
}
