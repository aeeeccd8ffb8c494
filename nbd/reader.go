package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"

	"github.com/blockstep/blockstep/internal/buf"
)

// flushAfterNanos bounds how long replies that were completed inside Submit
// wait for the rest of the requests that were read together with theirs.
const flushAfterNanos = 50_000

// runReader reads and submits requests until the connection ends, and says
// why. It is the only caller of Submit.
func (c *conn) runReader() error {
	headerBytes := requestHeaderBytes
	if c.gate.extended {
		headerBytes = extRequestBytes
	}
	started := c.srv.now()
	for {
		if c.inEnd-c.inStart < headerBytes {
			c.uncork()
			if c.draining.Load() {
				return c.drainReason()
			}
			if err := c.fill(headerBytes, false); err != nil {
				return err
			}
			started = c.srv.now()
		}
		h := parseRequestHeader(c.in.B[c.inStart:], c.gate.extended)
		c.inStart += headerBytes
		v := c.gate.judge(h)
		switch {
		case v.fatal != nil:
			return v.fatal
		case v.disc:
			c.uncork()
			return errDisconnected
		}
		if err := c.take(h, v, started); err != nil {
			return err
		}
		if now := c.srv.now(); now-started > flushAfterNanos {
			c.Flush()
			started = now
		}
	}
}

func (c *conn) drainReason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.mu.why != nil:
		return c.mu.why
	case c.mu.lost:
		return ErrSessionLost
	}
	return errDraining
}

// uncork starts what the session has put off, and sends what was completed
// inside Submit, before the reader waits.
func (c *conn) uncork() {
	c.mu.Lock()
	c.mu.submitting = nil
	c.mu.Unlock()
	c.session.Uncork()
	c.Flush()
}

// take admits one request that the gate has judged, reads its payload and
// submits it, or answers it with the gate's error.
func (c *conn) take(h requestHeader, v verdict, started int64) error {
	if v.err != nil {
		return c.refuse(h, v, started)
	}
	var held int64
	switch v.op {
	case OpRead, OpWrite:
		held = int64(h.length)
	case OpBlockStatus:
		if h.flags&cmdFlagReqOne == 0 {
			held = int64(len(c.contexts)) * statusBytes
		}
	case OpFlush, OpTrim, OpZero, OpCache:
	}
	q, err := c.admit(held)
	if err != nil {
		return err
	}
	q.fill(h, v.op, started)
	switch v.op {
	case OpRead:
		q.Data = buf.Get(int(h.length))
	case OpWrite:
		if q.Data, err = c.payload(int(h.length)); err != nil {
			c.abort(q)
			return err
		}
	case OpBlockStatus:
		q.Contexts = append(q.ctxs[:0], c.contexts...)
		if v.filter {
			list, err := c.payload(int(v.payload))
			if err != nil {
				c.abort(q)
				return err
			}
			err = c.filter(q, list.B)
			list.Release()
			if err != nil {
				c.completed(q, err, true)
				return nil //nolint:nilerr // it was answered: the connection goes on
			}
		}
	case OpFlush, OpTrim, OpZero, OpCache:
	}
	c.session.Submit(&q.Request)
	return nil
}

// fill sets the fields that a session sees.
func (q *request) fill(h requestHeader, op Op, started int64) {
	q.cookie, q.start = h.cookie, started
	q.dontFragment = h.flags&cmdFlagDF != 0
	q.Op, q.Offset, q.Length = op, h.offset, h.length
	q.FUA = h.flags&cmdFlagFUA != 0 && (op == OpWrite || op == OpZero || op == OpTrim)
	q.NoHole = h.flags&cmdFlagNoHole != 0
	q.FastZero = h.flags&cmdFlagFastZero != 0
	q.ReqOne = h.flags&cmdFlagReqOne != 0
}

// abort takes back a request that was never submitted nor answered, because
// the connection ended within it.
func (c *conn) abort(q *request) {
	c.retire([]*request{q})
}

// refuse answers a request with the gate's error, once its payload is out of
// the way.
func (c *conn) refuse(h requestHeader, v verdict, started int64) error {
	q, err := c.admit(0)
	if err != nil {
		return err
	}
	q.fill(h, v.op, started)
	if err := c.skip(int(v.payload)); err != nil {
		c.abort(q)
		return err
	}
	c.completed(q, v.err, true)
	return nil
}

