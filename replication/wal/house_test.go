package wal

import (
	"errors"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
)

// A spare has its room, and a directory entry that is durable.
func TestSpare(t *testing.T) {
	dirSyncs := 0
	fs := vfs.Inject(vfs.NewMem(1), func(c vfs.Call) error {
		if c.Op == vfs.OpSyncDir {
			dirSyncs++
		}
		return nil
	})
	o := small(1)
	l := create(t, fs, o)
	l.house.prepare()
	if n, err := l.house.spares[0].file.Size(); err != nil || n != o.SegmentBytes {
		t.Fatalf("a spare of %d bytes: %v", n, err)
	}
	dirSyncs = 0
	must(t, l.Append(entries(1, 1, 10, 1000), 0)) // into the spare
	syncTo(t, l, 10)
	if dirSyncs != 0 {
		t.Fatal("a spare's directory entry was not durable")
	}
	must(t, l.Append(entries(1, 11, 20, 1000), 0)) // into a file made on the spot
	syncTo(t, l, 20)
	if dirSyncs != 1 {
		t.Fatalf("%d syncs of the directory for a new file", dirSyncs)
	}
}

// TestBlocksAreWrittenAhead: where an fsync follows each append, few of them find
// blocks that were only allocated, from the first segment on; where they are
// rare, nothing is written twice; and in segments that are used again there is
// nothing to write ahead.
func TestBlocksAreWrittenAhead(t *testing.T) {
	const segment, payload, appends = 1 << 20, 4096, 600 // 2.4 segments
	for _, often := range []bool{true, false} {
		written := make(map[string]int64) // of each file
		var fresh, bytes int64            // writes that touched blocks for the first time, and bytes written
		fs := vfs.Inject(vfs.NewMem(1), func(c vfs.Call) error {
			if c.Op == vfs.OpWrite && c.Len > segmentHeaderSize {
				bytes += c.Len
				if end := c.Off + c.Len; end > written[c.Path] {
					fresh++
					written[c.Path] = end
				}
			}
			return nil
		})
		o := small(1)
		o.SegmentBytes = segment
		l := create(t, fs, o)
		run := func(from ident.Seq) {
			t.Helper()
			for s := from; s < from+appends; s++ {
				must(t, l.Append(entries(1, s, s, payload), l.Durable()))
				if often {
					syncTo(t, l, s)
				}
			}
		}
		run(1)
		if limit := int64(appends / 8); often && fresh > limit || !often && bytes > appends*(2*payload) {
			t.Errorf("often: %v: %d of %d appends touched new blocks (limit %d), %d bytes written", often, fresh, appends, limit, bytes)
		}
		syncTo(t, l, appends)
		check(t, l, entries(1, 1, appends, payload))
		again := l.segments[0]
		must(t, l.TrimTo(appends))
		if n := len(l.house.spares); n == 0 {
			t.Fatal("no segment was given back")
		}
		if s := l.house.spares[0]; s.name == again.name && s.written < again.end {
			t.Errorf("a segment of %d bytes that is used again is known to be written up to %d", again.end, s.written)
		}
		fresh = 0
		run(appends + 1)
		if limit := int64(appends / 8); often && fresh > limit {
			t.Errorf("%d of %d appends touched new blocks when segments were used again", fresh, appends)
		}
	}
}

// A disk that is full when a spare is prepared costs the spare and no more.
func TestSpareThatCannotBeMade(t *testing.T) {
	mem := vfs.NewMem(1)
	l := create(t, mem, small(1))
	mem.SetCapacity(mem.Used() + 4096)
	l.house.prepare()
	names, err := mem.List(logDir)
	must(t, err)
	if len(l.house.spares) != 0 || len(names) != 1 {
		t.Fatalf("%d spares, files %v", len(l.house.spares), names)
	}
	mem.SetCapacity(0)
	must(t, l.Append(entries(1, 1, 20, 1000), 0))
	check(t, l, entries(1, 1, 20, 1000))
}

