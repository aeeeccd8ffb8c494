package replication

import (
	"sync"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// inputKind says what an input is.
type inputKind uint8

const (
	inMessage inputKind = iota + 1
	inRequest
	inBarrier
	inForget
	inPeerUp
	inPeerDown
	inSyncStarted
	inSyncEnded // the fsync has returned: durable up to seq, of log generation gen
	inApplied
	inCall
)

// input is one thing that happened, on its way to the core.
type input struct {
	kind inputKind
	from ident.Node
	env  wire.Envelope
	req  *Request
	seq  ident.Seq
	id   uint64 // inForget: the session; inSyncEnded: the generation of the log
	call func(now core.Instant)
}

// inbox is where everybody leaves inputs and the loop takes them all at once.
type inbox struct {
	mu     sync.Mutex
	items  []input
	spare  []input
	closed bool
	wake   chan struct{} // of capacity one
}

func newInbox() *inbox { return &inbox{wake: make(chan struct{}, 1)} }

// push leaves an input and wakes the loop. It reports whether it was taken: a
// closed inbox takes nothing.
func (b *inbox) push(in input) bool {
	if !b.pushQuiet(in) {
		return false
	}
	signal(b.wake)
	return true
}

// pushQuiet leaves an input that can wait for the next batch or tick.
func (b *inbox) pushQuiet(in input) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	b.items = append(b.items, in)
	return true
}

// take returns all inputs; they are valid until the next take.
func (b *inbox) take() []input {
	b.mu.Lock()
	defer b.mu.Unlock()
	items := b.items
	clear(b.spare)
	b.items, b.spare = b.spare[:0], items
	return items
}

// close takes no more inputs.
func (b *inbox) close() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	signal(b.wake)
}

func (b *inbox) peer(node ident.Node, up bool) {
	kind := inPeerDown
	if up {
		kind = inPeerUp
	}
	b.push(input{kind: kind, from: node})
}

func (b *inbox) forget(session uint64) { b.push(input{kind: inForget, id: session}) }

func (b *inbox) request(r *Request) bool { return b.push(input{kind: inRequest, req: r}) }

func (b *inbox) message(from ident.Node, env wire.Envelope) {
	if !b.push(input{kind: inMessage, from: from, env: env}) {
		env.Free()
	}
}

func (b *inbox) barrier(r *Request, upTo ident.Seq) bool {
	return b.push(input{kind: inBarrier, req: r, seq: upTo})
}
