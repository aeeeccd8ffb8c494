package wire

import (
	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
)

// Type tells messages apart on the wire.
type Type uint8

// The message types. The first group is replica to replica and goes to the
// core; the second is forwarder to primary and goes to the volume's driver.
const (
	TypeAppend Type = iota + 1
	TypeAck
	TypeReject
	TypeStale
	TypeRelease
	TypeReleased
	TypeBlocks
	TypeBlocksAck

	TypeForward
	TypeReply

	// TypePing is the link's own; it is for no volume and is not delivered.
	TypePing

	TypeResyncStart
	TypeResyncState
)

// Message is anything that a link carries for one volume: one of the types
// below.
type Message interface{ Type() Type }

// Append carries entries from the primary of Epoch to one replica, and with or
// without entries the commit index, the trim horizon and the request for a
// lease. It is idempotent and may arrive late or twice: log matching judges it.
type Append struct {
	Epoch  ident.Epoch
	Stream uint64         // rises each time the primary begins anew with this replica; acks echo it
	Prev   ident.Position // the entry before Entries[0]; the receiver must hold it
	Commit ident.Seq
	SyncTo ident.Seq // fsync at least up to here at once and ack that; 0: when convenient
	Trim   ident.Seq // entries at or below are needed by no replica
	// LossEpoch is the newest epoch that began by a power-loss or forced
	// promotion. An entry of an older epoch that is cut may have been applied.
	LossEpoch ident.Epoch
	// Met is the receiver's newest incarnation that has answered the primary in
	// this epoch; 0: none. Acks of an earlier one count no more, so an
	// incarnation that finds itself here may go by Commit.
	Met        ident.Incarnation
	Generation uint64 // the volume's cache generation
	LeaseSent  int64  // the primary's clock (ns) when it asks for a lease; 0: it asks for none
	LeaseFor   int64  // ns
	Entries    []Entry
}

// Ack answers an Append that matched: of the prefix matched with the primary of
// Epoch, in the stream Stream, Matched is in the log file and Durable is fsynced.
type Ack struct {
	Epoch        ident.Epoch
	Stream       uint64
	Replica      ident.Replica
	Incarnation  ident.Incarnation
	Matched      ident.Seq
	Durable      ident.Seq
	Applied      ident.Seq
	Inconsistent bool  // it is a resync target that lacks blocks
	LeaseSent    int64 // echo of Append.LeaseSent when the lease is granted, else 0
	Amnesiac     bool
	Checkpoint   ident.Seq // its backing store is durable up to here
}

// RejectReason says why an Append did not match.
type RejectReason uint8

// The reasons of a Reject.
const (
	RejectGap    RejectReason = iota + 1 // it does not hold Prev
	RejectResync                         // it cannot be streamed to: it must be resynced first
	RejectFailed                         // its disk failed
)

// Reject answers an Append that did not match, with what the primary needs to
// find the point of divergence.
type Reject struct {
	Epoch       ident.Epoch
	Stream      uint64
	Replica     ident.Replica
	Incarnation ident.Incarnation
	Reason      RejectReason
	Last        ident.Position
	Base        ident.Position // the position just before the first entry that it still has
	Applied     ident.Seq
	Durable     ident.Seq
	History     []ident.EpochStart
	Amnesiac    bool
	LeaseSent   int64 // a replica that does not match may still grant the lease
}

// Stale answers any message of an epoch older than the one promised.
type Stale struct {
	Epoch    ident.Epoch // the epoch that was refused
	Promised ident.Epoch
}

// Release gives the lease back at a granter (switchover): it may answer a SEAL
// at once. Its loss costs one lease time.
type Release struct{ Epoch ident.Epoch }

// Released answers Release.
type Released struct{ Epoch ident.Epoch }

// Block is one extent of a resync, as of Blocks.AsOf. A nil Payload means that
// the extent reads as zeroes.
type Block struct {
	Off, Len uint64
	CRC      uint32
	Payload  *buf.Buf
}

