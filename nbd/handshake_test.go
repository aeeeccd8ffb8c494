package nbd_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/nbd/nbdtest"
)

// rawDial connects without saying anything.
func rawDial(t testing.TB, addr string) net.Conn {
	t.Helper()
	c, err := nbdtest.DialConn(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return c
}

func begin(t testing.TB, addr string) *nbdtest.Handshake {
	t.Helper()
	h, err := nbdtest.Begin(rawDial(t, addr))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func read(t testing.TB, c io.Reader, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	return b
}

func send(t testing.TB, c io.Writer, b []byte) {
	t.Helper()
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
}

// wantClosed checks that the server closes without another byte.
func wantClosed(t testing.TB, c net.Conn) {
	t.Helper()
	b, err := io.ReadAll(c)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Fatal("the connection is still open")
	}
	if len(b) > 0 {
		t.Fatalf("%d bytes before the close: %x", len(b), b[:min(len(b), 64)])
	}
}

// wantAlive checks that the handshake goes on: GO still works.
func wantAlive(t testing.TB, h *nbdtest.Handshake) {
	t.Helper()
	if _, err := h.Ask(nbdtest.OptGo, nbdtest.GoData("v")); err != nil {
		t.Fatalf("GO after it: %v", err)
	}
}

func one() nbdtest.Exports { return nbdtest.Exports{"v": nbdtest.NewMemDevice(1 << 20)} }

func TestGreeting(t *testing.T) {
	c := rawDial(t, serve(t, one()))
	if got, want := read(t, c, 18), []byte("NBDMAGICIHAVEOPT\x00\x03"); !bytes.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
}

func TestClientFlags(t *testing.T) {
	addr := serve(t, one())
	for _, flags := range []uint32{4, 1 << 31, 0xffffffff} {
		c := rawDial(t, addr)
		read(t, c, 18)
		send(t, c, binary.BigEndian.AppendUint32(nil, flags))
		wantClosed(t, c)
	}
}

// TestNotFixed is a client like go-nbd's: it does not say that it knows fixed
// newstyle, and uses its options all the same, with a wrong length.
func TestNotFixed(t *testing.T) {
	srv, _ := tlsConfigs(t)
	addr := serve(t, one(), nbd.Config{TLS: srv})
	start := func() *nbdtest.Handshake {
		c := rawDial(t, addr)
		read(t, c, 18)
		send(t, c, []byte{0, 0, 0, 0})
		return &nbdtest.Handshake{Conn: c}
	}
	h := start()
	if got, err := h.Ask(nbdtest.OptList, nil); err != nil || !bytes.Equal(got[0].Data, nbdtest.String("v")) {
		t.Errorf("LIST: %v %v", got, err)
	}
	if got, _ := h.Ask(nbdtest.OptStartTLS, nil); len(got) != 1 || got[0].Type != nbdtest.RepErrPolicy {
		t.Errorf("STARTTLS: %v", got)
	}
	for _, infos := range [][]uint16{nil, {1, 2}} {
		h = start()
		if err := h.Send(nbdtest.OptGo, nil); err != nil {
			t.Fatal(err)
		}
		for _, b := range nbdtest.GoData("v", infos...) {
			send(t, h.Conn, []byte{b})
		}
		for {
			r, err := h.Receive()
			if err != nil || r.Err() != nil {
				t.Fatal(err, r.Err())
			}
			if r.Type == nbdtest.RepAck {
				break
			}
		}
		send(t, h.Conn, request(nbdtest.CmdFlush, 0, 1, 0, 0))
		if got := read(t, h.Conn, 16); !bytes.Equal(got, simple(0, 1)) {
			t.Errorf("%x", got)
		}
	}
	for _, b := range [][]byte{{255, 255, 255, 255}, {0, 0, 0, 1, 'v', 255, 255}} {
		h = start()
		if err := h.Send(nbdtest.OptGo, b[:0]); err != nil {
			t.Fatal(err)
		}
		send(t, h.Conn, b)
		wantClosed(t, h.Conn)
	}
	h = start()
	if err := h.Send(nbdtest.OptGo, nil); err != nil {
		t.Fatal(err)
	}
	send(t, h.Conn, nbdtest.GoData("w"))
	if r, err := h.Receive(); err != nil || r.Type != nbdtest.RepErrUnknown {
		t.Errorf("%v %v", r, err)
	}
}

func TestExportName(t *testing.T) {
	addr := serve(t, one())
	for flags, pad := range map[byte]int{0: 124, 1: 124, 2: 0, 3: 0} {
		c := rawDial(t, addr)
		read(t, c, 18)
		send(t, c, []byte{0, 0, 0, flags})
		h := &nbdtest.Handshake{Conn: c}
		if err := h.Send(nbdtest.OptExportName, []byte("v")); err != nil {
			t.Fatal(err)
		}
		got := read(t, c, 10+pad)
		want := append([]byte{0, 0, 0, 0, 0, 0x10, 0, 0, 0x0d, 0x6d}, make([]byte, pad)...)
		if !bytes.Equal(got, want) {
			t.Errorf("flags %d: %x, want %x", flags, got, want)
		}
		// What follows is transmission: a read of four zeroes.
		send(t, c, request(nbdtest.CmdRead, 0, 7, 0, 4))
		if got, want := read(t, c, 20), append(simple(0, 7), 0, 0, 0, 0); !bytes.Equal(got, want) {
			t.Errorf("flags %d: reply %x, want %x", flags, got, want)
		}
	}
	for _, name := range []string{"nothing", "v\x00", "\xff", strings.Repeat("n", 4097), strings.Repeat("n", 70000)} {
		h := begin(t, addr)
		// The server need not read a name that is too long to its end.
		if err := h.Send(nbdtest.OptExportName, []byte(name)); err != nil && !errors.Is(err, syscall.EPIPE) {
			t.Fatal(err)
		}
		wantClosed(t, h.Conn)
	}
	h := begin(t, addr)
	if _, err := h.Ask(nbdtest.OptExtendedHeaders, nil); err != nil {
		t.Fatal(err)
	}
	if err := h.Send(nbdtest.OptExportName, []byte("v")); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, h.Conn)
}

