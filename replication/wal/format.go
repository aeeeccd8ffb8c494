package wal

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// The layout, as docs/format/wal.md draws it. All integers are little-endian.
const (
	// Version is the format that this code writes. It reads only this one.
	Version = 1

	segmentHeaderSize = 512 // one sector, so that it is never half written
	recordHeaderSize  = 128
	// recordAlign is where records may begin. It divides the sector, so no
	// record header is ever half written either: a cut is atomic.
	recordAlign = 128

	recordMagic = 0x31524c42 // "BLR1"
	// kindCut is the record that ends a branch: what stood at its place and
	// behind it was truncated. It is no entry and has no seq of its own.
	kindCut wire.Kind = 0xc7

	flagRoot = 1 << 0 // the log begins with this segment: older ones are void

	// payloadMax bounds an entry's payload: what an NBD client may send at
	// most, with room for the markers of later versions.
	payloadMax = 64 << 20
	// segmentSizeMax keeps an offset, in units of recordAlign, well inside 32
	// bits, and the time to search a segment short.
	segmentSizeMax = 1 << 30
)

var segmentMagic = [8]byte{'B', 'L', 'K', 'S', 'T', 'W', 'A', 'L'}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// segmentHeader is the first sector of a segment file.
type segmentHeader struct {
	id      uint64 // random, new at each use of the file
	ordinal uint64 // rises by one from segment to segment
	volume  ident.Volume
	replica ident.Replica
	base    ident.Position // of the entry before the segment's first
	durable ident.Seq      // known when the segment was begun
	prev    uint32         // CRC of the last record of the segment before
	gen     uint32         // cuts so far
	root    bool
	size    uint64 // bytes that the segment was made for
}

// encode writes the header into b and returns its CRC, with which the first
// record is chained.
func (h *segmentHeader) encode(b *[segmentHeaderSize]byte) uint32 {
	*b = [segmentHeaderSize]byte{}
	copy(b[0:8], segmentMagic[:])
	le := binary.LittleEndian
	le.PutUint32(b[8:], Version)
	le.PutUint64(b[16:], h.id)
	le.PutUint64(b[24:], h.ordinal)
	le.PutUint64(b[32:], uint64(h.volume))
	le.PutUint64(b[40:], uint64(h.replica))
	le.PutUint64(b[48:], uint64(h.base.Epoch))
	le.PutUint64(b[56:], uint64(h.base.Seq))
	le.PutUint64(b[64:], uint64(h.durable))
	le.PutUint32(b[72:], h.prev)
	le.PutUint32(b[76:], h.gen)
	if h.root {
		le.PutUint32(b[80:], flagRoot)
	}
	le.PutUint64(b[88:], h.size)
	crc := segmentCRC(b)
	le.PutUint32(b[12:], crc)
	return crc
}

// segmentCRC covers the whole sector but its own four bytes. It has its place
// and its reach in every version, so that newer can be told from corrupt.
func segmentCRC(b *[segmentHeaderSize]byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:12], castagnoli), castagnoli, b[16:])
}

// decodeSegmentHeader judges the first sector of a file. ok is false for a
// file that holds no segment: all zeroes.
func decodeSegmentHeader(b *[segmentHeaderSize]byte) (h segmentHeader, crc uint32, ok bool, err error) {
	if *b == ([segmentHeaderSize]byte{}) {
		return h, 0, false, nil
	}
	le := binary.LittleEndian
	if [8]byte(b[0:8]) != segmentMagic {
		return h, 0, false, fmt.Errorf("%w: segment begins with % x, expected % x", ErrCorrupt, b[0:8], segmentMagic)
	}
	crc = le.Uint32(b[12:])
	if want := segmentCRC(b); crc != want {
		return h, 0, false, fmt.Errorf("%w: segment header has CRC %08x, expected %08x", ErrCorrupt, crc, want)
	}
	if v := le.Uint32(b[8:]); v > Version {
		return h, 0, false, fmt.Errorf("%w: segment version %d, this version reads %d", ErrNewer, v, Version)
	} else if v < Version {
		return h, 0, false, fmt.Errorf("%w: segment version %d was never written", ErrCorrupt, v)
	}
	h = segmentHeader{
		id:      le.Uint64(b[16:]),
		ordinal: le.Uint64(b[24:]),
		volume:  ident.Volume(le.Uint64(b[32:])),
		replica: ident.Replica(le.Uint64(b[40:])),
		base:    ident.Position{Epoch: ident.Epoch(le.Uint64(b[48:])), Seq: ident.Seq(le.Uint64(b[56:]))},
		durable: ident.Seq(le.Uint64(b[64:])),
		prev:    le.Uint32(b[72:]),
		gen:     le.Uint32(b[76:]),
		root:    le.Uint32(b[80:])&flagRoot != 0,
		size:    le.Uint64(b[88:]),
	}
	if h.size < segmentHeaderSize || h.size > segmentSizeMax {
		return h, 0, false, fmt.Errorf("%w: segment of %d bytes, the limits are %d and %d", ErrCorrupt, h.size, segmentHeaderSize, segmentSizeMax)
	}
	return h, crc, true, nil
}

