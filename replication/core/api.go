package core

import (
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/bitmap"
	"github.com/blockstep/blockstep/replication/wire"
)

// Instant is a reading of the host's CLOCK_BOOTTIME in nanoseconds. The core
// has no clock; the driver passes a reading with every input.
type Instant int64

// Config is what does not change while a replica is open.
type Config struct {
	Node        ident.Node
	Volume      ident.Volume
	Replica     ident.Replica
	Incarnation ident.Incarnation

	Heartbeat    int64 // ns between messages to an idle peer, and between lease requests
	LeaseFor     int64 // ns that a granted lease lasts
	LeaseMax     int64 // ns: the longest lease time ever configured (durable): how long a restarted replica stays silent
	DriftPPM     int64 // how much faster the other clock may run, in parts per million
	StallTimeout int64 // ns after which an own append or fsync that is out counts as a stalled disk
	RetryAfter   int64 // ns of silence after which a peer is probed anew

	WindowBytes      int // entries in flight to one peer
	AppendBytesMax   int // payload bytes of one Append (one entry may exceed it)
	AppendEntriesMax int
	RingBytes        int   // payload of the newest entries that are kept in memory; 0: two windows
	UnappliedMax     int   // bytes of entries that are not applied: above it new requests wait
	UnappliedEntries int   // entries that are not applied, each of which takes some memory: likewise; 0: no bound
	DedupMax         int   // (session, request) pairs that are remembered
	LagMax           int64 // bytes of log beyond which a lagging replica is evicted
	TrimLagMax       int64 // bytes of log beyond which the trim horizon waits for one no more; 0: twice LagMax

	ResyncMax   int64 // bytes per second that a resync may move; 0: no ceiling
	ResyncMin   int64 // bytes per second that it may move while clients are busy; 0: it does not yield
	ResyncChunk int   // bytes of one BlockRead
}

// Start is what the replica's files held when it was opened.
type Start struct {
	Promise  ident.Epoch
	Base     ident.Position // just before the first entry in the log
	Last     ident.Position
	History  []ident.EpochStart // since the volume's beginning: the checkpoint's, and the log's behind it
	Durable  ident.Seq
	Applied  ident.Seq // of the checkpoint
	Amnesiac bool
	Failed   string
	Fresh    bool         // made just now: there is no lease to remember, so it need not be silent
	Dedup    []DedupEntry // of the checkpoint and of the log behind it, in order
	// Changes and Remaining are the checkpoint's; nil Changes: none was ever
	// written. Remaining, when not empty, makes this a resync target.
	Changes   *bitmap.Changes
	Remaining *bitmap.Bitmap
	// Tail are the entries after Applied, in order, without their payloads.
	Tail       []wire.Entry
	DedupFloor ident.Position // the table reaches back to just after this
}

// DedupEntry remembers that an entry answered a request.
type DedupEntry = wire.DedupEntry

// AckMode is what an answer waits for.
type AckMode uint8

// The ack modes of design section 3.
const (
	AckQuorum AckMode = iota
	AckDurable
	AckLocal
)

// Member is one replica of the volume as the cluster state has it.
type Member struct {
	Node    ident.Node
	Replica ident.Replica // 0: not registered yet
	Failed  bool
	Leaving bool // an operator removes it: it is to leave the set
}

// View is the cluster state of the volume. The core ignores one that is older
// than what it has (by Epoch, then SetVersion).
type View struct {
	Epoch       ident.Epoch
	Primary     ident.Node
	Incarnation ident.Incarnation // of the primary that was promoted
	Position    ident.Position    // at which it was promoted
	Set         []ident.Node      // the in-sync set
	SetVersion  uint64
	Members     []Member
	MinCopies   int
	Ack         AckMode
	Generation  uint64      // cache generation
	LossEpoch   ident.Epoch // the newest epoch that began by a power-loss or forced promotion
	Size        uint64
	HoldNanos   int64 // on_no_quorum: error after this long; 0: hold
	Deleted     bool
	// Rates bound a resync from here on; when they are not set, Config's do.
	Rates Rates
}

