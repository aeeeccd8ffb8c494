package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blockstep/blockstep/nbd/nbdtest"
)

// writer copies an image to a volume: data as writes, runs of zeroes as
// WRITE_ZEROES, with a FLUSH each flushEvery bytes and at the end.
type writer struct {
	client  *nbdtest.Client
	file    *os.File
	gap     *gap
	written atomic.Int64 // bytes of data that were answered
	half    int64
	onHalf  func() // called once, by itself, when half of the data is written
	once    sync.Once
	wg      sync.WaitGroup
}

func (w *writer) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	slots := make(chan []byte, window)
	for range window {
		slots <- make([]byte, chunk)
	}
	var inFlight sync.WaitGroup
	sinceFlush := 0
	err := func() error {
		for off := int64(0); ; off += chunk {
			var p []byte
			select {
			case p = <-slots:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			n, err := w.file.ReadAt(p, off)
			if n == 0 && errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return fmt.Errorf("reading the image: %w", err)
			}
			inFlight.Go(func() {
				if err := w.one(ctx, p[:n], off); err != nil {
					cancel(err)
				}
				slots <- p[:chunk]
			})
			if sinceFlush += n; sinceFlush >= flushEvery {
				sinceFlush = 0
				if err := w.flush(ctx); err != nil {
					return err
				}
			}
		}
	}()
	inFlight.Wait()
	w.wg.Wait()
	if err == nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = w.flush(ctx)
	}
	return err
}

func (w *writer) one(ctx context.Context, p []byte, off int64) error {
	if zeroes(p) {
		if err := w.client.WriteZeroes(ctx, uint64(off), uint64(len(p))); err != nil {
			return fmt.Errorf("WRITE_ZEROES at %d: %w", off, err)
		}
		w.gap.answered()
		return nil
	}
	if err := w.client.WriteAt(ctx, p, uint64(off)); err != nil {
		return fmt.Errorf("WRITE at %d: %w", off, err)
	}
	w.gap.answered()
	if w.written.Add(int64(len(p))) >= w.half {
		w.once.Do(func() { w.wg.Go(w.onHalf) })
	}
	return nil
}

func (w *writer) flush(ctx context.Context) error {
	if err := w.client.Flush(ctx); err != nil {
		return fmt.Errorf("FLUSH: %w", err)
	}
	w.gap.answered()
	return nil
}

// dataBytes counts the bytes of the chunks that are not all zeroes.
func dataBytes(f *os.File) (int64, error) {
	p := make([]byte, chunk)
	total := int64(0)
	for off := int64(0); ; off += chunk {
		n, err := f.ReadAt(p, off)
		if n > 0 && !zeroes(p[:n]) {
			total += int64(n)
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return 0, fmt.Errorf("reading the image: %w", err)
		}
	}
}

// gap finds the longest time between two answers.
type gap struct {
	mu   sync.Mutex
	last time.Time
	max  time.Duration
}

func newGap() *gap { return &gap{last: time.Now()} }

func (g *gap) answered() {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	g.max = max(g.max, now.Sub(g.last))
	g.last = now
}

func (g *gap) longest() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.max
}
