package replication

import (
	"testing"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/invariant"
)

// A request allocates nothing of its own on its way. What is left is the growth
// of queues, and buffers that the garbage collector has taken from their pool.
func TestRequestsAllocateNothing(t *testing.T) {
	if invariant.Enabled {
		t.Log("not measured: the checks that the race detector brings allocate")
		return
	}
	v, s := openLone(t, 64<<20)
	data := buf.Get(4096)
	defer data.Release()
	done := make(chan error, 1)
	r := &Request{Complete: func(_ *Request, err error) { done <- err }}
	do := func(op Op, off uint64) {
		r.Op, r.Offset, r.Length, r.Data = op, off, 4096, data
		s.Submit(r)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	for i := range uint64(4096) { // warm
		do(OpWrite, i*4096)
	}
	if err := v.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	at := uint64(0)
	next := func() uint64 { at += 4096; return at % (16 << 20) }
	if n := testing.AllocsPerRun(2000, func() { do(OpWrite, next()) }); n > 1 {
		t.Errorf("a write allocates %v times", n)
	}
	if n := testing.AllocsPerRun(2000, func() { do(OpRead, next()) }); n >= 1 {
		t.Errorf("a read allocates %v times", n)
	}
}
