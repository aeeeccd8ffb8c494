package sock

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns both ends of a connection.
func pair(t *testing.T, network string) (dialed, accepted net.Conn) {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialed, err = net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialed.Close() })
	if accepted, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return dialed, accepted
}

func each(t *testing.T, f func(t *testing.T, dialed net.Conn, c *Conn)) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			d, a := pair(t, network)
			c := Take(a, Client)
			if c == nil {
				t.Fatal("not taken")
			}
			if err := a.SetDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the connection is still the runtime's: %v", err)
			}
			f(t, d, c)
		})
	}
}

// What is written arrives, whatever the sizes, and then the end.
func TestReadsWhatIsWritten(t *testing.T) {
	each(t, func(t *testing.T, d net.Conn, c *Conn) {
		want := make([]byte, 256<<10)
		r := rand.New(rand.NewPCG(1, 2))
		for i := range want {
			want[i] = byte(r.Uint32())
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			for p := want; len(p) > 0; {
				n := min(len(p), 1+r.IntN(20_000))
				if _, err := d.Write(p[:n]); err != nil {
					t.Error(err)
				}
				p = p[n:]
			}
			d.Close()
		})
		var got bytes.Buffer
		b := make([]byte, 64<<10)
		for i := 0; ; i++ {
			n, err := c.Read(b[:1+i*7919%len(b)])
			got.Write(b[:n])
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		wg.Wait()
		if !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%d bytes arrived, not the %d that were sent", got.Len(), len(want))
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}

// Close ends a Read that waits, from any goroutine and more than once, and the
// peer sees the end.
func TestCloseEndsARead(t *testing.T) {
	each(t, func(t *testing.T, d net.Conn, c *Conn) {
		var wg sync.WaitGroup
		got := make([]byte, 1)
		if _, err := d.Write(got); err != nil {
			t.Fatal(err)
		}
		reading := make(chan struct{})
		wg.Go(func() {
			for range 2 {
				n, err := c.Read(got)
				if n == 1 {
					close(reading) // the next one waits, now or soon
					continue
				}
				if !errors.Is(err, net.ErrClosed) {
					t.Errorf("Read ended with %v", err)
				}
			}
		})
		<-reading
		for range 2 {
			wg.Go(func() { _ = c.Close() }) // one of them may find it closed already
		}
		if _, err := d.Read(got); !errors.Is(err, io.EOF) {
			t.Errorf("the peer sees %v", err)
		}
		wg.Wait()
		if _, err := c.Read(got); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read after Close: %v", err)
		}
		if refs := c.refs.Load(); refs != closedBit {
			t.Errorf("the descriptor is not given back: %#x", refs)
		}
	})
}

// Each Conn has its processor, there are not too many, and a closed one counts no
// longer.
func TestConnsAreCounted(t *testing.T) {
	live := func() int {
		threads.mu.Lock()
		defer threads.mu.Unlock()
		return threads.live[Link]
	}
	before := live()
	var conns []*Conn
	for range linksMax - before {
		_, a := pair(t, "tcp")
		c := Take(a, Link)
		if c == nil {
			t.Fatalf("%d were taken", len(conns))
		}
		conns = append(conns, c)
	}
	if got := runtime.GOMAXPROCS(0); got < linksMax+spareProcs {
		t.Errorf("%d processors for %d threads that wait", got, linksMax)
	}
	_, a := pair(t, "tcp")
	if Take(a, Link) != nil {
		t.Error("one too many was taken")
	}
	if err := a.SetDeadline(time.Time{}); err != nil {
		t.Errorf("it was not left alone: %v", err)
	}
	for _, c := range conns {
		_ = c.Close()
	}
	if live() != before {
		t.Errorf("%d count after they were closed, %d before", live(), before)
	}
	if c := Take(a, Link); c == nil || c.Close() != nil {
		t.Error("there was room again, and it was not taken")
	}
}

// A connection that is no socket is left alone.
func TestTakesSocketsOnly(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	if Take(a, Link) != nil {
		t.Fatal("a pipe is no socket")
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
}

// A deadline ends a Read that waits, also one that is set meanwhile; without it
// the bytes that came are there.
func TestDeadlineEndsARead(t *testing.T) {
	each(t, func(t *testing.T, d net.Conn, c *Conn) {
		b := make([]byte, 16)
		if err := c.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a Read with a deadline ended with %v", err)
		}
		if err := c.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		reading := make(chan struct{})
		wg.Go(func() {
			<-reading
			if err := c.SetReadDeadline(time.Unix(1, 0)); err != nil {
				t.Error(err)
			}
		})
		close(reading)
		if _, err := c.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a Read that waited ended with %v", err)
		}
		wg.Wait()
		if _, err := d.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if err := c.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(b); err != nil || string(b[:n]) != "hello" {
			t.Errorf("read %q, %v", b[:n], err)
		}
		_ = c.Close()
		if err := c.SetReadDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("SetReadDeadline after Close: %v", err)
		}
	})
}

// Raw writes wait for room, and end when the connection is closed; CloseWrite
// is the end for the peer, which may still be read from.
func TestRawWritesWaitForRoom(t *testing.T) {
	each(t, func(t *testing.T, d net.Conn, c *Conn) {
		chunk := make([]byte, 64<<10)
		write := func() error {
			var failed error
			err := c.Raw().Write(func(fd uintptr) bool {
				_, err := unix.Write(int(fd), chunk)
				if errors.Is(err, unix.EAGAIN) {
					return false
				}
				failed = err
				return true
			})
			return errors.Join(err, failed)
		}
		const rounds = 200 // more than any socket buffer holds
		var wg sync.WaitGroup
		wg.Go(func() {
			for range rounds {
				if err := write(); err != nil {
					t.Error(err)
				}
			}
			if err := c.CloseWrite(); err != nil {
				t.Error(err)
			}
		})
		n, err := io.Copy(io.Discard, d)
		wg.Wait()
		if err != nil || n > rounds*int64(len(chunk)) || n == 0 {
			t.Errorf("%d bytes arrived, %v", n, err)
		}
		if _, err := d.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(chunk); n != 1 || err != nil {
			t.Errorf("after CloseWrite: %d bytes, %v", n, err)
		}
		_ = c.Close()
		if err := c.Raw().Control(func(uintptr) {}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Control after Close: %v", err)
		}
	})
}

// Who comes after the end finds it, and takes nothing away from a Conn that has
// the same descriptors by then.
func TestUseAfterCloseTakesNothingAway(t *testing.T) {
	each(t, func(t *testing.T, _ net.Conn, c *Conn) {
		_ = c.Close()
		d, a := pair(t, "tcp")
		next := Take(a, Client)
		if next == nil {
			t.Fatal("not taken")
		}
		b := make([]byte, 1)
		for range 3 {
			if _, err := c.Read(b); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Read after Close: %v", err)
			}
			if err := c.SetReadDeadline(time.Unix(1, 0)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("SetReadDeadline after Close: %v", err)
			}
			if err := c.Raw().Control(func(uintptr) {}); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Control after Close: %v", err)
			}
			_ = c.Close()
		}
		if _, err := d.Write(b); err != nil {
			t.Fatal(err)
		}
		if n, err := next.Read(b); n != 1 || err != nil {
			t.Errorf("the next connection reads %d bytes, %v", n, err)
		}
		if err := next.Close(); err != nil {
			t.Error(err)
		}
	})
}
