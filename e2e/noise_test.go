package e2e

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// noise measures what the machine itself does to anybody, while a test runs: how
// late a timer is, and how long a small fdatasync takes. A promise in
// milliseconds can only be kept on top of that; on an idle machine it is next to
// nothing.
type noise struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     sync.Mutex
	timer  time.Duration
	sync   time.Duration
}

// startNoise starts the probes; they end with the test.
func startNoise(t *testing.T) *noise {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "probe"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &noise{cancel: cancel}
	p.wg.Add(2)
	go func() {
		defer p.wg.Done()
		for ctx.Err() == nil {
			began := time.Now()
			pause(ctx, time.Millisecond)
			p.note(&p.timer, time.Since(began)-time.Millisecond)
		}
	}()
	go func() {
		defer p.wg.Done()
		defer f.Close()
		b := make([]byte, 4096)
		for ctx.Err() == nil {
			began := time.Now()
			if _, err := f.WriteAt(b, 0); err != nil {
				return
			}
			if err := f.Sync(); err != nil {
				return
			}
			p.note(&p.sync, time.Since(began))
			pause(ctx, 10*time.Millisecond)
		}
	}()
	t.Cleanup(func() {
		p.cancel()
		p.wg.Wait()
	})
	return p
}

func (p *noise) note(worst *time.Duration, d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	*worst = max(*worst, d)
}

// reset forgets what was measured so far.
func (p *noise) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.timer, p.sync = 0, 0
}

// worst returns the worst since the last reset.
func (p *noise) worst(t *testing.T) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	t.Logf("the machine: at worst a timer was late by %v, and an fsync took %v", p.timer.Round(100*time.Microsecond), p.sync.Round(100*time.Microsecond))
	return p.timer + p.sync
}
