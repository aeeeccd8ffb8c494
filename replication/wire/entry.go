// Package wire has the messages that replicas and forwarders exchange, and the
// log entries that they carry: the types, their bytes and their versions. It
// opens no socket.
package wire

import (
	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
)

// Kind is what an entry does to the volume.
type Kind uint8

// The kinds of entry. Trim and Zero both leave the extent reading as zeroes on
// every replica alike; Zero with FlagNoHole keeps it allocated.
const (
	KindData Kind = iota + 1
	KindZero
	KindTrim
	KindMarker
)

// Entry flags.
const (
	FlagNoHole uint8 = 1 << iota // KindZero: do not punch a hole
)

// Entry is one ordered change. Seq rises by one from entry to entry.
type Entry struct {
	Pos     ident.Position
	Kind    Kind
	Flags   uint8
	Off     uint64 // first byte of the extent
	Len     uint64 // bytes of the extent; for KindMarker 0
	Session uint64 // the session and request that it answers; 0, 0 for markers
	Request uint64
	// PayloadCRC is the CRC-32C of the payload, computed once where the
	// payload enters blockstep and carried from wire to log; 0 without one.
	PayloadCRC uint32
	// Payload holds len(Payload.B) == Len bytes for KindData, an encoded
	// Marker for KindMarker, nil otherwise.
	Payload *buf.Buf
}

// End returns the first byte after the extent.
func (e *Entry) End() uint64 { return e.Off + e.Len }

// PayloadLen returns the bytes of payload that the entry carries.
func (e *Entry) PayloadLen() int {
	if e.Payload == nil {
		return 0
	}
	return len(e.Payload.B)
}

// MarkerType is what a marker entry says.
type MarkerType uint8

// MarkerEpoch is the first entry of a new primary (design section 4, step 4). It
// is the only type: docs/adr/0011 says what became of the others.
const MarkerEpoch MarkerType = 1

// Marker is the payload of a KindMarker entry.
type Marker struct {
	Type    MarkerType
	Node    ident.Node    // the primary
	Replica ident.Replica // its replica
}
