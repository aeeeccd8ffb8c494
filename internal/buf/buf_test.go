package buf

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"unsafe"
)

// empty lets every free buffer go, so that a test begins with none.
func empty(t *testing.T) {
	t.Helper()
	Trim()
	Trim()
	if n := Idle(); n != 0 {
		t.Fatalf("%d bytes are free after two trims", n)
	}
}

func TestFreeBuffersOutliveCollections(t *testing.T) {
	empty(t)
	b := Get(5000)
	at := unsafe.SliceData(b.B)
	b.Release()
	for range 3 { // a sync.Pool is empty after two
		runtime.GC()
	}
	c := Get(4097)
	defer c.Release()
	if unsafe.SliceData(c.B) != at || len(c.B) != 4097 || cap(c.B) != 8192 || c.Size() != 8192 {
		t.Errorf("another buffer, or of another size: len %d, cap %d", len(c.B), cap(c.B))
	}
}

func TestKeepBoundsWhatIsFree(t *testing.T) {
	empty(t)
	defer SetKeep(keepDefault)
	held := InUse()
	SetKeep(held + 1<<20)
	var list []*Buf
	for range 64 {
		list = append(list, Get(64<<10))
	}
	if got := InUse() - held; got != 4<<20 {
		t.Fatalf("%d bytes are in use, want 4 MiB: the limit is for free ones", got)
	}
	for _, b := range list {
		b.Release()
	}
	if n := Idle(); n != 1<<20 {
		t.Errorf("%d bytes are kept free, want 1 MiB", n)
	}
	empty(t)
}

func TestTrimLetsGoWhatWasNotNeeded(t *testing.T) {
	empty(t)
	release := func(list []*Buf) {
		for _, b := range list {
			b.Release()
		}
	}
	get := func(n int) (list []*Buf) {
		for range n {
			list = append(list, Get(4096))
		}
		return list
	}
	release(get(10))
	if n := Trim(); n != 0 {
		t.Errorf("%d bytes were let go that had just been needed", n)
	}
	release(get(4)) // the other six were not needed
	if n := Trim(); n != 6*4096 {
		t.Errorf("%d bytes were let go, want those of 6 buffers", n)
	}
	if n := Trim(); n != 4*4096 || Idle() != 0 {
		t.Errorf("%d bytes were let go at last, %d are free", n, Idle())
	}
}

// Whatever goroutines do at once, a buffer has one owner, and what is counted is
// what is there.
func TestOneOwner(t *testing.T) {
	empty(t)
	held := InUse()
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 1))
			var mine []*Buf
			for range 20_000 {
				if r.IntN(2) == 0 && len(mine) < 20 {
					b := Get(512 << r.IntN(3))
					b.B[0], b.B[len(b.B)-1] = byte(g), byte(g)
					mine = append(mine, b)
					continue
				}
				if len(mine) > 0 {
					b := mine[len(mine)-1]
					mine = mine[:len(mine)-1]
					if b.B[0] != byte(g) || b.B[len(b.B)-1] != byte(g) {
						t.Errorf("a buffer of %d has the bytes of %d", g, b.B[0])
					}
					b.Release()
				}
			}
			for _, b := range mine {
				b.Release()
			}
		})
	}
	wg.Wait()
	if n := InUse(); n != held {
		t.Errorf("%d bytes are in use, %d before", n, held)
	}
	if n := Idle(); n < 0 || n > 8*20*2048*2 {
		t.Errorf("%d bytes are free", n)
	}
	empty(t)
}

// Two that meet on a stack may leave a hole below its top and a buffer above it
// (see stack): neither may keep a buffer from being let go.
func TestTrimFindsWhatASlipLeft(t *testing.T) {
	empty(t)
	list := []*Buf{Get(4096), Get(4096), Get(4096)}
	for _, b := range list {
		b.Release()
	}
	s := &free[classFor(4096)]
	hole := s.slots[1].Swap(nil)        // a push that found the slot full while a pop emptied it
	s.slots[s.top.Load()+2].Store(hole) // a pop that came before the push had stored
	Trim()
	empty(t)
	for i := range s.slots {
		if s.slots[i].Load() != nil {
			t.Errorf("slot %d holds a buffer", i)
		}
	}
}

func TestReleaseTooOftenPanics(t *testing.T) {
	b := Get(10)
	b.Release()
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	b.Release()
}

func TestLargerThanAny(t *testing.T) {
	held := InUse()
	b := Get(1<<classMax + 1)
	if InUse()-held != 1<<classMax+1 {
		t.Errorf("%d bytes are counted", InUse()-held)
	}
	b.Release()
	if InUse() != held {
		t.Errorf("%d bytes are in use, %d before", InUse(), held)
	}
}

func TestSteadyUseAllocatesNothing(t *testing.T) {
	Get(4096).Release()
	if n := testing.AllocsPerRun(1000, func() { Get(4096).Release() }); n != 0 {
		t.Errorf("it allocates %v times", n)
	}
}

func BenchmarkGetRelease(b *testing.B) {
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			Get(4096).Release()
		}
	})
}
