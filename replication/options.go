package replication

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// Errors that requests and calls end with.
var (
	// ErrIO is returned when a request cannot be carried out: a disk failed, or
	// on_no_quorum is error and the time is over.
	ErrIO = errors.New("input/output error")
	// ErrNoSpace is returned when a disk is full.
	ErrNoSpace = errors.New("no space left on the backing store")
	// ErrRange is returned for a request that reaches beyond the volume's end.
	ErrRange = errors.New("beyond the end of the volume")
	// ErrReadOnly is returned for a change on a read-only export.
	ErrReadOnly = errors.New("export is read-only")
	// ErrUnsupported is returned for an operation that this version or the
	// primary's does not know.
	ErrUnsupported = errors.New("operation is not supported")
	// ErrGeneration ends a session that began before the cache generation was raised:
	// what its client believes to be written may be gone, or an operator has fenced
	// it. ErrFenced and errLostData are this one, where it is known which.
	ErrGeneration = errors.New("the volume was fenced by an operator, or lost unflushed data, since this session began: see blockstep events")
	// ErrFenced ends a session because an operator said so. Nothing was lost.
	ErrFenced error = generationError("the volume was fenced by an operator since this session began: another host may be using it (see blockstep events)")

	errLostData error = generationError("the volume lost unflushed data since this session began: check the data (see blockstep events)")
	// ErrTooOld is returned for a request that was sent again so late that
	// nobody can tell any more whether it took effect; it was not run again.
	ErrTooOld = errors.New("cannot tell whether the request took effect before the failover: it was not run again")
	// ErrClosed is returned when the session or the volume is closed.
	ErrClosed = errors.New("volume is closed")
	// ErrClientGone is returned for a request whose client went away before it
	// could be sent.
	ErrClientGone = errors.New("client is gone: the request was dropped")
	// ErrNoReplica is returned when a call needs a replica on this node.
	ErrNoReplica = errors.New("this node has no replica of the volume")
)

// generationError is an ErrGeneration that says why.
type generationError string

// Error returns the text.
func (e generationError) Error() string { return string(e) }

// Is makes errors.Is(err, ErrGeneration) true.
func (generationError) Is(target error) bool { return target == ErrGeneration } //nolint:errorlint // that is what Is is for

// Clock is where time comes from. Boot is CLOCK_BOOTTIME, which, unlike Go's
// monotonic clock, goes on in a suspend; leases are measured by it.
type Clock interface {
	Boot() core.Instant
}

// Links carries messages to other nodes; *peer.Manager is one. Its methods
// never block.
type Links interface {
	// Send queues a message for the volume's other end at the node to. It takes
	// over one reference of each payload, and is done with m when it returns.
	// When the link is down, or its queue is full, the message is lost.
	Send(to ident.Node, vol ident.Volume, m wire.Message)
	// Flush lets go what Send has queued for any node.
	Flush()
	// FlushSoon is Flush within a millisecond, once for all who ask until then:
	// for what nobody waits for.
	FlushSoon()
	// Echo returns the newest clock value of the node that was heard, for
	// wire.Forward.Echo.
	Echo(node ident.Node) int64
	// EchoAge returns how long ago, at the least, the node from was in touch
	// with this one when it sent a message with this echo.
	EchoAge(from ident.Node, echo int64) time.Duration
}

// Cluster is what a replica asks of the cluster state. The daemon implements it
// over raft.
type Cluster interface {
	// ProposeSet asks for a change of the in-sync set and returns when its
	// outcome can be told. shows says that the next view shows it: the change is
	// accepted, or epoch or version have moved, perhaps by this very change, asked
	// for again. Else it is refused, definitely. An error means that nothing is
	// known (a time-out, no leader): the replica asks again, with the same
	// proposal, until ctx ends.
	ProposeSet(ctx context.Context, vol ident.Volume, p core.SetProposal) (shows bool, err error)
	// Report hands a replica's word to the failover controller. It does not
	// block; a report may be lost and is made again while it holds.
	Report(vol ident.Volume, r core.Report)
	// MarkFailed records in the cluster state that a replica's disk failed. It
	// does not block, and goes on trying until the state says so.
	MarkFailed(vol ident.Volume, r ident.Replica, reason string)
	// Event records a change for the log and for `blockstep events`. It does
	// not block.
	Event(vol ident.Volume, e core.Event)
}

// Options describe a volume on this node. Zero values of limits take the
// defaults of limits.go.
type Options struct {
	Volume ident.Volume
	Name   string
	Node   ident.Node

	Links   Links
	Cluster Cluster
	Clock   Clock // nil: the host's
	Logger  *slog.Logger
	Alive   *AliveClock // the process's; nil: one of its own
	Pulse   *Pulse      // the node's, for its replicas' heartbeat; nil: each ticks by itself
	Limits  Limits
	// View is the cluster state at the start, when it is known already.
	View *core.View

	Replica *ReplicaOptions // nil: no replica here, clients only
}

// ReplicaOptions say where a replica's files are.
type ReplicaOptions struct {
	FS      vfs.FS
	Cluster string // the cluster's name, for the operator
	Dir     string // of the log, the meta and checkpoint slots, discarded tails
	Store   string // path of the backing file or device; "": DIR/data
	BootID  string // content of the boot id file

	Heartbeat    time.Duration // 0: 250 ms
	LeaseFor     time.Duration // 0: 1 s
	StallTimeout time.Duration // 0: 3 s
	DriftPPM     int64         // 0: 1000
	RetryAfter   time.Duration // silence after which a peer is probed anew; 0: 1 s
	LogRetention int64         // bytes of log kept for peers that are away; 0: 256 MiB
	LogSegment   int64         // bytes of one log file; 0: 16 MiB
	LagMax       int64         // bytes of log beyond which a lagging replica is evicted, of a small disk an eighth; 0: twice the retention
	ResyncMax    int64         // bytes per second that a resync may move; 0: no ceiling
	ResyncMin    int64         // bytes per second that it may move while clients are busy; 0: 4 MiB
	ResyncChunk  int           // bytes that it reads at a time; 0: 1 MiB
}

// Limits bound what one volume may hold in memory (design I9).
type Limits struct {
	Memory       int64 // bytes that it holds when it is busy: the defaults of others are shares of it
	OverlayBytes int64 // payload bytes of unapplied entries kept in memory
	UnappliedMax int   // bytes of unapplied entries: above it new requests wait
	// UnappliedEntries bounds their number likewise.
	UnappliedEntries int
	ReadersMax       int // reads that wait for the backing store at a time
	ForwardedMax     int // requests of other nodes' clients that are under way here
	// ForwardedBytes bounds the bytes that these read or write.
	ForwardedBytes int64
	CheckpointMax  int64         // bytes applied after which a checkpoint is made
	CheckpointAge  time.Duration // time after which one is made when anything changed
	SyncBytes      int64         // unfsynced log bytes at which the background fdatasync starts
	SyncAge        time.Duration // age of unfsynced log bytes at which it starts
	LinkLease      time.Duration // age at which a waiting forwarded write is dropped, not sent late
}