// filter takes the payload of a BLOCK_STATUS: u64 length | ids.
func (c *conn) filter(q *request, list []byte) error {
	q.Length = binary.BigEndian.Uint64(list)
	if err := c.gate.extent(OpBlockStatus, q.Offset, q.Length); err != nil {
		return err
	}
	q.Contexts = q.ctxs[:0]
	for b := list[8:]; len(b) > 0; b = b[4:] {
		i := int(binary.BigEndian.Uint32(b)) - 1
		if i < 0 || i >= len(c.contexts) || slices.Contains(q.Contexts, c.contexts[i]) {
			return fmt.Errorf("%w: an unknown or repeated meta context", ErrInvalid)
		}
		q.Contexts = append(q.Contexts, c.contexts[i])
	}
	return nil
}

// payload returns the next n bytes in a buffer of their own. A large buffer is
// not given for the claim but for bytes that arrive.
func (c *conn) payload(n int) (*buf.Buf, error) {
	c.lean = n >= leanPayload
	p := buf.Get(min(n, payloadClaimMax))
	got := copy(p.B, c.in.B[c.inStart:c.inEnd])
	c.inStart += got
	for {
		if err := c.readFull(p.B[got:]); err != nil {
			p.Release()
			return nil, err
		}
		got = len(p.B)
		if got == n {
			return p, nil
		}
		larger := buf.Get(min(n, 4*got))
		copy(larger.B, p.B)
		p.Release()
		p = larger
	}
}

// skip throws n bytes of payload away.
func (c *conn) skip(n int) error {
	for {
		have := min(n, c.inEnd-c.inStart)
		c.inStart += have
		if n -= have; n == 0 {
			return nil
		}
		c.uncork()
		if err := c.fill(1, true); err != nil {
			return err
		}
	}
}

// fill reads until the buffer holds at least n bytes, n being small. within
// says that the client owes them as part of a request. A buffer that one read
// fills is exchanged for a larger one.
func (c *conn) fill(n int, within bool) error {
	if c.inStart == c.inEnd {
		c.inStart, c.inEnd = 0, 0
	} else if c.inStart > 0 {
		c.inEnd = copy(c.in.B, c.in.B[c.inStart:c.inEnd])
		c.inStart = 0
	}
	for c.inEnd < n {
		c.midRequest.Store(within || c.inEnd > 0)
		end := len(c.in.B)
		if c.lean {
			end = min(end, max(n, c.inEnd+leanRead))
		}
		m, err := c.source.Read(c.in.B[c.inEnd:end])
		c.inEnd += m
		c.readBytes.Add(uint64(m))
		if err != nil && c.inEnd < n {
			return c.readError(err, within || c.inEnd > 0)
		}
	}
	c.midRequest.Store(false)
	if c.inEnd == len(c.in.B) && c.inEnd < c.srv.limits.ReadBuffer {
		larger := buf.Get(min(4*c.inEnd, c.srv.limits.ReadBuffer))
		copy(larger.B, c.in.B)
		c.in.Release()
		c.in = larger
	}
	return nil
}

// readFull reads payload straight into its place.
func (c *conn) readFull(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	c.uncork() // the rest of the payload may be long in coming
	c.midRequest.Store(true)
	for len(p) > 0 {
		m, err := c.readMost(p)
		c.readBytes.Add(uint64(m))
		p = p[m:]
		if err != nil && len(p) > 0 {
			return c.readError(err, true)
		}
	}
	c.midRequest.Store(false)
	return nil
}

// readMost reads, and may wait for a moment so that p is filled.
func (c *conn) readMost(p []byte) (int, error) {
	if t := c.thread.Load(); t != nil {
		return t.ReadMost(p)
	}
	return c.source.Read(p)
}

func (c *conn) readError(err error, within bool) error {
	select {
	case <-c.done:
		return c.reason
	default:
	}
	if c.draining.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
		return c.drainReason()
	}
	if within {
		return noEOF(err)
	}
	if errors.Is(err, net.ErrClosed) {
		return io.EOF
	}
	return err
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
