package wal

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/blockstep/blockstep/internal/vfs"
)

const (
	// sparesMin is how many empty segments are kept ready at the least.
	sparesMin  = 2
	fileSuffix = ".seg"
)

// house prepares segment files ahead of the writer and takes back those that
// are no longer needed, in a goroutine of its own unless Options.Inline.
//
// A segment file keeps its name for life; what is in it its header says. A
// header of zeroes makes it free. So beginning a segment changes no directory
// (one fsync less for a FLUSH), and giving one back is one sector.
type house struct {
	l    *Log
	wg   sync.WaitGroup
	wake chan struct{} // holds at most one wake-up

	mu       sync.Mutex
	spares   []*segment // free files, with their room, durable in the directory
	retiring []*segment // to be voided, in this order
	wanted   bool       // prepare one more
	nextName uint64
	running  bool
	stopping bool
}

func (h *house) init(l *Log) {
	h.l = l
	h.wake = make(chan struct{}, 1)
	h.nextName = 1
}

// start begins the goroutine.
func (h *house) start() {
	if h.l.o.Inline {
		h.work()
		return
	}
	h.mu.Lock()
	h.running = true
	h.mu.Unlock()
	h.wg.Add(1)
	go h.run()
	h.poke()
}

func (h *house) run() {
	defer h.wg.Done()
	for range h.wake {
		h.work()
	}
}

// stop ends the goroutine and closes the spare files. It may be called again.
func (h *house) stop() {
	h.mu.Lock()
	if h.stopping {
		h.mu.Unlock()
		return
	}
	h.stopping = true
	h.mu.Unlock()
	close(h.wake)
	h.wg.Wait()
	for _, s := range append(h.spares, h.retiring...) {
		_ = s.file.Close() // nothing in them counts
	}
}

// poke wakes the goroutine, or does its work when there is none.
func (h *house) poke() {
	if h.l.o.Inline {
		h.work()
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stopping {
		return
	}
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// want asks for a spare to be ready by the time that the active segment is full.
func (h *house) want() {
	if h.l.o.Inline {
		return // the writer makes its own
	}
	h.mu.Lock()
	enough := h.wanted || len(h.spares)+len(h.retiring) > 0
	if !enough {
		h.wanted = true
	}
	h.mu.Unlock()
	if !enough {
		h.poke()
	}
}

// retire gives segments back, in this order, which must be the log's own: a
// crash between two must leave a log without gaps.
func (h *house) retire(segments []*segment) {
	if len(segments) == 0 {
		return
	}
	h.mu.Lock()
	h.retiring = append(h.retiring, segments...)
	h.mu.Unlock()
	h.poke()
}

// adopt takes files that Open or Create has no use for.
func (h *house) adopt(free []*segment) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.retiring = append(h.retiring, free...)
	for _, s := range free {
		h.noteName(s.name)
	}
}

// adoptName keeps new names apart from that of a live segment.
func (h *house) adoptName(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.noteName(name)
}

// noteName is adoptName for who holds mu.
func (h *house) noteName(name string) {
	if n, ok := fileNumber(name); ok && n >= h.nextName {
		h.nextName = n + 1
	}
}

// take returns a free file of at least the given room, made on the spot when
// no spare is ready: then its directory entry is not durable yet.
func (h *house) take(room int64) (*segment, error) {
	h.mu.Lock()
	if n := len(h.spares); n > 0 && room == h.l.o.SegmentBytes {
		s := h.spares[n-1]
		h.spares = h.spares[:n-1]
		h.mu.Unlock()
		return s, nil
	}
	h.mu.Unlock()
	return h.makeFile()
}

func (h *house) makeFile() (*segment, error) {
	h.mu.Lock()
	name := fileName(h.nextName)
	h.nextName++
	h.mu.Unlock()
	f, err := h.l.fs.Open(filepath.Join(h.l.dir, name), vfs.Create|vfs.Exclusive)
	if err != nil {
		return nil, err
	}
	return &segment{file: f, name: name}, nil
}

// work does all there is to do.
func (h *house) work() {
	for h.l.usable() == nil {
		h.mu.Lock()
		var old *segment
		if len(h.retiring) > 0 {
			old = h.retiring[0]
		}
		fresh := old == nil && h.wanted && len(h.spares) == 0
		h.wanted = h.wanted && fresh
		stopping := h.stopping
		h.mu.Unlock()
		switch {
		case stopping || old == nil && !fresh:
			return
		case old != nil:
			h.recycle(old)
		default:
			h.prepare()
		}
	}
}

// sparesMax is how many empty segments are kept.
func (l *Log) sparesMax() int {
	return int(max(sparesMin, l.spare.Load()/l.o.SegmentBytes))
}

// SetSpare changes Options.SpareBytes, for what is trimmed from now on.
func (l *Log) SetSpare(bytes int64) { l.spare.Store(bytes) }

// recycle voids a segment and keeps its file as a spare, or removes it.
func (h *house) recycle(s *segment) {
	if err := s.makeVoid(); err != nil {
		_ = h.l.fail("void a segment that is no longer needed", err)
		return
	}
	size, err := s.file.Size()
	h.mu.Lock()
	h.retiring = h.retiring[1:]
	keep := err == nil && size == h.l.o.SegmentBytes && len(h.spares) < h.l.sparesMax()
	if keep {
		h.spares = append(h.spares, &segment{file: s.file, name: s.name, spare: true, written: s.written, index: s.index[:0]})
	}
	h.mu.Unlock()
	if !keep {
		_ = s.file.Close()
		_ = h.l.fs.Remove(filepath.Join(h.l.dir, s.name)) // void: it does no harm where it stays
	}
}

// prepare makes a spare whose room is reserved. When it does not succeed (a full
// disk) the writer will try by itself, and its failure counts.
func (h *house) prepare() {
	s, err := h.makeFile()
	if err == nil {
		if err = h.fill(s.file); err != nil {
			_ = s.file.Close()
			_ = h.l.fs.Remove(filepath.Join(h.l.dir, s.name))
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wanted = false
	if err == nil {
		s.spare = true
		h.spares = append(h.spares, s)
	}
}

func (h *house) fill(f vfs.File) error {
	if err := f.Allocate(0, h.l.o.SegmentBytes); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return h.l.fs.SyncDir(h.l.dir)
}

// makeVoid makes a file hold no segment, durably. It asks the disk nothing for
// a file that is void already: an empty one would need room, and there may be
// none.
func (s *segment) makeVoid() error {
	if s.void {
		return nil
	}
	var zeroes [segmentHeaderSize]byte
	if _, err := s.file.WriteAt(zeroes[:], 0); err != nil {
		return err
	}
	if err := s.file.Datasync(); err != nil {
		return err
	}
	s.void = true
	return nil
}

func fileName(n uint64) string { return fmt.Sprintf("%08d%s", n, fileSuffix) }

func fileNumber(name string) (uint64, bool) {
	digits, ok := strings.CutSuffix(name, fileSuffix)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	return n, err == nil
}
