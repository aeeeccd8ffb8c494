package sim

import (
	"flag"
	"os"
	"strconv"
	"testing"
)

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

// TestHistories plays random histories. A failing one names the command that
// plays it again.
func TestHistories(t *testing.T) {
	from, n := seeds(t)
	var sum Result
	failed, excused := 0, map[string]int{}
	for seed := from + 1; seed <= from+n; seed++ {
		r := Run(Draw(seed))
		sum.Events += r.Events
		sum.Entries += r.Entries
		sum.Answered += r.Answered
		sum.Reads += r.Reads
		sum.Epochs += r.Epochs
		sum.Losses += r.Losses
		if r.Excused != "" {
			excused[r.Excused]++
		}
		if r.Err != nil {
			t.Errorf("seed %d: %v\nplay it again: go test ./internal/sim -run TestSeed -seed=%d -v -events", seed, r.Err, seed)
			if failed++; failed >= failuresMax() {
				break
			}
		}
	}
	t.Logf("%d events, %d entries, %d answers, %d reads, %d epochs, %d power losses; not converged: %v",
		sum.Events, sum.Entries, sum.Answered, sum.Reads, sum.Epochs, sum.Losses, excused)
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
