package sim

import (
	"flag"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"testing"
)

// TestMain trades memory for time: a history is short and makes much garbage.
func TestMain(m *testing.M) {
	debug.SetGCPercent(400)
	os.Exit(m.Run())
}

var (
	seedFlag   = flag.Uint64("seed", 0, "the one history to play (TestSeed)")
	eventsFlag = flag.Bool("events", false, "print one line an event (TestSeed)")
)

// seeds is how many histories TestHistories plays: BLOCKSTEP_SIM_SEEDS.
func seeds(t *testing.T) (from, n uint64) {
	n = 2000
	if testing.Short() || raced {
		n = 200
	}
	if v := os.Getenv("BLOCKSTEP_SIM_SEEDS"); v != "" {
		k, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("BLOCKSTEP_SIM_SEEDS=%s: %v", v, err)
		}
		n = k
	}
	if v := os.Getenv("BLOCKSTEP_SIM_FROM"); v != "" {
		k, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("BLOCKSTEP_SIM_FROM=%s: %v", v, err)
		}
		from = k
	}
	return from, n
}

// failuresMax is how many failing histories TestHistories reports.
func failuresMax() int {
	if n, err := strconv.Atoi(os.Getenv("BLOCKSTEP_SIM_FAILURES")); err == nil && n > 0 {
		return n
	}
	return 10
}

// tally is what the histories of a run came to.
type tally struct {
	sum      Result
	excused  map[string]int
	failures map[uint64]error // by seed
}

func (y *tally) add(seed uint64, r *Result) {
	y.sum.Events += r.Events
	y.sum.Entries += r.Entries
	y.sum.Answered += r.Answered
	y.sum.Reads += r.Reads
	y.sum.Epochs += r.Epochs
	y.sum.Losses += r.Losses
	if r.Excused != "" {
		y.excused[r.Excused]++
	}
	if r.Err != nil {
		y.failures[seed] = r.Err
	}
}

// playAll plays the histories from+1 … from+n, one a processor at a time, and
// begins no further one after most have failed. The seeds are begun in order, so
// the lowest that fails is the same in each run.
func playAll(t *testing.T, from, n uint64, most int) tally {
	y := tally{excused: map[string]int{}, failures: map[uint64]error{}}
	var mu sync.Mutex
	next := from
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				mu.Lock()
				if next == from+n || len(y.failures) >= most {
					mu.Unlock()
					return
				}
				next++
				seed := next
				if (seed-from)%10_000 == 0 {
					t.Logf("%d of %d begun, %d failed", seed-from, n, len(y.failures))
				}
				mu.Unlock()
				r := Run(Draw(seed))
				mu.Lock()
				y.add(seed, &r)
				if r.Err != nil {
					t.Logf("seed %d fails", seed)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return y
}

// TestHistories plays random histories. A failing one names the command that
// plays it again.
func TestHistories(t *testing.T) {
	from, n := seeds(t)
	y := playAll(t, from, n, failuresMax())
	for _, seed := range slices.Sorted(maps.Keys(y.failures)) {
		t.Errorf("seed %d: %v\nplay it again: go test -tags invariants ./internal/sim -run TestSeed -seed=%d -v -events", seed, y.failures[seed], seed)
	}
	sum := &y.sum
	t.Logf("%d events, %d entries, %d answers, %d reads, %d epochs, %d losses; not converged: %v",
		sum.Events, sum.Entries, sum.Answered, sum.Reads, sum.Epochs, sum.Losses, y.excused)
}

// TestSeed plays one history again.
func TestSeed(t *testing.T) {
	o := Draw(*seedFlag)
	if *eventsFlag {
		o.Trace = os.Stdout
		t.Logf("%+v", o)
	}
	if r := Run(o); r.Err != nil {
		t.Fatalf("seed %d: %v", *seedFlag, r.Err)
	}
}

// TestReplaysExactly plays histories twice: the same seed, the same trace.
func TestReplaysExactly(t *testing.T) {
	for seed := uint64(1); seed <= 20; seed++ {
		a, b := Run(Draw(seed)), Run(Draw(seed))
		if a.Hash != b.Hash || a.Events != b.Events {
			t.Fatalf("seed %d: %d events with hash %x, then %d with %x", seed, a.Events, a.Hash, b.Events, b.Hash)
		}
	}
}
