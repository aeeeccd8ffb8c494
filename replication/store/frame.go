package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/blockstep/blockstep/internal/vfs"
)

// A frame is what a slot holds: a header and a body, under one CRC.
//
//	 0  magic       8 bytes: what the body is
//	 8  version     uint32
//	12  CRC-32C     uint32, over bytes 0 to 11 and 16 to the end of the body
//	16  generation  uint64: the newest of the slots counts
//	24  length      uint64 of the body, bytes
//	32  the body
//
// Magic, version, CRC and length keep their places in every version.
const frameHeaderSize = 32

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errEmpty is a slot that was never written.
var errEmpty = errors.New("slot is empty")

// sealFrame fills the header of b, whose body stands behind it already.
func sealFrame(b []byte, magic [8]byte, version uint32, generation uint64) {
	le := binary.LittleEndian
	copy(b, magic[:])
	le.PutUint32(b[8:], version)
	le.PutUint64(b[16:], generation)
	le.PutUint64(b[24:], uint64(len(b)-frameHeaderSize))
	le.PutUint32(b[12:], frameCRC(b))
}

func frameCRC(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:12], castagnoli), castagnoli, b[16:])
}

// openFrame verifies the frame at the beginning of b. The body is part of b.
// A length beyond b is judged before anything is read or made with it.
func openFrame(b []byte, magic [8]byte, version uint32) (body []byte, generation uint64, err error) {
	if len(b) < frameHeaderSize {
		if allZero(b) {
			return nil, 0, errEmpty
		}
		return nil, 0, fmt.Errorf("%w: %d bytes, a slot has at least %d", ErrCorrupt, len(b), frameHeaderSize)
	}
	if allZero(b[:frameHeaderSize]) {
		return nil, 0, errEmpty
	}
	if [8]byte(b[:8]) != magic {
		return nil, 0, fmt.Errorf("%w: begins with %q, expected %q", ErrCorrupt, b[:8], magic[:])
	}
	le := binary.LittleEndian
	n := le.Uint64(b[24:])
	if n > uint64(len(b)-frameHeaderSize) {
		return nil, 0, fmt.Errorf("%w: claims %d bytes, there are %d", ErrCorrupt, n, len(b)-frameHeaderSize)
	}
	b = b[:frameHeaderSize+n]
	if got, want := le.Uint32(b[12:]), frameCRC(b); got != want {
		return nil, 0, fmt.Errorf("%w: CRC %08x, expected %08x", ErrCorrupt, got, want)
	}
	if v := le.Uint32(b[8:]); v > version {
		return nil, 0, fmt.Errorf("%w: version %d, this version reads %d", ErrNewer, v, version)
	} else if v < version {
		return nil, 0, fmt.Errorf("%w: version %d was never written", ErrCorrupt, v)
	}
	return b[frameHeaderSize:], le.Uint64(b[16:]), nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// readSlot reads up to max bytes of a file.
func readSlot(f vfs.File, off, maxBytes int64) ([]byte, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if n := size - off; n < maxBytes {
		maxBytes = max(n, 0)
	}
	b := make([]byte, maxBytes)
	n, err := f.ReadAt(b, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:n], nil
}
