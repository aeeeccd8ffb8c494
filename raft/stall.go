package raft

import (
	"context"
	"net"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

// hashicorp/raft sends heartbeats from goroutines that never touch the disk, so
// a leader whose disk hangs stays leader and can commit nothing: no volume
// could be failed over while it lasts. Therefore a node whose Raft store has
// had a write out for longer than StallTimeout hands the leadership over, if it
// has it, and falls silent on Raft's connections; the others elect a leader whose
// disk works. It speaks again as soon as the write returns, and learns of the
// newer term.

// diskWatch knows for how long the Raft store's writes have made no progress.
type diskWatch struct {
	mu    sync.Mutex
	out   int
	since time.Time // of the oldest write under way, or of the last that returned
	err   error     // of the last that returned
}

func (w *diskWatch) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.out == 0 {
		w.since = time.Now()
	}
	w.out++
}

func (w *diskWatch) end(err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.out--
	w.since, w.err = time.Now(), err
	return err
}

func (w *diskWatch) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// stalled returns for how long a write has been out; 0 when none is.
func (w *diskWatch) stalled() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.out == 0 {
		return 0
	}
	return time.Since(w.since)
}

// watchedStore is Raft's store with its writes under a diskWatch.
type watchedStore struct {
	*raftboltdb.BoltStore
	watch *diskWatch
}

func (s *watchedStore) StoreLog(l *hraft.Log) error {
	s.watch.begin()
	return s.watch.end(s.BoltStore.StoreLog(l))
}

func (s *watchedStore) StoreLogs(ls []*hraft.Log) error {
	s.watch.begin()
	return s.watch.end(s.BoltStore.StoreLogs(ls))
}

func (s *watchedStore) DeleteRange(lo, hi uint64) error {
	s.watch.begin()
	return s.watch.end(s.BoltStore.DeleteRange(lo, hi))
}

func (s *watchedStore) Set(k, v []byte) error {
	s.watch.begin()
	return s.watch.end(s.BoltStore.Set(k, v))
}

func (s *watchedStore) SetUint64(k []byte, v uint64) error {
	s.watch.begin()
	return s.watch.end(s.BoltStore.SetUint64(k, v))
}

// StoreError is why the Raft store could not be written when that was tried last,
// as on a disk that is full; nil when it could. It is tried again by itself.
func (n *Node) StoreError() error { return n.disk.failure() }

// abdicateMax is how long a node whose disk hangs looks for one that takes over, before it
// falls silent all the same: two that do not answer take it.
const abdicateMax = 2 * ioTimeout

// look is how long to wait until a write that is out may have been so for limit.
func (w *diskWatch) look(limit time.Duration) time.Duration {
	if d := w.stalled(); d > 0 && d <= limit {
		return limit - d + time.Millisecond
	}
	return limit / 10
}

// runDiskWatch mutes the stream while the store hangs.
func (n *Node) runDiskWatch() {
	defer n.wg.Done()
	muted := false
	for pause(n.ctx, n.disk.look(n.opts.StallTimeout)) {
		hangs := n.disk.stalled() > n.opts.StallTimeout
		switch {
		case hangs && !muted:
			n.log.Error("the disk of the cluster state hangs: this node falls silent in Raft, so that another one can lead",
				"dir", n.opts.Dir, "stall_timeout", n.opts.StallTimeout)
			n.abdicate()
			if hangs = n.disk.stalled() > n.opts.StallTimeout; !hangs {
				n.log.Info("the disk of the cluster state answers again")
				break // while somebody who does not answer was asked
			}
			n.stream.mute.set(true)
			n.trans.CloseStreams() // it would send its first requests for votes, later, on those that it keeps
		case !hangs && muted:
			n.log.Info("the disk of the cluster state answers again")
			n.stream.mute.set(false)
		}
		muted = hangs
	}
}

// abdicate has another node stand for election, if this one leads. From silence alone
// the others would find out after one to three times HeartbeatTimeout, and one of them
// that is first finds no votes, since the rest still believe in a leader. It is what
// hashicorp/raft sends at the end of a leadership transfer, which it cannot begin while
// its main goroutine stands in the write. It is safe at any time: whoever stands is
// elected only by a majority, and with a log as long as theirs. One is asked, since two
// that stand at once would take one another's votes.
func (n *Node) abdicate() {
	if n.raft.State() == hraft.Leader {
		n.offer()
	}
}

// offer is abdicate at a node that may lead no more and not know it, since all of it hung:
// who is asked says its term first, lest the new leader be unseated.
func (n *Node) offer() {
	f := n.raft.GetConfiguration()
	if f.Error() != nil {
		return
	}
	self, term := n.RaftID(), n.Term()
	header := hraft.RPCHeader{ProtocolVersion: hraft.ProtocolVersionMax, ID: []byte(self), Addr: n.trans.EncodePeer(hraft.ServerID(self), n.trans.LocalAddr())}
	begin := time.Now()
	for _, s := range f.Configuration().Servers {
		if string(s.ID) == self || s.Suffrage != hraft.Voter {
			continue
		}
		var there hraft.RequestPreVoteResponse // of term 0 it asks for nothing
		err := n.trans.RequestPreVote(s.ID, s.Address, &hraft.RequestPreVoteRequest{RPCHeader: header}, &there)
		if err == nil && there.Term > term {
			n.log.Info("raft: there has been another election already", "node", s.ID, "term", there.Term)
			return
		}
		if err == nil {
			err = n.trans.TimeoutNow(s.ID, s.Address, &hraft.TimeoutNowRequest{RPCHeader: header}, &hraft.TimeoutNowResponse{})
		}
		if err == nil {
			n.log.Info("raft: another node stands for election in the place of this one", "node", s.ID)
			return
		}
		n.log.Info("raft: a node does not take over", "node", s.ID, "err", err)
		if time.Since(begin) >= abdicateMax {
			return // they find out by themselves
		}
	}
}

// muteSwitch ends connections, and refuses new ones, while it is on.
type muteSwitch struct {
	mu     sync.Mutex
	ctx    context.Context // ends when it is switched on
	cancel context.CancelFunc
}

func newMuteSwitch() *muteSwitch {
	m := &muteSwitch{}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

func (m *muteSwitch) set(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cancel()
	if !on {
		m.ctx, m.cancel = context.WithCancel(context.Background())
	}
}

func (m *muteSwitch) context() context.Context {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ctx
}

// bind returns conn so that it is closed when the switch is turned on or ctx
// ends, at once when one of them has happened.
func (m *muteSwitch) bind(ctx context.Context, conn net.Conn) net.Conn {
	shut := func() { conn.Close() }
	stopMute := context.AfterFunc(m.context(), shut)
	stopEnd := context.AfterFunc(ctx, shut)
	return &boundConn{Conn: conn, stop: func() { stopMute(); stopEnd() }}
}
