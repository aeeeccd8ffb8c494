package peer

import (
	"io"
	"net"
	"testing"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// discard is a Handler that takes everything.
type discard struct{}

func (discard) Settle(ident.Node, []ident.Volume) {}

func (discard) Messages(_ ident.Node, batch []wire.Envelope) {
	for i := range batch {
		batch[i].Free()
	}
}
func (discard) Up(ident.Node)   {}
func (discard) Down(ident.Node) {}

// FuzzAccept: whatever a dialer sends, the Manager goes on, keeps no buffer,
// and ends the connection when the dialer does.
func FuzzAccept(f *testing.F) {
	hello, err := wire.EncodeHello(nil, wire.Hello{Min: 1, Max: 1, Instance: 1, Attempt: 1, Cluster: "test", From: "beta", To: "alpha"})
	if err != nil {
		f.Fatal(err)
	}
	p := buf.Get(16)
	w := &wire.Append{Entries: []wire.Entry{{Pos: ident.Position{Seq: 1}, Kind: wire.KindData, Len: 16, Payload: p, PayloadCRC: wire.Checksum(p.B)}}}
	frame, _, err := wire.AppendFrame(nil, nil, 1, w)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(hello, append(frame, p.B...))
	p.Release()
	f.Add(hello[:20], []byte{})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		before := buf.InUse()
		m := NewManager(Options{Self: "alpha", Cluster: "test", Handler: discard{}})
		l := newLink(m, "beta")
		m.peers.Store(&peerSet{byName: map[ident.Node]*link{"beta": l}, list: []*link{l}})
		a, b := net.Pipe()
		m.Accept(b)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(io.Discard, a)
		}()
		if _, err := a.Write(first); err == nil {
			_, _ = a.Write(second)
		}
		a.Close()
		<-done
		m.Close()
		if n := buf.InUse(); n != before {
			t.Fatalf("%d bytes of buffers are held, %d before", n, before)
		}
	})
}

// FuzzAnswer: whatever an acceptor answers, the dialer goes on.
func FuzzAnswer(f *testing.F) {
	hello, err := wire.EncodeHello(nil, wire.Hello{Min: 1, Max: 1, Version: 1, Instance: 1, Attempt: 1, Cluster: "test", From: "beta", To: "alpha"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(hello)
	f.Fuzz(func(t *testing.T, answer []byte) {
		m := NewManager(Options{Self: "alpha", Cluster: "test", Handler: discard{}})
		defer m.Close()
		l := newLink(m, "beta")
		a, b := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			if _, err := wire.ReadHello(b); err == nil {
				_, _ = b.Write(answer)
			}
			b.Close()
		}()
		if h, err := l.greet(a); err == nil && (h.From != "beta" || h.To != "alpha" || h.Cluster != "test") {
			t.Fatalf("taken: %+v", h)
		}
		a.Close()
		<-done
	})
}
