package replication

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// route takes a request one step further: to the replica of this node, to the
// primary's node, or to the held ones until there is a primary. It is called
// again with the same request whenever that step came to nothing.
func (v *Volume) route(r *Request) {
	if r.sess.replicaOf == "" && v.primaryHere.Load() {
		// The usual case on the primary takes no lock.
		if err := r.sess.admit(); err != nil {
			v.finish(r, err)
			return
		}
		v.submitLocal(r)
		return
	}
	to := v.targetOf(r)
	// The echo is captured before the client is checked (see admit).
	var echo int64
	if to != "" && to != v.opts.Node {
		echo = v.opts.Links.Echo(to)
	}
	if err := r.sess.admit(); err != nil {
		v.finish(r, err)
		return
	}
	v.routeTo(r, to, echo)
}

// targetOf returns the node that should have the request now, "" when none is
// known.
func (v *Volume) targetOf(r *Request) ident.Node {
	if r.sess.replicaOf != "" {
		return r.sess.replicaOf
	}
	v.cmu.Lock()
	defer v.cmu.Unlock()
	return v.view.Primary
}

func (v *Volume) routeTo(r *Request, to ident.Node, echo int64) {
	if to == v.opts.Node && v.rep() != nil {
		v.submitLocal(r)
		return
	}
	v.cmu.Lock()
	switch {
	case v.stopped || r.sess.closed.Load():
		v.cmu.Unlock()
		v.finish(r, ErrClosed) // never under the lock: it is the client's code
		return
	case to == "" || to == v.opts.Node || !v.up[to]:
		v.holdLocked(r)
	default:
		v.sendLocked(r, to, echo)
	}
	v.cmu.Unlock()
}

// sendLocked sends a request to another node and keeps it in the table until
// the reply. It holds the lock while it reads the request, so that nothing can
// complete it meanwhile.
func (v *Volume) sendLocked(r *Request, to ident.Node, echo int64) {
	v.nextID++
	r.id, r.target = v.nextID, to
	if !r.sent {
		r.lastSeen = v.seenLocked()
		// It can have an entry in the epoch of its primary at the earliest, so
		// behind the position of that one's promotion. What was seen of an older
		// epoch may lie beyond that: a forced failover gave it up.
		if r.lastSeen.Epoch < v.view.Epoch {
			r.lastSeen = ident.Position{Epoch: v.view.Epoch, Seq: v.view.Position.Seq}
		}
	}
	f := &wire.Forward{
		ID:         r.id,
		Op:         wireOp(r.Op),
		Off:        r.Offset,
		Len:        r.Length,
		Session:    r.session,
		Request:    r.number,
		Replay:     r.sent,
		LastSeen:   r.lastSeen,
		Generation: r.generation,
		Echo:       echo,
		PayloadCRC: r.crc,
	}
	r.sess.remote.Store(true)
	if r.FUA {
		f.Flags |= wire.ForwardFUA
	}
	if r.NoHole {
		f.Flags |= wire.ForwardNoHole
	}
	if r.ReqOne {
		f.Flags |= wire.ForwardReqOne
	}
	if r.committed {
		f.Flags |= wire.ForwardReplica
	}
	if r.Op == OpWrite {
		f.Payload = r.Data.Retain() // Send takes over one reference
	}
	r.sent = true
	v.table[r.id] = r
	v.forwardedLocked(r.id)
	v.opts.Links.Send(to, v.opts.Volume, f) // Settle lets it go
}

// holdLocked lets a request wait for a primary.
func (v *Volume) holdLocked(r *Request) {
	if r.heldSince == 0 {
		r.heldSince = v.clock.Boot()
	}
	v.held = append(v.held, r)
	if len(v.held) == 1 {
		// Only arms the timer. Looking again at once would make a ball of a
		// request that a primary without its lease yet sends back.
		signal(v.clientArm)
	}
}

// hold is holdLocked for a request that came back undone.
func (v *Volume) hold(r *Request) {
	v.cmu.Lock()
	if v.stopped || r.sess.closed.Load() {
		v.cmu.Unlock()
		v.finish(r, ErrClosed)
		return
	}
	v.holdLocked(r)
	v.cmu.Unlock()
}

// seenLocked returns the newest position that this node knows of: a request
// that is first sent now can only be in the log behind it.
func (v *Volume) seenLocked() ident.Position {
	if v.rep() != nil {
		if last := v.rep().gate.load().Last; v.seen.Less(last) {
			v.seen = last
		}
	}
	return v.seen
}

