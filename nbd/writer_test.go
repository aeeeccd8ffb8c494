package nbd

import (
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
)

// TestInlineSends completes many large reads in one go, for a client that takes
// them as fast as it can. Whoever completes them sends at most inlineBytesMax of
// them; what remains is the writer's, and comes whole.
func TestInlineSends(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	there, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	here, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	s, err := NewServer(Config{Exports: fuzzExport{}})
	if err != nil {
		t.Fatal(err)
	}
	c := s.newConn(&listener{}, here)
	c.out.init()
	const reads, length = 8, 3 << 20
	for i := range reads {
		q, err := c.admit(length)
		if err != nil {
			t.Fatal(err)
		}
		q.fill(requestHeader{typ: cmdRead, cookie: uint64(i), length: length}, OpRead, s.now())
		q.Data = buf.Get(length)
		clear(q.Data.B)
		c.completed(q, nil, false)
	}
	const total = reads * (simpleReplyBytes + length)
	taken := make(chan int64, 1)
	go func() {
		there.SetDeadline(time.Now().Add(time.Minute)) //nolint:errcheck // a socket has deadlines
		n, _ := io.CopyN(io.Discard, there, total)
		taken <- n
	}()
	c.Flush()
	if sent := c.sentBytes.Load(); sent == 0 || sent > inlineBytesMax {
		t.Errorf("%d bytes were sent by whoever completed the reads, want 1 to %d", sent, inlineBytesMax)
	}
	go c.runWriter() // the role has been left to it
	if n := <-taken; n != total {
		t.Errorf("%d of %d bytes came", n, total)
	}
	c.waitIdle(0, nil)
	c.kill(errDisconnected)
	if used := s.budget.inUse(); used != 0 {
		t.Errorf("%d bytes of the budget are lost", used)
	}
}

// TestFirstReplyTakesItsTime: the janitor of a server that has been up for long finds
// a young connection, whose first reply is just being written.
func TestFirstReplyTakesItsTime(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	s := &Server{limits: Limits{Stall: time.Minute}, log: slog.New(slog.DiscardHandler)}
	c := s.newConn(&listener{}, here)
	c.sending.Store(true)
	up := int64(time.Hour)
	c.inspect(up)
	c.inspect(up + int64(time.Minute) - 1)
	if c.gone() {
		t.Errorf("killed after less than the stall time: %v", c.reason)
	}
	c.inspect(up + int64(time.Minute))
	if !c.gone() {
		t.Error("not killed after the stall time")
	}
}

// TestWithin cuts vectors at every length and checks that nothing is lost.
func TestWithin(t *testing.T) {
	for n := 1; n <= 12; n++ {
		var w replyWriter
		w.init()
		for _, part := range []string{"abc", "d", "efgh"} {
			w.payload([]byte(part))
		}
		v, cut := w.within(n)
		sum := 0
		for i := range v {
			sum += int(v[i].Len)
		}
		if sum != min(n, 8) || len(v) == 0 || v[len(v)-1].Len == 0 {
			t.Errorf("%d bytes in %d vectors, want %d", sum, len(v), n)
		}
		v[len(v)-1].Len += cut
		whole := 0
		for i := range w.iov {
			whole += int(w.iov[i].Len)
		}
		if whole != 8 {
			t.Errorf("after a cut at %d the vectors have %d bytes", n, whole)
		}
	}
}
