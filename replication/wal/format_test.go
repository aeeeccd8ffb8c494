package wal

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/wire"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

// golden compares bytes with a hex dump in testdata. A difference means that
// the format has changed: that needs a new version, not a new golden file.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	text := hex.Dump(got)
	if *rewrite {
		must(t, os.WriteFile(path, []byte(text), 0o644))
	}
	want, err := os.ReadFile(path)
	must(t, err)
	if text != string(want) {
		t.Fatalf("%s: the bytes differ from version %d:\n%s", name, Version, text)
	}
}

func TestGolden(t *testing.T) {
	h := segmentHeader{
		id: 0x1122334455667788, ordinal: 3, volume: 0xa1a2a3a4a5a6a7a8, replica: 0xb1b2b3b4b5b6b7b8,
		base: pos(5, 77), durable: 70, prev: 0xdeadbeef, gen: 2, root: true, size: 16 << 20,
	}
	var b [segmentHeaderSize]byte
	crc := h.encode(&b)
	back, crc2, ok, err := decodeSegmentHeader(&b)
	if err != nil || !ok || back != h || crc2 != crc {
		t.Fatalf("decoded %+v, %v, %v", back, ok, err)
	}
	file := append([]byte{}, b[:]...)

	e := wire.Entry{
		Pos: pos(5, 78), Kind: wire.KindZero, Flags: wire.FlagNoHole, Off: 0x1000, Len: 0x2000,
		Session: 0x5e55, Request: 0x4e9, PayloadCRC: 0xc4c,
	}
	var rec [recordHeaderSize]byte
	crc = encodeRecord(rec[:], &e, 300, 71, h.id, 512, crc, h.gen)
	var r record
	must(t, decodeRecord(rec[:], h.id, 512, &r))
	if r.entry != e || r.payloadLen != 300 || r.durable != 71 || r.crc != crc || r.gen != 2 || r.size() != 512 {
		t.Fatalf("decoded %+v", r)
	}
	golden(t, "v1.golden", append(file, rec[:]...))
}

// A log as version 1 wrote it must open for ever.
func TestGoldenLog(t *testing.T) {
	fs := vfs.NewMem(1)
	o := small(1)
	o.SegmentBytes = segmentBytesMin
	l, err := Create(fs, logDir, pos(2, 9), o)
	must(t, err)
	want := append(entries(2, 10, 11, 200), entries(3, 12, 12, 100)...)
	must(t, l.Append(want, 9))
	syncTo(t, l, 12)
	must(t, l.Truncate(11))
	want = append(want[:2:2], entries(4, 12, 12, 64)...)
	must(t, l.Append(want[2:], 11))
	must(t, l.Close())
	f, err := fs.Open(logDir+"/00000001.seg", vfs.ReadOnly)
	must(t, err)
	b := make([]byte, l.segments[0].end)
	_, err = f.ReadAt(b, 0)
	must(t, err)
	golden(t, "v1-log.golden", b)

	text, err := os.ReadFile("testdata/v1-log.golden")
	must(t, err)
	fs = vfs.NewMem(2)
	must(t, fs.MkdirAll(logDir))
	f, err = fs.Open(logDir+"/00000001.seg", vfs.Create)
	must(t, err)
	_, err = f.WriteAt(undump(t, string(text)), 0)
	must(t, err)
	l, r := reopen(t, fs, o)
	if r.Base != pos(2, 9) || r.Last != pos(4, 12) {
		t.Fatalf("recovered %+v", r)
	}
	check(t, l, want)
}

// undump is the reverse of hex.Dump.
func undump(t *testing.T, text string) []byte {
	t.Helper()
	var out []byte
	for line := range strings.Lines(text) {
		if len(line) < 58 {
			continue
		}
		b, err := hex.DecodeString(strings.ReplaceAll(line[10:58], " ", ""))
		must(t, err)
		out = append(out, b...)
	}
	return out
}

// FuzzOpen opens directories of arbitrary bytes. Whatever they are, Open ends
// in an error or in a log that works.
func FuzzOpen(f *testing.F) {
	fs := vfs.NewMem(1)
	l, err := Create(fs, logDir, pos(0, 0), small(1))
	must(f, err)
	must(f, l.Append(append(entries(1, 1, 12, 1000), entries(2, 13, 14, 10)...), 0))
	must(f, l.Truncate(13))
	must(f, l.Append(entries(3, 14, 15, 128), 13))
	for _, name := range []string{"/00000001.seg", "/00000002.seg"} {
		file, err := fs.Open(logDir+name, vfs.ReadOnly)
		must(f, err)
		b := make([]byte, 8<<10)
		n, _ := file.ReadAt(b, 0)
		f.Add(b[:n], uint16(n/2), true)
		f.Add(b[:n], uint16(0), false)
	}
	f.Fuzz(func(t *testing.T, b []byte, cut uint16, fix bool) {
		if fix {
			b = fixCRCs(b)
		}
		fs := vfs.NewMem(1)
		must(t, fs.MkdirAll(logDir))
		at := min(int(cut), len(b))
		for i, p := range [][]byte{b[:at], b[at:]} {
			file, err := fs.Open(logDir+"/"+fileName(uint64(i+1)), vfs.Create)
			must(t, err)
			_, err = file.WriteAt(p, 0)
			must(t, err)
		}
		o := small(1)
		l, r, err := Open(fs, logDir, o)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) && !errors.Is(err, ErrNoLog) && !errors.Is(err, ErrForeign) {
				t.Fatalf("an error of no kind: %v", err)
			}
			return
		}
		before, err := l.Read(l.First(), 1<<30, nil)
		if err != nil || len(before) != int(r.Last.Seq-r.Base.Seq) {
			t.Fatalf("recovered %+v, read %d: %v", r, len(before), err)
		}
		if r.Last.Seq+2 < r.Last.Seq || r.Last.Epoch+1 == 0 {
			return // no log lives that long
		}
		next := entry(r.Last.Epoch+1, r.Last.Seq+1, 1, 100)
		must(t, l.Append([]wire.Entry{next}, l.Durable()))
		must(t, l.Close())
		l, r2, err := Open(fs, logDir, o)
		must(t, err)
		if r2.Base != r.Base || r2.Last != next.Pos {
			t.Fatalf("recovered %+v, then %+v", r, r2)
		}
		must(t, l.Close())
	})
}

// fixCRCs makes headers verify where they look like ones, so that the fuzzer
// gets behind the first check.
func fixCRCs(b []byte) []byte {
	b = append([]byte{}, b...)
	le := binary.LittleEndian
	id, chain := uint64(0), uint32(0)
	for off := 0; off+recordHeaderSize <= len(b); off += recordAlign {
		switch {
		case off+segmentHeaderSize <= len(b) && [8]byte(b[off:off+8]) == segmentMagic:
			h := (*[segmentHeaderSize]byte)(b[off:])
			chain = segmentCRC(h)
			le.PutUint32(h[12:], chain)
			id = le.Uint64(h[16:])
		case le.Uint32(b[off:]) == recordMagic:
			r := b[off : off+recordHeaderSize]
			le.PutUint64(r[16:], id)
			le.PutUint32(r[8:], chain)
			if n := int(le.Uint32(r[80:])); n <= len(b)-off-recordHeaderSize && n >= 0 {
				le.PutUint32(r[84:], crc32.Checksum(b[off+recordHeaderSize:off+recordHeaderSize+n], castagnoli))
			}
			chain = crc32.Checksum(r[8:], castagnoli)
			le.PutUint32(r[4:], chain)
		}
	}
	return b
}
