package daemon

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/raft/state"
)

// localEventsMax bounds the node-local events that are kept.
const localEventsMax = 1000

// localEvents keeps what this node noticed and the cluster state need not know:
// links, roles, catch-ups. They are lost with the process, so their ids are
// worth something only together with its instance.
type localEvents struct {
	instance string // random, of this process

	mu      sync.Mutex
	list    []localEvent // ids rise by one
	next    uint64
	watches map[chan struct{}]struct{}
}

type localEvent struct {
	id uint64
	control.Event
}

func newLocalEvents() *localEvents {
	var b [instanceBytes]byte
	_, _ = rand.Read(b[:]) // it never fails: it stops the process instead
	return &localEvents{instance: hex.EncodeToString(b[:]), next: 1, watches: map[chan struct{}]struct{}{}}
}

// instanceBytes makes two processes of one node differ.
const instanceBytes = 4

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

// since lists the events with an id above cursor. gap says that some between
// cursor and the first one given have been dropped.
func (l *localEvents) since(cursor uint64) (out []localEvent, gap bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.list {
		if e.id > cursor {
			out = append(out, e)
		}
	}
	return out, len(out) > 0 && out[0].id > cursor+1
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

// eventCursor is where a reader of events stands in the cluster's list and in
// the own list of one process of a node: CLUSTER.LOCAL.INSTANCE.
type eventCursor struct {
	cluster, local uint64
	instance       string // "" before the first event of a node's own list
}

var cursorRule = regexp.MustCompile(`^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)(\.[0-9a-f]{8})?$`)

func parseCursor(s string) (eventCursor, error) {
	var c eventCursor
	if s == "" {
		return c, nil
	}
	bad := control.Errorf(control.CodeUsage, "take the cursor field of blockstep events --json", "%q is not a cursor", s)
	m := cursorRule.FindStringSubmatch(s)
	if m == nil {
		return c, bad
	}
	if _, err := fmt.Sscanf(m[1]+" "+m[2], "%d %d", &c.cluster, &c.local); err != nil {
		return c, bad
	}
	c.instance = strings.TrimPrefix(m[3], ".")
	return c, nil
}

// String is the form that clients pass back.
func (c eventCursor) String() string {
	s := fmt.Sprintf("%d.%d", c.cluster, c.local)
	if c.instance != "" {
		s += "." + c.instance
	}
	return s
}

// Events implements control.Backend. What a reader has got, and nothing else,
// is before the cursor of the last event that it has got: whoever asks again
// with that cursor misses nothing that is kept and gets nothing twice.
func (b backend) Events(ctx context.Context, since string, follow bool, emit func(control.Event) error) error {
	at, err := parseCursor(since)
	if err != nil {
		return err
	}
	if local := b.d.local; at.instance != local.instance {
		// Of an earlier process, or of another node: none of this list is known.
		at.local, at.instance = 0, local.instance
	}
	clusterNews, stop := b.d.raft.Watch()
	defer stop()
	localNews, stopLocal := b.d.local.watch()
	defer stopLocal()
	for last := !follow; ; {
		if err := b.emitEvents(&at, emit); err != nil || last {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-b.d.stopping:
			last = true // what came with the stop is still given
		case <-clusterNews:
		case <-localNews:
		}
	}
}

// emitEvents emits what is after the cursor. The two lists are merged by time,
// but each keeps its own order even where clocks disagree: a cursor says "all up
// to this id" of each.
func (b backend) emitEvents(at *eventCursor, emit func(control.Event) error) error {
	cluster, gap := b.d.state().EventsSince(at.cluster)
	local, localGap := b.d.local.since(at.local)
	give := func(e control.Event) error {
		e.Cursor = at.String()
		return emit(e)
	}
	if gap && at.cluster > 0 {
		at.cluster = cluster[0].ID - 1
		if err := give(gapEvent(time.Unix(0, cluster[0].Time), "the cluster's")); err != nil {
			return err
		}
	}
	if localGap && at.local > 0 {
		at.local = local[0].id - 1
		if err := give(gapEvent(local[0].Time, "this node's")); err != nil {
			return err
		}
	}
	for len(cluster)+len(local) > 0 {
		var e control.Event
		if len(cluster) == 0 || len(local) > 0 && local[0].Time.Before(time.Unix(0, cluster[0].Time)) {
			e, at.local = local[0].Event, local[0].id
			local = local[1:]
		} else {
			e, at.cluster = clusterEvent(cluster[0]), cluster[0].ID
			cluster = cluster[1:]
		}
		if err := give(e); err != nil {
			return err
		}
	}
	return nil
}

func clusterEvent(e state.Event) control.Event {
	return control.Event{Time: time.Unix(0, e.Time), Node: string(e.Node), Volume: e.Volume, Kind: e.Name, Text: e.Text}
}

func gapEvent(before time.Time, whose string) control.Event {
	return control.Event{Time: before, Kind: "gap", Text: whose + " events before this one have been dropped: too many came since the cursor"}
}