// askPositionLocked asks a primary elsewhere for its position, so that this
// node's first requests can be told apart from very old ones if they have to be
// sent again. The answer is of use or not; nobody waits for it.
func (v *Volume) askPositionLocked() {
	p := v.view.Primary
	if p == "" || p == v.opts.Node || !v.up[p] {
		return
	}
	v.nextID++ // nobody waits under it
	v.opts.Links.Send(p, v.opts.Volume, &wire.Forward{
		ID: v.nextID, Op: wire.OpRead, Len: blockSize, Generation: v.view.Generation, Echo: v.opts.Links.Echo(p),
	})
	v.opts.Links.Flush()
}

// signal wakes whoever waits on a channel of capacity one.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// runClient sends held requests on when there is somewhere to send them, and
// ends those that were held too long.
func (v *Volume) runClient(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-v.clientArm:
			timer.Reset(holdTick)
			continue
		case <-v.clientWake:
		case <-timer.C:
		}
		if v.releaseHeld() > 0 {
			timer.Reset(holdTick)
		}
	}
}

// releaseHeld routes every held request that has a target whose link is up, and
// returns how many go on waiting.
func (v *Volume) releaseHeld() int {
	now := v.clock.Boot()
	v.cmu.Lock()
	held := v.held
	v.held = v.heldSpare[:0]
	var hold core.Instant
	if v.view != nil {
		hold = core.Instant(v.view.HoldNanos)
	}
	v.cmu.Unlock()
	for _, r := range held {
		if hold > 0 && r.heldSince != 0 && now-r.heldSince > hold {
			v.finish(r, fmt.Errorf("%w: no primary for %v (on_no_quorum is error)", ErrIO, time.Duration(hold)))
			continue
		}
		v.route(r)
	}
	v.Settle()
	v.cmu.Lock()
	waiting := len(v.held)
	clear(held)
	v.heldSpare = held[:0]
	v.cmu.Unlock()
	return waiting
}

// lostReplies is the ID of a Reply that answers no request: the link that
// carries the sender's replies is up, and was not always. A node hears only of
// breaks of the link that it sends on, so this is how a forwarder learns that
// what it waits for may never come.
const lostReplies = 0

// handleReply ends, or sends on, a request that another node has answered.
func (v *Volume) handleReply(from ident.Node, m *wire.Reply, b *completions) {
	v.cmu.Lock()
	if v.seen.Less(m.Pos) {
		v.seen = m.Pos
	}
	if m.ID == lostReplies && m.Status == wire.StatusRetry {
		v.held = append(v.held, v.takeRemoteLocked(func(r *Request) bool { return r.target == from })...)
		v.cmu.Unlock()
		signal(v.clientWake)
		return
	}
	r := v.table[m.ID]
	if r == nil || r.target != from {
		v.cmu.Unlock()
		return
	}
	delete(v.table, m.ID)
	r.id = 0
	v.repliedLocked(m)
	v.cmu.Unlock()

	switch m.Status {
	case wire.StatusRange:
		if v.fits(r) {
			v.undone(r) // the volume has grown, and the primary has not heard of it yet
			return
		}
		v.finish(r, statusError(m.Status))
	case wire.StatusRetry, wire.StatusStaleEcho:
		v.undone(r)
	case wire.StatusOK:
		if err := r.takeReply(m); err != nil {
			v.finish(r, err)
			return
		}
		b.succeed(r)
	case wire.StatusGeneration:
		v.outlive(r)
	case wire.StatusIO, wire.StatusNoSpace, wire.StatusTooOld, wire.StatusUnsupported:
		v.finish(r, statusError(m.Status))
	default:
		v.finish(r, fmt.Errorf("%w: status %d from node %s, which may be newer", ErrUnsupported, m.Status, from))
	}
}

// undone takes back a request that its target did not carry out. When the view
// names another primary by now it goes there at once, else it waits for news or
// for the tick.
func (v *Volume) undone(r *Request) {
	if to := v.targetOf(r); to != "" && to != r.target && r.sess.replicaOf == "" {
		v.route(r)
		v.wakeLoop() // who gave it back may hold the turn, or a lock
		v.opts.Links.Flush()
		return
	}
	v.hold(r)
}

// wakeLoop lets the replica's loop look at what was left in the inbox.
func (v *Volume) wakeLoop() {
	if rp := v.rep(); rp != nil {
		signal(rp.in.wake)
	}
}

// takeReply copies the result of a read into the request.
func (r *Request) takeReply(m *wire.Reply) error {
	switch r.Op {
	case OpRead:
		if m.Payload == nil || len(m.Payload.B) != len(r.Data.B) {
			return fmt.Errorf("%w: the primary answered a read of %d bytes with another length", ErrIO, len(r.Data.B))
		}
		copy(r.Data.B, m.Payload.B)
	case OpBlockStatus:
		if m.Payload == nil {
			return fmt.Errorf("%w: the primary answered a block status with nothing", ErrIO)
		}
		var err error
		r.Extents, err = wire.DecodeExtents(r.Extents[:0], m.Payload.B)
		return err
	case OpWrite, OpFlush, OpTrim, OpZero, OpCache:
	}
	return nil
}

