package nbd

import (
	"errors"
	"time"
)

// stallWatch is what the janitor remembers of a connection: since when, on the
// server's clock, neither end has moved.
type stallWatch struct {
	read, sent           uint64
	readSince, sentSince int64
}

var (
	errStalledRequest = errors.New("nbd: the client stopped in the middle of a request")
	errStalledReply   = errors.New("nbd: the client takes no replies")
	errGone           = errors.New("nbd: the client has gone, with requests unread")
	errIdle           = errors.New("nbd: no request for the idle time-out")
)

// runJanitor ends connections that are stalled or idle, and those whose client went
// while the reader waited for room. One for all spares
// each read and write the cost of a deadline.
func (s *Server) runJanitor() {
	every := s.limits.Stall / 4
	if s.limits.Idle > 0 {
		every = min(every, s.limits.Idle/4)
	}
	t := time.NewTicker(max(every, time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-t.C:
			for _, c := range s.snapshot() {
				if c.serving.Load() {
					c.inspect(s.now())
				}
			}
		case <-s.ctx.Done():
			return
		}
	}
}

// inspect is called by the janitor alone.
func (c *conn) inspect(now int64) {
	w := &c.watch
	read, sent := c.readBytes.Load(), c.sentBytes.Load()
	still := read == w.read && sent == w.sent // since the last look
	if read != w.read || w.readSince == 0 {
		w.read, w.readSince = read, now
	}
	sending := c.sending.Load()
	if sent != w.sent || !sending || w.sentSince == 0 {
		w.sent, w.sentSince = sent, now
	}
	l := &c.srv.limits
	c.mu.Lock()
	busy, admitting := c.mu.inflight > 0, c.mu.admitting
	c.mu.Unlock()
	if busy && !c.midRequest.Load() {
		w.readSince = now
	}
	switch {
	case admitting && still && c.gone():
		// What it holds may be needed by others. (One that gets on may have closed
		// its end behind requests that are all to be done.)
		c.kill(errGone)
	case c.midRequest.Load() && now-w.readSince >= int64(l.Stall):
		c.kill(errStalledRequest)
	case sending && now-w.sentSince >= int64(l.Stall):
		c.kill(errStalledReply)
	case l.Idle > 0 && !busy && now-w.readSince >= int64(l.Idle):
		c.kill(errIdle)
	}
}
