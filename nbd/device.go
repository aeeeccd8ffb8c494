package nbd

import (
	"context"

	"github.com/blockstep/blockstep/internal/buf"
)

// Op is what a request does.
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

// Info describes an export to a client.
type Info struct {
	Size        uint64 // bytes
	Description string
	ReadOnly    bool
	MultiConn   bool
	BlockMin    uint32 // bytes; every offset and length is a multiple of it
	BlockBest   uint32
	BlockMax    uint32 // the largest READ or WRITE payload
	// MetaContexts lists what BlockStatus answers besides base:allocation, as
	// namespace:leaf, or namespace: for a context with a parameter.
	MetaContexts []string
}

// Exports is what the server asks for exports. Its methods may be called from
// several goroutines.
type Exports interface {
	// List names the exports that a client may be shown.
	List() []string
	// Lookup describes an export without opening it. It returns ErrNoExport
	// (wrapped) for a name that is not there.
	Lookup(ctx context.Context, name string) (Info, error)
	// Open begins a session. The session ends with Session.Close.
	Open(ctx context.Context, name string, c Client) (Session, error)
}

// Client is what a session may know of the connection that it serves.
type Client struct {
	Remote string // for logs
	Local  bool   // the peer is on this host (unix socket or loopback)
	// Gone reports whether the client has closed its end, even when bytes
	// that it sent before are still unread. It costs a system call.
	Gone func() bool
	// Kill ends the connection at once, without answering what is in flight; for
	// ErrSessionLost, once that is answered. It may be called from any goroutine,
	// more than once.
	Kill func(reason error)
}

// Session is one client's use of an export.
type Session interface {
	Info() Info
	// Submit starts a request. It must not block for I/O on a peer or on a
	// slow disk; it may complete the request before it returns. Requests that
	// are in flight at the same time have no order among them.
	//
	// The server calls Submit from one goroutine at a time. The session calls
	// r.Complete exactly once, from any goroutine.
	Submit(r *Request)
	// Uncork is called, by the goroutine that calls Submit, after the last of
	// the requests that were read together, and before the server waits for
	// anything. A session may put off until then what is cheaper to do for
	// several requests at once. It may wait for the session's own disk; the
	// connection takes no further request meanwhile.
	Uncork()
	// MetaContext prepares a negotiated meta context (a name as in
	// Info.MetaContexts, with its parameter). The returned id goes into
	// Request.Contexts.
	MetaContext(name string) (id uint32, err error)
	// Close ends the session, and may be called again. In-flight requests that no
	// peer has been sent yet are dropped. Each one in flight gets its Complete now,
	// unless a disk is at it: the memory of its payload is given back then.
	Close()
}

// Extent is one run of a block status.
type Extent struct {
	Length uint64
	Flags  uint32 // of the context: for base:allocation NBD_STATE_HOLE|NBD_STATE_ZERO
}

// Status is the block status of one context.
type Status struct {
	Context uint32
	Extents []Extent
}

// Request is one command. The server makes it, fills it, and takes it back in
// Complete. Fields above the line are set before Submit and not changed.
type Request struct {
	Op       Op
	FUA      bool // OpWrite, OpZero, OpTrim: durable before it completes
	NoHole   bool // OpZero: the range must stay allocated
	FastZero bool // OpZero: fail with ErrUnsupported rather than be slow
	ReqOne   bool // OpBlockStatus: one extent is enough
	Offset   uint64
	Length   uint64
	Contexts []uint32 // OpBlockStatus
	// Data is the payload: OpWrite's bytes to write, OpRead's room to fill.
	// len(Data.B) == Length. The server holds one reference until after
	// Complete; whoever needs OpWrite's bytes longer retains the buffer.
	Data *buf.Buf

	// Result fields, set by the session before Complete.
	Status []Status // OpBlockStatus
	Holes  []Extent // OpRead, optional: alternating runs that cover Data exactly; Flags&2 (zero) marks a run of zeroes

	// Complete answers the request. err is nil or one of the errors that
	// errno.go knows. It may be called from any goroutine, exactly once, and
	// must not block.
	Complete func(r *Request, err error)
	// Server is the server's own; a session leaves it alone.
	Server any
}