// step is an option and the types of all replies to it.
type step struct {
	opt  uint32
	data []byte
	want []uint32
}

func ack(opt uint32) step { return step{opt, nil, []uint32{nbdtest.RepAck}} }

func TestOptions(t *testing.T) {
	const (
		unsup, policy, invalid, unknown = nbdtest.RepErrUnsup, nbdtest.RepErrPolicy, nbdtest.RepErrInvalid, nbdtest.RepErrUnknown
		tooBig, info, meta, acked       = nbdtest.RepErrTooBig, nbdtest.RepInfo, nbdtest.RepMetaContext, nbdtest.RepAck
	)
	replies := func(types ...uint32) []uint32 { return types }
	structured := ack(nbdtest.OptStructuredReply)
	set := func(data []byte, types ...uint32) []step {
		return []step{structured, {nbdtest.OptSetMetaContext, data, types}}
	}
	list := func(data []byte, types ...uint32) []step {
		return []step{structured, {nbdtest.OptListMetaContext, data, types}}
	}
	many := make([]string, 65)
	for i := range many {
		many[i] = "x-none:y"
	}
	for name, steps := range map[string][]step{
		"unknown option":                {{99, nil, replies(unsup)}},
		"unknown option with data":      {{1 << 31, []byte("data"), replies(unsup)}},
		"unknown option, long":          {{99, make([]byte, 1<<20), replies(unsup)}},
		"peek export is withdrawn":      {{4, []byte("v"), replies(unsup)}},
		"known option, too long":        {{nbdtest.OptInfo, make([]byte, 1<<17), replies(tooBig)}},
		"list":                          {{nbdtest.OptList, nil, replies(nbdtest.RepServer, acked)}},
		"list with data":                {{nbdtest.OptList, []byte{1}, replies(invalid)}},
		"starttls without certificate":  {{nbdtest.OptStartTLS, nil, replies(policy)}},
		"starttls with data":            {{nbdtest.OptStartTLS, []byte{1}, replies(invalid)}},
		"structured":                    {structured, structured},
		"structured with data":          {{nbdtest.OptStructuredReply, []byte{1}, replies(invalid)}},
		"extended":                      {ack(nbdtest.OptExtendedHeaders), ack(nbdtest.OptExtendedHeaders)},
		"extended after structured":     {structured, ack(nbdtest.OptExtendedHeaders)},
		"structured, set, structured":   {structured, {nbdtest.OptSetMetaContext, nbdtest.MetaData("v", "base:allocation"), replies(meta, acked)}, structured},
		"go after a failed go":          {{nbdtest.OptGo, nbdtest.GoData("nothing"), replies(unknown)}, {nbdtest.OptGo, nbdtest.GoData("v@w"), replies(unknown)}},
		"extended with data":            {{nbdtest.OptExtendedHeaders, []byte{1}, replies(invalid)}},
		"structured after extended":     {ack(nbdtest.OptExtendedHeaders), {nbdtest.OptStructuredReply, nil, replies(nbdtest.RepErrExtHeaderReqd)}},
		"info":                          {{nbdtest.OptInfo, nbdtest.GoData("v"), replies(info, info, acked)}},
		"info with all requests":        {{nbdtest.OptInfo, nbdtest.GoData("v", 0, 1, 2, 3), replies(info, info, info, info, acked)}},
		"info with an unknown request":  {{nbdtest.OptInfo, nbdtest.GoData("v", 77), replies(info, info, acked)}},
		"info with a request twice":     {{nbdtest.OptInfo, nbdtest.GoData("v", 1, 1), replies(info, info, info, acked)}},
		"info with too many requests":   {{nbdtest.OptInfo, nbdtest.GoData("v", make([]uint16, 65)...), replies(tooBig)}},
		"info with unknown requests":    {{nbdtest.OptInfo, nbdtest.GoData("v", slices.Repeat([]uint16{77}, 30000)...), replies(info, info, acked)}},
		"info on nothing":               {{nbdtest.OptInfo, nbdtest.GoData("nothing"), replies(unknown)}},
		"go on nothing":                 {{nbdtest.OptGo, nbdtest.GoData("nothing"), replies(unknown)}},
		"go on the default export":      {{nbdtest.OptGo, nbdtest.GoData(""), replies(unknown)}},
		"go with no data":               {{nbdtest.OptGo, nil, replies(invalid)}},
		"go with a name beyond its end": {{nbdtest.OptGo, []byte{0, 0, 0, 9, 'v', 0, 0}, replies(invalid)}},
		"go with a huge name":           {{nbdtest.OptGo, []byte{255, 255, 255, 255, 'v', 0, 0}, replies(invalid)}},
		"go with NUL":                   {{nbdtest.OptGo, nbdtest.GoData("v\x00"), replies(invalid)}},
		"go with bad UTF-8":             {{nbdtest.OptGo, nbdtest.GoData("\xc3"), replies(invalid)}},
		"go with a long name":           {{nbdtest.OptGo, nbdtest.GoData(strings.Repeat("n", 4097)), replies(invalid)}},
		"go with the longest name":      {{nbdtest.OptGo, nbdtest.GoData(strings.Repeat("n", 4096)), replies(unknown)}},
		"go with a wrong count":         {{nbdtest.OptGo, []byte{0, 0, 0, 1, 'v', 0, 2, 0, 0}, replies(invalid)}},
		"go with bytes left over":       {{nbdtest.OptGo, []byte{0, 0, 0, 1, 'v', 0, 0, 0, 0}, replies(invalid)}},
		"list meta, all":                list(nbdtest.MetaData("v"), meta, meta, acked),
		"list meta, base":               list(nbdtest.MetaData("v", "base:"), meta, acked),
		"list meta, namespace":          list(nbdtest.MetaData("v", "blockstep:"), meta, acked),
		"list meta, a position":         list(nbdtest.MetaData("v", "blockstep:dirty-since:1:0"), meta, acked),
		"list meta, position unknown":   list(nbdtest.MetaData("v", "blockstep:dirty-since:1:77"), acked),
		"list meta, bad parameter":      list(nbdtest.MetaData("v", "blockstep:dirty-since:x", "base:"), meta, acked),
		"list meta, twice the same":     list(nbdtest.MetaData("v", "base:", "base:allocation"), meta, acked),
		"list meta, unknown leaf":       list(nbdtest.MetaData("v", "base:what"), acked),
		"list meta, unknown namespace":  list(nbdtest.MetaData("v", "qemu:"), acked),
		"list meta, no colon":           list(nbdtest.MetaData("v", "base"), invalid),
		"list meta, on nothing":         list(nbdtest.MetaData("nothing"), unknown),
		"list meta, too many queries":   list(nbdtest.MetaData("v", many...), tooBig),
		"list meta, cut short":          list(nbdtest.MetaData("v", "base:")[:12], invalid),
		"list meta, unstructured":       {{nbdtest.OptListMetaContext, nbdtest.MetaData("v"), replies(invalid)}},
		"set meta":                      set(nbdtest.MetaData("v", "base:allocation"), meta, acked),
		"set meta with extended":        {ack(nbdtest.OptExtendedHeaders), {nbdtest.OptSetMetaContext, nbdtest.MetaData("v", "base:allocation"), replies(meta, acked)}},
		"set meta, two":                 set(nbdtest.MetaData("v", "blockstep:dirty-since:1:0", "base:allocation"), meta, meta, acked),
		"set meta, none":                set(nbdtest.MetaData("v"), acked),
		"set meta, base wildcard":       set(nbdtest.MetaData("v", "base:"), acked),
		"set meta, unknown leaf":        set(nbdtest.MetaData("v", "base:what"), acked),
		"set meta, unknown namespace":   set(nbdtest.MetaData("v", "qemu:dirty-bitmap:x"), acked),
		"set meta, parameter missing":   set(nbdtest.MetaData("v", "blockstep:dirty-since:"), acked),
		"set meta, bad parameter":       set(nbdtest.MetaData("v", "blockstep:dirty-since:x"), invalid),
		"set meta, position unknown":    set(nbdtest.MetaData("v", "blockstep:dirty-since:1:77"), invalid),
		"set meta, no colon":            set(nbdtest.MetaData("v", "base"), invalid),
		"set meta, on nothing":          set(nbdtest.MetaData("nothing", "base:allocation"), unknown),
		"set meta, too many queries":    set(nbdtest.MetaData("v", many...), tooBig),
		"set meta, too long":            set(make([]byte, 1<<17), tooBig),
		"set meta, bytes left over":     set(append(nbdtest.MetaData("v", "base:allocation"), 0), invalid),
		"set meta, huge count":          set(append(nbdtest.String("v"), 255, 255, 255, 255), invalid),
		"set meta, unstructured":        {{nbdtest.OptSetMetaContext, nbdtest.MetaData("v", "base:allocation"), replies(invalid)}},
	} {
		t.Run(name, func(t *testing.T) {
			h := begin(t, serve(t, one()))
			for _, s := range steps {
				got, _ := h.Ask(s.opt, s.data)
				var types []uint32
				for _, r := range got {
					types = append(types, r.Type)
				}
				if !slices.Equal(types, s.want) {
					t.Fatalf("option %d: %x, want %x", s.opt, types, s.want)
				}
			}
			wantAlive(t, h)
		})
	}
}