// Rates bound the copying of blocks to one target, in bytes a second.
type Rates struct {
	Set bool
	Max int64 // 0: no ceiling
	Min int64 // what it may move while clients are busy; 0: it does not yield to them
}

// Origin names who asked, for the driver alone; the core carries it to the answer.
type Origin struct {
	ID   uint64
	From any
}

// Request is a client's write, zero, trim or flush.
type Request struct {
	Origin   Origin
	Flush    bool
	Kind     wire.Kind // when not a flush
	Flags    uint8     // entry flags
	FUA      bool
	Off, Len uint64
	Session  uint64
	Request  uint64
	Replay   bool
	// LastSeen is the newest position that the forwarder had seen when it first
	// sent the request, or, if it knew of a newer epoch, where that one began.
	LastSeen   ident.Position
	Generation uint64
	Entry      wire.Entry // Payload and PayloadCRC are taken from here
}

// Answer ends a request.
type Answer struct {
	Origin Origin
	Status wire.Status
	Pos    ident.Position
}

// Out is a message to one peer.
type Out struct {
	To  ident.Node
	Msg wire.Message
}

// Meta is the durable part of the core's own state. The driver keeps it in the
// replica's meta file next to what is the driver's.
type Meta struct {
	Promise     ident.Epoch
	Amnesiac    bool
	Incarnation ident.Incarnation // rises beyond that of the start where a primary has met a later one
}

// SetProposal asks the cluster state to change the in-sync set.
type SetProposal struct {
	ID      uint64
	Epoch   ident.Epoch
	Version uint64 // compared with the one in force; becomes Version+1
	Set     []ident.Node
	Reason  string
	// Unfit says that all who leave failed or must be resynced: the set may then
	// fall below min_copies (where nothing is answered) until they are back.
	Unfit bool
}

// ReportKind is what a replica tells the failover controller.
type ReportKind uint8

// The reports.
const (
	ReportLapsed  ReportKind = iota + 1 // no live lease is granted to any primary of the newest epoch
	ReportReseal                        // the primary was refused for a newer promise and wants a new epoch
	ReportRefused                       // it was promoted and cannot take office: seal again
	ReportStalled                       // the primary's own disk hangs: hand over
)

// BlockRead asks the driver for this replica's committed content of an extent,
// for a resync: from backing store and overlay, as of a commit index that is
// not older than the call, split into blocks where zeroes begin and end.
type BlockRead struct {
	Peer     ident.Node
	Stream   uint64
	ID       uint64
	Off, Len uint64
}

// Snapshot is what a checkpoint holds beside the backing store: all of it as of
// Applied.
type Snapshot struct {
	Applied    ident.Position
	History    []ident.EpochStart
	Dedup      []DedupEntry
	DedupFloor ident.Position
	Changes    []byte // encoded bitmap.Changes
	Remaining  []byte // encoded bitmap of the blocks that a resync target lacks; empty: none
	Generation uint64
}

// Report is a replica's word to the failover controller.
type Report struct {
	Kind  ReportKind
	Epoch ident.Epoch // of the view that the report is about
}

// SealReply answers Core.Seal.
type SealReply struct {
	ID     uint64
	Answer ident.SealAnswer
}

// LogRead asks the driver for entries of the own log that are no longer in
// memory, for one peer: from From on, about Bytes of payload.
type LogRead struct {
	Peer   ident.Node
	Stream uint64
	From   ident.Seq
	Bytes  int
}

// Event is a change worth a line in the log and in `blockstep events`.
type Event struct {
	Name string // what: "role", "peer", "cut", "set", "amnesia" …
	From string
	To   string
	Rule string // why, in the words of the design
	Peer ident.Node
	Pos  ident.Position
}

