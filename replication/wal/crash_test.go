package wal

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/wire"
)

var (
	crashSeed  = flag.Uint64("crash.seed", 0, "run this one seed of TestCrashes")
	crashSeeds = flag.Int("crash.seeds", 500, "how many seeds TestCrashes runs")
)

var errCrash = errors.New("the machine is off")

// crasher is a disk on which the machine goes off at a chosen change.
type crasher struct {
	rng  *rand.Rand
	left int // changes until then; negative: never
	off  bool
}

func (c *crasher) hook(call vfs.Call) error {
	if !c.off && call.Op.Mutates() && c.left >= 0 {
		if c.left == 0 {
			c.off = true
			if call.Op == vfs.OpWrite && c.rng.IntN(2) == 0 {
				// A write that a kill cuts short ends between two sectors.
				end := (call.Off + c.rng.Int64N(call.Len+1)) &^ 511
				return &vfs.Short{N: int(max(end-call.Off, 0)), Err: errCrash}
			}
		}
		c.left--
	}
	if c.off {
		return errCrash
	}
	return nil
}

// oracle says what the log must and may hold.
type oracle struct {
	t       testing.TB
	base    ident.Position // of the log since its last reset
	entries []wire.Entry   // after base, without payload: all that was appended and not cut
	durable ident.Seq      // at least
	trimmed ident.Seq      // the first entry may be at most the next one
	request uint64
	epoch   ident.Epoch

	// What an operation that the crash cut short may have left.
	tentative []wire.Entry    // an append
	reset     *ident.Position // the base of a reset
	cut       bool            // a cut, not below durable
}

func (o *oracle) last() ident.Position {
	if n := len(o.entries); n > 0 {
		return o.entries[n-1].Pos
	}
	return o.base
}

func (o *oracle) cutTo(after ident.Seq) {
	o.entries = o.entries[:after-o.base.Seq]
}

// batch makes entries to append.
func (o *oracle) batch(rng *rand.Rand) []wire.Entry {
	if rng.IntN(10) == 0 {
		o.epoch += ident.Epoch(1 + rng.IntN(2))
	}
	var es []wire.Entry
	next := o.last().Seq + 1
	for i := range 1 + rng.IntN(6) {
		o.request++
		n := rng.IntN(1500)
		switch rng.IntN(30) {
		case 0:
			n = 8 << 10 // does not fit into a segment
		case 1:
			n = 0
		}
		es = append(es, entry(o.epoch, next+ident.Seq(i), o.request, n))
	}
	return es
}

// recovered compares a reopened log with what may be, and goes on from it.
func (o *oracle) recovered(r Recovery, killed bool) error {
	if o.reset != nil && r.Base == *o.reset && r.Last == r.Base {
		*o = oracle{t: o.t, base: r.Base, durable: r.Base.Seq, trimmed: r.Base.Seq, request: o.request, epoch: o.epoch}
		return nil
	}
	want := append(o.entries[:len(o.entries):len(o.entries)], o.tentative...)
	killed = killed && !o.cut
	o.tentative, o.reset, o.cut = nil, nil, false
	if r.Base.Seq < o.base.Seq || r.Base.Seq > max(o.trimmed, o.base.Seq) {
		return fmt.Errorf("begins after %s; created after %s, trimmed to %d", r.Base, o.base, o.trimmed)
	}
	if r.Last.Seq < o.durable {
		return fmt.Errorf("ends at %s, but %d was durable", r.Last, o.durable)
	}
	if killed && r.Last.Seq < o.last().Seq {
		return fmt.Errorf("ends at %s after a kill, but %s was written", r.Last, o.last())
	}
	if n := o.base.Seq + ident.Seq(len(want)); r.Last.Seq > n {
		return fmt.Errorf("ends at %s, but only %d was ever appended", r.Last, n)
	}
	o.entries = want[:r.Last.Seq-o.base.Seq]
	if o.last() != r.Last {
		return fmt.Errorf("ends at %s, want %s", r.Last, o.last())
	}
	o.durable = r.Last.Seq // Open syncs
	return nil
}

// compare reads all that the log has.
func (o *oracle) compare(l *Log) error {
	if l.Last() != o.last() {
		return fmt.Errorf("last is %s, want %s", l.Last(), o.last())
	}
	if l.Base().Seq == l.Last().Seq {
		return nil
	}
	got, err := l.Read(l.First(), 1<<30, nil)
	if err != nil {
		return err
	}
	want := o.entries[l.Base().Seq-o.base.Seq:]
	if len(got) != len(want) {
		return fmt.Errorf("read %d entries, want %d", len(got), len(want))
	}
	for i := range got {
		g, w := got[i], want[i]
		full := entry(w.Pos.Epoch, w.Pos.Seq, w.Request, int(w.Len))
		same(o.t, &g, &full)
		if l2, ok := l.EpochAt(w.Pos.Seq); !ok || l2 != w.Pos.Epoch {
			return fmt.Errorf("EpochAt(%d) = %d, %v, want %d", w.Pos.Seq, l2, ok, w.Pos.Epoch)
		}
		g.Payload.Release()
		full.Payload.Release()
	}
	return nil
}

