package wal

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/wire"
)

const (
	// runMax is how much of the log one Read call takes from the disk at once.
	runMax = 1 << 20
	// copyMax is the record size above which a payload is read straight into
	// its own buffer: another system call is then cheaper than a copy.
	copyMax = 64 << 10
	// windowBytes is the read-ahead of who walks the headers.
	windowBytes = 256 << 10
)

// run is a stretch of whole records in one segment, as the index had it when
// the log was at version.
type run struct {
	file    vfs.File
	name    string
	id      uint64
	from    int64
	to      int64
	entries int
	version uint64
}

// locate finds the entries from seq on, as many as fit into maxBytes, and at
// least one. A run without entries means that seq is beyond the end.
func (l *Log) locate(seq ident.Seq, maxBytes int64) (run, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return run{}, ErrClosed
	}
	if base := l.segments[0].header.base; seq <= base.Seq {
		return run{}, fmt.Errorf("wal: %w: asked for %d, the log begins after %s", ErrTrimmed, seq, base)
	}
	r := run{version: l.version}
	if seq > l.last.Seq {
		return r, nil
	}
	s := l.segments[l.find(seq)]
	r.file, r.name, r.id, r.from = s.file, s.name, s.header.id, s.offset(seq)
	for last := s.lastSeq(); seq <= last; seq++ {
		stop := s.stop(seq)
		if r.entries > 0 && stop-r.from > maxBytes {
			break
		}
		r.to = stop
		r.entries++
	}
	return r, nil
}

// changed reports whether entries have left the log since version: what was
// read meanwhile may be something else.
func (l *Log) changed(version uint64) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.version != version
}

// Read appends entries to dst, from the given seq on, until they take maxBytes
// of the log or more, or it ends; one at least, when it is there.
// Each payload is in a buffer of its own, which the caller releases. All CRCs
// are verified: a failure is ErrCorrupt. Entries that are gone are ErrTrimmed;
// a seq beyond the end adds nothing. On an error, dst has the entries before.
func (l *Log) Read(from ident.Seq, maxBytes int, dst []wire.Entry) ([]wire.Entry, error) {
	for got := 0; ; {
		r, err := l.locate(from, min(runMax, int64(max(maxBytes-got, 0))))
		if err != nil || r.entries == 0 {
			return dst, err
		}
		n := len(dst)
		dst, err = l.readRun(r, from, dst)
		if err != nil && !l.changed(r.version) {
			return dst, err
		}
		// After a change the entries that verified are still what they say:
		// each names its position. The rest is looked up anew.
		for _, e := range dst[n:] {
			got += recordHeaderSize + e.PayloadLen()
		}
		from += ident.Seq(len(dst) - n)
		if got >= maxBytes {
			return dst, nil
		}
	}
}

// readRun reads and verifies the entries of one run.
func (l *Log) readRun(r run, seq ident.Seq, dst []wire.Entry) ([]wire.Entry, error) {
	length := r.to - r.from
	if r.entries == 1 && length > copyMax {
		return readLarge(r, seq, dst)
	}
	scratch := buf.Get(int(length))
	defer scratch.Release()
	if err := readFull(r.file, scratch.B, r.from); err != nil {
		return dst, fmt.Errorf("wal: read %s: %w", r.name, err)
	}
	at := int64(0)
	for n := 0; n < r.entries; {
		var rec record
		if err := decodeRecord(scratch.B[min(at, length):], r.id, r.from+at, &rec); err != nil {
			return dst, corrupt(r.name, r.from+at, err)
		}
		if rec.entry.Kind == kindCut {
			at += recordHeaderSize
			continue
		}
		stop := at + recordHeaderSize + int64(rec.payloadLen)
		if stop > length || rec.entry.Pos.Seq != seq {
			return dst, corrupt(r.name, r.from+at, fmt.Errorf("record is %s with %d bytes, expected seq %d", rec.entry.Pos, rec.payloadLen, seq))
		}
		payload := scratch.B[at+recordHeaderSize : stop]
		if err := checkPayload(&rec, payload); err != nil {
			return dst, corrupt(r.name, r.from+at, err)
		}
		if len(payload) > 0 {
			rec.entry.Payload = buf.Get(len(payload))
			copy(rec.entry.Payload.B, payload)
		}
		dst = append(dst, rec.entry)
		at += rec.size()
		seq++
		n++
	}
	return dst, nil
}

// readLarge reads one entry without copying its payload.
func readLarge(r run, seq ident.Seq, dst []wire.Entry) ([]wire.Entry, error) {
	var head [recordHeaderSize]byte
	if err := readFull(r.file, head[:], r.from); err != nil {
		return dst, fmt.Errorf("wal: read %s: %w", r.name, err)
	}
	var rec record
	if err := decodeRecord(head[:], r.id, r.from, &rec); err != nil {
		return dst, corrupt(r.name, r.from, err)
	}
	if rec.entry.Pos.Seq != seq || rec.size() > r.to-r.from {
		return dst, corrupt(r.name, r.from, fmt.Errorf("record is %s with %d bytes, expected seq %d", rec.entry.Pos, rec.payloadLen, seq))
	}
	payload := buf.Get(int(rec.payloadLen))
	err := readFull(r.file, payload.B, r.from+recordHeaderSize)
	if err != nil {
		err = fmt.Errorf("wal: read %s: %w", r.name, err)
	} else if e := checkPayload(&rec, payload.B); e != nil {
		err = corrupt(r.name, r.from, e)
	}
	if err != nil {
		payload.Release()
		return dst, err
	}
	rec.entry.Payload = payload
	return append(dst, rec.entry), nil
}

