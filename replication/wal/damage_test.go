package wal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/wire"
)

// damaged is a log of 12 entries of 1000 bytes: 1 to 6 are known to be durable
// by the records behind them, 7 to 12 are not.
func damaged(t *testing.T, o Options) (*vfs.Mem, *Log) {
	t.Helper()
	fs := vfs.NewMem(1)
	l, err := Create(fs, logDir, pos(0, 0), o)
	must(t, err)
	must(t, l.Append(entries(1, 1, 6, 1000), 0))
	syncTo(t, l, 6)
	must(t, l.Append(entries(1, 7, 12, 1000), 6))
	return fs, l
}

// place returns the file and the offset of an entry's record.
func place(l *Log, seq ident.Seq) (string, int64) {
	s := l.segments[l.find(seq)]
	return filepath.Join(logDir, s.name), s.offset(seq)
}

func flip(t *testing.T, fs *vfs.Mem, path string, off int64) {
	t.Helper()
	f, err := fs.Open(path, vfs.ReadOnly)
	must(t, err)
	var b [1]byte
	_, err = f.ReadAt(b[:], off)
	must(t, err)
	must(t, fs.Corrupt(path, off, []byte{b[0] ^ 0x40}))
}

// Every byte of a record counts: before the durable position damage is
// corruption, behind it a tail.
func TestDamage(t *testing.T) {
	offsets := []int64{0, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 72, 80, 84, 88, 89, 90, 92, 96, 127, 128, 1000, 1127}
	for seq := ident.Seq(1); seq <= 12; seq++ {
		for _, at := range offsets {
			fs, l := damaged(t, small(1))
			path, off := place(l, seq)
			_ = l.Close()
			flip(t, fs, path, off+at)
			l, r, err := Open(fs, logDir, small(1))
			what := fmt.Sprintf("byte %d of entry %d", at, seq)
			if seq <= 6 {
				if !errors.Is(err, ErrCorrupt) {
					t.Fatalf("%s: recovered %+v, %v; want ErrCorrupt", what, r, err)
				}
				continue
			}
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if r.Last.Seq != seq-1 || seq < 12 && r.CutBytes == 0 {
				t.Fatalf("%s: recovered %+v", what, r)
			}
			// What was cut stays cut when the gap fills with the same bytes.
			must(t, l.Append(entries(1, seq, seq, 1000), l.Durable()))
			_ = l.Close()
			l, _ = reopen(t, fs, small(1))
			check(t, l, entries(1, 1, seq, 1000))
		}
	}
}

func TestDurableFloor(t *testing.T) {
	fs, l := damaged(t, small(1))
	path, off := place(l, 10)
	_ = l.Close()
	flip(t, fs, path, off+500)
	o := small(1)
	o.DurableFloor = 10
	if _, _, err := Open(fs, logDir, o); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("the caller knows that 10 was durable: %v", err)
	}
	o.DurableFloor = 9
	_, r := reopen(t, fs, o)
	if r.Last != pos(1, 9) {
		t.Fatalf("recovered %+v", r)
	}
}

// VerifyAfter spares payloads, never headers; Read still verifies.
func TestVerifyAfter(t *testing.T) {
	fs, l := damaged(t, small(1))
	path, off := place(l, 3)
	_ = l.Close()
	flip(t, fs, path, off+500)
	o := small(1)
	o.VerifyAfter = 3
	l, _ = reopen(t, fs, o)
	if _, err := l.Read(3, 1, nil); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("read of a damaged payload: %v", err)
	}
	if es, err := l.Read(1, 2000, nil); err != nil || len(es) != 2 {
		t.Fatalf("read before it: %d entries, %v", len(es), err)
	}
	if err := l.ReadPayload(3, 0, make([]byte, 1000)); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("read of the whole damaged payload: %v", err)
	}
	flip(t, fs, path, off+40)
	o.VerifyAfter = 6
	if _, _, err := Open(fs, logDir, o); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("a damaged header: %v", err)
	}
}

