package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
)

var rewrite = flag.Bool("rewrite", false, "write the golden bytes anew")

// flat returns the bytes of m's frame as they go over the wire.
func flat(t interface {
	Helper()
	Fatal(args ...any)
}, vol ident.Volume, m Message,
) []byte {
	t.Helper()
	b, payloads, err := AppendFrame(nil, nil, vol, m)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range payloads {
		b = append(b, p.B...)
	}
	return b
}

func load(data string) *buf.Buf {
	b := buf.Get(len(data))
	copy(b.B, data)
	return b
}

// view turns a message into text that two equal messages share, with the bytes
// of its payloads and without what buffers are made of.
func view(m Message) string {
	var s strings.Builder
	put := func(p *buf.Buf) {
		if p != nil {
			fmt.Fprintf(&s, "\n  payload %x", p.B)
		}
	}
	switch m := m.(type) {
	case *Append:
		c := *m
		c.Entries = nil
		fmt.Fprintf(&s, "%T %+v", m, c)
		for _, e := range m.Entries {
			c := e
			c.Payload = nil
			fmt.Fprintf(&s, "\n %+v", c)
			put(e.Payload)
		}
	case *Blocks:
		c := *m
		c.Blocks = nil
		fmt.Fprintf(&s, "%T %+v", m, c)
		for _, k := range m.Blocks {
			c := k
			c.Payload = nil
			fmt.Fprintf(&s, "\n %+v", c)
			put(k.Payload)
		}
	case *Forward:
		c := *m
		c.Payload = nil
		fmt.Fprintf(&s, "%T %+v", m, c)
		put(m.Payload)
	case *Reply:
		c := *m
		c.Payload = nil
		fmt.Fprintf(&s, "%T %+v", m, c)
		put(m.Payload)
	case *ResyncStart:
		c := *m
		c.Payload = nil
		fmt.Fprintf(&s, "%T %+v", m, c)
		put(m.Payload)
	case *ResyncState:
		c := *m
		c.Payload = nil
		fmt.Fprintf(&s, "%T %+v", m, c)
		put(m.Payload)
	default:
		fmt.Fprintf(&s, "%T %+v", m, m)
	}
	return s.String()
}

// samples has one message of each type, with every field set.
func samples(t testing.TB) []Message {
	marker, err := EncodeMarker(nil, Marker{Type: MarkerEpoch, Node: "gamma", Replica: 7})
	if err != nil {
		t.Fatal(err)
	}
	data := "sixteen bytes of"
	return []Message{
		&Append{
			Epoch: 5, Stream: 6, Prev: ident.Position{Epoch: 4, Seq: 99}, Commit: 98, SyncTo: 97, Trim: 50, LossEpoch: 2, Met: 3,
			Generation: 3, LeaseSent: 123456789, LeaseFor: 2_000_000_000,
			Entries: []Entry{
				{Pos: ident.Position{Epoch: 5, Seq: 100}, Kind: KindMarker, Payload: load(string(marker)), PayloadCRC: Checksum(marker)},
				{Pos: ident.Position{Epoch: 5, Seq: 101}, Kind: KindData, Off: 4096, Len: 16, Session: 0x0102030405060708, Request: 9, Payload: load(data), PayloadCRC: Checksum([]byte(data))},
				{Pos: ident.Position{Epoch: 5, Seq: 102}, Kind: KindZero, Flags: FlagNoHole, Off: 1 << 40, Len: 1 << 30, Session: 1, Request: 10},
				{Pos: ident.Position{Epoch: 5, Seq: 103}, Kind: KindTrim, Off: 0, Len: 512, Session: 1, Request: 11},
			},
		},
		&Append{Epoch: 5, Stream: 6, Prev: ident.Position{Epoch: 5, Seq: 103}},
		&Ack{Epoch: 5, Stream: 6, Replica: 7, Incarnation: 8, Matched: 103, Durable: 99, Applied: 98, LeaseSent: 123456789, Amnesiac: true, Inconsistent: true, Checkpoint: 50},
		&Reject{
			Epoch: 5, Stream: 6, Replica: 7, Incarnation: 8, Reason: RejectResync, Last: ident.Position{Epoch: 4, Seq: 120},
			Base: ident.Position{Epoch: 2, Seq: 10}, Applied: 90, Durable: 95, Amnesiac: true, LeaseSent: 11,
			History: []ident.EpochStart{{Epoch: 2, First: 3}, {Epoch: 4, First: 80}},
		},
		&Stale{Epoch: 5, Promised: 6},
		&Release{Epoch: 5},
		&Released{Epoch: 5},
		&Blocks{Epoch: 5, Stream: 6, ID: 7, AsOf: 8, First: true, Last: true, Blocks: []Block{
			{Off: 8192, Len: 16, CRC: Checksum([]byte(data)), Payload: load(data)},
			{Off: 1 << 32, Len: 1 << 20},
		}},
		&BlocksAck{Epoch: 5, Stream: 6, ID: 7, Durable: true},
		&Forward{
			ID: 1, Op: OpWrite, Flags: ForwardFUA, Off: 4096, Len: 16, Session: 2, Request: 3, Replay: true, LastSeen: ident.Position{Epoch: 4, Seq: 5},
			Generation: 6, Echo: 7, PayloadCRC: Checksum([]byte(data)), Payload: load(data),
		},
		&Forward{ID: 1, Op: OpRead, Off: 4096, Len: 32 << 20},
		&Reply{ID: 1, Status: StatusOK, Pos: ident.Position{Epoch: 4, Seq: 5}, PayloadCRC: Checksum([]byte(data)), Payload: load(data)},
		&Reply{ID: 1, Status: StatusRetry, Primary: "beta"},
		&Forward{ID: 2, Op: OpForget, Session: 2},
		&ResyncStart{
			Epoch: 5, Stream: 6, Base: ident.Position{Epoch: 4, Seq: 5}, Since: 3, Whole: true, Continue: true,
			PayloadCRC: Checksum([]byte(data)), Payload: load(data),
		},
		&ResyncState{Epoch: 5, Stream: 6, Replica: 7, Incarnation: 8, PayloadCRC: Checksum([]byte(data)), Payload: load(data)},
		&Ping{Clock: 1, Echo: 2, Held: 3},
	}
}

