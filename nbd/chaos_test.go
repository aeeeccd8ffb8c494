package nbd_test

import (
	"io"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/nbd/nbdtest"
)

// scattered completes requests from several goroutines, out of order, singly
// and in batches, as a volume does; and kills a client now and then.
type scattered struct {
	nbd.Exports
	work chan *nbd.Request
	wg   sync.WaitGroup
}

func scatter(e nbd.Exports, seed uint64) *scattered {
	s := &scattered{Exports: e, work: make(chan *nbd.Request, 4096)}
	for i := range 3 {
		s.wg.Go(func() { s.runCompleter(rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	return s
}

func (s *scattered) runCompleter(rnd *rand.Rand) {
	var b nbd.Batch
	for r := range s.work {
		n := 0
		if rnd.IntN(2) == 0 {
			r.Complete(r, nil)
		} else {
			b.Complete(r, nil)
			n = rnd.IntN(8)
		}
		for ; n > 0; n-- {
			select {
			case r, ok := <-s.work:
				if ok {
					b.Complete(r, [...]error{nil, nil, nil, nbd.ErrIO}[rnd.IntN(4)])
				}
			default: // what is queued must not wait for more
				n = 0
			}
		}
		b.Flush()
	}
}

// TestChaos runs clients that come and go, take their replies or do not, and
// break off anywhere, against completions from everywhere. All must end: the
// shutdown at the end of the test waits for each connection, which waits for
// each of its requests.
func TestChaos(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			listen := "tcp://127.0.0.1:0"
			if network == "unix" {
				listen = "unix://" + filepath.Join(t.TempDir(), "s")
			}
			s := scatter(one(), 1)
			var mu sync.Mutex
			var clients []nbd.Client
			e := &nbdtest.Interceptor{
				Exports:  s.Exports,
				OnOpen:   func(_ string, c nbd.Client) { mu.Lock(); clients = append(clients, c); mu.Unlock() },
				OnSubmit: func(r *nbd.Request, _ func(*nbd.Request)) { s.work <- r },
			}
			t.Run("clients", func(t *testing.T) {
				srv, addr := serveOn(t, listen, e, nbd.Config{Limits: nbd.Limits{Requests: 32, BytesTotal: 64 << 20}})
				var wg sync.WaitGroup
				for i := range 8 {
					wg.Go(func() {
						rnd := rand.New(rand.NewPCG(7, uint64(i)))
						for range 12 {
							chaosClient(t, addr, rnd)
							if rnd.IntN(3) == 0 {
								mu.Lock()
								clients[rnd.IntN(len(clients))].Kill(nbd.ErrShutdown)
								mu.Unlock()
							}
						}
					})
				}
				wg.Wait()
				eventually(t, "all connections end", func() bool { return srv.Stats().Connections == 0 })
				if used := srv.Stats().BudgetUsed; used != 0 {
					t.Errorf("%d bytes of the budget are lost", used)
				}
			})
			close(s.work)
			s.wg.Wait()
		})
	}
}

// chaosClient sends a stream of requests and breaks off somewhere.
func chaosClient(t *testing.T, addr string, rnd *rand.Rand) {
	h, err := nbdtest.DialConn(t.Context(), addr)
	if err != nil {
		t.Error(err)
		return
	}
	defer h.Close()
	h.SetDeadline(time.Now().Add(5 * time.Second)) //nolint:errcheck // a fresh socket
	n, err := nbdtest.Begin(h)
	if err != nil {
		return // killed
	}
	if rnd.IntN(2) == 0 {
		n.Ask(nbdtest.OptStructuredReply, nil) //nolint:errcheck // the next one fails too
	}
	if _, err := n.Ask(nbdtest.OptGo, nbdtest.GoData("v")); err != nil {
		return
	}
	var b []byte
	for i := range 200 {
		switch rnd.IntN(4) {
		case 0:
			size := 1 + rnd.IntN(40000)
			b = append(append(b, request(nbdtest.CmdWrite, 0, uint64(i), 0, uint32(size))...), make([]byte, size)...)
		case 1:
			b = append(b, request(nbdtest.CmdFlush, 0, uint64(i), 0, 0)...)
		default:
			b = append(b, request(nbdtest.CmdRead, 0, uint64(i), 0, uint32(1+rnd.IntN(200000)))...)
		}
	}
	if rnd.IntN(2) == 0 {
		b = append(b, request(nbdtest.CmdDisc, 0, 0, 0, 0)...)
	} else {
		b = b[:rnd.IntN(len(b))]
	}
	take := rnd.IntN(3)
	if take == 0 { // the server stops to read when nobody takes its replies
		h.SetDeadline(time.Now().Add(100 * time.Millisecond)) //nolint:errcheck // an open socket
	}
	var wg sync.WaitGroup
	if take > 0 {
		wg.Go(func() {
			if take == 1 {
				io.CopyN(io.Discard, h, int64(rnd.IntN(1<<22))) //nolint:errcheck // breaks off
				h.Close()
				return
			}
			io.Copy(io.Discard, h) //nolint:errcheck // until the server hangs up
		})
	}
	h.Write(b) //nolint:errcheck // may be cut off
	if take < 2 {
		h.Close()
	} else if half, ok := h.(interface{ CloseWrite() error }); ok {
		half.CloseWrite() //nolint:errcheck // may be cut off already
	}
	wg.Wait()
}