func TestAbort(t *testing.T) {
	for _, data := range [][]byte{nil, []byte("ignored"), make([]byte, 1<<17)} {
		h := begin(t, serve(t, one()))
		if got, err := h.Ask(nbdtest.OptAbort, data); err != nil || len(got) != 1 {
			t.Fatalf("%v %v", got, err)
		}
		wantClosed(t, h.Conn)
	}
}

func TestInfoThenGo(t *testing.T) {
	for name, before := range map[string][]step{
		"plain":      nil,
		"structured": {ack(nbdtest.OptStructuredReply)},
		"contexts": {ack(nbdtest.OptExtendedHeaders), {
			nbdtest.OptSetMetaContext, nbdtest.MetaData("v", "base:allocation"), nil,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			h := begin(t, serve(t, one()))
			for _, s := range before {
				if _, err := h.Ask(s.opt, s.data); err != nil {
					t.Fatal(err)
				}
			}
			info, err := h.Ask(nbdtest.OptInfo, nbdtest.GoData("v", 1, 2, 3))
			if err != nil {
				t.Fatal(err)
			}
			enter, err := h.Ask(nbdtest.OptGo, nbdtest.GoData("v", 1, 2, 3))
			if err != nil {
				t.Fatal(err)
			}
			for i := range info {
				if !bytes.Equal(info[i].Data, enter[i].Data) {
					t.Errorf("INFO said %x, GO %x", info[i].Data, enter[i].Data)
				}
			}
			flags := binary.BigEndian.Uint16(info[0].Data[10:])
			if flags&1 == 0 {
				t.Error("no HAS_FLAGS")
			}
			if got := flags&nbdtest.FlagSendDF != 0; got != (name != "plain") {
				t.Errorf("SEND_DF %v", got)
			}
			if got := flags&nbdtest.FlagBlockStatusPayload != 0; got != (name == "contexts") {
				t.Errorf("BLOCK_STATUS_PAYLOAD %v", got)
			}
		})
	}
}

