package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/nbd/nbdtest"
)

// serve starts a server on a unix socket and returns its address.
func serve(t testing.TB, exports nbd.Exports, opts ...any) string {
	t.Helper()
	_, addr := serveOn(t, "unix://"+filepath.Join(t.TempDir(), "s"), exports, opts...)
	return addr
}

// serveOn starts a server with any of nbd.Config and nbd.ListenerOptions. It
// is shut down with the test, which fails if the shutdown hangs.
func serveOn(t testing.TB, listen string, exports nbd.Exports, opts ...any) (*nbd.Server, string) {
	t.Helper()
	cfg := nbd.Config{Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))}
	var lo nbd.ListenerOptions
	for _, o := range opts {
		switch o := o.(type) {
		case nbd.Config:
			logger := cfg.Logger
			cfg = o
			cfg.Logger = logger
		case nbd.ListenerOptions:
			lo = o
		}
	}
	cfg.Exports = exports
	s, err := nbd.NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := nbd.Listen(listen, nbd.SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), ln, lo) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	if tcp, ok := ln.Addr().(*net.TCPAddr); ok {
		return s, "tcp://" + tcp.String()
	}
	return s, listen
}

// dial connects a client that is closed with the test.
func dial(t testing.TB, addr, export string, opts nbdtest.Options) *nbdtest.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if opts.Timeout == 0 {
		opts.Timeout = time.Minute
	}
	c, err := nbdtest.Dial(ctx, addr, export, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// styles are the ways to talk that every command must work in.
var styles = map[string]nbdtest.Options{
	"simple":     {Simple: true},
	"structured": {MetaContexts: []string{nbd.AllocationContext}},
	"extended":   {Extended: true, MetaContexts: []string{nbd.AllocationContext}},
	"oldstyle":   {ExportName: true},
}

func TestCommands(t *testing.T) {
	for name, style := range styles {
		t.Run(name, func(t *testing.T) {
			const size = 16<<20 + 512
			dev := nbdtest.NewMemDevice(size)
			c := dial(t, serve(t, nbdtest.Exports{"v": dev}), "v", style)
			if c.Size() != size {
				t.Fatalf("size %d", c.Size())
			}
			model := make([]byte, size)
			rnd := rand.New(rand.NewPCG(1, 2))
			noise := rand.NewChaCha8([32]byte{3})
			ctx := t.Context()
			for i := range 300 {
				off := uint64(rnd.IntN(size - 1))
				n := min(uint64(1+rnd.IntN(1<<rnd.IntN(23))), size-off)
				p := make([]byte, n)
				var err error
				switch rnd.IntN(5) {
				case 0, 1:
					err = c.ReadAt(ctx, p, off)
					if err == nil && !bytes.Equal(p, model[off:off+n]) {
						t.Fatalf("%d: read %d+%d differs", i, off, n)
					}
				case 2:
					noise.Read(p)
					err = c.WriteAt(ctx, p, off, nbdtest.FUA)
					copy(model[off:], p)
				case 3:
					err = c.WriteZeroes(ctx, off, n)
					clear(model[off : off+n])
				case 4:
					err = errors.Join(c.Trim(ctx, off, n), c.Cache(ctx, off, n), c.Flush(ctx))
					clear(model[off : off+n]) // as MemDevice does it
				}
				if err != nil {
					t.Fatalf("%d: %v", i, err)
				}
			}
			if dev.Flushed() == 0 {
				t.Error("neither FLUSH nor FUA arrived")
			}
			if err := c.Disconnect(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPipelined(t *testing.T) {
	for _, listen := range []string{"tcp://127.0.0.1:0", "unix://" + filepath.Join(t.TempDir(), "s")} {
		dev := nbdtest.NewMemDevice(64 << 20)
		_, addr := serveOn(t, listen, nbdtest.Exports{"v": dev})
		c := dial(t, addr, "v", nbdtest.Options{})
		var wg sync.WaitGroup
		for i := range 32 {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(i), 7))
				noise := rand.NewChaCha8([32]byte{byte(i)})
				base := uint64(i) * (2 << 20)
				for range 200 {
					n := 1 + rnd.IntN(1<<(6+rnd.IntN(12)))
					p := make([]byte, n)
					noise.Read(p)
					if err := c.WriteAt(t.Context(), p, base); err != nil {
						t.Error(err)
						return
					}
					got := make([]byte, n)
					if err := c.ReadAt(t.Context(), got, base); err != nil || !bytes.Equal(p, got) {
						t.Errorf("read %d: %v, equal %v", n, err, bytes.Equal(p, got))
						return
					}
				}
			})
		}
		wg.Wait()
	}
}