// Blocks carries extents of a resync. It travels in the same ordered stream as
// Append: the target writes the blocks after it has applied everything up to
// AsOf, a committed position, and before it applies anything later.
type Blocks struct {
	Epoch  ident.Epoch
	Stream uint64
	ID     uint64 // rises by one in a stream
	AsOf   ident.Seq
	First  bool // of a resync: the target marks itself inconsistent before it acks
	Last   bool // of a resync: the target checkpoints before it acks
	Blocks []Block
}

// BlocksAck says that all Blocks up to ID are written (not yet durable) or,
// with Durable, that they survive a power cut.
type BlocksAck struct {
	Epoch   ident.Epoch
	Stream  uint64
	ID      uint64
	Durable bool
}

// Forward is a client's request on its way to the primary.
type Forward struct {
	ID         uint64 // the forwarder's own number, echoed by Reply
	Op         Op
	Flags      uint8 // FlagFUA …
	Off, Len   uint64
	Session    uint64
	Request    uint64
	Replay     bool           // it may have been sent before, perhaps to another primary
	LastSeen   ident.Position // the newest position the forwarder had seen when it first sent it
	Generation uint64         // the cache generation that the session began with
	// Echo is the newest clock value (ns) of the receiver that the sender had
	// heard when it sent this; a receiver drops what is older than the link's
	// lease ("stopped-forwarder-writes-late").
	Echo       int64
	PayloadCRC uint32
	Payload    *buf.Buf
}

// Op is what a forwarded request does.
type Op uint8

// The forwarded operations.
const (
	OpRead Op = iota + 1
	OpWrite
	OpFlush
	OpTrim
	OpZero
	OpBlockStatus
	// OpForget says that the session's client is gone: what the primary has not
	// let through of it must not take effect later. It is not answered.
	OpForget
)

// Forward flags.
const (
	ForwardFUA uint8 = 1 << iota
	ForwardNoHole
	ForwardReqOne
	// ForwardReplica asks for the receiver's own committed content (OpRead,
	// OpBlockStatus), primary or not: the export VOLUME@NODE.
	ForwardReplica
)

// Status is the outcome of a forwarded request.
type Status uint8

// The outcomes. Everything but StatusOK and StatusRetry ends the request.
const (
	StatusOK          Status = iota + 1
	StatusRetry              // not (or no longer) primary: send it to the primary again, as a replay
	StatusStaleEcho          // the link's lease had lapsed: send it again if the client is still there
	StatusIO                 // EIO
	StatusNoSpace            // ENOSPC
	StatusRange              // beyond the end of the volume
	StatusGeneration         // the session began before data may have been lost: end it
	StatusTooOld             // a replay from before the table's reach: it was not run
	StatusUnsupported        // not known to this version
)

// Reply answers a Forward.
type Reply struct {
	ID         uint64
	Status     Status
	Pos        ident.Position // the newest position that the primary has
	Primary    ident.Node     // StatusRetry: who the primary is, when known
	PayloadCRC uint32
	Payload    *buf.Buf // OpRead: the bytes; OpBlockStatus: encoded extents
}

// Ping goes over a link in both directions at a steady rate. It says that the
// sender lives, and carries its clock, which the receiver echoes.
type Ping struct {
	Clock int64 // the sender's clock (ns); only the sender can judge it
	Echo  int64 // the newest clock of the receiver that the sender has heard; 0: none
	Held  int64 // ns between hearing Echo and sending this
}

// Type implements Message.
func (*Append) Type() Type    { return TypeAppend }
func (*Ack) Type() Type       { return TypeAck }
func (*Reject) Type() Type    { return TypeReject }
func (*Stale) Type() Type     { return TypeStale }
func (*Release) Type() Type   { return TypeRelease }
func (*Released) Type() Type  { return TypeReleased }
func (*Blocks) Type() Type    { return TypeBlocks }
func (*BlocksAck) Type() Type { return TypeBlocksAck }
func (*Forward) Type() Type   { return TypeForward }
func (*Reply) Type() Type     { return TypeReply }
func (*Ping) Type() Type      { return TypePing }
