package nbd_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/nbd/nbdtest"
)

// request encodes a compact request header.
func request(cmd, flags uint16, cookie, offset uint64, length uint32) []byte {
	b := []byte{0x25, 0x60, 0x95, 0x13}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, offset)
	return binary.BigEndian.AppendUint32(b, length)
}

// extRequest encodes an extended request header.
func extRequest(cmd, flags uint16, cookie, offset, length uint64) []byte {
	b := []byte{0x21, 0xe4, 0x1c, 0x71}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, offset)
	return binary.BigEndian.AppendUint64(b, length)
}

// simple encodes a simple reply.
func simple(errno uint32, cookie uint64) []byte {
	b := []byte{0x67, 0x44, 0x66, 0x98}
	b = binary.BigEndian.AppendUint32(b, errno)
	return binary.BigEndian.AppendUint64(b, cookie)
}

// chunk encodes the header of a structured reply chunk.
func chunk(flags, typ uint16, cookie uint64, length uint32) []byte {
	b := []byte{0x66, 0x8e, 0x33, 0xef}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, typ)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint32(b, length)
}

// extChunk encodes the header of an extended reply chunk.
func extChunk(flags, typ uint16, cookie, offset, length uint64) []byte {
	b := []byte{0x6e, 0x8a, 0x27, 0x8c}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, typ)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, offset)
	return binary.BigEndian.AppendUint64(b, length)
}

// errorChunk reads one error chunk, the last of its reply.
func errorChunk(t testing.TB, c io.Reader) nbdtest.Errno {
	t.Helper()
	b := read(t, c, 20)
	if !bytes.Equal(b[:8], []byte{0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1}) {
		t.Fatalf("not a last error chunk: %x", b)
	}
	p := read(t, c, int(binary.BigEndian.Uint32(b[16:])))
	if int(binary.BigEndian.Uint16(p[4:])) != len(p)-6 {
		t.Errorf("message length %d of %d", binary.BigEndian.Uint16(p[4:]), len(p)-6)
	}
	return nbdtest.Errno(binary.BigEndian.Uint32(p))
}

// enter negotiates and returns the bare connection in transmission.
func enter(t testing.TB, addr string, options ...uint32) net.Conn {
	t.Helper()
	h := begin(t, addr)
	for _, opt := range options {
		var data []byte
		if opt == nbdtest.OptSetMetaContext {
			data = nbdtest.MetaData("v", "base:allocation", "blockstep:dirty-since:1:0")
		}
		if _, err := h.Ask(opt, data); err != nil {
			t.Fatal(err)
		}
	}
	wantAlive(t, h)
	return h.Conn
}

func cat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func be(width int, v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v)[8-width:] }

