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

// turnState says who steps the core.
type turnState uint8

const (
	turnFree   turnState = iota // nobody: whoever has brought something may
	turnTaken                   // a goroutine is at it, and sees what others leave meanwhile
	turnHanded                  // it was given up to the loop, which has been woken
	turnOver                    // the replica has ended: nobody does any more
)

// inbox is where everybody leaves inputs, and where the turn lies: the right to
// take them all at once and to step the core. One goroutine has it at a time.
//
// An input is never forgotten. Whoever leaves one either takes the turn after
// it (turn), or wakes the loop, which does (push). Who finds the turn taken
// leaves it at that: the turn is given back under the lock under which inputs
// are left, and only when there are none.
type inbox struct {
	mu      sync.Mutex
	items   []input
	spare   []input
	closed  bool
	turn    turnState
	tickDue bool
	wake    chan struct{} // of capacity one: the loop is to look
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

// pushQuiet leaves an input for the next turn. The caller takes it soon, or the
// input can wait for the next tick.
func (b *inbox) pushQuiet(in input) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	b.items = append(b.items, in)
	return true
}

// enter takes the turn if it is free and there is something to do. The loop
// also takes one that was handed over to it.
func (b *inbox) enter(loop bool) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.turn == turnFree && (len(b.items) > 0 || b.tickDue), loop && b.turn == turnHanded:
		b.turn = turnTaken
		return true
	}
	return false
}

// next returns all inputs to who has the turn; they are valid until the next
// call. When there are none, and no tick is due, it gives the turn back and
// returns false.
func (b *inbox) next() ([]input, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.items) == 0 && !b.tickDue {
		b.turn = turnFree
		if b.closed {
			signal(b.wake) // the loop waits for the end of the last turn
		}
		return nil, false
	}
	b.tickDue = false
	return b.swapLocked(), true
}

// handOver gives the turn up to the loop.
func (b *inbox) handOver() {
	b.mu.Lock()
	b.turn = turnHanded
	b.mu.Unlock()
	signal(b.wake)
}

// end makes the last turn the last one. It returns false when somebody has it,
// or there is something left to do; the loop is then woken when that has changed.
func (b *inbox) end() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.turn != turnFree || len(b.items) > 0 {
		return false
	}
	b.turn = turnOver
	return true
}

// tick makes a tick due: whoever has the turn, or takes it next, looks at the
// clock.
func (b *inbox) tick() {
	b.mu.Lock()
	b.tickDue = true
	b.mu.Unlock()
}

// rest returns what nobody has taken, after the end.
func (b *inbox) rest() []input {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.swapLocked()
}

func (b *inbox) swapLocked() []input {
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

// request and message are quiet: see pushQuiet.
func (b *inbox) request(r *Request) bool { return b.pushQuiet(input{kind: inRequest, req: r}) }

func (b *inbox) message(from ident.Node, env wire.Envelope) {
	if !b.pushQuiet(input{kind: inMessage, from: from, env: env}) {
		env.Free()
	}
}

func (b *inbox) barrier(r *Request, upTo ident.Seq) bool {
	return b.push(input{kind: inBarrier, req: r, seq: upTo})
}
