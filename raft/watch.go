package raft

import "sync"

// watchers are told that something changed, not what: they look at State and
// Leader themselves, so that a slow one misses nothing and holds up nobody.
type watchers struct {
	mu  sync.Mutex
	set map[chan struct{}]struct{}
}

func (w *watchers) add() (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	ch <- struct{}{} // the state as it is now is news to a new watcher
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.set == nil {
		w.set = map[chan struct{}]struct{}{}
	}
	w.set[ch] = struct{}{}
	return ch, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.set, ch)
	}
}

func (w *watchers) wake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for ch := range w.set {
		select {
		case ch <- struct{}{}:
		default: // it has a wake-up waiting that covers this one
		}
	}
}

// Watch returns a channel that receives after changes of the cluster state or
// of the leader (several may be one), and at once for the state as it is. stop
// ends it; the channel is never closed.
func (n *Node) Watch() (changed <-chan struct{}, stop func()) { return n.watch.add() }
