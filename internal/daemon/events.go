package daemon

import (
	"fmt"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/control"
)

// localEventsMax bounds the node-local events that are kept.
const localEventsMax = 1000

// localEvents keeps what this node noticed and the cluster state need not know:
// links, roles, catch-ups. They are lost with the process.
type localEvents struct {
	mu      sync.Mutex
	list    []localEvent
	next    uint64
	watches map[chan struct{}]struct{}
}

type localEvent struct {
	id uint64
	control.Event
}

func newLocalEvents() *localEvents {
	return &localEvents{next: 1, watches: map[chan struct{}]struct{}{}}
}

// add records an event now.
func (l *localEvents) add(e control.Event) {
	e.Time = time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.list) >= localEventsMax {
		l.list = append(l.list[:0:0], l.list[len(l.list)-localEventsMax/2:]...)
	}
	l.list = append(l.list, localEvent{id: l.next, Event: e})
	l.next++
	for ch := range l.watches {
		select {
		case ch <- struct{}{}:
		default: // it has a wake-up waiting that covers this one
		}
	}
}

// since lists the events with an id above cursor.
func (l *localEvents) since(cursor uint64) []localEvent {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []localEvent
	for _, e := range l.list {
		if e.id > cursor {
			out = append(out, e)
		}
	}
	return out
}

// watch returns a channel that receives after events are added; stop ends it.
func (l *localEvents) watch() (changed <-chan struct{}, stop func()) {
	ch := make(chan struct{}, 1)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.watches[ch] = struct{}{}
	return ch, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.watches, ch)
	}
}

// eventCursor is where a reader of events stands in the cluster's and in the
// node's own list: CLUSTER.LOCAL.
type eventCursor struct{ cluster, local uint64 }

func parseCursor(s string) (eventCursor, error) {
	var c eventCursor
	if s == "" {
		return c, nil
	}
	if _, err := fmt.Sscanf(s, "%d.%d", &c.cluster, &c.local); err != nil || s != c.String() {
		return c, control.Errorf(control.CodeUsage, "take the cursor field of blockstep events --json", "%q is not a cursor", s)
	}
	return c, nil
}

// String is the form that clients pass back.
func (c eventCursor) String() string { return fmt.Sprintf("%d.%d", c.cluster, c.local) }
