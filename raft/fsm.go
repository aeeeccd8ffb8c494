package raft

import (
	"fmt"
	"io"
	"sync/atomic"

	hraft "github.com/hashicorp/raft"

	"github.com/blockstep/blockstep/raft/state"
)

// fsm is raft.FSM over state.State. hashicorp/raft calls Apply, Snapshot and
// Restore from one goroutine; cur is read from any.
type fsm struct {
	cur     atomic.Pointer[state.State]
	halted  atomic.Pointer[error]
	changed func()      // after each change
	halt    func(error) // once, when a command cannot be understood
}

// snapshotMax bounds what Restore reads: the limits of package state leave it
// far below.
const snapshotMax = 256 << 20

// Apply does one command of the log.
func (f *fsm) Apply(l *hraft.Log) any {
	if err := f.stopped(); err != nil {
		return err
	}
	c, err := state.DecodeCommand(l.Data)
	if err != nil {
		// To skip it would make this node's state differ for ever from that of
		// nodes that understand it. The entry stays in the log, and a build
		// that knows it goes on from here.
		return f.stop(fmt.Errorf("cluster log entry %d: %w", l.Index, err))
	}
	next, res := f.cur.Load().Apply(c)
	f.cur.Store(next)
	f.changed()
	return res
}

// Snapshot hands over the state as it is: it never changes.
func (f *fsm) Snapshot() (hraft.FSMSnapshot, error) {
	if err := f.stopped(); err != nil {
		// It would claim to cover an entry that was not applied.
		return nil, err
	}
	return &snapshot{f.cur.Load()}, nil
}

// Restore replaces the state by a snapshot's.
func (f *fsm) Restore(r io.ReadCloser) error {
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, snapshotMax))
	if err != nil {
		return fmt.Errorf("read snapshot: %w", err)
	}
	s, err := state.Decode(b)
	if err != nil {
		return f.stop(err)
	}
	f.cur.Store(s)
	f.changed()
	return nil
}

func (f *fsm) stopped() error {
	if p := f.halted.Load(); p != nil {
		return *p
	}
	return nil
}

func (f *fsm) stop(err error) error {
	if f.halted.CompareAndSwap(nil, &err) {
		f.halt(err)
	}
	return err
}

type snapshot struct{ s *state.State }

// Persist writes the snapshot.
func (s *snapshot) Persist(sink hraft.SnapshotSink) error {
	b, err := s.s.Encode()
	if err == nil {
		_, err = sink.Write(b)
	}
	if err != nil {
		_ = sink.Cancel()
		return fmt.Errorf("write snapshot: %w", err)
	}
	return sink.Close()
}

// Release has nothing to give back.
func (s *snapshot) Release() {}
