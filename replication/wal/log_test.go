package wal

import (
	"bytes"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/wire"
)

const logDir = "/log"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// small are options under which everything happens often, and always alike.
func small(seed uint64) Options {
	rng := rand.New(rand.NewPCG(seed, 2))
	return Options{
		Volume: 0xa1, Replica: 0xb2, SegmentBytes: 8 << 10, RetentionBytes: -1, SpareBytes: 16 << 10,
		Inline: true, NewID: rng.Uint64,
	}
}

func pos(epoch ident.Epoch, seq ident.Seq) ident.Position {
	return ident.Position{Epoch: epoch, Seq: seq}
}

// entry makes a data entry whose payload depends on its position and request.
func entry(epoch ident.Epoch, seq ident.Seq, request uint64, n int) wire.Entry {
	e := wire.Entry{
		Pos: pos(epoch, seq), Kind: wire.KindData, Off: uint64(seq) * 4096, Len: uint64(n),
		Session: 7, Request: request,
	}
	if n > 0 {
		e.Payload = buf.Get(n)
		fill(e.Payload.B, e.Pos, request)
		e.PayloadCRC = crc32.Checksum(e.Payload.B, castagnoli)
	}
	return e
}

func fill(p []byte, at ident.Position, request uint64) {
	x := uint64(at.Epoch)<<48 ^ uint64(at.Seq)<<24 ^ request
	for i := range p {
		x = x*6364136223846793005 + 1442695040888963407
		p[i] = byte(x >> 56)
	}
}

// entries makes entries of one epoch, whose requests are their seqs.
func entries(epoch ident.Epoch, from, to ident.Seq, n int) []wire.Entry {
	var es []wire.Entry
	for s := from; s <= to; s++ {
		es = append(es, entry(epoch, s, uint64(s), n))
	}
	return es
}