// Every field of every message and of what it repeats is set in some sample: so
// a field that is added and forgotten in the codec fails the round trip.
func TestSamplesSetEveryField(t *testing.T) {
	set, all := map[string]bool{}, map[string]bool{}
	var note func(v reflect.Value)
	note = func(v reflect.Value) {
		for i := range v.NumField() {
			name := v.Type().Name() + "." + v.Type().Field(i).Name
			all[name] = true
			f := v.Field(i)
			set[name] = set[name] || !f.IsZero()
			if f.Kind() == reflect.Slice {
				for k := range f.Len() {
					note(f.Index(k))
				}
			}
		}
	}
	for _, m := range samples(t) {
		note(reflect.ValueOf(m).Elem())
	}
	for name := range all {
		if !set[name] {
			t.Errorf("no sample sets %s", name)
		}
	}
}

// The bytes of version 1 never change: a rolling upgrade depends on it.
func TestGolden(t *testing.T) {
	var s strings.Builder
	for _, m := range samples(t) {
		fmt.Fprintf(&s, "%s\n%s\n", view(m), hex.Dump(flat(t, 0x1122334455667788, m)))
	}
	hello, err := EncodeHello(nil, Hello{Min: 1, Max: 2, Version: 1, Refusal: RefusedTarget, Instance: 3, Attempt: 4, Cluster: "prod", ClusterID: "c0ffee", From: "alpha", To: "beta"})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&s, "hello\n%s\n", hex.Dump(hello))
	fmt.Fprintf(&s, "extents\n%s\n", hex.Dump(EncodeExtents(nil, []Extent{{Len: 4096, Flags: 3}, {Len: 1 << 40}})))
	resync := ResyncData{
		Dirty: []byte("dirty"), Changes: []byte("changes"), History: []ident.EpochStart{{Epoch: 1, First: 2}},
		Dedup: []DedupEntry{{Session: 1, Request: 2, Seq: 3}}, DedupFloor: ident.Position{Epoch: 1, Seq: 1},
	}
	fmt.Fprintf(&s, "resync data\n%s\n", hex.Dump(resync.Encode(nil)))
	file := filepath.Join("testdata", "v1.golden")
	if *rewrite {
		if err := os.WriteFile(file, []byte(s.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), s.String()); diff != "" {
		t.Error(diff)
	}
}

