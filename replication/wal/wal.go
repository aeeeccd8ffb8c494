// Package wal is the durable, segmented log of one volume's replica (design
// section 2). The bytes are described in docs/format/wal.md.
//
// # Use
//
// One goroutine, the volume's loop, calls the methods that change the log:
// Append, Truncate, TrimTo, Reset and Close. Sync, Read, ReadPayload, Scan and
// the accessors may be called by any goroutine at any time.
//
// # What survives
//
// What Append has written survives the death of the process. What Sync has
// reported survives a power cut. A write or an fsync that fails leaves the log
// failed for ever: the kernel may have dropped the dirty pages, so no later
// call can prove anything, and none is made.
package wal

import (
	"errors"

	"github.com/blockstep/blockstep/internal/ident"
)

// The errors. Each is returned wrapped, with what was found and where.
var (
	// ErrCorrupt is returned when bytes that were durable do not verify. The
	// replica must be resynced under a new id.
	ErrCorrupt = errors.New("log is corrupt")
	// ErrNewer is returned when a segment was written by a newer version.
	ErrNewer = errors.New("log was written by a newer version of blockstep")
	// ErrFailed is returned by every change after one that failed.
	ErrFailed = errors.New("log has failed and stays failed")
	// ErrTrimmed is returned when the entries asked for are no longer in the log.
	ErrTrimmed = errors.New("entries are no longer in the log")
	// ErrNoLog is returned by Open when the directory holds no log.
	ErrNoLog = errors.New("no log here")
	// ErrExists is returned by Create when the directory holds a log already.
	ErrExists = errors.New("a log is here already")
	// ErrForeign is returned by Open when the log is of another volume or
	// replica.
	ErrForeign = errors.New("log belongs to another replica")
	// ErrInvalid is returned when an argument breaks the rules of the log (a
	// seq that does not follow, an epoch that falls); nothing was changed.
	ErrInvalid = errors.New("not a valid change of the log")
	// ErrClosed is returned after Close.
	ErrClosed = errors.New("log is closed")
)

// Options configure a log. The zero value of a field means its default.
type Options struct {
	Volume  ident.Volume  // of the log; Open refuses another one's
	Replica ident.Replica // likewise

	// SegmentBytes is the size of a segment file, 16 MiB by default. An entry
	// that does not fit gets a larger segment of its own.
	SegmentBytes int64
	// RetentionBytes is how much of the newest log TrimTo keeps although it is
	// no longer needed, for peers that are away for a short time; 256 MiB by
	// default, and none when it is negative.
	RetentionBytes int64
	// SpareBytes is how much of trimmed segments is kept to be used again, 32
	// MiB by default. It should cover what one TrimTo gives back: a new file has
	// to be made, and its blocks are slower to write and to fsync than those of
	// one that was written before.
	SpareBytes int64
	// DurableFloor is a seq that the caller knows to have been durable (0:
	// unknown). Open returns ErrCorrupt for a log that ends below it.
	DurableFloor ident.Seq
	// VerifyAfter spares Open the payloads of entries at or below it, which the
	// backing store holds already; their headers are always verified, and Read
	// verifies every payload that it returns.
	VerifyAfter ident.Seq

	// Inline makes the log do its housekeeping (preparing and recycling
	// segments) inside Append and TrimTo rather than in a goroutine, so that a
	// simulation replays exactly.
	Inline bool
	// NewID returns a random number; nil means crypto/rand. For simulations.
	NewID func() uint64
}

// Recovery is what Open found.
type Recovery struct {
	Base    ident.Position     // just before the first entry
	Last    ident.Position     // of the last entry; Base when there is none
	History []ident.EpochStart // of the entries, with the epoch of Base first
	// Durable is the highest durable position that the records themselves
	// name: all of it was found. What lies behind it survived by luck; Open
	// has fsynced it again.
	Durable  ident.Seq
	CutBytes int64 // bytes of records that did not verify and were cut
}
