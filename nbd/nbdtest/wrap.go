package nbdtest

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/blockstep/blockstep/nbd"
)

// Interceptor stands between a server and any exports. Each hook may be nil.
type Interceptor struct {
	nbd.Exports
	// OnOpen sees each session that is opened.
	OnOpen func(name string, c nbd.Client)
	// OnSubmit is given each request. It calls next, then or later and from
	// any goroutine, or completes the request itself.
	OnSubmit func(r *nbd.Request, next func(*nbd.Request))
	// OnClose sees each session that is closed.
	OnClose func(name string)
}

// Open opens the session behind.
func (i *Interceptor) Open(ctx context.Context, name string, c nbd.Client) (nbd.Session, error) {
	s, err := i.Exports.Open(ctx, name, c)
	if err != nil {
		return nil, err
	}
	if i.OnOpen != nil {
		i.OnOpen(name, c)
	}
	return &interceptedSession{Session: s, i: i, name: name}, nil
}

type interceptedSession struct {
	nbd.Session
	i    *Interceptor
	name string

	mu     sync.Mutex // Submit is called from one goroutine at a time
	closed bool
}

func (s *interceptedSession) Submit(r *nbd.Request) {
	if s.i.OnSubmit == nil {
		s.next(r)
		return
	}
	s.i.OnSubmit(r, s.next)
}

func (s *interceptedSession) next(r *nbd.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		r.Complete(r, nbd.ErrShutdown)
		return
	}
	s.Session.Submit(r)
	s.Session.Uncork() // it may not be the server's goroutine that we are on
}

func (s *interceptedSession) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.Session.Close()
	if s.i.OnClose != nil {
		s.i.OnClose(s.name)
	}
}

// Delay lets each request wait for d before it is submitted.
func Delay(e nbd.Exports, d time.Duration) nbd.Exports {
	return &Interceptor{Exports: e, OnSubmit: func(r *nbd.Request, next func(*nbd.Request)) {
		time.AfterFunc(d, func() { next(r) })
	}}
}

// Fail answers those requests for which f returns an error with it.
func Fail(e nbd.Exports, f func(r *nbd.Request) error) nbd.Exports {
	return &Interceptor{Exports: e, OnSubmit: func(r *nbd.Request, next func(*nbd.Request)) {
		if err := f(r); err != nil {
			r.Complete(r, err)
			return
		}
		next(r)
	}}
}

// Log logs each request and its outcome at level Debug.
func Log(e nbd.Exports, log *slog.Logger) nbd.Exports {
	return &Interceptor{Exports: e, OnSubmit: func(r *nbd.Request, next func(*nbd.Request)) {
		began := time.Now()
		next(After(r, func(err error) {
			log.Debug("request", "op", r.Op.String(), "offset", r.Offset, "length", r.Length, "fua", r.FUA,
				"error", err, "took", time.Since(began))
		}))
	}}
}

// After returns a request that stands for r: when it is completed, f is called
// and then r completed with the same outcome.
func After(r *nbd.Request, f func(err error)) *nbd.Request {
	inner := *r
	inner.Server = nil
	inner.Complete = func(in *nbd.Request, err error) {
		f(err)
		r.Status, r.Holes = in.Status, in.Holes
		r.Complete(r, err)
	}
	return &inner
}