func TestHandshakeBreaks(t *testing.T) {
	addr := serve(t, one())
	for name, b := range map[string][]byte{
		"no magic":        []byte("IHAVEOPX\x00\x00\x00\x03\x00\x00\x00\x00"),
		"a huge option":   []byte("IHAVEOPT\x00\x00\x00\x63\x00\x10\x00\x01"),
		"the hugest":      []byte("IHAVEOPT\x00\x00\x00\x07\xff\xff\xff\xff"),
		"a long name":     []byte("IHAVEOPT\x00\x00\x00\x01\x00\x02\x00\x00"),
		"options en bloc": bytes.Repeat([]byte("IHAVEOPT\x00\x00\x00\x63\x00\x00\x00\x00"), 1025),
	} {
		t.Run(name, func(t *testing.T) {
			h := begin(t, addr)
			go h.Conn.Write(b) //nolint:errcheck // the server may hang up meanwhile
			got, _ := io.ReadAll(h.Conn)
			if n := bytes.Count(got, []byte("\x00\x03\xe8\x89\x04\x55\x65\xa9")); n > 1024 || name != "options en bloc" && n > 0 {
				t.Errorf("%d replies", n)
			}
		})
	}
}

func TestMetaContextOfAnotherExport(t *testing.T) {
	e := nbdtest.Exports{"v": nbdtest.NewMemDevice(1 << 20), "w": nbdtest.NewMemDevice(1 << 20)}
	closed := make(chan string, 9)
	addr := serve(t, &nbdtest.Interceptor{Exports: e, OnClose: func(name string) { closed <- name }})
	h := begin(t, addr)
	for _, s := range []step{
		{nbdtest.OptStructuredReply, nil, nil},
		{nbdtest.OptSetMetaContext, nbdtest.MetaData("w", "blockstep:dirty-since:1:0"), nil},
		{nbdtest.OptGo, nbdtest.GoData("v"), nil},
	} {
		if _, err := h.Ask(s.opt, s.data); err != nil {
			t.Fatal(err)
		}
	}
	if name := <-closed; name != "w" {
		t.Errorf("closed %q", name)
	}
	send(t, h.Conn, request(nbdtest.CmdBlockStatus, 0, 1, 0, 4096))
	if got := errorChunk(t, h.Conn); got != nbdtest.EINVAL {
		t.Errorf("BLOCK_STATUS without a context: %v", got)
	}
}

