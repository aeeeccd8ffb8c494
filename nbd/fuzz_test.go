package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// fuzzExport is an export of 1 MiB that completes everything at once.
type fuzzExport struct{}

type fuzzSession struct{ closed bool }

var fuzzInfo = Info{Size: 1 << 20, Description: "fuzz", MultiConn: true, BlockMin: 1, MetaContexts: []string{"x-fuzz:"}}

func (fuzzExport) List() []string { return []string{"v", "w"} }
func (fuzzExport) Lookup(_ context.Context, name string) (Info, error) {
	if name != "v" && name != "w" {
		return Info{}, ErrNoExport
	}
	return fuzzInfo, nil
}

func (e fuzzExport) Open(ctx context.Context, name string, _ Client) (Session, error) {
	if _, err := e.Lookup(ctx, name); err != nil {
		return nil, err
	}
	return &fuzzSession{}, nil
}

func (s *fuzzSession) Info() Info { return fuzzInfo }
func (s *fuzzSession) Close()     { s.closed = true }
func (s *fuzzSession) Uncork()    {}
func (s *fuzzSession) MetaContext(name string) (uint32, error) {
	if name == "x-fuzz:bad" {
		return 0, ErrInvalid
	}
	return uint32(len(name)), nil
}

// Submit asserts what the gate has promised.
func (s *fuzzSession) Submit(r *Request) {
	end := r.Offset + r.Length
	switch {
	case s.closed:
		panic("Submit after Close")
	case r.Op < OpRead || r.Op > OpBlockStatus:
		panic("unknown operation")
	case r.Op != OpFlush && (r.Length == 0 || end < r.Offset || end > fuzzInfo.Size):
		panic("out of range")
	case (r.Op == OpRead || r.Op == OpWrite) && uint64(len(r.Data.B)) != r.Length:
		panic("data of another length")
	case r.Op == OpBlockStatus && len(r.Contexts) == 0:
		panic("a status of nothing")
	}
	if r.Op == OpRead && r.Offset%3 == 0 && r.Length > 2 {
		r.Holes = []Extent{{Length: 1}, {Length: r.Length - 1, Flags: StateZero}}
	}
	for _, id := range r.Contexts {
		r.Status = append(r.Status, Status{Context: id, Extents: []Extent{{Length: r.Length / 2, Flags: 3}, {Length: 1 << 40}}})
	}
	r.Complete(r, nil)
}

// hagglerOf lets a negotiation run without a server.
type hagglerOf struct{ fuzzExport }

func (h hagglerOf) list() []listed                   { return []listed{{"v", "d"}, {"w", ""}} }
func (h hagglerOf) lookup(name string) (Info, error) { return h.Lookup(context.Background(), name) }
func (h hagglerOf) open(name string) (Session, error) {
	return h.Open(context.Background(), name, Client{})
}
func (h hagglerOf) stopping() bool { return false }

// negotiateAll feeds bytes to a negotiation and returns what it answered, and
// the outcome: goOn if it wants more.
func negotiateAll(n *negotiation, in []byte) ([]byte, outcome) {
	out := n.greet()
	for {
		need := n.need()
		if need < 0 || need > optionDataMax {
			panic("a step of unbounded size")
		}
		if need > len(in) {
			return out, goOn
		}
		var what outcome
		out, what, _ = n.step(in[:need], out)
		in = in[need:]
		switch what {
		case startTLS:
			n.upgraded()
		case transmit, hangUp:
			return out, what
		case goOn:
		}
	}
}

// wellFormed checks that a server's bytes are a greeting and whole replies.
func wellFormed(t *testing.T, out []byte) {
	t.Helper()
	out = out[18:]
	for len(out) >= 20 && binary.BigEndian.Uint64(out) == magicOptReply {
		n := binary.BigEndian.Uint32(out[16:])
		if uint64(len(out)) < 20+uint64(n) {
			t.Fatalf("a reply of %d bytes is cut short", n)
		}
		out = out[20+n:]
	}
	if len(out) != 0 && len(out) != 10 && len(out) != 134 {
		t.Fatalf("%d bytes that are no reply", len(out))
	}
}

func option(opt uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func str(s string) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...) }

// handshakes are negotiations that reach every option.
func handshakes() [][]byte {
	flags := []byte{0, 0, 0, 3}
	enter := option(optGo, append(str("v"), 0, 1, 0, 3))
	meta := append(str("v"), 0, 0, 0, 2)
	meta = append(append(meta, str("base:allocation")...), str("x-fuzz:one")...)
	join := func(parts ...[]byte) []byte { return bytes.Join(append([][]byte{flags}, parts...), nil) }
	return [][]byte{
		join(enter),
		join(option(optExportName, []byte("v"))),
		join(option(optList, nil), option(optAbort, nil)),
		join(option(optStructuredReply, nil), option(optListMetaContext, append(str("v"), 0, 0, 0, 0)), option(optSetMetaContext, meta), enter),
		join(option(optExtendedHeaders, nil), option(optSetMetaContext, meta), option(optInfo, append(str("w"), 0, 0)), enter),
		join(option(optStartTLS, nil), option(99, []byte("what")), enter),
		append(append([]byte{0, 0, 0, 0}, option(optGo, nil)...), append(str("v"), 0, 1, 0, 3)...),
	}
}

