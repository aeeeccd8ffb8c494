package replication

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync/atomic"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Client is what a session may know of the connection that it serves.
type Client struct {
	Remote string // for logs
	Local  bool   // the peer is on this host
	// Gone reports whether the client has closed its end, even when bytes that
	// it sent before are still unread. It costs a system call.
	Gone func() bool
	// Kill ends the connection at once, without answering what is in flight; with
	// ErrGeneration what is in flight is answered first. It may be called from any
	// goroutine, more than once; it must not call back into the session before it
	// returns.
	Kill func(reason error)
}

// Session is one client's use of a volume, or of one replica's content.
type Session struct {
	v          *Volume
	client     Client
	id         uint64 // random, never 0
	generation uint64
	epoch      ident.Epoch // of the volume when it began
	replicaOf  ident.Node  // VOLUME@NODE: whose content; "": the volume
	next       atomic.Uint64
	stalls     atomic.Uint64 // of the process, when the client was last known to be there
	pauses     atomic.Uint64 // likewise, the shorter ones too
	closed     atomic.Bool
	remote     atomic.Bool // another node has been sent requests of it
}

// OpenSession begins a client's session on the volume.
func (v *Volume) OpenSession(_ context.Context, c Client) (*Session, error) {
	return v.openSession(c, "")
}

// OpenReplicaSession begins a read-only session on the committed content of the
// replica at node (the export VOLUME@NODE).
func (v *Volume) OpenReplicaSession(_ context.Context, node ident.Node, c Client) (*Session, error) {
	if node == v.opts.Node && v.rep() == nil {
		return nil, fmt.Errorf("volume %s at node %s: %w", v.opts.Name, node, ErrNoReplica)
	}
	return v.openSession(c, node)
}

func (v *Volume) openSession(c Client, replicaOf ident.Node) (*Session, error) {
	s := &Session{v: v, client: c, id: randomID(), replicaOf: replicaOf}
	s.stalls.Store(v.alive.Stalls())
	s.pauses.Store(v.alive.Pauses())
	v.cmu.Lock()
	defer v.cmu.Unlock()
	if v.stopped {
		return nil, ErrClosed
	}
	if v.view == nil {
		return nil, fmt.Errorf("volume %s: this node has not heard of it from the cluster yet: %w", v.opts.Name, ErrClosed)
	}
	s.generation, s.epoch = v.view.Generation, v.view.Epoch
	v.sessions[s] = struct{}{}
	if replicaOf == "" {
		v.askPositionLocked()
	}
	return s, nil
}

// Size returns the volume's size in bytes as the cluster state has it now.
func (s *Session) Size() uint64 { return s.v.Size() }

// ReadOnly reports whether the session may not change anything.
func (s *Session) ReadOnly() bool { return s.replicaOf != "" }

// Submit starts a request: Queue and Flush. One goroutine calls either at a time.
func (s *Session) Submit(r *Request) {
	s.Queue(r)
	s.Flush()
}

// Queue takes a request, and waits for nothing. It may answer the request, or
// begin it, before it returns; one that is to change something, or is for another
// node, may also wait for the next Flush. One goroutine calls it at a time.
func (s *Session) Queue(r *Request) {
	if err := s.check(r); err != nil {
		r.Complete(r, err)
		return
	}
	if r.Op == OpCache || r.Op == OpFlush && s.ReadOnly() || r.Op != OpFlush && r.Length == 0 {
		// Nothing to do: a read-only session has written nothing, and reading
		// ahead is what the primary's page cache does by itself.
		r.Complete(r, nil)
		return
	}
	r.begin(s)
	s.v.route(r)
}

// Flush starts what Queue has taken: many requests in one go. It may wait for
// the log's disk, and as long as that hangs; it waits for no peer.
func (s *Session) Flush() { s.v.Settle() }