// statusError is the one place that turns a wire status into an error.
func statusError(s wire.Status) error {
	switch s {
	case wire.StatusOK:
		return nil
	case wire.StatusNoSpace:
		return ErrNoSpace
	case wire.StatusRange:
		return ErrRange
	case wire.StatusGeneration:
		return ErrGeneration
	case wire.StatusTooOld:
		return ErrTooOld
	case wire.StatusUnsupported:
		return ErrUnsupported
	case wire.StatusIO, wire.StatusRetry, wire.StatusStaleEcho:
	}
	return ErrIO
}

// finish completes a request. The request is its owner's again from here on.
func (v *Volume) finish(r *Request, err error) {
	r.sess = nil
	r.Complete(r, err)
}

// SetView hands the volume a newer cluster state of itself. An older one is
// ignored.
func (v *Volume) SetView(view core.View) {
	v.cmu.Lock()
	if v.rep() != nil {
		v.rep().setView(view) // before a request can be routed by it
	}
	if old := v.view; old != nil && (view.Epoch < old.Epoch || view.Epoch == old.Epoch && view.SetVersion < old.SetVersion) {
		v.cmu.Unlock()
		return
	}
	newEpoch := v.view == nil || view.Epoch > v.view.Epoch
	view.Set, view.Members = slices.Clone(view.Set), slices.Clone(view.Members)
	v.view = &view
	v.size.Store(view.Size)
	v.primaryHere.Store(v.rep() != nil && view.Primary == v.opts.Node && !v.stopped)
	if v.seen.Less(view.Position) {
		v.seen = view.Position
	}
	// In a new epoch everything is sent again, to the same node too: it may have
	// lost what it had in between.
	moved := v.takeRemoteLocked(func(r *Request) bool {
		return r.sess.replicaOf == "" && newEpoch
	})
	v.held = append(v.held, moved...)
	outlived := map[*Session]error{}
	for s := range v.sessions {
		if s.generation < view.Generation && s.replicaOf == "" {
			outlived[s] = s.outlivedBy(&view)
		}
	}
	v.cmu.Unlock()
	signal(v.clientWake)
	for s, reason := range outlived {
		s.end(reason)
	}
}

// takeRemoteLocked takes the requests that match out of the table of those sent
// elsewhere, to be sent again.
func (v *Volume) takeRemoteLocked(match func(*Request) bool) []*Request {
	var out []*Request
	for id, r := range v.table {
		if match(r) {
			delete(v.table, id)
			r.id = 0
			if r.heldSince == 0 {
				r.heldSince = v.clock.Boot()
			}
			out = append(out, r)
		}
	}
	return out
}

// dropSession ends what a session has under way and forgets it.
func (v *Volume) dropSession(s *Session, reason error) {
	mine := func(r *Request) bool { return r.sess == s }
	v.cmu.Lock()
	if _, ok := v.sessions[s]; !ok {
		v.cmu.Unlock()
		return
	}
	delete(v.sessions, s)
	drop := v.takeRemoteLocked(mine)
	v.held = slices.DeleteFunc(v.held, func(r *Request) bool {
		if mine(r) {
			drop = append(drop, r)
			return true
		}
		return false
	})
	p := v.view.Primary
	if s.remote.Load() && p != "" && p != v.opts.Node {
		// What the primary has not let through yet must not take effect later.
		v.opts.Links.Send(p, v.opts.Volume, &wire.Forward{Op: wire.OpForget, Session: s.id, Echo: v.opts.Links.Echo(p)})
		v.opts.Links.Flush()
	}
	v.cmu.Unlock()
	if v.rep() != nil {
		v.rep().in.forget(s.id)
	}
	for _, r := range drop {
		v.finish(r, reason)
	}
}

// PeerUp says that a link to the node is up (again). Whoever opens a volume
// calls it for each link that is up already.
func (v *Volume) PeerUp(node ident.Node) {
	v.cmu.Lock()
	v.up[node] = true
	if v.rep() != nil {
		v.rep().in.peer(node, true)
		v.reply(node, lostReplies, wire.StatusRetry, ident.Position{}, nil)
	}
	v.cmu.Unlock()
	v.opts.Links.Flush()
	signal(v.clientWake)
}

// PeerDown says that the link to the node is down: what was under way on it may
// be lost, and is sent again when there is a link, or another primary.
func (v *Volume) PeerDown(node ident.Node) {
	v.cmu.Lock()
	delete(v.up, node)
	if v.rep() != nil {
		v.rep().in.peer(node, false)
		v.rep().forgetForwarder(node)
	}
	v.held = append(v.held, v.takeRemoteLocked(func(r *Request) bool { return r.target == node })...)
	v.cmu.Unlock()
	signal(v.clientWake)
}
