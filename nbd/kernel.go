package nbd

import (
	"errors"
	"net"
)

// ServeConn serves one connection that was made elsewhere, such as an end of a
// socket pair of which the kernel gets the other, handshake included. It returns
// when the connection has ended: nil after the client's disconnect request,
// otherwise why. Shutdown ends it like any other connection. It does not count in
// Limits.Connections: the caller bounds how many it makes.
func (s *Server) ServeConn(raw net.Conn, opts ListenerOptions) error {
	l := &listener{ListenerOptions: opts}
	c := s.newConn(l, raw)
	s.mu.Lock()
	if s.mu.stopping {
		s.mu.Unlock()
		s.stats.refused.Add(1)
		raw.Close()
		return ErrShutdown
	}
	if !s.mu.started {
		s.mu.started = true
		s.wg.Go(s.runJanitor)
	}
	s.mu.conns[c] = struct{}{}
	s.mu.own++
	s.wg.Add(1)
	s.mu.Unlock()
	s.stats.accepted.Add(1)
	s.stats.connections.Add(1)
	s.runConn(l, c)
	s.mu.Lock()
	s.mu.own--
	s.mu.Unlock()
	if errors.Is(c.reason, errDisconnected) {
		return nil
	}
	return c.reason
}
