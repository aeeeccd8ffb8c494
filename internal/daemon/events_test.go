package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
)

// contiguous checks that each cursor goes one step on from the one before, in
// exactly one of the two lists: nothing is missing, nothing comes twice.
func contiguous(cursors []string) error {
	var at eventCursor
	for i, s := range cursors {
		c, err := parseCursor(s)
		if err != nil {
			return err
		}
		if c.instance != at.instance {
			at.local, at.instance = 0, c.instance
		}
		if c.cluster+c.local != at.cluster+at.local+1 || c.cluster < at.cluster || c.local < at.local {
			return fmt.Errorf("event %d: %s comes after %s", i, s, at)
		}
		at = c
	}
	return nil
}

// TestEventsHaveNoGap follows the events of a busy node over connections that
// break all the time, and over a restart.
func TestEventsHaveNoGap(t *testing.T) {
	alpha := newCluster(t, "")["alpha"]
	ctx, stop := context.WithCancel(t.Context())
	var mu sync.Mutex
	var cursors, kinds []string
	connections := 0
	done := make(chan struct{})
	go func() {
		defer close(done)
		enough := errors.New("enough")
		for since := ""; ctx.Err() == nil; {
			n := 0
			err := alpha.client.Follow(ctx, since, func() {}, func(e control.Event) error {
				mu.Lock()
				defer mu.Unlock()
				since = e.Cursor
				cursors, kinds = append(cursors, e.Cursor), append(kinds, e.Kind)
				if n++; n == 5 {
					connections++
					return enough // and the connection is dropped with what is on its way
				}
				return nil
			})
			if err != nil && !errors.Is(err, enough) && !errors.Is(err, control.ErrUnreachable) && ctx.Err() == nil {
				t.Errorf("following: %v", err)
				return
			}
		}
	}()
	seen := func(kind string, times int) {
		alpha.eventually(20*time.Second, fmt.Sprintf("%d events %s", times, kind), func(context.Context) error {
			mu.Lock()
			defer mu.Unlock()
			n := 0
			for _, k := range kinds {
				if k == kind {
					n++
				}
			}
			if n < times {
				return fmt.Errorf("only %d", n)
			}
			return nil
		})
	}
	for i := range 4 {
		if i == 2 {
			alpha.halt()
			alpha.start()
			alpha.eventually(20*time.Second, "it is back", func(ctx context.Context) error {
				_, err := alpha.client.Nodes(ctx)
				return err
			})
		}
		name := fmt.Sprintf("v%d", i)
		alpha.create(name, 1<<20)
		if err := alpha.client.DeleteVolume(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	seen("volume-deleted", 4)
	stop()
	<-done
	mu.Lock()
	defer mu.Unlock()
	if err := contiguous(cursors); err != nil {
		t.Errorf("%v; all are %v", err, cursors)
	}
	instances := map[string]bool{}
	for _, c := range cursors {
		instances[c[strings.LastIndexByte(c, '.'):]] = true
	}
	if len(instances) != 2 || connections < 5 {
		t.Errorf("%d processes, %d broken connections in %d events: the test has shown nothing", len(instances), connections, len(cursors))
	}
}

// TestEventsThatWereDropped: a reader that stayed away too long is told.
func TestEventsThatWereDropped(t *testing.T) {
	l := newLocalEvents()
	for i := range localEventsMax + 1 {
		l.add(control.Event{Text: fmt.Sprint(i)})
	}
	list, gap := l.since(1)
	if !gap || list[0].id == 2 || !slices.IsSortedFunc(list, func(a, b localEvent) int { return int(a.id) - int(b.id) }) {
		t.Errorf("gap %v, from %d", gap, list[0].id)
	}
	if _, gap := l.since(list[0].id - 1); gap {
		t.Error("a gap where nothing is missing")
	}
}

func TestAttachedVolumesAreNotDeleted(t *testing.T) {
	if err := attachedRefusal("db", nil); err != nil {
		t.Error(err)
	}
	err := attachedRefusal("db", map[ident.Node]string{"beta": "/dev/nbd3", "alpha": "/dev/nbd0"})
	want := "volume db is attached as /dev/nbd0 on alpha and as /dev/nbd3 on beta; unmount it there, run blockstep detach db on alpha and on beta, then delete it"
	var e *control.Error
	if !errors.As(err, &e) || e.Code != control.CodeRefused || err.Error() != want {
		t.Errorf("got %v", err)
	}
}

func TestAttachedOnTwoNodes(t *testing.T) {
	if w := attachedElsewhere("db", nil); w != nil {
		t.Errorf("got %v", w)
	}
	got := attachedElsewhere("db", map[ident.Node]string{"beta": "/dev/nbd3"})
	want := []control.Warning{{
		Volume: "db",
		Text:   "db is attached as /dev/nbd3 on beta too: only the file system of a cluster may be mounted by both",
		Next:   "before you mount it here, unmount it there, and run blockstep detach db on beta",
	}}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v", got)
	}
}
