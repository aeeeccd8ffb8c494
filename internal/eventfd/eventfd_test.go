package eventfd

import (
	"sync"
	"testing"
	"time"
)

func newEvent(t *testing.T) *Event {
	t.Helper()
	e, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// A Set before or during a Wait ends it, and each is seen once.
func TestSetEndsWait(t *testing.T) {
	e, back := newEvent(t), newEvent(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 1000 {
			e.Set()
			if !back.Wait(time.Minute) {
				t.Error("not waited")
			}
		}
	})
	began := time.Now()
	for range 1000 {
		if !e.Wait(time.Minute) {
			t.Error("not waited")
		}
		back.Set()
	}
	wg.Wait()
	if d := time.Since(began); d > 50*time.Second {
		t.Errorf("some of it timed out: %v", d)
	}
}

// Without a Set it takes its time, and an older Set counts once.
func TestWaitEnds(t *testing.T) {
	e := newEvent(t)
	e.Set()
	e.Set()
	const d = 20 * time.Millisecond
	for i, want := range []time.Duration{0, d, d} {
		began := time.Now()
		if !e.Wait(d) {
			t.Fatal("not waited")
		}
		if took := time.Since(began); took < want {
			t.Errorf("wait %d took %v, not %v", i, took, want)
		}
	}
}

// Who comes when enough wait is told so.
func TestFewWait(t *testing.T) {
	var wg sync.WaitGroup
	var events []*Event
	for range waitersMax {
		e := newEvent(t)
		events = append(events, e)
		wg.Go(func() {
			if !e.Wait(time.Minute) {
				t.Error("not waited")
			}
		})
	}
	for waiters.Load() < waitersMax {
		time.Sleep(time.Millisecond)
	}
	if newEvent(t).Wait(time.Minute) {
		t.Error("one too many has waited")
	}
	for _, e := range events {
		e.Set()
	}
	wg.Wait()
	if n := waiters.Load(); n != 0 {
		t.Errorf("%d wait", n)
	}
}

// Nothing is allocated for a wake-up.
func TestNoAllocation(t *testing.T) {
	e := newEvent(t)
	if n := testing.AllocsPerRun(100, func() { e.Set(); e.Wait(time.Second) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