func TestDamagedSegmentHeader(t *testing.T) {
	fs, l := damaged(t, small(1))
	_ = l.Close()
	for _, at := range []int64{0, 8, 12, 16, 48, 100, 511} {
		c := fs.Clone(1)
		flip(t, c, logDir+"/00000001.seg", at)
		if _, _, err := Open(c, logDir, small(1)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("byte %d: %v", at, err)
		}
	}
	newer := fs.Clone(1)
	var b [segmentHeaderSize]byte
	f, err := newer.Open(logDir+"/00000001.seg", 0)
	must(t, err)
	_, err = f.ReadAt(b[:], 0)
	must(t, err)
	binary.LittleEndian.PutUint32(b[8:], Version+1)
	binary.LittleEndian.PutUint32(b[12:], segmentCRC(&b))
	_, err = f.WriteAt(b[:], 0)
	must(t, err)
	if _, _, err := Open(newer, logDir, small(1)); !errors.Is(err, ErrNewer) || errors.Is(err, ErrCorrupt) {
		t.Errorf("a newer segment: %v", err)
	}
	o := small(1)
	o.Replica++
	if _, _, err := Open(fs, logDir, o); !errors.Is(err, ErrForeign) {
		t.Errorf("another replica's log: %v", err)
	}
	if _, _, err := Open(fs, "/", o); !errors.Is(err, ErrNoLog) {
		t.Errorf("no log: %v", err)
	}
	if _, _, err := Open(fs, "/nowhere", o); err == nil {
		t.Error("opened nothing")
	}
}

// A segment in the middle that is gone takes durable entries with it.
func TestMissingSegment(t *testing.T) {
	fs := vfs.NewMem(1)
	l := create(t, fs, small(1))
	for s := ident.Seq(1); s <= 30; s += 5 {
		must(t, l.Append(entries(1, s, s+4, 1000), l.Durable()))
		syncTo(t, l, s+4)
	}
	names := []string{}
	for _, s := range l.segments {
		names = append(names, s.name)
	}
	_ = l.Close()
	must(t, fs.Remove(filepath.Join(logDir, names[1])))
	if _, _, err := Open(fs, logDir, small(1)); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("opened with a gap: %v", err)
	}
}

// stale-record-after-cut: entries 5 to 9 are cut; the entry that takes the
// place of 5 is byte for byte the one that stood there, so that what follows
// on the disk is the very chain that was cut.
func TestStaleRecordAfterCut(t *testing.T) {
	for _, crash := range []bool{false, true} {
		fs := vfs.NewMem(1)
		l := create(t, fs, small(1))
		old := entries(1, 1, 9, 100)
		must(t, l.Append(old, 0))
		syncTo(t, l, 9)
		must(t, l.Truncate(4))
		must(t, l.Append(old[4:5], 0))
		if crash {
			syncTo(t, l, 5)
			fs.Crash()
		} else {
			fs.Kill()
		}
		l, _ = reopen(t, fs, small(1))
		check(t, l, old[:5])
	}
}

// The same after a torn tail: 5 was lost in a power cut, 6 to 9 were not.
func TestStaleRecordAfterTornTail(t *testing.T) {
	fs := vfs.NewMem(1)
	l := create(t, fs, small(1))
	old := entries(1, 1, 9, 100)
	must(t, l.Append(old[:4], 0))
	syncTo(t, l, 4)
	must(t, l.Append(old[4:], 4))
	syncTo(t, l, 9) // so that the crash below takes only what we damage
	path, off := place(l, 5)
	fs.Crash()
	must(t, fs.Corrupt(path, off, make([]byte, recordHeaderSize)))
	l, r := reopen(t, fs, small(1))
	check(t, l, old[:4])
	if r.CutBytes != 4*256 {
		t.Fatalf("cut %d bytes, want the four records behind the gap", r.CutBytes)
	}
	must(t, l.Append(old[4:5], 4))
	syncTo(t, l, 5)
	fs.Crash()
	l, _ = reopen(t, fs, small(1))
	check(t, l, old[:5])
}

// A client that writes a copy of the log into its volume cannot have it taken
// for the log: neither as a continuation nor as evidence.
func TestPayloadThatLooksLikeALog(t *testing.T) {
	fs := vfs.NewMem(1)
	o := small(1)
	o.SegmentBytes = 64 << 10
	l := create(t, fs, o)
	must(t, l.Append(entries(1, 1, 8, 1000), 0))
	syncTo(t, l, 8)
	must(t, l.Append(entries(1, 9, 9, 1000), 8))
	seg := l.active()
	// The image of the segment as it is, aligned as records are.
	image := buf.Get(int(seg.end))
	_, err := seg.file.ReadAt(image.B, 0)
	must(t, err)
	clone := wire.Entry{
		Pos: pos(1, 10), Kind: wire.KindData, Len: uint64(len(image.B)),
		PayloadCRC: crc32.Checksum(image.B, castagnoli), Payload: image,
	}
	must(t, l.Append([]wire.Entry{clone}, 8))
	want := append(entries(1, 1, 9, 1000), clone)
	fs.Kill()
	l, _ = reopen(t, fs, o)
	check(t, l, want)
	// The record that holds the image loses its header: a tail. In the image
	// stand records that verify but for their place.
	path, off := place(l, 10)
	fs.Kill()
	must(t, fs.Corrupt(path, off, make([]byte, recordHeaderSize)))
	l, r := reopen(t, fs, o)
	check(t, l, want[:9])
	if r.CutBytes != 0 {
		t.Fatalf("took %d bytes of a payload for records", r.CutBytes)
	}
}