func create(t testing.TB, fs vfs.FS, o Options) *Log {
	t.Helper()
	l, err := Create(fs, logDir, pos(0, 0), o)
	must(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func reopen(t testing.TB, fs vfs.FS, o Options) (*Log, Recovery) {
	t.Helper()
	l, r, err := Open(fs, logDir, o)
	must(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return l, r
}

func syncTo(t testing.TB, l *Log, want ident.Seq) {
	t.Helper()
	got, err := l.Sync()
	must(t, err)
	if got != want || l.Durable() != want {
		t.Fatalf("durable is %d and %d, want %d", got, l.Durable(), want)
	}
}

// check reads the whole log and compares it with what it should hold.
func check(t testing.TB, l *Log, want []wire.Entry) {
	t.Helper()
	if len(want) == 0 {
		if l.Last() != l.Base() {
			t.Fatalf("log holds %s to %s, want none", l.Base(), l.Last())
		}
		return
	}
	if first, last := want[0].Pos.Seq, want[len(want)-1].Pos; l.First() != first || l.Last() != last {
		t.Fatalf("log holds %d to %s, want %d to %s", l.First(), l.Last(), first, last)
	}
	got, err := l.Read(want[0].Pos.Seq, 1<<30, nil)
	must(t, err)
	if len(got) != len(want) {
		t.Fatalf("read %d entries, want %d", len(got), len(want))
	}
	for i := range got {
		same(t, &got[i], &want[i])
		if e, ok := l.EpochAt(got[i].Pos.Seq); !ok || e != got[i].Pos.Epoch {
			t.Fatalf("EpochAt(%d) = %d, %v, want %d", got[i].Pos.Seq, e, ok, got[i].Pos.Epoch)
		}
		got[i].Payload.Release()
	}
	i := 0
	must(t, l.Scan(l.First(), func(e *wire.Entry) error {
		w := want[i]
		w.Payload = nil
		if *e != w {
			t.Fatalf("scanned %+v, want %+v", *e, w)
		}
		i++
		return nil
	}))
	if i != len(want) {
		t.Fatalf("scanned %d entries, want %d", i, len(want))
	}
}

func same(t testing.TB, got, want *wire.Entry) {
	t.Helper()
	a, b := *got, *want
	a.Payload, b.Payload = nil, nil
	if a != b {
		t.Fatalf("read %+v, want %+v", a, b)
	}
	if got.PayloadLen() != want.PayloadLen() || got.PayloadLen() > 0 && !bytes.Equal(got.Payload.B, want.Payload.B) {
		t.Fatalf("payload of %s differs", got.Pos)
	}
}

func TestAppendReadReopen(t *testing.T) {
	for name, fs := range map[string]vfs.FS{"mem": vfs.NewMem(1), "os": vfs.OS()} {
		t.Run(name, func(t *testing.T) {
			dir := logDir
			if name == "os" {
				dir = t.TempDir() + "/log"
			}
			o := small(1)
			l, err := Create(fs, dir, pos(3, 10), o)
			must(t, err)
			want := entries(3, 11, 30, 1000)
			want = append(want, entry(4, 31, 31, 0), entry(4, 32, 32, 1), entry(4, 33, 33, 200_000), entry(6, 34, 34, 4096))
			want[20].Kind, want[20].Len, want[20].Flags = wire.KindZero, 1<<40, wire.FlagNoHole
			must(t, l.Append(want[:1], 0))
			must(t, l.Append(want[1:], 0))
			check(t, l, want)
			if _, err := Create(fs, dir, pos(0, 0), o); !errors.Is(err, ErrExists) {
				t.Fatalf("created over a log: %v", err)
			}
			must(t, l.Close())
			l, r, err := Open(fs, dir, o)
			must(t, err)
			check(t, l, want)
			if r.Base != pos(3, 10) || r.Last != pos(6, 34) || r.Durable != 10 || r.CutBytes != 0 || l.Durable() != 34 {
				t.Fatalf("recovered %+v, durable %d", r, l.Durable())
			}
			if h := r.History; len(h) != 3 || h[0] != (ident.EpochStart{Epoch: 3, First: 10}) ||
				h[1] != (ident.EpochStart{Epoch: 4, First: 31}) || h[2] != (ident.EpochStart{Epoch: 6, First: 34}) {
				t.Fatalf("history %v", h)
			}
			p := make([]byte, 100)
			must(t, l.ReadPayload(33, 150_000, p))
			if !bytes.Equal(p, want[22].Payload.B[150_000:150_100]) {
				t.Fatal("part of a payload differs")
			}
			if err := l.ReadPayload(33, 199_950, p); !errors.Is(err, ErrInvalid) {
				t.Fatalf("read beyond a payload: %v", err)
			}
			if err := l.ReadPayload(35, 0, p); !errors.Is(err, ErrInvalid) {
				t.Fatalf("read beyond the log: %v", err)
			}
			if err := l.ReadPayload(10, 0, p); !errors.Is(err, ErrTrimmed) {
				t.Fatalf("read before the log: %v", err)
			}
			must(t, l.Close())
		})
	}
}

func TestReadStopsAtMaxBytes(t *testing.T) {
	l := create(t, vfs.NewMem(1), small(1))
	must(t, l.Append(entries(1, 1, 20, 1000), 0))
	for _, c := range []struct {
		from ident.Seq
		max  int
		want int
	}{{1, 0, 1}, {1, 1, 1}, {1, 2500, 3}, {5, 1 << 20, 16}, {20, 1 << 20, 1}, {21, 1 << 20, 0}, {99, 1, 0}} {
		got, err := l.Read(c.from, c.max, nil)
		must(t, err)
		if len(got) != c.want {
			t.Errorf("Read(%d, %d) gave %d entries, want %d", c.from, c.max, len(got), c.want)
		}
	}
}

func TestAppendRefuses(t *testing.T) {
	l := create(t, vfs.NewMem(1), small(1))
	must(t, l.Append(entries(3, 1, 2, 10), 0))
	cut := entry(3, 3, 0, 0)
	cut.Kind = kindCut
	for name, e := range map[string]wire.Entry{
		"gap": entry(3, 4, 0, 0), "repeat": entry(3, 2, 0, 0), "epoch falls": entry(2, 3, 0, 0), "cut": cut,
	} {
		if err := l.Append([]wire.Entry{e}, 0); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	must(t, l.Append(entries(3, 3, 3, 10), 0)) // nothing has changed
	if err := l.Truncate(0); err != nil {
		t.Fatal(err)
	}
	must(t, l.Reset(pos(5, 50)))
	if err := l.Truncate(49); !errors.Is(err, ErrInvalid) {
		t.Fatalf("cut before the base: %v", err)
	}
}

func TestTruncate(t *testing.T) {
	for after := ident.Seq(0); after <= 30; after++ {
		fs := vfs.NewMem(uint64(after))
		o := small(1)
		l := create(t, fs, o)
		old := append(entries(1, 1, 20, 900), entries(2, 21, 30, 900)...)
		must(t, l.Append(old, 0))
		must(t, l.Truncate(after))
		want := old[:after]
		check(t, l, want)
		if l.Durable() != after && after < 30 {
			t.Fatalf("durable is %d after a cut at %d", l.Durable(), after)
		}
		fs.Crash() // a cut needs no Sync
		if after == 30 {
			continue // nothing was cut, so nothing was synced
		}
		l, _ = reopen(t, fs, o)
		check(t, l, want)
		// Seqs of the old branch in an epoch of the new one, then a cut again.
		next := entries(3, after+1, after+12, 333)
		must(t, l.Append(next, l.Durable()))
		must(t, l.Truncate(after+5))
		fs.Crash()
		l, _ = reopen(t, fs, o)
		check(t, l, append(old[:after:after], next[:5]...))
	}
}

func TestTrimKeepsRetention(t *testing.T) {
	fs := vfs.NewMem(1)
	o := small(1)
	o.RetentionBytes = 20 << 10
	l := create(t, fs, o)
	want := entries(1, 1, 60, 1000)
	must(t, l.Append(want, 0))
	must(t, l.TrimTo(60))
	if l.First() != 1 {
		t.Fatal("trimmed what is not durable")
	}
	syncTo(t, l, 60)
	must(t, l.TrimTo(3))
	if l.First() != 1 {
		t.Fatalf("trimmed a segment that is needed: first is %d", l.First())
	}
	must(t, l.TrimTo(60))
	if got := l.Bytes(); got < 20<<10 || got > 30<<10 {
		t.Fatalf("kept %d bytes, want 20 KiB and at most a segment more", got)
	}
	first := l.First()
	check(t, l, want[first-1:])
	if h := l.History(); len(h) != 1 || h[0] != (ident.EpochStart{Epoch: 1, First: first - 1}) {
		t.Fatalf("history %v", h)
	}
	if _, err := l.Read(first-1, 1, nil); !errors.Is(err, ErrTrimmed) {
		t.Fatalf("read before the log: %v", err)
	}
	l, _ = reopen(t, fs, o)
	check(t, l, want[first-1:])
}

func TestRecyclingKeepsTheNumberOfFiles(t *testing.T) {
	fs := vfs.NewMem(1)
	l := create(t, fs, small(1))
	for s := ident.Seq(1); s <= 500; s++ {
		must(t, l.Append(entries(1, s, s, 1000), l.Durable()))
		if s%3 == 0 {
			syncTo(t, l, s)
			must(t, l.TrimTo(s))
		}
	}
	names, err := fs.List(logDir)
	must(t, err)
	if len(names) > 2+l.sparesMax() {
		t.Fatalf("%d files for a log of one segment: %v", len(names), names)
	}
}

// TestOneTrimGivesBackMany: a checkpoint gives back many segments at once. As
// many as SpareBytes, or SetSpare, says are used again, so no file is made or removed
// then.
func TestOneTrimGivesBackMany(t *testing.T) {
	fs := vfs.NewMem(1)
	o := small(1)
	l := create(t, fs, o)
	l.SetSpare(16 * o.SegmentBytes)
	seq := ident.Seq(0)
	var names []string
	for round := range 5 {
		for range 60 { // 8 segments
			seq++
			must(t, l.Append(entries(1, seq, seq, 1000), l.Durable()))
		}
		syncTo(t, l, seq)
		must(t, l.TrimTo(seq))
		now, err := fs.List(logDir)
		must(t, err)
		if round > 1 && !slices.Equal(now, names) {
			t.Fatalf("round %d: files %v, before %v", round, now, names)
		}
		names = now
	}
}

func TestReset(t *testing.T) {
	fs := vfs.NewMem(1)
	o := small(1)
	l := create(t, fs, o)
	must(t, l.Append(entries(1, 1, 60, 1000), 0))
	syncTo(t, l, 60)
	must(t, l.Reset(pos(1, 40)))
	check(t, l, nil)
	fs.Crash()
	l, r := reopen(t, fs, o)
	if r.Base != pos(1, 40) || r.Last != pos(1, 40) || l.Durable() != 40 {
		t.Fatalf("recovered %+v", r)
	}
	want := entries(2, 41, 45, 10)
	must(t, l.Append(want, 40))
	check(t, l, want)
}

// A failed fsync or write is final, also when the disk would work again.
func TestFailedStaysFailed(t *testing.T) {
	for _, op := range []vfs.Op{vfs.OpSync, vfs.OpWrite, vfs.OpSyncDir} {
		broken := errors.New("broken disk")
		var armed atomic.Bool
		syncs := 0
		fs := vfs.Inject(vfs.NewMem(1), func(c vfs.Call) error {
			if c.Op == vfs.OpSync {
				syncs++
			}
			if c.Op == op && armed.Load() {
				return broken
			}
			return nil
		})
		l := create(t, fs, small(1))
		must(t, l.Append(entries(1, 1, 3, 10), 0))
		syncTo(t, l, 3)
		armed.Store(true)
		err := l.Append(entries(1, 4, 20, 1000), 0)
		if err == nil {
			_, err = l.Sync()
		}
		if !errors.Is(err, ErrFailed) || !errors.Is(err, broken) {
			t.Fatalf("%s: %v, want ErrFailed and the cause", op, err)
		}
		armed.Store(false)
		before := syncs
		if d, err := l.Sync(); !errors.Is(err, ErrFailed) || d != 3 {
			t.Fatalf("%s: sync again: %d, %v", op, d, err)
		}
		for name, f := range map[string]func() error{
			"append": func() error { return l.Append(entries(1, 21, 21, 10), 0) },
			"cut":    func() error { return l.Truncate(2) },
			"trim":   func() error { return l.TrimTo(2) },
			"reset":  func() error { return l.Reset(pos(9, 9)) },
		} {
			if err := f(); !errors.Is(err, ErrFailed) {
				t.Errorf("%s after a failed %s: %v", name, op, err)
			}
		}
		if syncs != before {
			t.Fatalf("%s: an fsync was tried again", op)
		}
		if got, err := l.Read(1, 1<<20, nil); err != nil || len(got) < 3 {
			t.Fatalf("%s: what was durable is not readable: %v", op, err)
		}
	}
}

func TestConcurrentReadersAndSync(t *testing.T) {
	o := small(1)
	o.Inline, o.RetentionBytes = false, 64<<10
	l, err := Create(vfs.OS(), t.TempDir()+"/log", pos(0, 0), o)
	must(t, err)
	var wg sync.WaitGroup
	var done atomic.Bool
	wg.Go(func() {
		for !done.Load() {
			if _, err := l.Sync(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for i := range 3 {
		wg.Go(func() {
			for from := ident.Seq(1); !done.Load(); {
				es, err := l.Read(from, 10_000, nil)
				switch {
				case errors.Is(err, ErrTrimmed):
					from = l.First() + ident.Seq(i)
					continue
				case err != nil:
					t.Error(err)
					return
				}
				for k := range es {
					want := entry(es[k].Pos.Epoch, from, es[k].Request, es[k].PayloadLen())
					same(t, &es[k], &want)
					want.Payload.Release()
					es[k].Payload.Release()
					p := make([]byte, 1)
					if err := l.ReadPayload(from, 0, p); err != nil && !errors.Is(err, ErrTrimmed) && !errors.Is(err, ErrInvalid) {
						t.Error(err)
					}
					from++
				}
				if len(es) == 0 {
					from = max(l.First(), l.Last().Seq-ident.Seq(min(uint64(l.Last().Seq), 20))) // a cut may have taken us back
				}
				if err := l.Scan(l.Last().Seq-ident.Seq(min(uint64(l.Last().Seq), 5)), func(*wire.Entry) error { return nil }); err != nil && !errors.Is(err, ErrTrimmed) {
					t.Error(err)
					return
				}
			}
		})
	}
	epoch, request := ident.Epoch(1), uint64(0)
	for i := range 1500 {
		last := l.Last().Seq
		var batch []wire.Entry
		for s := last + 1; s <= last+1+ident.Seq(i%7); s++ {
			request++
			batch = append(batch, entry(epoch, s, request, 100+i%3000))
		}
		must(t, l.Append(batch, l.Durable()))
		for i := range batch {
			batch[i].Payload.Release()
		}
		switch {
		case i%50 == 49:
			must(t, l.Truncate(l.Last().Seq-ident.Seq(i%11)))
			epoch++
		case i%10 == 9:
			must(t, l.TrimTo(l.Last().Seq))
		}
	}
	done.Store(true)
	wg.Wait()
	must(t, l.Close())
}

func TestAppendDoesNotAllocate(t *testing.T) {
	o := Options{RetentionBytes: -1, SegmentBytes: 4 << 20}
	l, err := Create(vfs.OS(), t.TempDir()+"/log", pos(0, 0), o)
	must(t, err)
	defer func() { must(t, l.Close()) }()
	batch := entries(1, 1, 4, 4096)
	add := func() {
		next := l.Last().Seq + 1
		for i := range batch {
			batch[i].Pos = pos(1, next+ident.Seq(i))
		}
		must(t, l.Append(batch, l.Durable()))
	}
	for range 200 {
		add()
	}
	if n := testing.AllocsPerRun(200, add); n >= 1 && !raceEnabled {
		t.Fatalf("%v allocations an Append", n)
	}
}

func BenchmarkAppend4K(b *testing.B) {
	o := Options{RetentionBytes: -1}
	l, err := Create(vfs.OS(), b.TempDir()+"/log", pos(0, 0), o)
	must(b, err)
	defer func() { must(b, l.Close()) }()
	e := entries(1, 1, 1, 4096)
	b.ReportAllocs()
	b.SetBytes(4096)
	for b.Loop() {
		e[0].Pos.Seq = l.Last().Seq + 1
		must(b, l.Append(e, l.Durable()))
		if e[0].Pos.Seq%10000 == 0 {
			_, err := l.Sync()
			must(b, err)
			must(b, l.TrimTo(e[0].Pos.Seq))
		}
	}
}

// BenchmarkAppendSync4K is the price of a FLUSH: with segments that are written
// ahead or used again, and with ones that are only allocated.
func BenchmarkAppendSync4K(b *testing.B) {
	for _, inline := range []bool{false, true} {
		name := map[bool]string{false: "prepared", true: "allocated"}[inline]
		b.Run(name, func(b *testing.B) {
			o := Options{RetentionBytes: -1, SegmentBytes: 4 << 20, Inline: inline}
			l, err := Create(vfs.OS(), b.TempDir()+"/log", pos(0, 0), o)
			must(b, err)
			defer func() { must(b, l.Close()) }()
			e := entries(1, 1, 1, 4096)
			for b.Loop() {
				e[0].Pos.Seq = l.Last().Seq + 1
				must(b, l.Append(e, l.Durable()))
				_, err := l.Sync()
				must(b, err)
				if !inline && e[0].Pos.Seq%500 == 0 {
					must(b, l.TrimTo(e[0].Pos.Seq))
				}
			}
		})
	}
}
