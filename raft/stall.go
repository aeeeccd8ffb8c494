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
// had a write out for longer than StallTimeout falls silent on Raft's
// connections; the others elect a leader whose disk works. It speaks again as
// soon as the write returns, and learns of the newer term.

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

// runDiskWatch mutes the stream while the store hangs.
func (n *Node) runDiskWatch() {
	defer n.wg.Done()
	muted := false
	for pause(n.ctx, n.opts.StallTimeout/10) {
		hangs := n.disk.stalled() > n.opts.StallTimeout
		switch {
		case hangs && !muted:
			n.log.Error("the disk of the cluster state hangs: this node falls silent in Raft, so that another one can lead",
				"dir", n.opts.Dir, "stall_timeout", n.opts.StallTimeout)
			n.stream.mute.set(true)
		case !hangs && muted:
			n.log.Info("the disk of the cluster state answers again")
			n.stream.mute.set(false)
		}
		muted = hangs
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
