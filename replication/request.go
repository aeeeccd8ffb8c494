package replication

import (
	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// Op is what a request does. The values are nbd.Op's.
type Op uint8

// The operations that a Session is asked for.
const (
	OpRead Op = iota + 1
	OpWrite
	OpFlush
	OpTrim
	OpZero
	OpCache
	OpBlockStatus
)

// Extent is one run of a block status.
type Extent = wire.Extent

// The flags of an Extent: NBD's for base:allocation.
const (
	ExtentHole uint32 = 1 << iota
	ExtentZero
)

// Request is one command of a client. Its owner makes it, fills it, and has it
// back when Complete is called; it may then be used again. The fields above the
// line are set before Submit and not changed until then.
type Request struct {
	Op     Op
	FUA    bool // OpWrite, OpZero, OpTrim: durable before it completes
	NoHole bool // OpZero: the range must stay allocated
	ReqOne bool // OpBlockStatus: one extent is enough
	Offset uint64
	Length uint64
	// Data is the payload: OpWrite's bytes to write, OpRead's room to fill.
	// len(Data.B) == Length. The owner holds one reference until Complete.
	Data *buf.Buf

	// Extents is the result of OpBlockStatus. Its room is the owner's and is
	// used again.
	Extents []Extent

	// Complete answers the request: err is nil or one of this package's errors
	// (wrapped). It is called exactly once, from any goroutine, and must not
	// block.
	Complete func(r *Request, err error)
	// Queue, when it is set, may be called instead of Complete: the answer then
	// waits for a Flush of what it returns, which comes soon.
	Queue func(r *Request, err error) Flusher
	// User is the owner's own.
	User any

	// What follows is the volume's, embedded so that a request costs no
	// allocation on its way.
	sess       *Session       // nil: another node's client, see fwd
	fwd        fwdOrigin      // who forwarded it
	session    uint64         // id
	number     uint64         // within the session
	generation uint64         // the cache generation that the session began with
	committed  bool           // of VOLUME@NODE
	id         uint64         // in the table of those sent to another node; 0: not there
	target     ident.Node     // where it was sent last; "": nowhere yet
	sent       bool           // it may have reached a primary: later sendings are replays
	replay     bool           // this sending is one
	lastSeen   ident.Position // newest position seen when it was first sent
	crc        uint32         // of Data, for OpWrite
	tries      int            // of a read that had to start over
	heldSince  core.Instant   // when it began to wait; 0: it does not
}

// fwdOrigin names a request of another node's client.
type fwdOrigin struct {
	node ident.Node
	id   uint64
}

// wireOp maps an operation to its forwarded form.
func wireOp(op Op) wire.Op {
	switch op {
	case OpRead, OpCache:
		return wire.OpRead
	case OpWrite:
		return wire.OpWrite
	case OpFlush:
		return wire.OpFlush
	case OpTrim:
		return wire.OpTrim
	case OpZero:
		return wire.OpZero
	case OpBlockStatus:
		return wire.OpBlockStatus
	}
	return 0
}

// changes reports whether an operation changes the volume or waits for changes:
// it passes through the core.
func (op Op) changes() bool {
	return op == OpWrite || op == OpFlush || op == OpTrim || op == OpZero
}