// TestListMetaContextLeavesNothing: the session that judges a position is closed, and
// what SET_META_CONTEXT has selected stays. It judges no more positions than a session
// may have, and where that cannot be told the option fails.
func TestListMetaContextLeavesNothing(t *testing.T) {
	closed := make(chan string, 9)
	e := &shut{Exports: &nbdtest.Interceptor{Exports: one(), OnClose: func(name string) { closed <- name }}}
	h := begin(t, serve(t, e))
	position := nbdtest.MetaData("v", "blockstep:dirty-since:1:0")
	for _, s := range []step{
		{nbdtest.OptStructuredReply, nil, nil},
		{nbdtest.OptSetMetaContext, position, nil},
		{nbdtest.OptListMetaContext, position, nil},
	} {
		if _, err := h.Ask(s.opt, s.data); err != nil {
			t.Fatal(err)
		}
	}
	if len(closed) != 1 {
		t.Errorf("%d sessions are closed after LIST_META_CONTEXT, want the one that it has opened", len(closed))
	}
	var positions []string
	for i := range 17 {
		positions = append(positions, fmt.Sprintf("blockstep:dirty-since:1:%d", i))
	}
	if _, err := h.Ask(nbdtest.OptListMetaContext, nbdtest.MetaData("v", positions...)); !refusedWith(err, nbdtest.RepErrTooBig) {
		t.Errorf("17 positions: %v", err)
	}
	e.now = true
	if replies, err := h.Ask(nbdtest.OptListMetaContext, position); err == nil {
		t.Errorf("a position that cannot be judged: %+v", replies)
	}
	e.now = false
	wantAlive(t, h)
	send(t, h.Conn, request(nbdtest.CmdBlockStatus, 0, 1, 0, 4096))
	if got := read(t, h.Conn, 20); binary.BigEndian.Uint16(got[6:]) != 5 { // NBD_REPLY_TYPE_BLOCK_STATUS
		t.Errorf("BLOCK_STATUS is answered with a chunk of type %d", binary.BigEndian.Uint16(got[6:]))
	}
}