// Effects is what the driver does after a batch of inputs, in the order of the
// fields. Whatever stands in Send, SealReplies or Answers may rest on what
// stands above it, and is never performed before it.
type Effects struct {
	Early []Out // the primary's appends: rest on no local write and may overtake it

	Cut   bool      // truncate the log: drop every entry after CutTo (before Append)
	CutTo ident.Seq // the driver saves the dropped entries to the discarded file, drops them from the overlay

	// Reset, when set, makes this replica a resync target: the driver waits for
	// its applier, writes the snapshot as a checkpoint (fsynced), lets the log
	// begin anew after Reset.Applied (wal.Reset), empties the overlay, and only
	// then goes on. A checkpoint that is under way is waited for before; an
	// fsync that began before is reported no more. It comes alone: no Cut or Append stands in the same batch.
	Reset *Snapshot

	// Append are entries to write to the own log and to insert into the
	// overlay, in order. The driver reports Written when they are in the file.
	Append []wire.Entry

	Meta      Meta // write and fsync, when MetaDirty, before Send and SealReplies
	MetaDirty bool

	// Send must wait until this batch's Append is written and Meta is durable.
	Send        []Out
	SealReplies []SealReply

	Answers  []Answer // rest on facts that the core has been told already
	Released []uint64 // read barriers that have come true (Core.Barrier)
	Bounced  []uint64 // read barriers to send to another primary

	SyncTo   ident.Seq // fsync the log at least to here now (0: at leisure); nothing rests on when it begins
	ApplyTo  ident.Seq // entries up to here are committed and durable: apply
	TrimTo   ident.Seq // recycle the log up to here (0: nothing)
	LogReads []LogRead
	// WriteBlocks are blocks of a resync to write to the backing store, now,
	// in order; then BlocksWritten with the last ID. Nothing beyond their AsOf
	// is applied meanwhile. The payloads are the core's until BlocksWritten.
	WriteBlocks []*wire.Blocks
	BlockReads  []BlockRead
	// CheckpointNow asks for a checkpoint without delay.
	CheckpointNow bool
	Propose       []SetProposal
	Reports       []Report
	Drained       []uint64 // Core.Drain calls that are done: in-flight is answered and the lease is given back
	Events        []Event
}

// Gate is what readers that do not pass through the loop check, before and
// after they have read (design section 3, reads).
type Gate struct {
	Serving    bool // primary, marker committed, not draining, enough copies
	LeaseUntil Instant
	Epoch      ident.Epoch
	Generation uint64
	Commit     ident.Seq
	Last       ident.Position
}

// Role is what a replica is to its volume at the moment.
type Role uint8

// The roles.
const (
	RoleSecondary    Role = iota
	RolePrimaryElect      // promoted, its marker is not committed
	RolePrimary
	RoleFailed
)

// PeerStatus is what the primary knows of one other replica.
type PeerStatus struct {
	Node         ident.Node
	State        string // InSync, CatchingUp, Resyncing, Amnesiac, Failed, Absent
	Connected    bool
	Matched      ident.Seq
	Durable      ident.Seq
	LagBytes     int64
	DirtyBytes   int64
	ResyncDone   int64
	ResyncTotal  int64
	ResyncRate   int64 // bytes a second, lately; 0: not known yet
	LeaseGranted bool
	HeardAgo     int64 // ns since its last answer; -1: none in this reign
}

// Status is a picture for the operator.
type Status struct {
	Role      Role
	State     string // of this replica
	Reason    string
	Promise   ident.Epoch
	View      View
	Last      ident.Position
	Commit    ident.Seq
	Durable   ident.Seq
	Applied   ident.Seq
	LeaseLeft int64 // ns
	Suspended bool  // holds I/O at the moment
	Waiting   int   // requests that are held
	RingBytes int   // payload of the newest entries, kept in memory
	Peers     []PeerStatus
}