// ReadPayload reads part of an entry's payload into p, from byte off of it on.
// The payload's CRC is verified when p takes all of it; a part is as good as
// the disk. ErrTrimmed when the entry is gone, ErrInvalid when there is no
// such entry or it has no such bytes.
func (l *Log) ReadPayload(seq ident.Seq, off int, p []byte) error {
	for {
		r, err := l.locate(seq, 0)
		if err != nil {
			return err
		}
		if r.entries == 0 {
			return fmt.Errorf("wal: %w: entry %d is beyond the end", ErrInvalid, seq)
		}
		err = readPart(r, seq, off, p)
		if !l.changed(r.version) {
			return err
		}
	}
}

func readPart(r run, seq ident.Seq, off int, p []byte) error {
	var head [recordHeaderSize]byte
	if err := readFull(r.file, head[:], r.from); err != nil {
		return fmt.Errorf("wal: read %s: %w", r.name, err)
	}
	var rec record
	if err := decodeRecord(head[:], r.id, r.from, &rec); err != nil {
		return corrupt(r.name, r.from, err)
	}
	if rec.entry.Pos.Seq != seq {
		return corrupt(r.name, r.from, fmt.Errorf("record is %s, expected seq %d", rec.entry.Pos, seq))
	}
	if off < 0 || off+len(p) > int(rec.payloadLen) {
		return fmt.Errorf("wal: %w: bytes %d to %d of entry %s, which has %d", ErrInvalid, off, off+len(p), rec.entry.Pos, rec.payloadLen)
	}
	if err := readFull(r.file, p, r.from+recordHeaderSize+int64(off)); err != nil {
		return fmt.Errorf("wal: read %s: %w", r.name, err)
	}
	if len(p) == int(rec.payloadLen) {
		if err := checkPayload(&rec, p); err != nil {
			return corrupt(r.name, r.from, err)
		}
	}
	return nil
}

// Scan calls fn for each entry from the given seq on, in order, up to the end
// as of the call. It reads headers only: Payload is nil. The entry is Scan's
// own and valid during fn alone. An error from fn ends it and is returned.
func (l *Log) Scan(from ident.Seq, fn func(*wire.Entry) error) error {
	var win window
	for end := l.Last().Seq; from <= end; {
		r, err := l.locate(from, 1<<62)
		if err != nil || r.entries == 0 {
			return err
		}
		win.reset(r.file, r.to)
		for at, n := r.from, 0; n < r.entries && from <= end; {
			var rec record
			head, err := win.at(at, recordHeaderSize)
			if err == nil {
				if e := decodeRecord(head, r.id, at, &rec); e != nil {
					err = corrupt(r.name, at, e)
				}
			}
			if err == nil && rec.entry.Kind != kindCut && rec.entry.Pos.Seq != from {
				err = corrupt(r.name, at, fmt.Errorf("record is %s, expected seq %d", rec.entry.Pos, from))
			}
			if l.changed(r.version) {
				break // look it up anew
			}
			if err != nil {
				return err
			}
			at += rec.size()
			if rec.entry.Kind == kindCut {
				continue
			}
			if err := fn(&rec.entry); err != nil {
				return err
			}
			from++
			n++
		}
	}
	return nil
}

// window reads a file through a buffer, forwards.
type window struct {
	file vfs.File
	size int64 // nothing is read beyond
	from int64
	b    []byte
}

func (w *window) reset(f vfs.File, size int64) {
	w.file, w.size, w.from, w.b = f, size, 0, w.b[:0]
}

// at returns n bytes from off on, valid until the next call; fewer at the end
// of the file. n must not exceed windowBytes.
func (w *window) at(off int64, n int) ([]byte, error) {
	if off < w.from || off+int64(n) > w.from+int64(len(w.b)) {
		if w.b == nil {
			w.b = make([]byte, windowBytes)
		}
		want := min(windowBytes, max(w.size-off, 0))
		got, err := w.file.ReadAt(w.b[:want], off)
		if err != nil && !errors.Is(err, io.EOF) {
			w.b = w.b[:0]
			return nil, err
		}
		w.from, w.b = off, w.b[:got]
	}
	b := w.b[off-w.from:]
	return b[:min(n, len(b))], nil
}

// checksum returns the CRC of n bytes from off on.
func (w *window) checksum(off int64, n int) (uint32, error) {
	crc := uint32(0)
	for n > 0 {
		b, err := w.at(off, min(n, windowBytes/2))
		if err != nil {
			return 0, err
		}
		if len(b) == 0 {
			return 0, io.ErrUnexpectedEOF
		}
		crc = crc32.Update(crc, castagnoli, b)
		off, n = off+int64(len(b)), n-len(b)
	}
	return crc, nil
}

func checkPayload(rec *record, payload []byte) error {
	if len(payload) == 0 {
		return nil
	}
	if crc := crc32.Checksum(payload, castagnoli); crc != rec.entry.PayloadCRC {
		return fmt.Errorf("payload of %s has CRC %08x, expected %08x", rec.entry.Pos, crc, rec.entry.PayloadCRC)
	}
	return nil
}

func corrupt(name string, off int64, err error) error {
	return fmt.Errorf("wal: %w: %s at %d: %w", ErrCorrupt, name, off, err)
}

// readFull reads all of p: in the middle of a log, the end of the file is as
// corrupt as anything.
func readFull(f vfs.File, p []byte, off int64) error {
	_, err := f.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: the file ends before byte %d", ErrCorrupt, off+int64(len(p)))
	}
	return err
}