func refusedWith(err error, typ uint32) bool {
	var refused *nbdtest.OptionError
	return errors.As(err, &refused) && refused.Type == typ
}

// TestMetaContextsOutliveAFailedGo: what was selected for an export counts until it is
// entered, also if that was tried before in vain.
func TestMetaContextsOutliveAFailedGo(t *testing.T) {
	e := &shut{Exports: one()}
	h := begin(t, serve(t, e))
	for _, s := range []step{
		{nbdtest.OptStructuredReply, nil, nil},
		{nbdtest.OptSetMetaContext, nbdtest.MetaData("v", "base:allocation"), nil},
	} {
		if _, err := h.Ask(s.opt, s.data); err != nil {
			t.Fatal(err)
		}
	}
	e.now = true
	for _, name := range []string{"v", "nosuch"} {
		if _, err := h.Ask(nbdtest.OptGo, nbdtest.GoData(name)); err == nil {
			t.Errorf("GO of %s succeeded", name)
		}
	}
	e.now = false
	wantAlive(t, h)
	send(t, h.Conn, request(nbdtest.CmdBlockStatus, 0, 1, 0, 4096))
	if got := read(t, h.Conn, 20); binary.BigEndian.Uint16(got[6:]) != 5 { // NBD_REPLY_TYPE_BLOCK_STATUS
		t.Errorf("BLOCK_STATUS is answered with a chunk of type %d", binary.BigEndian.Uint16(got[6:]))
	}
}