// check judges a request against the volume as it is.
func (s *Session) check(r *Request) error {
	if s.closed.Load() {
		return ErrClosed
	}
	switch r.Op {
	case OpRead, OpCache, OpBlockStatus, OpFlush:
	case OpWrite, OpTrim, OpZero:
		if s.replicaOf != "" {
			return ErrReadOnly
		}
	default:
		return ErrUnsupported
	}
	if r.Op == OpFlush {
		return nil
	}
	if !s.v.fits(r) {
		return fmt.Errorf("%w: offset %d, length %d, size %d", ErrRange, r.Offset, r.Length, s.v.size.Load())
	}
	if (r.Op == OpRead || r.Op == OpWrite) && (r.Length > requestMax || r.Data == nil || uint64(len(r.Data.B)) != r.Length) {
		return fmt.Errorf("%w: a payload of %d bytes", ErrUnsupported, r.Length)
	}
	return nil
}

// fits reports whether a request lies within the volume.
func (v *Volume) fits(r *Request) bool {
	size := v.size.Load()
	return r.Offset <= size && r.Length <= size-r.Offset
}

// begin prepares a request's own fields for a new life.
func (r *Request) begin(s *Session) {
	r.sess, r.fwd = s, fwdOrigin{}
	r.session, r.number = s.id, s.next.Add(1)
	r.generation, r.committed = s.generation, s.replicaOf != ""
	r.id, r.target, r.sent, r.lastSeen = 0, "", false, ident.Position{}
	r.tries, r.heldSince, r.crc = 0, 0, 0
	if r.Op == OpWrite {
		r.crc = crc32.Checksum(r.Data.B, castagnoli)
	}
}

// admit makes sure, before a request is let through to a primary, that its
// client is still the one that wants it. After a stall of the process that is
// not known: a local client is asked; one across the network cannot be, so its
// connection ends ("stopped-forwarder-writes-late"). The caller has captured
// the link's echo already, so that a stall after this check is found by the
// age of that echo.
//
// After one that was shorter than the link's lease, a client that is seen to have gone
// is not served either: its write would be in time, but somebody else may have written
// in its place meanwhile.
func (s *Session) admit() error {
	n, p := s.v.alive.Stalls(), s.v.alive.Pauses()
	if s.stalls.Load() == n {
		if s.pauses.Load() == p {
			return nil
		}
		if s.client.Gone != nil && s.client.Gone() {
			s.end(fmt.Errorf("%w while this node stood still", ErrClientGone))
			return ErrClientGone
		}
		s.pauses.Store(p)
		return nil
	}
	if s.client.Local && s.client.Gone != nil && !s.client.Gone() {
		s.stalls.Store(n)
		return nil
	}
	s.end(fmt.Errorf("%w: this node stood still for a while, and whether the client has gone on elsewhere cannot be known", ErrClientGone))
	return ErrClientGone
}

// outlivedBy says why a session of an older cache generation than view's must end: each
// loss since it began has an epoch, and what raises the generation without one is a
// fence. It is asked with the volume's lock.
func (s *Session) outlivedBy(view *core.View) error {
	switch {
	case view.Generation <= s.generation:
		return ErrGeneration // the primary has said so, before the news have come here
	case view.LossEpoch > s.epoch:
		return errLostData
	}
	return ErrFenced
}

// outlive ends the session of a request that was refused for its cache generation.
func (v *Volume) outlive(r *Request) {
	s := r.sess
	v.cmu.Lock()
	reason := s.outlivedBy(v.view)
	v.cmu.Unlock()
	v.finish(r, reason)
	s.end(reason)
}

// end kills the connection. Its owner then closes the session. A client that may
// believe in writes that are gone (ErrGeneration) is told so by the answers to what
// it has under way; any other gets none, so that it asks again elsewhere.
func (s *Session) end(reason error) {
	if s.closed.Swap(true) {
		return
	}
	if errors.Is(reason, ErrGeneration) {
		s.v.dropSession(s, reason)
	}
	if s.client.Kill != nil {
		s.client.Kill(reason)
	}
	s.v.dropSession(s, reason)
}

// Close ends the session. Requests that have not been let through are dropped;
// each one in flight gets its Complete now, also one that is in the log and not
// committed: it may yet be. Only reads that the disk has, or has next, wait for it.
func (s *Session) Close() {
	s.closed.Store(true)
	s.v.dropSession(s, ErrClosed)
}

func randomID() uint64 {
	var b [8]byte
	for {
		// rand.Read never fails (it ends the process rather than be weak).
		_, _ = rand.Read(b[:])
		if id := binary.LittleEndian.Uint64(b[:]); id != 0 {
			return id
		}
	}
}
