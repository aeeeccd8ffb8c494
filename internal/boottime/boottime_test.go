package boottime

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// TestNowIsBootTime holds readings of several goroutines against the system
// call: never ahead of it, never far behind, never backwards.
func TestNowIsBootTime(t *testing.T) {
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			last := int64(0)
			for range 20000 {
				before := bootTime()
				now := Now()
				after := bootTime()
				if now < before-bracketMax || now > after {
					t.Errorf("%d is not within %d - %d and %d", now, before, bracketMax, after)
					return
				}
				if now < last-bracketMax {
					t.Errorf("%d after %d", now, last)
					return
				}
				last = now
			}
		})
	}
	wg.Wait()
}

// machine is a host whose clocks a test moves.
type machine struct {
	mono, wall, boot int64
	calls            int
	step             int64 // what each reading takes
}

func (m *machine) pass(d int64) { m.mono, m.wall, m.boot = m.mono+d, m.wall+d, m.boot+d }

func (m *machine) clock() *clock {
	times := func() (int64, int64) { m.pass(m.step); return m.mono, m.wall }
	return newClock(times, func() int64 { m.pass(m.step); m.calls++; return m.boot })
}

// TestSuspend moves clocks at random: time passes, the machine is suspended, the
// wall clock is set. A reading follows the clock through all of it, and the
// system call is rare when nothing happens.
func TestSuspend(t *testing.T) {
	const us, ms, s = int64(time.Microsecond), int64(time.Millisecond), int64(time.Second)
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		m := &machine{mono: r.Int64N(s), wall: 1e18 + r.Int64N(s), boot: r.Int64N(1000 * s), step: 50}
		c := m.clock()
		for range 1000 {
			switch r.IntN(10) {
			case 0: // suspended: the wall clock goes on, and may be set when it wakes
				d := slop + 1 + r.Int64N(100*s)
				m.boot, m.wall = m.boot+d, m.wall+d
			case 1:
				m.wall += r.Int64N(2*s) - s
			case 2:
				m.step = r.Int64N(bracketMax) // a busy machine
			default:
				m.pass(r.Int64N(10 * us))
				m.step = 50
			}
			before := m.boot
			got := c.read()
			if got > m.boot || got < before-bracketMax {
				t.Fatalf("seed %d: %d, and the clock shows %d (%d before the call)", seed, got, m.boot, before)
			}
		}
		m.step, m.calls = 50, 0
		for range 1000 {
			m.pass(10 * us)
			c.read()
		}
		if m.calls > 2 {
			t.Fatalf("seed %d: %d system calls in 10 ms in which nothing happened", seed, m.calls)
		}
		m.pass(200 * ms)
		if m.calls = 0; c.read() == 0 || m.calls == 0 {
			t.Fatalf("seed %d: a reading that is 200 ms old was trusted", seed)
		}
	}
}

func BenchmarkNow(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		Now()
	}
}

func BenchmarkSystemCall(b *testing.B) {
	for b.Loop() {
		bootTime()
	}
}