// The goroutine ends with Close, whatever it was asked to do.
func TestHouseEnds(t *testing.T) {
	for range 20 {
		o := small(1)
		o.Inline, o.SegmentBytes = false, 256<<10
		l, err := Create(vfs.NewMem(1), logDir, pos(0, 0), o)
		must(t, err)
		for s := ident.Seq(1); s <= 200; s += 20 {
			must(t, l.Append(entries(1, s, s+19, 4096), l.Durable()))
			_, err := l.Sync()
			must(t, err)
			must(t, l.TrimTo(s))
		}
		must(t, l.Close())
		must(t, l.Close())
		if _, err := l.Sync(); !errors.Is(err, ErrClosed) {
			t.Fatalf("sync after close: %v", err)
		}
		if _, err := l.Read(1, 1, nil); !errors.Is(err, ErrClosed) {
			t.Fatalf("read after close: %v", err)
		}
	}
}

// TestWriteOutLeavesThePageThatIsFilled: what was appended is sent out once, and
// a failure is as final as that of an fsync.
func TestWriteOutLeavesThePageThatIsFilled(t *testing.T) {
	var calls []vfs.Call
	var fail error
	fs := vfs.Inject(vfs.NewMem(1), func(c vfs.Call) error {
		if c.Op != vfs.OpWriteOut {
			return nil
		}
		calls = append(calls, c)
		return fail
	})
	o := small(1)
	o.SegmentBytes = 1 << 20
	l, err := Create(fs, logDir, ident.Position{}, o)
	must(t, err)
	t.Cleanup(func() { _ = l.Close() })
	must(t, l.Append(entries(1, 1, 9, 1000), 0)) // 512 + 9*1152 bytes
	must(t, l.WriteOut())
	must(t, l.WriteOut())
	if len(calls) != 1 || calls[0].Off != 0 || calls[0].Len != 8192 {
		t.Fatalf("wrote out %+v, want the first two pages once", calls)
	}
	must(t, l.Append(entries(1, 10, 20, 1000), 0))
	must(t, l.WriteOut())
	if len(calls) != 2 || calls[1].Off != 8192 {
		t.Fatalf("then wrote out %+v", calls[1:])
	}
	if l.Durable() != 0 {
		t.Fatalf("a write-out has made %d durable", l.Durable())
	}
	must(t, l.Append(entries(1, 21, 40, 1000), 0))
	fail = errors.New("bad sector")
	if err := l.WriteOut(); !errors.Is(err, ErrFailed) {
		t.Fatalf("write-out: %v", err)
	}
	if _, err := l.Sync(); !errors.Is(err, ErrFailed) {
		t.Errorf("sync after it: %v", err)
	}
}

// A segment that is used again may have left the page cache, and a write of a part
// of a page would wait for the rest to be read from the disk: so what is appended
// goes to the end of its page, and what is appended next begins in it.
func TestAppendWritesWholePages(t *testing.T) {
	for _, payload := range []int{0, 100, 4096, 70_000} {
		cached := make(map[string]int64) // up to where a file's pages have been written
		fs := vfs.Inject(vfs.NewMem(1), func(c vfs.Call) error {
			if c.Op != vfs.OpWrite {
				return nil
			}
			end := c.Off + c.Len
			if at := cached[c.Path]; len(cached) > 0 && (c.Off > at || end%pageBytes != 0) {
				t.Errorf("payloads of %d: %s written from %d to %d, its pages are there up to %d", payload, c.Path, c.Off, end, at)
			}
			cached[c.Path] = (end + pageBytes - 1) &^ (pageBytes - 1)
			return nil
		})
		o := small(1)
		o.SegmentBytes = 256 << 10
		l := create(t, fs, o) // it writes a header, and that file's first page is there
		for s := ident.Seq(1); s < 200; s += 3 {
			must(t, l.Append(entries(1, s, s+2, payload), 0))
		}
		if payload > 4096 && len(cached) < 20 {
			t.Errorf("%d segments", len(cached))
		}
		check(t, l, entries(1, 1, 201, payload))
	}
}
