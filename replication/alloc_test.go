package replication

import (
	"math/rand/v2"
	"testing"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/invariant"
)

// A request allocates nothing of its own on its way, wherever it falls: not in
// the steady state of one extent that is written over and over, and not where
// each write touches another part of the volume.
func TestRequestsAllocateNothing(t *testing.T) {
	if invariant.Enabled {
		t.Log("not measured: the checks that the race detector brings allocate")
		return
	}
	const size = 256 << 20
	v, s := openLone(t, size)
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
	at := uint64(0)
	next := func() uint64 { at += 4096; return at % (16 << 20) }
	rnd := rand.New(rand.NewPCG(1, 1))
	random := func() uint64 { return rnd.Uint64N(size/4096) * 4096 }
	for range 8192 { // warm
		do(OpWrite, random())
	}
	if err := v.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		op   Op
		off  func() uint64
	}{{"write", OpWrite, next}, {"write at random", OpWrite, random}, {"read", OpRead, next}, {"read at random", OpRead, random}} {
		if n := testing.AllocsPerRun(4000, func() { do(c.op, c.off()) }); n != 0 {
			t.Errorf("a %s allocates %v times", c.name, n)
		}
	}
}