// record is a decoded record header.
type record struct {
	crc        uint32 // of the header; the next record names it as prev
	prev       uint32
	gen        uint32
	payloadLen uint32
	durable    ident.Seq
	entry      wire.Entry // without payload
}

// size returns the bytes that the record takes in its segment.
func (r *record) size() int64 { return recordSize(int(r.payloadLen)) }

// recordSize returns the bytes that an entry with that much payload takes.
func recordSize(payload int) int64 {
	return (recordHeaderSize + int64(payload) + recordAlign - 1) &^ (recordAlign - 1)
}

// encodeRecord writes a header for e, to stand at off in the segment id, and
// returns its CRC. b must be recordHeaderSize long; every byte is set.
func encodeRecord(b []byte, e *wire.Entry, payloadLen int, durable ident.Seq, id uint64, off int64, prev, gen uint32) uint32 {
	_ = b[recordHeaderSize-1]
	le := binary.LittleEndian
	le.PutUint32(b[0:], recordMagic)
	le.PutUint32(b[8:], prev)
	le.PutUint32(b[12:], uint32(off/recordAlign))
	le.PutUint64(b[16:], id)
	le.PutUint64(b[24:], uint64(e.Pos.Epoch))
	le.PutUint64(b[32:], uint64(e.Pos.Seq))
	le.PutUint64(b[40:], e.Off)
	le.PutUint64(b[48:], e.Len)
	le.PutUint64(b[56:], e.Session)
	le.PutUint64(b[64:], e.Request)
	le.PutUint64(b[72:], uint64(durable))
	le.PutUint32(b[80:], uint32(payloadLen))
	le.PutUint32(b[84:], e.PayloadCRC)
	b[88], b[89] = uint8(e.Kind), e.Flags
	b[90], b[91] = 0, 0
	le.PutUint32(b[92:], gen)
	clear(b[96:recordHeaderSize])
	crc := crc32.Checksum(b[8:recordHeaderSize], castagnoli)
	le.PutUint32(b[4:], crc)
	return crc
}

// looksLikeRecord is a cheap first look for who searches a whole file.
func looksLikeRecord(b []byte) bool {
	return len(b) >= recordHeaderSize && binary.LittleEndian.Uint32(b) == recordMagic
}

// decodeRecord reads a header that verifies by itself: it was written at off
// in this use of the segment file. Whether it continues the chain is for the
// caller to judge. It tells why it does not verify, for the operator.
func decodeRecord(b []byte, id uint64, off int64, r *record) error {
	if len(b) < recordHeaderSize {
		return fmt.Errorf("%d bytes are no record header", len(b))
	}
	le := binary.LittleEndian
	if m := le.Uint32(b[0:]); m != recordMagic {
		return fmt.Errorf("record begins with %08x, expected %08x", m, recordMagic)
	}
	if got := le.Uint64(b[16:]); got != id {
		return fmt.Errorf("record belongs to segment %016x, not %016x", got, id)
	}
	if got := le.Uint32(b[12:]); got != uint32(off/recordAlign) {
		return fmt.Errorf("record was written at unit %d, found at %d", got, off/recordAlign)
	}
	crc := le.Uint32(b[4:])
	if want := crc32.Checksum(b[8:recordHeaderSize], castagnoli); crc != want {
		return fmt.Errorf("record header has CRC %08x, expected %08x", crc, want)
	}
	*r = record{
		crc:        crc,
		prev:       le.Uint32(b[8:]),
		gen:        le.Uint32(b[92:]),
		payloadLen: le.Uint32(b[80:]),
		durable:    ident.Seq(le.Uint64(b[72:])),
		entry: wire.Entry{
			Pos:        ident.Position{Epoch: ident.Epoch(le.Uint64(b[24:])), Seq: ident.Seq(le.Uint64(b[32:]))},
			Kind:       wire.Kind(b[88]),
			Flags:      b[89],
			Off:        le.Uint64(b[40:]),
			Len:        le.Uint64(b[48:]),
			Session:    le.Uint64(b[56:]),
			Request:    le.Uint64(b[64:]),
			PayloadCRC: le.Uint32(b[84:]),
		},
	}
	if r.payloadLen > payloadMax {
		return fmt.Errorf("record claims %d bytes of payload, the limit is %d", r.payloadLen, payloadMax)
	}
	return nil
}
