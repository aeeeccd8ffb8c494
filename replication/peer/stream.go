package peer

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

var (
	errOverflow = errors.New("the peer is too slow: its queue overflowed")
	errClosed   = errors.New("link closed")
	errUnjudged = errors.New("the id of the cluster has become known since: it is made anew")
)

// The lanes of a stream, in the order in which they are served.
const (
	laneControl = iota // what others wait for: pings, answers, leases
	laneSmall
	laneBulk
	lanes
)

// laneOf says which lane a message would like to take, and whether it must stay
// behind earlier ones of its volume (see order).
//
// What a secondary answers is small, but for one bitmap a resync, and somebody
// waits for each: it keeps its order among itself and overtakes all else. What
// a primary and a forwarder send is ordered within its volume; but one volume's
// resync does not delay the lease or the small writes of another.
func laneOf(m wire.Message) (lane int, ordered bool) {
	switch m := m.(type) {
	case *wire.Ping, *wire.Ack, *wire.Reject, *wire.Stale, *wire.BlocksAck, *wire.ResyncState:
		return laneControl, false
	case *wire.Append:
		size := 0
		for i := range m.Entries {
			size += m.Entries[i].PayloadLen()
		}
		switch {
		case len(m.Entries) == 0:
			return laneControl, true
		case size <= smallBytes:
			return laneSmall, true
		}
	case *wire.Forward:
		if m.Payload == nil || len(m.Payload.B) <= smallBytes {
			return laneSmall, true
		}
	case *wire.Reply:
		if m.Payload == nil || len(m.Payload.B) <= smallBytes {
			return laneSmall, true
		}
	case *wire.Release, *wire.Released:
		return laneSmall, true
	}
	return laneBulk, true
}

// stream is the sending end of one connection.
//
//	push ──► lanes ──► round ──► socket
//
// Any goroutine pushes. Whoever finds writing false and something queued sets
// writing, and then owns round and writer until it gives writing up or hands it
// to runSender by a kick: at most one goroutine writes, and what it leaves
// behind is never forgotten.
type stream struct {
	conn     net.Conn
	w        *writer // of the owner of writing
	limits   Limits
	instance uint64 // of the peer's process
	version  uint8  // of the frames: what the hellos have agreed on
	said     string // the cluster's id as we knew it before the hellos; "" while it is not known
	named    string // and as the peer did

	kick   chan struct{} // hands writing to runSender; capacity 1
	failed chan struct{} // closed by the first fail

	sentBytes, sentFrames atomic.Uint64

	mu      sync.Mutex
	err     error // why it failed; nothing is queued any more
	lanes   [lanes]lane
	bytes   int // queued, the round that is being written included
	frames  int
	writing bool
	round   round // of the owner of writing
	scratch []*buf.Buf
	orders  map[ident.Volume]*order
	last    struct { // the last of orders that was asked for
		vol   ident.Volume
		order *order
	}
}

func newStream(conn net.Conn, w *writer, limits Limits, instance uint64, version uint8) *stream {
	return &stream{
		conn: conn, w: w, limits: limits, instance: instance, version: version,
		kick: make(chan struct{}, 1), failed: make(chan struct{}),
		orders: map[ident.Volume]*order{},
	}
}

func (s *stream) orderLocked(vol ident.Volume) *order {
	if s.last.order == nil || s.last.vol != vol {
		o := s.orders[vol]
		if o == nil {
			o = new(order)
			s.orders[vol] = o
		}
		s.last.vol, s.last.order = vol, o
	}
	return s.last.order
}