// A record that is right in itself, in place of one that is not the log's last
// any more: what stands behind it was written after another one.
func TestChain(t *testing.T) {
	for _, c := range []struct {
		name string
		seq  func(l *Log) ident.Seq
	}{
		{"within a segment", func(l *Log) ident.Seq { return l.segments[1].header.base.Seq + 2 }},
		{"at a segment's end", func(l *Log) ident.Seq { return l.segments[1].lastSeq() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			fs := vfs.NewMem(1)
			l := create(t, fs, small(1))
			want := entries(1, 1, 30, 1000)
			must(t, l.Append(want, 0))
			seq := c.seq(l)
			seg := l.segments[1]
			off := seg.offset(seq)
			var r record
			must(t, l.readHeader(seg, off, &r))
			r.entry.Request++
			var b [recordHeaderSize]byte
			encodeRecord(b[:], &r.entry, int(r.payloadLen), r.durable, seg.header.id, off, r.prev, r.gen)
			must(t, fs.Corrupt(filepath.Join(logDir, seg.name), off, b[:]))
			fs.Kill()
			l, rec := reopen(t, fs, small(1))
			if rec.Last.Seq != seq || rec.CutBytes == 0 {
				t.Fatalf("recovered %+v, want it to end at %d", rec, seq)
			}
			want[seq-1].Request++
			check(t, l, want[:seq])
		})
	}
}

// What a recycled file held before is another log.
func TestRecycledSegmentHoldsNoEvidence(t *testing.T) {
	fs := vfs.NewMem(1)
	l := create(t, fs, small(1))
	next := ident.Seq(1)
	for range 20 { // until all files have been used several times
		must(t, l.Append(entries(1, next, next+5, 1000), l.Durable()))
		next += 6
		syncTo(t, l, next-1)
		must(t, l.TrimTo(next-1))
	}
	must(t, l.Append(entries(1, next, next, 100), l.Durable()))
	path, off := place(l, next)
	first := l.First()
	fs.Kill()
	must(t, fs.Corrupt(path, off, make([]byte, recordHeaderSize)))
	l, r := reopen(t, fs, small(1))
	if r.Last.Seq != next-1 || l.First() > first {
		t.Fatalf("recovered %+v, want it to end at %d", r, next-1)
	}
}

// A crash within Create leaves something that Create can be called on again.
func TestCreateAgain(t *testing.T) {
	for n := range 10 {
		mem := vfs.NewMem(uint64(n))
		left := n
		fs := vfs.Inject(mem, func(c vfs.Call) error {
			if c.Op.Mutates() {
				if left--; left < 0 {
					return io.ErrUnexpectedEOF
				}
			}
			return nil
		})
		_, err := Create(fs, logDir, pos(0, 0), small(1))
		mem.Crash()
		if err == nil {
			l, _ := reopen(t, mem, small(1))
			check(t, l, nil)
			continue
		}
		l, err := Create(mem, logDir, pos(0, 0), small(1))
		if errors.Is(err, ErrExists) {
			l, _ = reopen(t, mem, small(1))
		} else {
			must(t, err)
		}
		must(t, l.Append(entries(1, 1, 20, 1000), 0))
		check(t, l, entries(1, 1, 20, 1000))
	}
}

// A full disk ends the log's use, and harms nothing: with room again it opens,
// and goes on.
func TestFullDisk(t *testing.T) {
	for room := int64(12 << 10); room < 80<<10; room += 4 << 10 {
		fs := vfs.NewMem(uint64(room))
		fs.SetCapacity(room)
		l, err := Create(fs, logDir, pos(0, 0), small(1))
		must(t, err)
		last, durable := ident.Seq(0), ident.Seq(0)
		for err == nil {
			if err = l.Append(entries(1, last+1, last+1, 1000), l.Durable()); err == nil {
				last++
			}
			if err == nil && last%4 == 0 {
				durable, err = l.Sync()
			}
		}
		if !errors.Is(err, ErrFailed) || !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("room for %d: %v, want ErrFailed by ENOSPC", room, err)
		}
		_ = l.Close()
		fs.Crash()
		l, r := reopen(t, fs, small(1)) // still full
		if r.Last.Seq < durable {
			t.Fatalf("room for %d: ends at %s, %d was durable", room, r.Last, durable)
		}
		fs.SetCapacity(0)
		from := r.Last.Seq + 1
		must(t, l.Append(entries(2, from, from+20, 1000), l.Durable()))
		check(t, l, append(entries(1, 1, from-1, 1000), entries(2, from, from+20, 1000)...))
	}
}