// shut refuses to open anything for a time.
type shut struct {
	nbd.Exports
	now bool // changed between two options
}

func (s *shut) Open(ctx context.Context, name string, c nbd.Client) (nbd.Session, error) {
	if s.now {
		return nil, errors.New("not now")
	}
	return s.Exports.Open(ctx, name, c)
}

func TestAllowListAndReadOnly(t *testing.T) {
	e := nbdtest.Exports{"db-1": nbdtest.NewMemDevice(1 << 20), "db-2": nbdtest.NewMemDevice(1 << 20), "secret": nbdtest.NewMemDevice(1 << 20)}
	addr := serve(t, e, nbd.ListenerOptions{ReadOnly: true, Allow: []string{"db-*"}})
	h := begin(t, addr)
	replies, err := h.Ask(nbdtest.OptList, nil)
	if err != nil || len(replies) != 3 {
		t.Errorf("%d replies to LIST, %v", len(replies), err)
	}
	for _, opt := range []uint32{nbdtest.OptInfo, nbdtest.OptGo} {
		got, _ := h.Ask(opt, nbdtest.GoData("secret"))
		if len(got) != 1 || got[0].Type != nbdtest.RepErrUnknown {
			t.Errorf("option %d on an export that is not allowed: %v", opt, got)
		}
	}
	c := dial(t, addr, "db-1", nbdtest.Options{})
	if c.Flags()&nbdtest.FlagReadOnly == 0 || c.Flags()&(nbdtest.FlagSendTrim|nbdtest.FlagSendWriteZeroes|nbdtest.FlagSendFastZero) != 0 {
		t.Errorf("flags %#x", c.Flags())
	}
	for name, err := range map[string]error{
		"write": c.WriteAt(t.Context(), []byte("x"), 0),
		"trim":  c.Trim(t.Context(), 0, 512),
		"zero":  c.WriteZeroes(t.Context(), 0, 512),
	} {
		if !errors.Is(err, nbdtest.EPERM) {
			t.Errorf("%s on a read-only export: %v", name, err)
		}
	}
	if err := c.ReadAt(t.Context(), make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Error(err)
	}
}

// tlsConfigs returns a server's and a client's configuration.
func tlsConfigs(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	dir := certificates(t)
	file := func(name string) string { return filepath.Join(dir, name) }
	server, err := nbd.LoadTLS(file("server-cert.pem"), file("server-key.pem"), file("ca-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(file("client-cert.pem"), file("client-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return server, &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true, ServerName: "localhost"} //nolint:gosec // a test of the server
}

func TestForcedTLS(t *testing.T) {
	srv, cli := tlsConfigs(t)
	addr := serve(t, one(), nbd.Config{TLS: srv}, nbd.ListenerOptions{TLS: nbd.TLSRequired})
	h := begin(t, addr)
	for _, opt := range []uint32{
		nbdtest.OptList, nbdtest.OptInfo, nbdtest.OptGo, nbdtest.OptStructuredReply, nbdtest.OptExtendedHeaders,
		nbdtest.OptListMetaContext, nbdtest.OptSetMetaContext, 99,
	} {
		got, _ := h.Ask(opt, nbdtest.GoData("v"))
		if len(got) != 1 || got[0].Type != nbdtest.RepErrTLSReqd {
			t.Errorf("option %d: %v", opt, got)
		}
	}
	if got, _ := h.Ask(99, make([]byte, 1<<17)); len(got) != 1 || got[0].Type != nbdtest.RepErrTLSReqd {
		t.Errorf("a long option: %v", got)
	}
	if err := h.StartTLS(t.Context(), cli); err != nil {
		t.Fatal(err)
	}
	if got, _ := h.Ask(nbdtest.OptStartTLS, nil); len(got) != 1 || got[0].Type != nbdtest.RepErrInvalid {
		t.Errorf("STARTTLS twice: %v", got)
	}
	wantAlive(t, h)

	h = begin(t, addr)
	if err := h.Send(nbdtest.OptExportName, []byte("v")); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, h.Conn)

	c := rawDial(t, addr) // not even fixed newstyle
	read(t, c, 18)
	send(t, c, []byte{0, 0, 0, 0})
	wantClosed(t, c)

	h = begin(t, addr)
	if _, err := h.Ask(nbdtest.OptAbort, nil); err != nil {
		t.Errorf("ABORT before TLS: %v", err)
	}
}

