package nbd

import (
	"errors"
	"net"
)

// ServeConn serves one connection that was made elsewhere, such as an end of a
// socket pair of which the kernel gets the other, handshake included. It returns
// when the connection has ended: nil after the client's disconnect request,
// otherwise why. Shutdown ends it like any other connection.
func (s *Server) ServeConn(raw net.Conn, opts ListenerOptions) error {
	l := &listener{ListenerOptions: opts}
	c := s.newConn(l, raw)
	s.mu.Lock()
	full := len(s.mu.conns) >= s.limits.Connections
	if full || s.mu.stopping {
		s.mu.Unlock()
		s.stats.refused.Add(1)
		raw.Close()
		if full {
			return errors.New("nbd: too many connections: raise nbd.max_connections")
		}
		return ErrShutdown
	}
	if !s.mu.started {
		s.mu.started = true
		s.wg.Go(s.runJanitor)
	}
	s.mu.conns[c] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	s.stats.accepted.Add(1)
	s.stats.connections.Add(1)
	s.runConn(l, c)
	if errors.Is(c.reason, errDisconnected) {
		return nil
	}
	return c.reason
}