func TestRoundTripInPieces(t *testing.T) {
	var all []byte
	for _, m := range samples(t) {
		all = append(all, flat(t, 42, m)...)
	}
	sources := map[string]io.Reader{
		"whole":       bytes.NewReader(all),
		"byte a read": iotest.OneByteReader(bytes.NewReader(all)),
		"halves":      iotest.HalfReader(bytes.NewReader(all)),
		"eof early":   iotest.DataErrReader(bytes.NewReader(all)),
	}
	for name, src := range sources {
		r := NewReader(src)
		for i, want := range samples(t) {
			var e Envelope
			if err := r.Next(&e); err != nil {
				t.Fatalf("%s, message %d: %v", name, i, err)
			}
			if diff := cmp.Diff(view(want), view(e.Msg)); diff != "" || e.Volume != 42 {
				t.Fatalf("%s, volume %d: %s", name, e.Volume, diff)
			}
			e.Free()
		}
		var e Envelope
		if err := r.Next(&e); !errors.Is(err, io.EOF) {
			t.Errorf("%s: %v at the end, want io.EOF", name, err)
		}
		if r.Bytes() != uint64(len(all)) {
			t.Errorf("%s: counted %d bytes of %d", name, r.Bytes(), len(all))
		}
	}
}

func drawPos(t *rapid.T, label string) ident.Position {
	return ident.Position{Epoch: ident.Epoch(rapid.Uint64Max(1<<62).Draw(t, label)), Seq: ident.Seq(rapid.Uint64Max(1<<62).Draw(t, label))}
}

func drawAppend(t *rapid.T) *Append {
	m := &Append{
		Epoch: ident.Epoch(rapid.Uint64().Draw(t, "epoch")), Stream: rapid.Uint64().Draw(t, "stream"), Prev: drawPos(t, "prev"),
		Commit: ident.Seq(rapid.Uint64().Draw(t, "commit")), LeaseSent: rapid.Int64().Draw(t, "sent"),
	}
	pos := m.Prev
	for range rapid.IntRange(0, 40).Draw(t, "entries") {
		pos.Seq++
		pos.Epoch += ident.Epoch(rapid.IntRange(0, 1).Draw(t, "rise"))
		e := Entry{Pos: pos, Kind: rapid.SampledFrom([]Kind{KindData, KindZero, KindTrim}).Draw(t, "kind"), Off: rapid.Uint64Max(1<<50).Draw(t, "off"), Len: rapid.Uint64Range(1, 1<<50).Draw(t, "len")}
		if e.Kind == KindData {
			n := rapid.SampledFrom([]int{1, 511, 512, 4096, 40 << 10, 300 << 10}).Draw(t, "size")
			e.Payload, e.Len = buf.Get(n), uint64(n)
			for i := range e.Payload.B {
				e.Payload.B[i] = byte(i * int(pos.Seq))
			}
			e.PayloadCRC = Checksum(e.Payload.B)
		}
		m.Entries = append(m.Entries, e)
	}
	return m
}

// Whatever is sent arrives, however the stream is cut into reads, and every
// buffer goes back.
func TestRoundTripRapid(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		before := buf.InUse()
		var all []byte
		var want []Message
		for range rapid.IntRange(1, 4).Draw(t, "frames") {
			m := drawAppend(t)
			want = append(want, m)
			all = append(all, flat(t, 7, m)...)
		}
		step := rapid.SampledFrom([]int{1000, 4096, 100 << 10, 1 << 20}).Draw(t, "step")
		r := NewReader(&stepReader{b: all, step: step})
		for _, w := range want {
			var e Envelope
			if err := r.Next(&e); err != nil {
				t.Fatal(err)
			}
			if view(w) != view(e.Msg) {
				t.Fatalf("got %s\nwant %s", view(e.Msg), view(w))
			}
			e.Free()
			ReleasePayloads(w)
		}
		if n := buf.InUse(); n != before {
			t.Fatalf("%d bytes of buffers are held, %d before", n, before)
		}
	})
}

type stepReader struct {
	b    []byte
	step int
}

func (s *stepReader) Read(p []byte) (int, error) {
	if len(s.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), s.step)], s.b)
	s.b = s.b[n:]
	return n, nil
}

