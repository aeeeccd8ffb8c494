package sock

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// A brief connection is a connection: sizes on both sides of what is moved briefly,
// a socket that is full, deadlines, the end, and an end that is torn off.
func TestBrief(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			d, a := pair(t, network)
			b := Brief(d)
			if b == d {
				t.Fatal("a socket is left as it is")
			}
			sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB: more than a socket takes
			wrote := make(chan error, 1)
			go func() {
				for p, n := sent, 1; len(p) > 0; n = n*2 + 1 {
					n = min(n, len(p))
					if m, err := b.Write(p[:n]); err != nil || m != n {
						wrote <- errors.Join(err, io.ErrShortWrite)
						return
					}
					p = p[n:]
				}
				wrote <- nil
			}()
			back := Brief(a)
			got := make([]byte, len(sent))
			if _, err := io.ReadFull(back, got); err != nil || !bytes.Equal(got, sent) {
				t.Fatalf("read: %v, as written: %v", err, bytes.Equal(got, sent))
			}
			if err := <-wrote; err != nil {
				t.Fatal(err)
			}
			if n, err := back.Read(nil); n != 0 || err != nil {
				t.Errorf("a read of nothing: %d, %v", n, err)
			}
			if err := back.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if _, err := back.Read(got); !errors.Is(err, os.ErrDeadlineExceeded) || !strings.HasPrefix(err.Error(), "read "+network+" ") || !strings.HasSuffix(err.Error(), ": i/o timeout") {
				t.Errorf("past its deadline a read ends with %v", err)
			}
			if err := back.SetDeadline(time.Time{}); err != nil {
				t.Fatal(err)
			}

			// A small write waits for room.
			small := make([]byte, 4096)
			if err := b.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			var err error
			filled, n := 0, 0
			for err == nil {
				n, err = b.Write(small)
				filled += n
			}
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("a full socket: %v", err)
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			if rest, err := io.Copy(io.Discard, back); err != nil || rest != int64(filled) {
				t.Errorf("%d bytes and then %v came of %d", rest, err, filled)
			}
			if _, err := b.Read(got); !errors.Is(err, net.ErrClosed) {
				t.Errorf("a read of one that is closed: %v", err)
			}
			if _, err := b.Write(small); !errors.Is(err, net.ErrClosed) {
				t.Errorf("a write to one that is closed: %v", err)
			}
			for err = nil; err == nil; {
				_, err = back.Write(small) // the end of the other side may take a moment
			}
			if op := new(net.OpError); !errors.As(err, &op) || op.Op != "write" || !strings.HasSuffix(err.Error(), ": write: broken pipe") && !strings.HasSuffix(err.Error(), ": write: connection reset by peer") {
				t.Errorf("a write to who has gone: %v", err)
			}
		})
	}
	p, q := net.Pipe()
	defer q.Close()
	defer p.Close()
	if Brief(p) != p {
		t.Error("a pipe has no descriptor")
	}
}
