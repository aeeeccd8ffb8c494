package nbd

import (
	"errors"
	"io"
	"math"
	"syscall"
	"unsafe"
)

// inlineRounds is how often in a row a completing goroutine writes what others
// have queued meanwhile, before it leaves them to the writer goroutine.
const inlineRounds = 4

// write sends what is queued. The caller holds the writer's role, and write
// gives it up or hands it to the writer goroutine. Unless mayBlock it never
// waits for the client, and sends at most inlineBytesMax.
func (c *conn) write(mayBlock bool) {
	c.out.room = inlineBytesMax
	if mayBlock {
		c.out.room = math.MaxInt
	}
	for round := 0; ; round++ {
		c.mu.Lock()
		if len(c.mu.queue) == 0 && c.out.idle() {
			c.mu.writing = false
			c.mu.Unlock()
			return
		}
		if !mayBlock && (round == inlineRounds || c.fd == nil || c.out.room == 0) && !c.mu.dead {
			c.work <- struct{}{} // never blocks: there is one role to hand over
			c.mu.Unlock()
			return
		}
		var batch []*request
		if c.out.idle() {
			batch = c.mu.queue
			c.mu.queue = c.mu.spare[:0]
			c.mu.spare = nil
		}
		dead := c.mu.dead
		c.mu.Unlock()
		if batch != nil {
			c.out.load(batch)
		}
		if c.writeLoaded(mayBlock, dead) {
			c.finishBatch()
		} else if c.handOver() {
			return
		}
	}
}

// handOver gives the writer's role to the writer goroutine, unless the
// connection is dead, when nothing is written any more.
func (c *conn) handOver() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.dead {
		return false
	}
	c.work <- struct{}{}
	return true
}

// finishBatch takes back the requests of a batch that is on its way.
func (c *conn) finishBatch() {
	batch := c.out.batch
	lost := c.srv.stats.answered(c.srv.now(), batch)
	c.retire(batch)
	clear(batch)
	c.mu.Lock()
	c.mu.spare = batch[:0]
	c.mu.lost = c.mu.lost || lost
	c.mu.Unlock()
	c.out.batch = nil
	if lost {
		c.drain()
	}
}

// writeLoaded encodes and sends the loaded batch. It returns false when the
// socket took not all of it and it must not wait, or when it has sent all that it
// may.
func (c *conn) writeLoaded(mayBlock, dead bool) bool {
	for !dead {
		if c.out.sent() && !c.out.encode(c) {
			return true
		}
		if c.out.room == 0 {
			return false
		}
		n, again, err := c.send(mayBlock)
		c.sentBytes.Add(uint64(n))
		c.out.advance(n)
		switch {
		case err != nil:
			c.kill(err)
			dead = true
		case again:
			return false
		}
	}
	c.out.discard()
	return true
}

// send writes from the encoded vectors: some bytes, or all if it may block.
func (c *conn) send(mayBlock bool) (n int, again bool, err error) {
	if mayBlock {
		c.sending.Store(true)
		defer c.sending.Store(false)
	}
	if c.fd == nil {
		n, err = c.out.copyTo(c.stream)
		return n, false, err
	}
	c.out.n, c.out.errno, c.out.wait = 0, 0, mayBlock
	if err := c.fd.Write(c.out.writev); err != nil {
		return 0, false, err
	}
	switch c.out.errno {
	case 0:
		return c.out.n, false, nil
	case syscall.EAGAIN:
		return 0, true, nil
	}
	return 0, false, c.out.errno
}

// runWriter is the connection's writer goroutine: it takes the role over when
// the socket is full, and for connections that cannot be written without
// blocking (TLS).
func (c *conn) runWriter() {
	for {
		select {
		case <-c.work:
			c.write(true)
		case <-c.done:
			// The role may be on its way here; whoever has it sees that the
			// connection is dead and empties the queue.
			select {
			case <-c.work:
				c.write(true)
			default:
			}
			return
		}
	}
}

// replyWriter holds a batch of replies on its way to the socket.
type replyWriter struct {
	batch []*request // taken from the queue, not yet retired
	next  int        // the first that is not encoded

	hdr     []byte // headers of what is encoded; its array never moves
	iov     []syscall.Iovec
	iovNext int
	tail    int // up to where hdr is in the last vector; 0 if that is a payload

	// The call in progress; fields so that the callback needs no closure.
	writev func(fd uintptr) bool
	msg    syscall.Msghdr
	n      int
	errno  syscall.Errno
	wait   bool
	room   int    // bytes that whoever has the role may still send
	stage  []byte // for a stream that takes no vectors
}