// sparse has four chunks of 64 KiB: data, hole, hole, data.
func sparse(t testing.TB) *nbdtest.MemDevice {
	t.Helper()
	d := nbdtest.NewMemDevice(256 << 10)
	for _, off := range []int64{0, 192 << 10} {
		if _, err := d.WriteAt(bytes.Repeat([]byte{0xda}, 64<<10), off); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// flagsText is what a client is told of a flag that its command does not have.
const flagsText = "invalid request: a flag that the command does not take"

func TestReplyBytes(t *testing.T) {
	const k = 1 << 10
	data := bytes.Repeat([]byte{0xda}, 64*k)
	zeroes := make([]byte, 128*k)
	const cookie = 0xfedcba9876543210
	for _, c := range []struct {
		name    string
		options []uint32
		send    []byte
		want    []byte
	}{
		{"simple read", nil, request(nbdtest.CmdRead, 0, cookie, 64*k-2, 4), cat(simple(0, cookie), data[:2], zeroes[:2])},
		{"simple write", nil, cat(request(nbdtest.CmdWrite, 0, cookie, 1, 3), []byte("abc")), simple(0, cookie)},
		{"simple flush", nil, request(nbdtest.CmdFlush, 0, cookie, 0, 0), simple(0, cookie)},
		{"simple error", nil, request(nbdtest.CmdRead, 0, cookie, 1<<40, 4), simple(22, cookie)},
		{"simple read of holes is data", nil, request(nbdtest.CmdRead, 0, cookie, 64*k, 128*k), cat(simple(0, cookie), zeroes)},
		{
			"structured read",
			[]uint32{nbdtest.OptStructuredReply},
			request(nbdtest.CmdRead, 0, cookie, 10, 4),
			cat(chunk(1, 1, cookie, 12), be(8, 10), data[:4]),
		},
		{
			"structured write",
			[]uint32{nbdtest.OptStructuredReply},
			cat(request(nbdtest.CmdWrite, 1, cookie, 1, 3), []byte("abc")),
			simple(0, cookie),
		},
		{
			"holes",
			[]uint32{nbdtest.OptStructuredReply},
			request(nbdtest.CmdRead, 0, cookie, 64*k-2, 128*k+4),
			cat(chunk(0, 1, cookie, 10), be(8, 64*k-2), data[:2], chunk(0, 2, cookie, 12), be(8, 64*k), be(4, 128*k),
				chunk(1, 1, cookie, 10), be(8, 192*k), data[:2]),
		},
		{
			"holes with DF",
			[]uint32{nbdtest.OptStructuredReply},
			request(nbdtest.CmdRead, 4, cookie, 64*k-2, 128*k+4),
			cat(chunk(1, 1, cookie, 128*k+12), be(8, 64*k-2), data[:2], zeroes, data[:2]),
		},
		{
			"extended read",
			[]uint32{nbdtest.OptExtendedHeaders},
			extRequest(nbdtest.CmdRead, 0, cookie, 10, 4),
			cat(extChunk(1, 1, cookie, 10, 12), be(8, 10), data[:4]),
		},
		{
			"extended holes",
			[]uint32{nbdtest.OptExtendedHeaders},
			extRequest(nbdtest.CmdRead, 0, cookie, 64*k-2, 128*k+2),
			cat(extChunk(0, 1, cookie, 64*k-2, 10), be(8, 64*k-2), data[:2], extChunk(1, 2, cookie, 64*k-2, 12), be(8, 64*k), be(4, 128*k)),
		},
		{
			"extended write",
			[]uint32{nbdtest.OptExtendedHeaders},
			cat(extRequest(nbdtest.CmdWrite, 1<<5, cookie, 1, 3), []byte("abc")),
			extChunk(1, 0, cookie, 1, 0),
		},
		{
			"extended zeroes beyond 4 GiB are refused for their range",
			[]uint32{nbdtest.OptExtendedHeaders},
			extRequest(nbdtest.CmdTrim, 0, cookie, 0, 1<<33),
			cat(extChunk(1, 0x8001, cookie, 0, uint64(6+len(nbd.ErrRange.Error()))), be(4, 22), be(2, uint64(len(nbd.ErrRange.Error()))), []byte(nbd.ErrRange.Error())),
		},
		{
			"block status",
			[]uint32{nbdtest.OptStructuredReply, nbdtest.OptSetMetaContext},
			request(nbdtest.CmdBlockStatus, 0, cookie, 0, 256*k),
			cat(chunk(0, 5, cookie, 28), be(4, 1), be(4, 64*k), be(4, 0), be(4, 128*k), be(4, 3), be(4, 64*k), be(4, 0),
				chunk(1, 5, cookie, 28), be(4, 2), be(4, 64*k), be(4, 1), be(4, 128*k), be(4, 0), be(4, 64*k), be(4, 1)),
		},
		{
			"block status, one",
			[]uint32{nbdtest.OptStructuredReply, nbdtest.OptSetMetaContext},
			request(nbdtest.CmdBlockStatus, 8, cookie, 512, 4096),
			cat(chunk(0, 5, cookie, 12), be(4, 1), be(4, 4096), be(4, 0), chunk(1, 5, cookie, 12), be(4, 2), be(4, 4096), be(4, 1)),
		},
		{
			"extended block status",
			[]uint32{nbdtest.OptExtendedHeaders, nbdtest.OptSetMetaContext},
			extRequest(nbdtest.CmdBlockStatus, 0, cookie, 32*k, 64*k),
			cat(extChunk(0, 6, cookie, 32*k, 40), be(4, 1), be(4, 2), be(8, 32*k), be(8, 0), be(8, 32*k), be(8, 3),
				extChunk(1, 6, cookie, 32*k, 40), be(4, 2), be(4, 2), be(8, 32*k), be(8, 1), be(8, 32*k), be(8, 0)),
		},
		{
			"extended headers replace structured replies",
			[]uint32{nbdtest.OptStructuredReply, nbdtest.OptExtendedHeaders},
			extRequest(nbdtest.CmdFlush, 0, cookie, 0, 0),
			extChunk(1, 0, cookie, 0, 0),
		},
		{
			"extended write with flags that it does not have: its payload is skipped",
			[]uint32{nbdtest.OptExtendedHeaders},
			cat(extRequest(nbdtest.CmdWrite, 1<<5|1<<15, cookie, 0, 3), []byte("abc"), extRequest(nbdtest.CmdFlush, 0, cookie, 0, 0)),
			cat(extChunk(1, 0x8001, cookie, 0, uint64(6+len(flagsText))), be(4, 22), be(2, uint64(len(flagsText))), []byte(flagsText), extChunk(1, 0, cookie, 0, 0)),
		},
		{
			"extended block status of one context",
			[]uint32{nbdtest.OptExtendedHeaders, nbdtest.OptSetMetaContext},
			cat(extRequest(nbdtest.CmdBlockStatus, 1<<5, cookie, 0, 12), be(8, 4096), be(4, 2)),
			cat(extChunk(1, 6, cookie, 0, 24), be(4, 2), be(4, 1), be(8, 4096), be(8, 1)),
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := enter(t, serve(t, nbdtest.Exports{"v": sparse(t)}), c.options...)
			send(t, conn, c.send)
			if got := read(t, conn, len(c.want)); !bytes.Equal(got, c.want) {
				t.Errorf("got  %.200x\nwant %.200x", got, c.want)
			}
			var disc []byte
			if slices.Contains(c.options, nbdtest.OptExtendedHeaders) {
				disc = extRequest(nbdtest.CmdDisc, 0, 0, 0, 0)
			} else {
				disc = request(nbdtest.CmdDisc, 0, 0, 0, 0)
			}
			send(t, conn, disc)
			wantClosed(t, conn) // and so nothing more was sent
		})
	}
}

// TestRefused sends what the protocol forbids and checks the error, and that
// the connection goes on.
func TestRefused(t *testing.T) {
	const size = 1 << 20
	type refusal struct {
		name         string
		cmd          uint16
		flags        nbdtest.Flag
		offset, size uint64
		payload      int
		want         nbdtest.Errno
	}
	both := []refusal{
		{"unknown command", 77, 0, 0, 0, 0, nbdtest.EINVAL},
		{"resize is an extension", 8, 0, 0, 4096, 0, nbdtest.EINVAL},
		{"read beyond the end", nbdtest.CmdRead, 0, size - 511, 512, 0, nbdtest.EINVAL},
		{"read far beyond the end", nbdtest.CmdRead, 0, 1<<64 - 512, 1024, 0, nbdtest.EINVAL},
		{"write beyond the end", nbdtest.CmdWrite, 0, size - 511, 512, 512, nbdtest.ENOSPC},
		{"trim beyond the end", nbdtest.CmdTrim, 0, size, 512, 0, nbdtest.EINVAL},
		{"zeroes beyond the end", nbdtest.CmdWriteZeroes, 0, size, 512, 0, nbdtest.ENOSPC},
		{"cache beyond the end", nbdtest.CmdCache, 0, size, 512, 0, nbdtest.EINVAL},
		{"status beyond the end", nbdtest.CmdBlockStatus, 0, size, 512, 0, nbdtest.EINVAL},
		{"read of nothing", nbdtest.CmdRead, 0, 0, 0, 0, nbdtest.EINVAL},
		{"trim of nothing", nbdtest.CmdTrim, 0, 0, 0, 0, nbdtest.EINVAL},
		{"status of nothing", nbdtest.CmdBlockStatus, 0, 0, 0, 0, nbdtest.EINVAL},
		{"flush with a range", nbdtest.CmdFlush, 0, 512, 512, 0, nbdtest.EINVAL},
		{"unaligned read", nbdtest.CmdRead, 0, 1, 512, 0, nbdtest.EINVAL},
		{"unaligned write", nbdtest.CmdWrite, 0, 0, 511, 511, nbdtest.EINVAL},
		{"unaligned zeroes", nbdtest.CmdWriteZeroes, 0, 512, 513, 0, nbdtest.EINVAL},
		{"unknown flag", nbdtest.CmdRead, 1 << 9, 0, 512, 0, nbdtest.EINVAL},
		{"a flag of another command", nbdtest.CmdWrite, nbdtest.NoHole, 0, 512, 512, nbdtest.EINVAL},
		{"DF on a write", nbdtest.CmdWrite, nbdtest.DF, 0, 512, 512, nbdtest.EINVAL},
		{"REQ_ONE on a trim", nbdtest.CmdTrim, nbdtest.ReqOne, 0, 512, 0, nbdtest.EINVAL},
		{"a flag on cache", nbdtest.CmdCache, nbdtest.FastZero, 0, 512, 0, nbdtest.EINVAL},
		{"slow zero asked to be fast", nbdtest.CmdWriteZeroes, nbdtest.FastZero | nbdtest.NoHole, 0, 512, 0, nbdtest.ENOTSUP},
	}
	big := nbdtest.NewMemDevice(1 << 30)
	dev := nbdtest.NewMemDevice(size)
	for _, d := range []*nbdtest.MemDevice{dev, big} {
		info := d.Info()
		info.BlockMin, info.BlockMax = 512, 1<<20
		d.SetInfo(info)
	}
	addr := serve(t, nbdtest.Exports{"v": dev, "big": big})
	for name, style := range styles {
		t.Run(name, func(t *testing.T) {
			c := dial(t, addr, "v", style)
			check := func(r refusal) {
				err := c.Do(t.Context(), r.cmd, r.flags, r.offset, r.size, make([]byte, r.payload))
				if !errors.Is(err, r.want) {
					t.Errorf("%s: %v, want %v", r.name, err, r.want)
				}
			}
			for _, r := range both {
				check(r)
			}
			// FUA is accepted with every command.
			for _, cmd := range []uint16{nbdtest.CmdRead, nbdtest.CmdTrim, nbdtest.CmdCache, nbdtest.CmdWriteZeroes} {
				if err := c.Do(t.Context(), cmd, nbdtest.FUA, 0, 512, nil); err != nil {
					t.Errorf("command %d with FUA: %v", cmd, err)
				}
			}
			if err := c.Do(t.Context(), nbdtest.CmdFlush, nbdtest.FUA, 0, 0, nil); err != nil {
				t.Errorf("flush with FUA: %v", err)
			}
			c = dial(t, addr, "big", style)
			tooLong := nbdtest.EINVAL
			if !style.Simple {
				tooLong = nbdtest.EOVERFLOW
			}
			check(refusal{"read of more than the maximum", nbdtest.CmdRead, 0, 0, 1<<20 + 512, 0, tooLong})
			if !style.Extended {
				check(refusal{"write of more than the maximum", nbdtest.CmdWrite, 0, 0, 48 << 20, 48 << 20, nbdtest.EINVAL})
			}
			if err := c.WriteZeroes(t.Context(), 0, 1<<30); err != nil {
				t.Errorf("zeroes may be longer than a payload: %v", err)
			}
		})
	}
}

func TestRefusedExtended(t *testing.T) {
	addr := serve(t, one())
	conn := enter(t, addr, nbdtest.OptExtendedHeaders, nbdtest.OptSetMetaContext)
	wantError := func(name string, want nbdtest.Errno) {
		t.Helper()
		b := read(t, conn, 32)
		p := read(t, conn, int(binary.BigEndian.Uint64(b[24:])))
		if len(p) < 6 || nbdtest.Errno(binary.BigEndian.Uint32(p)) != want {
			t.Errorf("%s: %x %x, want %v", name, b, p, want)
		}
	}
	const withPayload = 1 << 5
	for name, b := range map[string][]byte{
		"write without the flag":         extRequest(nbdtest.CmdWrite, 0, 1, 0, 512),
		"read with a payload":            cat(extRequest(nbdtest.CmdRead, withPayload, 1, 0, 3), []byte("abc")),
		"flush with a payload":           cat(extRequest(nbdtest.CmdFlush, withPayload, 1, 0, 3), []byte("abc")),
		"unknown command with a payload": cat(extRequest(99, withPayload, 1, 0, 3), []byte("abc")),
		"status with a short payload":    cat(extRequest(nbdtest.CmdBlockStatus, withPayload, 1, 0, 8), be(8, 512)),
		"status with a crooked payload":  cat(extRequest(nbdtest.CmdBlockStatus, withPayload, 1, 0, 14), be(8, 512), be(6, 1)),
		"status of an unknown context":   cat(extRequest(nbdtest.CmdBlockStatus, withPayload, 1, 0, 12), be(8, 512), be(4, 9)),
		"status of context 0":            cat(extRequest(nbdtest.CmdBlockStatus, withPayload, 1, 0, 12), be(8, 512), be(4, 0)),
		"status of a context twice":      cat(extRequest(nbdtest.CmdBlockStatus, withPayload, 1, 0, 16), be(8, 512), be(4, 1), be(4, 1)),
		"status of too many contexts":    cat(extRequest(nbdtest.CmdBlockStatus, withPayload, 1, 0, 20), be(8, 512), be(4, 1), be(4, 2), be(4, 3)),
		"status beyond the end":          cat(extRequest(nbdtest.CmdBlockStatus, withPayload, 1, 0, 12), be(8, 1<<40), be(4, 1)),
	} {
		send(t, conn, b)
		wantError(name, nbdtest.EINVAL)
	}
	send(t, conn, extRequest(nbdtest.CmdRead, 0, 1, 0, 1<<63))
	wantError("a read of 2^63 bytes", nbdtest.EINVAL)
	// A payload beyond the maximum is not even skipped.
	send(t, conn, extRequest(nbdtest.CmdWrite, withPayload, 1, 0, nbd.PayloadMax+1))
	wantClosed(t, conn)
}

func TestBrokenRequests(t *testing.T) {
	addr := serve(t, one())
	for name, b := range map[string][]byte{
		"wrong magic":              append([]byte{0x12}, make([]byte, 27)...),
		"extended, not negotiated": extRequest(nbdtest.CmdRead, 0, 1, 0, 512),
		"a write of 4 GiB":         request(nbdtest.CmdWrite, 0, 1, 0, 1<<32-1),
	} {
		t.Run(name, func(t *testing.T) {
			conn := enter(t, addr)
			send(t, conn, b)
			wantClosed(t, conn)
		})
	}
}

func TestErrnos(t *testing.T) {
	for _, c := range []struct {
		err  error
		cmd  uint16
		want nbdtest.Errno
	}{
		{nbd.ErrRange, nbdtest.CmdRead, nbdtest.EINVAL},
		{nbd.ErrRange, nbdtest.CmdWrite, nbdtest.ENOSPC},
		{nbd.ErrRange, nbdtest.CmdWriteZeroes, nbdtest.ENOSPC},
		{nbd.ErrRange, nbdtest.CmdTrim, nbdtest.EINVAL},
		{nbd.ErrNoSpace, nbdtest.CmdWrite, nbdtest.ENOSPC},
		{nbd.ErrReadOnly, nbdtest.CmdWrite, nbdtest.EPERM},
		{nbd.ErrIO, nbdtest.CmdFlush, nbdtest.EIO},
		{nbd.ErrInvalid, nbdtest.CmdRead, nbdtest.EINVAL},
		{nbd.ErrUnsupported, nbdtest.CmdWriteZeroes, nbdtest.ENOTSUP},
		{nbd.ErrUnsupported, nbdtest.CmdRead, nbdtest.EINVAL},
		{nbd.ErrShutdown, nbdtest.CmdRead, nbdtest.ESHUTDOWN},
		{nbd.ErrTooLarge, nbdtest.CmdRead, nbdtest.EOVERFLOW},
		{nbd.ErrNoMemory, nbdtest.CmdRead, nbdtest.ENOMEM},
		{nbd.ErrNoExport, nbdtest.CmdRead, nbdtest.EINVAL},
		{syscall.EDQUOT, nbdtest.CmdWrite, nbdtest.ENOSPC},
		{syscall.EFBIG, nbdtest.CmdWrite, nbdtest.ENOSPC},
		{syscall.EROFS, nbdtest.CmdWrite, nbdtest.EPERM},
		{syscall.EBADF, nbdtest.CmdWrite, nbdtest.EIO},
		{syscall.ENOMEM, nbdtest.CmdWrite, nbdtest.ENOMEM},
		{syscall.EINVAL, nbdtest.CmdWrite, nbdtest.EINVAL},
		{errors.New("some text with \x00 and \xff in it"), nbdtest.CmdRead, nbdtest.EIO},
		{fmt.Errorf("%s: %w", bytes.Repeat([]byte("ä"), 5000), nbd.ErrNoSpace), nbdtest.CmdWrite, nbdtest.ENOSPC},
	} {
		addr := serve(t, nbdtest.Fail(one(), func(*nbd.Request) error { return fmt.Errorf("wrapped: %w", c.err) }))
		for name, style := range styles {
			k := dial(t, addr, "v", style)
			length := uint64(512)
			if c.cmd == nbdtest.CmdFlush {
				length = 0
			}
			var p []byte
			if c.cmd == nbdtest.CmdWrite {
				p = make([]byte, length)
			}
			if err := k.Do(t.Context(), c.cmd, 0, 0, length, p); !errors.Is(err, c.want) {
				t.Errorf("%s: command %d, %v: %v, want %v", name, c.cmd, c.err, err, c.want)
			}
		}
	}
}

// TestOutOfOrder holds back the first of two requests: the second is answered,
// with its own cookie.
func TestOutOfOrder(t *testing.T) {
	var mu sync.Mutex
	var held func()
	addr := serve(t, &nbdtest.Interceptor{Exports: one(), OnSubmit: func(r *nbd.Request, next func(*nbd.Request)) {
		mu.Lock()
		defer mu.Unlock()
		if r.Offset == 0 {
			held = func() { next(r) }
			return
		}
		next(r)
		held()
	}})
	conn := enter(t, addr)
	send(t, conn, cat(request(nbdtest.CmdRead, 0, 11, 0, 512), request(nbdtest.CmdRead, 0, 22, 512, 512)))
	first, second := read(t, conn, 16+512)[:16], read(t, conn, 16+512)[:16]
	if !bytes.Equal(first, simple(0, 22)) || !bytes.Equal(second, simple(0, 11)) {
		t.Errorf("%x, then %x", first, second)
	}
}

// TestDisconnectAnswers checks that what was asked before DISC is answered
// before the close.
func TestDisconnectAnswers(t *testing.T) {
	release := make(chan struct{})
	addr := serve(t, &nbdtest.Interceptor{Exports: one(), OnSubmit: func(r *nbd.Request, next func(*nbd.Request)) {
		go func() { <-release; next(r) }()
	}})
	conn := enter(t, addr)
	send(t, conn, cat(request(nbdtest.CmdWrite, 0, 1, 0, 4), []byte("data"), request(nbdtest.CmdDisc, 0, 2, 0, 0)))
	close(release)
	if got := read(t, conn, 16); !bytes.Equal(got, simple(0, 1)) {
		t.Errorf("%x", got)
	}
	wantClosed(t, conn)
}