// A single flipped bit anywhere is refused, and never as anything but an error.
func TestEveryFlippedBitIsRefused(t *testing.T) {
	before := buf.InUse()
	for i, m := range samples(t) {
		good := flat(t, 42, m)
		ReleasePayloads(m)
		for bit := range len(good) * 8 {
			bad := bytes.Clone(good)
			bad[bit/8] ^= 1 << (bit % 8)
			var e Envelope
			if err := NewReader(bytes.NewReader(bad)).Next(&e); err == nil {
				t.Fatalf("message %d with bit %d flipped was taken", i, bit)
			} else if e.Msg != nil {
				t.Fatal("an error left a message behind")
			}
		}
		for n := range len(good) {
			var e Envelope
			if err := NewReader(bytes.NewReader(good[:n])).Next(&e); n > 0 && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("message %d cut to %d bytes: %v", i, n, err)
			}
		}
	}
	if n := buf.InUse(); n != before {
		t.Errorf("%d bytes of buffers are held, %d before", n, before)
	}
}

func TestNewerIsNotCorrupt(t *testing.T) {
	b := flat(t, 1, &Ping{})
	b[offVersion] = VersionMax + 1
	var e Envelope
	if err := NewReader(bytes.NewReader(b)).Next(&e); !errors.Is(err, ErrNewer) || errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
	if _, err := DecodeMarker([]byte{markerVersion + 1}); !errors.Is(err, ErrNewer) {
		t.Error(err)
	}
	for _, c := range []struct {
		min, max, want uint8
		ok             bool
	}{{1, 1, 1, true}, {1, 9, VersionMax, true}, {VersionMax + 1, 9, 0, false}, {0, 0, 0, false}} {
		if v, ok := Known().Pick(Hello{Min: c.min, Max: c.max}); ok != c.ok || ok && v != c.want {
			t.Errorf("versions %d to %d: %d, %v", c.min, c.max, v, ok)
		}
	}
}

// A header may not make the reader wait for, or make room for, more than the
// limits.
func TestLimitsFromTheWire(t *testing.T) {
	for _, off := range []int{offBody, offPayload} {
		b := flat(t, 1, &Ping{})
		le.PutUint32(b[off:], 1<<30)
		var e Envelope
		if err := NewReader(bytes.NewReader(b)).Next(&e); !errors.Is(err, ErrLimit) {
			t.Error(err)
		}
	}
}

func TestEncoderRefuses(t *testing.T) {
	p := ident.Position{Epoch: 1, Seq: 1}
	next := ident.Position{Epoch: 1, Seq: 2}
	cases := map[string]Message{
		"gap":           &Append{Prev: p, Entries: []Entry{{Pos: ident.Position{Epoch: 1, Seq: 3}, Kind: KindTrim, Len: 1}}},
		"epoch falls":   &Append{Prev: p, Entries: []Entry{{Pos: ident.Position{Epoch: 0, Seq: 2}, Kind: KindTrim, Len: 1}}},
		"kind":          &Append{Prev: p, Entries: []Entry{{Pos: next, Kind: 9, Len: 1}}},
		"no payload":    &Append{Prev: p, Entries: []Entry{{Pos: next, Kind: KindData, Len: 1}}},
		"payload short": &Append{Prev: p, Entries: []Entry{{Pos: next, Kind: KindData, Len: 2, Payload: load("x")}}},
		"overflow":      &Append{Prev: p, Entries: []Entry{{Pos: next, Kind: KindZero, Off: 1 << 63, Len: 1 << 63}}},
		"many":          &Append{Entries: make([]Entry, FrameEntriesMax+1)},
		"reason":        &Reject{},
		"history":       &Reject{Reason: RejectGap, History: []ident.EpochStart{{Epoch: 2, First: 1}, {Epoch: 2, First: 5}}},
		"empty block":   &Blocks{Blocks: []Block{{Off: 1}}},
		"op":            &Forward{Op: 99, Len: 1},
		"large read":    &Forward{Op: OpRead, Len: EntryPayloadMax + 1},
		"status":        &Reply{},
		"name":          &Reply{Status: StatusRetry, Primary: ident.Node(strings.Repeat("x", NameMax+1))},
		"nil":           nil,
	}
	for name, m := range cases {
		dst, payloads, err := AppendFrame([]byte("kept"), nil, 1, m)
		if !errors.Is(err, ErrLimit) && !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
		if string(dst) != "kept" || len(payloads) != 0 {
			t.Errorf("%s: something was left behind", name)
		}
	}
}

