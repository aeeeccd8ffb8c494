package nbd_test

import (
	"io"
	"net"
	"path/filepath"
	"testing"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/nbd/nbdtest"
)

// burst sends requests and takes their replies, again and again, without
// allocating anything itself.
func burst(t testing.TB, conn net.Conn, requests []byte, replies int) func() {
	in := make([]byte, replies)
	return func() {
		if _, err := conn.Write(requests); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, in); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNoAllocations is the rule of the steady write and read paths: nothing is
// allocated for a request.
func TestNoAllocations(t *testing.T) {
	write := cat(request(nbdtest.CmdWrite, 0, 1, 0, 4096), make([]byte, 4096))
	read := request(nbdtest.CmdRead, 0, 2, 0, 4096)
	for name, c := range map[string]struct {
		options []uint32
		replies int
	}{
		"simple":     {nil, 8*16 + 8*(16+4096)},
		"structured": {[]uint32{nbdtest.OptStructuredReply}, 8*16 + 8*(20+8+4096)},
	} {
		t.Run(name, func(t *testing.T) {
			addr := serve(t, one())
			var b []byte
			for range 8 {
				b = append(append(b, write...), read...)
			}
			f := burst(t, enter(t, addr, c.options...), b, c.replies)
			buf.Trim() // what other tests have left free counts in what is kept
			buf.Trim()
			for range 50 {
				f() // pools and buffers fill
			}
			if got := testing.AllocsPerRun(200, f); got > 0.5 && !raced {
				t.Errorf("%.2f allocations for 16 requests", got)
			}
		})
	}
}

func BenchmarkServer(b *testing.B) {
	write := cat(request(nbdtest.CmdWrite, 0, 1, 0, 4096), make([]byte, 4096))
	read := request(nbdtest.CmdRead, 0, 2, 0, 4096)
	for _, network := range []string{"tcp", "unix"} {
		listen := "tcp://127.0.0.1:0"
		if network == "unix" {
			listen = "unix://" + filepath.Join(b.TempDir(), "s")
		}
		for _, k := range []struct {
			name    string
			request []byte
			reply   int
			depth   int
		}{{"write/1", write, 16, 1}, {"write/32", write, 16, 32}, {"read/1", read, 16 + 4096, 1}, {"read/32", read, 16 + 4096, 32}} {
			b.Run(network+"/"+k.name, func(b *testing.B) {
				_, addr := serveOn(b, listen, one())
				var all []byte
				for range k.depth {
					all = append(all, k.request...)
				}
				f := burst(b, enter(b, addr), all, k.depth*k.reply)
				b.ReportAllocs()
				n := 0
				for b.Loop() {
					f()
					n += k.depth
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/request")
			})
		}
	}
}