const (
	iovMax = 512 // vectors a call; the kernel takes 1024
	// hdrBytes is the room for headers of one writev; hdrRoom is what one
	// reply needs at most: holeRunsMax+1 chunks, or an error with its text.
	hdrBytes = 16 << 10
	hdrRoom  = (holeRunsMax+1)*(extReplyBytes+12) + extReplyBytes + 8 + errorTextMax
	// stageBytes is how much is copied together for TLS, whose records hold
	// 16 KiB.
	stageBytes = 64 << 10
)

func (w *replyWriter) init() {
	w.hdr = make([]byte, 0, hdrBytes)
	w.iov = make([]syscall.Iovec, 0, iovMax)
	w.writev = w.doWritev
}

func (w *replyWriter) idle() bool            { return w.batch == nil }
func (w *replyWriter) load(batch []*request) { w.batch, w.next = batch, 0 }
func (w *replyWriter) sent() bool            { return w.iovNext == len(w.iov) }
func (w *replyWriter) full() bool {
	return cap(w.hdr)-len(w.hdr) < hdrRoom || cap(w.iov)-len(w.iov) < 2*holeRunsMax+4
}

// encode turns as many replies into vectors as there is room for. It returns
// false when there are no more.
func (w *replyWriter) encode(c *conn) bool {
	w.reset()
	for ; w.next < len(w.batch) && !w.full(); w.next++ {
		c.encodeReply(w, w.batch[w.next])
	}
	return len(w.iov) > 0
}

func (w *replyWriter) reset() {
	clear(w.iov) // drop the pointers to payloads that go back to their pool
	w.iov, w.iovNext, w.hdr, w.tail = w.iov[:0], 0, w.hdr[:0], 0
}

func (w *replyWriter) discard() {
	w.reset()
	w.next = len(w.batch)
}

// commit makes what was appended to hdr from the given length on a vector, or
// part of the last one if it follows directly.
func (w *replyWriter) commit(from int) {
	b := w.hdr[from:]
	if w.tail == from && from > 0 {
		v := &w.iov[len(w.iov)-1]
		v.SetLen(int(v.Len) + len(b))
	} else {
		w.payload(b)
	}
	w.tail = len(w.hdr)
}

// payload adds b as a vector; it must stay as it is until sent.
func (w *replyWriter) payload(b []byte) {
	if len(b) == 0 {
		return
	}
	v := syscall.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	w.iov = append(w.iov, v)
	w.tail = 0
}

// advance notes that n bytes are sent.
func (w *replyWriter) advance(n int) {
	w.room -= n
	for n > 0 {
		v := &w.iov[w.iovNext]
		if have := int(v.Len); n < have {
			v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
			v.SetLen(have - n)
			return
		}
		n -= int(v.Len)
		w.iovNext++
	}
}

// within returns the vectors of the next n bytes. The last is cut short by the
// length returned, which the caller gives back.
func (w *replyWriter) within(n int) (v []syscall.Iovec, cut uint64) {
	v = w.iov[w.iovNext:]
	for i := range v {
		have := int(v[i].Len)
		if have >= n {
			v[i].SetLen(n)
			return v[:i+1], uint64(have - n)
		}
		n -= have
	}
	return v, 0
}

// doWritev is the callback of RawConn.Write: false waits for room and calls
// again.
func (w *replyWriter) doWritev(fd uintptr) bool {
	v, cut := w.within(w.room)
	w.msg.Iov, w.msg.Iovlen = &v[0], uint64(len(v))
	for {
		n, _, errno := syscall.Syscall(syscall.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&w.msg)), syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL)
		if errno == syscall.EINTR {
			continue
		}
		v[len(v)-1].Len += cut
		switch errno {
		case 0:
			w.n, w.errno = int(n), 0
			return true
		case syscall.EAGAIN:
			w.errno = errno
			return !w.wait
		}
		w.errno = errno
		return true
	}
}

var errNothingWritten = errors.New("nbd: the connection takes no bytes")

// copyTo writes vectors to a stream, small ones together.
func (w *replyWriter) copyTo(dst io.Writer) (int, error) {
	if w.stage == nil {
		w.stage = make([]byte, 0, stageBytes)
	}
	w.stage = w.stage[:0]
	for _, v := range w.iov[w.iovNext:] {
		b := unsafe.Slice(v.Base, int(v.Len))
		if len(w.stage)+len(b) > stageBytes {
			if len(w.stage) == 0 {
				// Not all at once, so that the janitor sees it move.
				return dst.Write(b[:min(len(b), 4*stageBytes)])
			}
			break
		}
		w.stage = append(w.stage, b...)
	}
	if len(w.stage) == 0 {
		return 0, errNothingWritten
	}
	return dst.Write(w.stage)
}