func TestHello(t *testing.T) {
	h := Hello{Min: 1, Max: 3, Version: 1, Refusal: RefusedCluster, Instance: 9, Attempt: 1 << 60, Cluster: "prod", ClusterID: "id", From: "alpha", To: "beta"}
	b, err := EncodeHello(nil, h)
	if err != nil {
		t.Fatal(err)
	}
	src := bytes.NewReader(append(bytes.Clone(b), "rest"...))
	got, err := ReadHello(src)
	if err != nil || got != h {
		t.Errorf("%+v, %v", got, err)
	}
	if src.Len() != 4 {
		t.Errorf("read beyond its end: %d bytes left", src.Len())
	}
	// A later version may add to the end.
	long := append(bytes.Clone(b), 1, 2, 3)
	le.PutUint32(long[8:], uint32(len(long)-helloHead))
	le.PutUint32(long[12:], Checksum(long[helloHead:]))
	if got, err := ReadHello(bytes.NewReader(long)); err != nil || got != h {
		t.Errorf("%+v, %v", got, err)
	}
	for bit := range len(b) * 8 {
		bad := bytes.Clone(b)
		bad[bit/8] ^= 1 << (bit % 8)
		if _, err := ReadHello(bytes.NewReader(bad)); err == nil {
			t.Errorf("bit %d flipped, and taken", bit)
		}
	}
}

func TestExtents(t *testing.T) {
	want := []Extent{{Len: 1, Flags: 3}, {Len: 1 << 40}}
	got, err := DecodeExtents(nil, EncodeExtents(nil, want))
	if err != nil || !cmp.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"x", strings.Repeat("\x00", extentLen), strings.Repeat("\xff", extentLen)} {
		if _, err := DecodeExtents(nil, []byte(bad)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// steady is the traffic of the write path.
func steady() []Message {
	p := buf.Get(4096)
	crc := Checksum(p.B)
	return []Message{
		&Append{Epoch: 1, Entries: []Entry{{Pos: ident.Position{Epoch: 1, Seq: 1}, Kind: KindData, Len: 4096, Payload: p, PayloadCRC: crc}}},
		&Ack{Epoch: 1, Matched: 1},
		&Forward{Op: OpWrite, Len: 4096, Payload: p, PayloadCRC: crc},
		&Reply{Status: StatusOK},
	}
}

func TestSteadyTrafficAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Log("the race detector makes sync.Pool drop at random: only the bytes are compared")
		return
	}
	for _, m := range steady() {
		frame := flat(t, 1, m)
		slab, payloads := make([]byte, 0, 1024), make([]*buf.Buf, 0, 4)
		if n := testing.AllocsPerRun(100, func() {
			var err error
			if slab, payloads, err = AppendFrame(slab[:0], payloads[:0], 1, m); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("encoding a %T allocates %v times", m, n)
		}
		src := bytes.NewReader(nil)
		r := NewReader(src)
		if n := testing.AllocsPerRun(100, func() {
			src.Reset(frame)
			var e Envelope
			if err := r.Next(&e); err != nil {
				t.Fatal(err)
			}
			e.Free()
		}); n >= 1 {
			t.Errorf("decoding a %T allocates %v times", m, n)
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	for _, m := range steady() {
		b.Run(fmt.Sprintf("%T", m)[6:], func(b *testing.B) {
			b.ReportAllocs()
			var slab []byte
			var payloads []*buf.Buf
			for b.Loop() {
				slab, payloads, _ = AppendFrame(slab[:0], payloads[:0], 1, m)
			}
		})
	}
}

func BenchmarkDecode(b *testing.B) {
	for _, m := range steady() {
		b.Run(fmt.Sprintf("%T", m)[6:], func(b *testing.B) {
			frame := flat(b, 1, m)
			b.ReportAllocs()
			b.SetBytes(int64(len(frame)))
			src := bytes.NewReader(nil)
			r := NewReader(src)
			for b.Loop() {
				src.Reset(frame)
				var e Envelope
				if err := r.Next(&e); err != nil {
					b.Fatal(err)
				}
				e.Free()
			}
		})
	}
}