func TestOfferedTLS(t *testing.T) {
	srv, cli := tlsConfigs(t)
	addr := serve(t, one(), nbd.Config{TLS: srv, TLSRequire: true}) // a unix socket: not required
	wantAlive(t, begin(t, addr))

	// What was negotiated before TLS is forgotten.
	h := begin(t, addr)
	for _, s := range []step{
		{nbdtest.OptExtendedHeaders, nil, nil},
		{nbdtest.OptSetMetaContext, nbdtest.MetaData("v", "base:allocation"), nil},
	} {
		if _, err := h.Ask(s.opt, s.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.StartTLS(t.Context(), cli); err != nil {
		t.Fatal(err)
	}
	got, err := h.Ask(nbdtest.OptGo, nbdtest.GoData("v"))
	if err != nil {
		t.Fatal(err)
	}
	if flags := binary.BigEndian.Uint16(got[0].Data[10:]); flags&(nbdtest.FlagSendDF|nbdtest.FlagBlockStatusPayload) != 0 {
		t.Errorf("flags %#x remember what was before TLS", flags)
	}
	send(t, h.Conn, request(nbdtest.CmdFlush, 0, 5, 0, 0))
	if got := read(t, h.Conn, 16); !bytes.Equal(got, simple(0, 5)) {
		t.Errorf("%x", got)
	}
	// DISC ends TLS before TCP.
	send(t, h.Conn, request(nbdtest.CmdDisc, 0, 6, 0, 0))
	if b, err := io.ReadAll(h.Conn); err != nil || len(b) > 0 {
		t.Errorf("after DISC: %x, %v", b, err)
	}

	// A plain text that arrives with STARTTLS is no part of what follows.
	h = begin(t, addr)
	b := []byte("IHAVEOPT\x00\x00\x00\x05\x00\x00\x00\x00IHAVEOPT\x00\x00\x00\x03\x00\x00\x00\x00")
	send(t, h.Conn, b)
	if r, err := h.Receive(); err != nil || r.Type != nbdtest.RepAck {
		t.Fatalf("%v %v", r, err)
	}
	if rest, _ := io.ReadAll(h.Conn); bytes.Contains(rest, []byte{0, 3, 0xe8, 0x89, 0x04}) {
		t.Errorf("an option in plain text was answered after STARTTLS: %x", rest)
	}
}

func TestRequestsWithTLS(t *testing.T) {
	srv, cli := tlsConfigs(t)
	dev := nbdtest.NewMemDevice(64 << 20)
	_, addr := serveOn(t, "tcp://127.0.0.1:0", nbdtest.Exports{"v": dev}, nbd.Config{TLS: srv, TLSRequire: true})
	c := dial(t, addr, "v", nbdtest.Options{TLS: cli})
	p := bytes.Repeat([]byte("0123456789abcdef"), 2<<20)
	if err := c.WriteAt(t.Context(), p, 4096); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(p))
	if err := c.ReadAt(t.Context(), got, 4096); err != nil || !bytes.Equal(got, p) {
		t.Errorf("%v, equal %v", err, bytes.Equal(got, p))
	}
	if _, err := nbdtest.Dial(t.Context(), addr, "v", nbdtest.Options{TLS: &tls.Config{InsecureSkipVerify: true}}); err == nil { //nolint:gosec // a test
		t.Error("served without a client certificate")
	}
}