func FuzzNegotiation(f *testing.F) {
	for _, b := range handshakes() {
		f.Add(b, false)
		f.Add(b, true)
	}
	f.Fuzz(func(t *testing.T, in []byte, tls bool) {
		n := &negotiation{server: hagglerOf{}, tlsOffered: tls, tlsRequired: tls}
		out, what := negotiateAll(n, in)
		wellFormed(t, out)
		if what == transmit && (n.session == nil || tls && !n.secure) {
			t.Fatal("transmission without a session, or without the TLS that is required")
		}
		n.abandon()
	})
}

// request encodes a header for the corpus.
func (h requestHeader) bytes(extended bool, payload ...byte) []byte {
	magic := magicRequest
	if extended {
		magic = magicExtRequest
	}
	b := binary.BigEndian.AppendUint32(nil, magic)
	b = binary.BigEndian.AppendUint16(b, h.flags)
	b = binary.BigEndian.AppendUint16(b, h.typ)
	b = binary.BigEndian.AppendUint64(b, h.cookie)
	b = binary.BigEndian.AppendUint64(b, h.offset)
	if extended {
		b = binary.BigEndian.AppendUint64(b, h.length)
	} else {
		b = binary.BigEndian.AppendUint32(b, uint32(h.length))
	}
	return append(b, payload...)
}

// FuzzTransmission sends bytes to a whole connection after each of the
// handshakes that lead to transmission. The connection must end, and what it
// sends must be whole replies.
func FuzzTransmission(f *testing.F) {
	for _, style := range []byte{0, 3, 4} {
		ext := style == 4
		var all []byte
		for typ := cmdRead; typ <= cmdBlockStatus+1; typ++ {
			h := requestHeader{typ: typ, cookie: uint64(typ), offset: 3, length: 5}
			switch typ {
			case cmdDisc:
				continue
			case cmdFlush:
				h.offset, h.length = 0, 0
			case cmdWrite:
				if ext {
					h.flags = cmdFlagPayloadLen
				}
				all = append(all, h.bytes(ext, []byte("12345")...)...)
				continue
			}
			all = append(all, h.bytes(ext)...)
		}
		if ext {
			p := append(binary.BigEndian.AppendUint64(nil, 512), 0, 0, 0, 2)
			all = append(all, requestHeader{flags: cmdFlagPayloadLen, typ: cmdBlockStatus, length: 12}.bytes(true, p...)...)
		}
		f.Add(style, append(all, requestHeader{typ: cmdDisc}.bytes(ext)...))
	}
	f.Fuzz(func(t *testing.T, style byte, in []byte) {
		before := handshakes()[int(style)%5]
		s, err := NewServer(Config{Exports: fuzzExport{}, Limits: Limits{Requests: 4}})
		if err != nil {
			t.Fatal(err)
		}
		here, there := net.Pipe()
		l := &listener{}
		l.ln = nil
		c := s.newConn(l, there)
		ended := make(chan struct{})
		go func() { c.run(context.Background()); close(ended) }()
		got := make(chan []byte, 1)
		go func() { b, _ := io.ReadAll(here); got <- b }()
		here.SetWriteDeadline(time.Now().Add(time.Minute)) //nolint:errcheck // a pipe has deadlines
		if _, err := here.Write(append(before, in...)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("the server reads no more and does not hang up")
		}
		// A client that says no more: its half is at its end.
		c.drain()
		select {
		case <-ended:
		case <-time.After(time.Minute):
			t.Fatal("the connection does not end")
		}
		here.Close()
		if b := <-got; len(b) < 18 {
			t.Fatalf("only %d bytes", len(b))
		}
		if used := s.budget.inUse(); used != 0 {
			t.Fatalf("%d bytes of the budget are lost", used)
		}
	})
}

// TestCorpus keeps the seeds as files too, where `go test -fuzz` adds what it
// finds.
func TestCorpus(t *testing.T) {
	for _, name := range []string{"FuzzNegotiation", "FuzzTransmission"} {
		files, err := filepath.Glob(filepath.Join("testdata", "fuzz", name, "*"))
		if err != nil || len(files) == 0 {
			t.Errorf("no corpus of %s: %v", name, err)
		}
	}
}
