package replication

import (
	"sync"
	"sync/atomic"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
)

// TestTurnsForgetNothing: many goroutines leave inputs and take the turn after
// each, or wake the loop. One at a time has it, each input is taken once, in the
// order of its sender, and none is left when all have returned.
func TestTurnsForgetNothing(t *testing.T) {
	const senders, each = 8, 2000
	b := newInbox()
	var (
		inTurn   atomic.Int32
		last     [senders]uint64 // of who has the turn
		taken    int
		loopDone = make(chan struct{})
		stop     = make(chan struct{})
	)
	// As in replica.step.
	step := func(rounds int) {
		if inTurn.Add(1) != 1 {
			t.Error("two goroutines have the turn")
		}
		for n := 1; ; n++ {
			if inTurn.Load() != 1 {
				t.Error("two goroutines have the turn")
			}
			// Given back before next or handOver gives the turn away.
			inTurn.Add(-1)
			batch, ok := b.next()
			if !ok {
				return
			}
			inTurn.Add(1)
			for i := range batch {
				s := batch[i].seq
				if batch[i].id != last[s]+1 {
					t.Errorf("input %d of sender %d comes after %d", batch[i].id, s, last[s])
				}
				last[s] = batch[i].id
				taken++
			}
			if n == rounds {
				inTurn.Add(-1)
				b.handOver()
				return
			}
		}
	}
	go func() {
		defer close(loopDone)
		done := stop
		for {
			if b.enter(true) {
				step(0)
			}
			if done == nil && b.end() {
				return
			}
			select {
			case <-done:
				done = nil
			case <-b.wake:
			}
		}
	}()
	var wg sync.WaitGroup
	for s := range senders {
		wg.Go(func() {
			for n := range uint64(each) {
				in := input{kind: inApplied, id: n + 1, seq: ident.Seq(s)}
				if s%2 == 0 {
					b.push(in)
					continue
				}
				b.pushQuiet(in)
				if b.enter(false) {
					step(3)
				}
			}
		})
	}
	wg.Wait()
	b.close()
	close(stop)
	<-loopDone
	if taken != senders*each || len(b.rest()) > 0 {
		t.Errorf("%d inputs were taken of %d", taken, senders*each)
	}
	if b.pushQuiet(input{}) || b.enter(false) || b.enter(true) {
		t.Error("a turn after the end")
	}
}

// TestEndWaitsForTheTurn: a replica does not end under the goroutine that is
// stepping it, and is told when that one is done.
func TestEndWaitsForTheTurn(t *testing.T) {
	b := newInbox()
	b.pushQuiet(input{})
	if !b.enter(false) || b.enter(false) || b.enter(true) {
		t.Fatal("the turn is not one goroutine's")
	}
	if _, ok := b.next(); !ok {
		t.Fatal("no input")
	}
	b.close()
	<-b.wake
	if b.end() {
		t.Fatal("ended under a turn")
	}
	if _, ok := b.next(); ok {
		t.Fatal("an input out of nothing")
	}
	select {
	case <-b.wake:
	default:
		t.Fatal("the loop is not told of the end of the last turn")
	}
	if !b.end() {
		t.Fatal("not ended")
	}
	b.tick()
	if b.enter(false) || b.enter(true) {
		t.Fatal("a turn after the end")
	}
}
