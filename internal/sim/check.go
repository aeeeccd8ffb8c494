package sim

import (
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// checker judges every step. It knows the one true log: whatever any replica
// has taken for committed, in order. From that follow the checks of reads
// (I3), of what may never be lost (I2), and of each replica's content (I4).
type checker struct {
	log   []entryID // committed; seq is index+1
	epoch []epochLog
	// floor is, for each block, the newest entry that an answered write or an
	// answered read has shown to somebody: no later read may show less.
	floor    []ident.Seq
	byReq    map[reqID]ident.Seq
	begun    map[reqID]begunAt
	losses   []loss
	lossAt   int64
	limbo    bool      // since the newest loss nobody has committed anything
	newest   ident.Seq // the newest answered write
	flushed  ident.Seq // what answered flushes cover
	sessions []uint64  // the cache generation of each
	fence    fence
	shown    map[uint64][]ident.Position
	copies   map[copyID]*copied

	answered, reads, moved int
}

type reqID struct{ session, request uint64 }

// begunAt is when a write was first asked for, and what it must come after.
type begunAt struct {
	at    int64
	after ident.Seq
}

// entryID is what tells entries apart.
type entryID struct {
	pos              ident.Position
	session, request uint64
	off, len         uint64
	kind             wire.Kind
}

func idOf(e *wire.Entry) entryID {
	return entryID{e.Pos, e.Session, e.Request, e.Off, e.Len, e.Kind}
}

// epochLog is every entry of one epoch that was ever written anywhere, and the
// entry before the first.
type epochLog struct {
	prev ident.Position
	ents []entryID
}

func (k *checker) init(s *Sim) {
	k.floor = make([]ident.Seq, s.blocksMax())
	k.byReq, k.begun = map[reqID]ident.Seq{}, map[reqID]begunAt{}
	k.shown, k.copies = map[uint64][]ident.Position{}, map[copyID]*copied{}
}

// append: one entry is written to a replica's log (log matching, I1).
func (k *checker) append(s *Sim, n *node, e *wire.Entry) {
	last := n.disk.log.last()
	if e.Pos.Seq != last.Seq+1 {
		s.fail("log", "node %s appends %v after %v", n.name, e.Pos, last)
	}
	for len(k.epoch) <= int(e.Pos.Epoch) {
		k.epoch = append(k.epoch, epochLog{})
	}
	ep := &k.epoch[e.Pos.Epoch]
	if len(ep.ents) == 0 {
		ep.prev = last
		ep.ents = append(ep.ents, idOf(e))
		return
	}
	i := int(e.Pos.Seq) - int(ep.ents[0].pos.Seq)
	switch {
	case i < 0 || i > len(ep.ents):
		s.fail("log matching", "node %s appends %v, epoch %d began at %v", n.name, e.Pos, e.Pos.Epoch, ep.ents[0].pos)
	case i == len(ep.ents):
		ep.ents = append(ep.ents, idOf(e))
	case ep.ents[i] != idOf(e):
		s.fail("I1", "two entries at %v: %+v and %+v at node %s", e.Pos, ep.ents[i], idOf(e), n.name)
	}
	if i == 0 && ep.prev != last {
		s.fail("log matching", "node %s has %v before %v, others %v", n.name, last, e.Pos, ep.prev)
	}
	if i > 0 && last != ep.ents[i-1].pos {
		s.fail("log matching", "node %s has %v before %v", n.name, last, e.Pos)
	}
}

// cut: entries after to are dropped from a replica's log.
func (k *checker) cut(s *Sim, n *node, to ident.Seq) {
	if to < n.disk.log.base.Seq || to > n.disk.log.last().Seq {
		s.fail("log", "node %s cuts %v to %d, base %v", n.name, n.disk.log.last(), to, n.disk.log.base)
	}
	if int(to) < len(k.log) {
		if e := n.disk.log.at(to + 1); e != nil && e.Pos == k.log[to].pos {
			s.fail("I2", "node %s cuts the committed entry %v", n.name, e.Pos)
		}
	}
}

func (k *checker) trim(s *Sim, n *node, to ident.Seq) {
	if to > n.disk.ckpt.Applied.Seq {
		s.fail("trim", "node %s recycles up to %d, its checkpoint is at %d", n.name, to, n.disk.ckpt.Applied.Seq)
	}
}

// meta: the durable state of the core has changed.
func (k *checker) meta(s *Sim, n *node) {
	if n.disk.meta.Promise < n.sealed {
		s.fail("I1", "node %s sealed %d and promises %d", n.name, n.sealed, n.disk.meta.Promise)
	}
	k.held(s, "after a change of meta")
}

// committed: the node takes more entries for committed.
func (k *checker) committed(s *Sim, n *node) {
	c := n.gate.Commit
	if c == n.commit {
		return
	}
	if c < n.commit && (s.local() || len(k.losses) > 0) {
		// It is primary no more: what it alone holds is no commit now. Or what it cuts
		// was given up.
		n.commit = c
		return
	}
	if c < n.commit {
		s.fail("commit", "node %s: the commit index falls from %d to %d", n.name, n.commit, c)
	}
	if p, ok := n.disk.log.pos(c); ok && k.dead(p) {
		return // of before a loss, and out of date
	}
	n.commit = c
	grown := false
	for int(c) > len(k.log) {
		e, ok := k.entry(n, ident.Seq(len(k.log)+1))
		if !ok && n.disk.failed {
			return // the others hold it; its own copy could not be written
		}
		if !ok {
			s.fail("commit", "node %s commits %d, its log is %v..%v", n.name, c, n.disk.log.base, n.disk.log.last())
		}
		if len(k.log) > 0 && !n.disk.failed && !n.disk.holds(k.log[len(k.log)-1].pos) {
			break
		}
		k.commit(s, e)
		grown = true
	}
	if int(c) > len(k.log) || c == 0 {
		s.fail("I1", "node %s commits up to %d in a log of its own, %d are committed", n.name, c, len(k.log))
	}
	if !n.disk.failed && !n.disk.holds(k.log[c-1].pos) {
		s.fail("I1", "node %s commits %v where %v is committed", n.name, n.disk.log.at(c).Pos, k.log[c-1].pos)
	}
	if grown {
		k.held(s, "after a commit")
	}
}

// entry returns an entry that a replica holds, held and has recycled, or, its
// disk having failed, was to write.
func (k *checker) entry(n *node, seq ident.Seq) (entryID, bool) {
	if e := n.disk.log.at(seq); e != nil {
		return idOf(e), true
	}
	epoch := n.gate.Epoch
	if seq <= n.disk.log.base.Seq {
		epoch = n.disk.epochAt(seq)
	}
	if int(epoch) < len(k.epoch) && len(k.epoch[epoch].ents) > 0 {
		ents := k.epoch[epoch].ents
		if i := int(seq) - int(ents[0].pos.Seq); i >= 0 && i < len(ents) {
			return ents[i], true
		}
	}
	return entryID{}, false
}

func (k *checker) commit(s *Sim, e entryID) {
	if s.tracing() {
		s.note(-1, "committed", "%v session %d request %d", e.pos, e.session, e.request)
	}
	k.log = append(k.log, e)
	loss := k.newestLoss()
	if e.pos.Epoch >= loss.epoch {
		k.limbo = false
	}
	if e.session == 0 {
		return
	}
	if g := k.sessions[e.session-1]; e.pos.Epoch >= loss.epoch && g < loss.generation {
		s.fail("I2", "session %d of generation %d writes %v, and since then something was lost", e.session, g, e.pos)
	}
	if g := k.sessions[e.session-1]; e.pos.Epoch >= k.fence.epoch && g < k.fence.generation {
		s.fail("fence", "session %d of generation %d writes %v, after a fence", e.session, g, e.pos)
	}
	r := reqID{e.session, e.request}
	if old, ok := k.byReq[r]; ok {
		s.fail("exactly once", "session %d request %d is in the log at %d and at %v", e.session, e.request, old, e.pos)
	}
	k.byReq[r] = e.pos.Seq
	if b := k.begun[r]; b.at >= k.lossAt && e.pos.Seq <= b.after {
		s.fail("I3", "session %d request %d began after %d had been seen and is at %v", e.session, e.request, b.after, e.pos)
	}
}

// begin: a client starts a request.
func (k *checker) begin(c *session) {
	o := &c.op
	o.flushed = k.newest
	var after ident.Seq
	o.floor = o.floor[:0]
	for b := o.block; b < o.block+o.blocks; b++ {
		o.floor = append(o.floor, k.floor[b])
		after = max(after, k.floor[b])
	}
	if o.kind == opWrite {
		k.begun[reqID{c.id, o.request}] = begunAt{o.invoked, after}
	}
}

// done: a client's request was answered with success.
func (k *checker) done(s *Sim, c *session, show []ident.Position) {
	o := &c.op
	// Before a loss, or at an old primary that has not heard of it.
	stale := o.invoked < k.lossAt || c.generation < k.newestLoss().generation
	switch o.kind {
	case opFlush:
		k.answered++
		if !stale {
			k.flush(s, o.flushed)
		}
	case opWrite:
		k.answered++
		seq, ok := k.byReq[reqID{c.id, o.request}]
		if stale {
			return
		}
		if !ok {
			s.fail("I2", "session %d request %d is answered and not committed", c.id, o.request)
		}
		k.newest = max(k.newest, seq)
		for b := o.block; b < o.block+o.blocks; b++ {
			k.floor[b] = max(k.floor[b], seq)
		}
		if o.fua || s.opt.Ack == core.AckDurable {
			k.flush(s, seq)
		}
	case opRead:
		k.reads++
		if !stale {
			k.read(s, c, show)
		}
	}
}

func (k *checker) flush(s *Sim, seq ident.Seq) {
	if seq > k.flushed {
		k.flushed = seq
		k.held(s, "after a flush")
	}
}

// read judges what a read showed: nothing older than what was known when it
// began, nothing that is not committed, and of each write all or nothing.
func (k *checker) read(s *Sim, c *session, show []ident.Position) {
	o := &c.op
	if len(show) != o.blocks {
		s.fail("sim", "a read of %d blocks shows %d", o.blocks, len(show))
	}
	for i, p := range show {
		b := o.block + i
		if p.Seq < o.floor[i] {
			s.fail("I3", "session %d request %d reads block %d as of %v, and %d had been seen before it began", c.id, o.request, b, p, o.floor[i])
		}
		if p.Seq == 0 {
			continue
		}
		if int(p.Seq) > len(k.log) || k.log[p.Seq-1].pos != p {
			s.fail("I3", "session %d request %d reads block %d as of %v, which is not committed", c.id, o.request, b, p)
		}
		e := &k.log[p.Seq-1]
		for j, q := range show {
			at := uint64(o.block+j) * blockSize
			if at >= e.off && at < e.off+e.len && q.Seq < p.Seq {
				s.fail("I5", "session %d request %d shows %v in block %d and not in block %d", c.id, o.request, p, b, o.block+j)
			}
		}
	}
	for i, p := range show {
		k.floor[o.block+i] = max(k.floor[o.block+i], p.Seq)
	}
}

// apply: an entry goes to a replica's backing store.
func (k *checker) apply(s *Sim, n *node, e *wire.Entry) {
	if e.Pos.Seq > n.disk.log.durable {
		s.fail("write-ahead", "node %s applies %v, its log is durable up to %d", n.name, e.Pos, n.disk.log.durable)
	}
	if k.dead(e.Pos) {
		return
	}
	if int(e.Pos.Seq) > len(k.log) || k.log[e.Pos.Seq-1].pos != e.Pos {
		s.fail("write-ahead", "node %s applies %v, which is not committed", n.name, e.Pos)
	}
}

// content: the backing store is exactly the log up to what was applied (I4).
func (k *checker) content(s *Sim, n *node) {
	done := int(n.apply.done)
	if n.apply.done < n.disk.store.applied || done > len(k.log) {
		return
	}
	if done > 0 && !n.disk.holds(k.log[done-1].pos) {
		return // of before a loss: it is to be resynced
	}
	want := make([]ident.Position, s.blocksMax())
	for i := range k.log[:done] {
		e := &k.log[i]
		if e.kind == wire.KindMarker {
			continue
		}
		for b := e.off / blockSize; b < (e.off+e.len)/blockSize; b++ {
			want[b] = e.pos
		}
	}
	for b, p := range n.disk.store.cur {
		if p != want[b] {
			s.fail("I4", "node %s has applied %d and holds %v in block %d instead of %v", n.name, n.apply.done, p, b, want[b])
		}
	}
}

// sent: a promise leaves the node.
func (k *checker) sent(s *Sim, n *node, o *core.Out) {
	d := &n.disk
	switch m := o.Msg.(type) {
	case *wire.Ack:
		if m.Epoch < n.sealed {
			s.fail("I1", "node %s acks epoch %d after it sealed %d", n.name, m.Epoch, n.sealed)
		}
		if m.Epoch > d.meta.Promise {
			s.fail("I1", "node %s acks epoch %d, its durable promise is %d", n.name, m.Epoch, d.meta.Promise)
		}
		if m.Matched > d.log.last().Seq || m.Durable > d.log.durable {
			s.fail("ack", "node %s acks matched %d durable %d, it has %v durable %d", n.name, m.Matched, m.Durable, d.log.last(), d.log.durable)
		}
	case *wire.Reject:
		if m.Epoch < n.sealed && m.LeaseSent != 0 {
			s.fail("I1", "node %s grants to epoch %d after it sealed %d", n.name, m.Epoch, n.sealed)
		}
	case *wire.ResyncState:
		k.asked(s, n, o.To, m)
	}
}

func (k *checker) sealed(s *Sim, n *node, a *ident.SealAnswer) {
	if a.Refusal != ident.SealAccepted {
		return
	}
	n.sealed = max(n.sealed, a.Epoch)
	if n.disk.meta.Promise < a.Epoch {
		s.fail("I1", "node %s seals %d, its durable promise is %d", n.name, a.Epoch, n.disk.meta.Promise)
	}
	if a.Last != n.disk.log.last() {
		s.fail("I1", "node %s seals at %v, its log ends at %v", n.name, a.Last, n.disk.log.last())
	}
}

// gateOpen: no two replicas may answer reads at the same time.
func (k *checker) gateOpen(s *Sim, n *node) {
	for _, m := range s.nodes {
		if m != n && m.openTo > s.now && !k.unfenced(m.openIn, n.openIn) {
			s.fail("lease", "nodes %s (epoch %d) and %s (epoch %d) both hold a valid lease", n.name, n.openIn, m.name, m.openIn)
		}
	}
}

func (k *checker) opened(s *Sim, n *node) {
	if n.disk.ckpt.Applied.Seq > n.disk.log.last().Seq {
		s.fail("I4", "node %s opens with checkpoint %d and log %v", n.name, n.disk.ckpt.Applied.Seq, n.disk.log.last())
	}
}

// reset: the replica becomes a resync target.
func (k *checker) reset(s *Sim, n *node, snap *core.Snapshot) {
	if s.cl.vol().InSet(n.name) {
		s.fail("I2", "node %s becomes a resync target while it is in the set", n.name)
	}
	if p := snap.Applied; p.Seq > 0 && !k.dead(p) && (int(p.Seq) > len(k.log) || k.log[p.Seq-1].pos != p) {
		s.fail("I4", "node %s begins anew at %v, which is not committed", n.name, p)
	}
}

// amnesiac says whether the replica, asked now or after its next start, says
// that it may have lost what it had acked.
func (n *node) amnesiac() bool {
	m := &n.disk.meta
	return m.Amnesiac || (m.bootID != n.boots && !m.clean)
}

// held checks the two properties that make every later promotion safe: of any
// |I|-W+1 replicas that a round may count, one holds the newest committed
// entry, and of any that a round after a power loss may count, one has all
// that was flushed.
func (k *checker) held(s *Sim, when string) {
	if len(k.log) == 0 || s.local() || k.limbo {
		return
	}
	v := s.cl.vol()
	may := len(v.InSync) - v.Majority()
	newest := k.log[len(k.log)-1].pos
	lack, lackFlush := 0, 0
	for _, name := range v.InSync {
		n := s.nodes[s.index(name)]
		if n.disk.broken() || v.Replica(name).Failed || v.Replica(name).Replica != n.disk.meta.replica {
			continue
		}
		if !n.amnesiac() && !n.disk.holds(newest) {
			lack++
		}
		if k.flushed > 0 && (n.disk.log.durable < k.flushed || !n.disk.holds(k.log[k.flushed-1].pos)) {
			lackFlush++
		}
	}
	if lack > may {
		s.fail("I2", "%s: %d of %v may be asked and do not hold the committed entry %v", when, lack, v.InSync, newest)
	}
	if lackFlush > may {
		s.fail("I2", "%s: %d of %v do not have the flushed entry %v on disk", when, lackFlush, v.InSync, k.log[k.flushed-1].pos)
	}
}
