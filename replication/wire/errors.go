package wire

import "errors"

var (
	// ErrMalformed is returned when bytes are not what any version of this
	// protocol would send: the link is closed, for nothing after them can be
	// trusted.
	ErrMalformed = errors.New("wire: malformed frame")
	// ErrChecksum is returned when a frame or a payload does not have its
	// CRC-32C.
	ErrChecksum = errors.New("wire: checksum mismatch")
	// ErrNewer is returned for bytes of a version that this build does not
	// know. They are not corrupt: upgrade this node.
	ErrNewer = errors.New("wire: written by a newer version")
	// ErrLimit is returned by the encoder for a message that exceeds a limit of
	// this package, and by the decoder for a length that does.
	ErrLimit = errors.New("wire: beyond a limit")
)