// push queues m and takes over its payloads. It returns an error only for a
// message that has no bytes, which is the caller's mistake.
func (s *stream) push(vol ident.Volume, m wire.Message) error {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		wire.ReleasePayloads(m)
		return nil //nolint:nilerr // a message for a link that is down is dropped; Down says so
	}
	lane, ordered := laneOf(m)
	var o *order
	if ordered {
		o = s.orderLocked(vol)
		lane = o.lane(lane)
	}
	n, err := s.lanes[lane].push(s.version, vol, m, o, &s.scratch)
	if err != nil {
		s.mu.Unlock()
		wire.ReleasePayloads(m)
		return err
	}
	if o != nil {
		o[lane]++
	}
	s.bytes += n
	s.frames++
	// One message always fits, however large.
	over := s.frames > 1 && (s.bytes > s.limits.QueueBytes || s.frames > s.limits.QueueFrames)
	bytes, frames := s.bytes, s.frames
	s.mu.Unlock()
	if over {
		s.fail(fmt.Errorf("%w: %d bytes in %d messages wait", errOverflow, bytes, frames))
	}
	return nil
}

// flush writes what is queued as far as it goes without waiting.
func (s *stream) flush() {
	s.mu.Lock()
	if s.writing || !s.composeLocked() {
		s.mu.Unlock()
		return
	}
	s.writing = true
	// A caller that always finds more is doing the work of others: let the
	// sender do it.
	for range directRounds {
		if s.round.bytes > directBytes {
			break
		}
		s.mu.Unlock()
		err := s.w.try(&s.round)
		if err != nil {
			s.fail(err)
		}
		s.mu.Lock()
		if err == nil && !s.round.done() {
			break
		}
		if !s.nextLocked() {
			s.mu.Unlock()
			return
		}
	}
	s.handOverLocked()
	s.mu.Unlock()
}

// composeLocked fills the empty round from the lanes; false if there is nothing.
func (s *stream) composeLocked() bool {
	if s.err != nil {
		return false
	}
	for i := range s.lanes {
		s.round.take(&s.lanes[i], i, roundBytes)
	}
	return s.round.frames > 0
}

// nextLocked ends the owner's round and composes the next. It returns false,
// with writing given up, if there is none.
func (s *stream) nextLocked() bool {
	if s.round.done() {
		s.sentBytes.Add(uint64(s.round.bytes))
		s.sentFrames.Add(uint64(s.round.frames))
	}
	s.bytes -= s.round.bytes
	s.frames -= s.round.frames
	s.round.finish()
	if !s.composeLocked() {
		s.writing = false
		return false
	}
	return true
}

// handOverLocked gives writing to the sender, or ends it if there is no sender
// any more.
func (s *stream) handOverLocked() {
	if s.err != nil {
		s.nextLocked()
		return
	}
	s.kick <- struct{}{} // never waits: only the owner of writing kicks, and the sender takes it before it owns
}

// runSender writes what did not go out at once, until the stream fails.
func (s *stream) runSender() {
	for {
		select {
		case <-s.kick:
			s.drive()
		case <-s.failed:
			// A kick is made under the lock and not after the failure, so one
			// that is there now is the last.
			select {
			case <-s.kick:
				s.drive()
			default:
			}
			return
		}
	}
}

// drive is the owner's loop in the sender.
func (s *stream) drive() {
	for {
		if err := s.w.finish(&s.round); err != nil {
			s.fail(err)
		}
		s.mu.Lock()
		more := s.nextLocked()
		s.mu.Unlock()
		if !more {
			return
		}
	}
}

// runWatcher notices that the peer has closed its end: it never sends anything
// after the handshake.
func (s *stream) runWatcher() {
	var b [1]byte
	n, err := s.conn.Read(b[:])
	switch {
	case n > 0:
		err = fmt.Errorf("%w: the peer sent something where it never does", wire.ErrMalformed)
	case errors.Is(err, io.EOF):
		err = errors.New("closed by the peer")
	}
	s.fail(err)
}

// fail ends the stream, once: the connection is closed, what is queued is
// dropped. It does not wait.
func (s *stream) fail(err error) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.err = err
	for i := range s.lanes {
		s.lanes[i].drop()
	}
	s.bytes, s.frames = s.round.bytes, s.round.frames
	close(s.failed)
	s.mu.Unlock()
	s.conn.Close()
}

// reason returns why the stream failed.
func (s *stream) reason() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// queued returns what waits to be sent.
func (s *stream) queued() (bytes, frames int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes, s.frames
}
