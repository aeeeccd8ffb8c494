package yield

import (
	"runtime"
	"sync/atomic"
	"testing"
)

// Who waits for the processor runs within a few turns.
func TestTurnLetsOthersRun(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	var ran atomic.Bool
	go ran.Store(true)
	for i := 0; !ran.Load(); i++ {
		if i == 1000 {
			t.Fatal("the other goroutine has not run in 1000 turns")
		}
		Turn()
	}
	if n := testing.AllocsPerRun(100, Turn); n != 0 {
		t.Errorf("a turn allocates %v times", n)
	}
}

func BenchmarkTurn(b *testing.B) {
	for b.Loop() {
		Turn()
	}
}

func BenchmarkGosched(b *testing.B) {
	for b.Loop() {
		runtime.Gosched()
	}
}