// step does one thing to the log, and to the oracle what is certain of it.
func (o *oracle) step(l *Log, rng *rand.Rand) error {
	switch k := rng.IntN(100); {
	case k < 60:
		es := o.batch(rng)
		bare := make([]wire.Entry, len(es))
		for i, e := range es {
			bare[i] = e
			bare[i].Payload = nil
		}
		o.tentative = bare
		err := l.Append(es, l.Durable())
		for i := range es {
			es[i].Payload.Release()
		}
		if err == nil {
			o.entries, o.tentative = append(o.entries, bare...), nil
		}
		return err
	case k < 80:
		seq, err := l.Sync()
		o.durable = max(o.durable, seq)
		if err == nil && seq != o.last().Seq {
			return fmt.Errorf("sync said %d, appended is %s", seq, o.last())
		}
		return err
	case k < 88:
		low := max(l.Base().Seq, o.base.Seq)
		after := low + ident.Seq(rng.Uint64N(uint64(o.last().Seq-low)+1))
		o.durable, o.cut = min(o.durable, after), true
		if err := l.Truncate(after); err != nil {
			return err
		}
		if after < o.last().Seq {
			o.durable = after
		}
		o.cut = false
		o.cutTo(after)
		return nil
	case k < 99:
		to := o.base.Seq + ident.Seq(rng.Uint64N(uint64(o.last().Seq-o.base.Seq)+1))
		o.trimmed = max(o.trimmed, min(to, l.Durable()))
		return l.TrimTo(to)
	default:
		at := pos(o.epoch, o.last().Seq+ident.Seq(rng.IntN(5)))
		o.reset = &at
		if err := l.Reset(at); err != nil {
			return err
		}
		*o = oracle{t: o.t, base: at, durable: at.Seq, trimmed: at.Seq, request: o.request, epoch: o.epoch}
		return nil
	}
}

// TestCrashes runs random operations with a crash at a random change of the
// disk, a random subset of what was not synced lost, and the log opened again,
// several times over. Crashes within recovery are among them.
func TestCrashes(t *testing.T) {
	if *crashSeed != 0 {
		crashRun(t, *crashSeed)
		return
	}
	seeds := *crashSeeds
	if raceEnabled {
		seeds /= 10 // nothing here runs at the same time
	}
	for seed := range uint64(seeds) {
		crashRun(t, seed+1)
	}
}

func crashRun(t *testing.T, seed uint64) {
	fail := func(round int, err error) {
		t.Helper()
		t.Fatalf("round %d: %v\nreplay: go test ./replication/wal -run TestCrashes -crash.seed=%d", round, err, seed)
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	mem := vfs.NewMem(seed)
	must(t, mem.MkdirAll("/"))
	disk := &crasher{rng: rng, left: -1}
	fs := vfs.Inject(mem, disk.hook)
	opts := small(seed)
	l, err := Create(fs, logDir, pos(0, 0), opts)
	must(t, err)
	o := &oracle{t: t, epoch: 1}
	for round := range 8 {
		disk.left = rng.IntN(60)
		for err == nil {
			err = o.step(l, rng)
		}
		for killed := true; ; {
			if !errors.Is(err, errCrash) {
				fail(round, err)
			}
			if l != nil {
				_ = l.Close()
			}
			if rng.IntN(3) == 0 {
				mem.Kill()
			} else {
				killed = false
				mem.Crash()
			}
			disk.off, disk.left = false, -1
			if rng.IntN(3) == 0 {
				disk.left = rng.IntN(6) // within the recovery
			}
			var r Recovery
			l, r, err = Open(fs, logDir, opts)
			if err != nil {
				continue
			}
			if err := o.recovered(r, killed); err != nil {
				fail(round, fmt.Errorf("killed %v, recovered %+v: %w", killed, r, err))
			}
			killed = true
			if disk.off {
				err = errCrash // met by the housekeeping after the recovery
				continue
			}
			disk.left = -1
			if err := o.compare(l); err != nil {
				fail(round, err)
			}
			break
		}
	}
	_ = l.Close()
}

// A kill in the middle of a cut leaves segments void in the page cache only. A
// log that is said to end before them must not end behind them after a power
// cut, whichever part of that reaches the disk.
func TestVoidedByAKilledProcess(t *testing.T) {
	for seed := range uint64(40) {
		mem := vfs.NewMem(seed)
		armed := false
		fs := vfs.Inject(mem, func(c vfs.Call) error {
			if armed && c.Op == vfs.OpSync {
				return errCrash
			}
			return nil
		})
		l := create(t, fs, small(seed))
		must(t, l.Append(entries(1, 1, 30, 1000), 0))
		syncTo(t, l, 30)
		armed = true
		if err := l.Truncate(10); !errors.Is(err, errCrash) {
			t.Fatalf("seed %d: %v", seed, err)
		}
		mem.Kill()
		// The power goes before the housekeeping has written anything.
		_, first := reopen(t, vfs.Inject(mem, func(c vfs.Call) error {
			if c.Op == vfs.OpWrite {
				return errCrash
			}
			return nil
		}), small(seed))
		mem.Crash()
		l, second := reopen(t, mem, small(seed))
		if first.Last != second.Last {
			t.Fatalf("seed %d: the log ended at %s, and after a power cut at %s", seed, first.Last, second.Last)
		}
		check(t, l, entries(1, 1, second.Last.Seq, 1000))
	}
}
