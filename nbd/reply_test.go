package nbd

import (
	"encoding/binary"
	"slices"
	"testing"
)

func TestClip(t *testing.T) {
	const mib = 1 << 20
	e := func(pairs ...uint64) (list []Extent) {
		for i := 0; i < len(pairs); i += 2 {
			list = append(list, Extent{Length: pairs[i], Flags: uint32(pairs[i+1])})
		}
		return list
	}
	for name, c := range map[string]struct {
		gate    gate
		one     bool
		context uint32
		length  uint64
		in      []Extent
		want    []Extent // nil: an error
	}{
		"as it is":                    {length: mib, in: e(512, 0, mib-512, 3), want: e(512, 0, mib-512, 3)},
		"beyond the request":          {length: mib, in: e(512, 0, 1<<40, 3, 7, 1), want: e(512, 0, mib-512, 3)},
		"less than the request":       {length: mib, in: e(512, 0), want: e(512, 0)},
		"empty ones":                  {length: mib, in: e(0, 1, 512, 0, 0, 3, mib, 0), want: e(mib, 0)},
		"neighbours of one state":     {length: mib, in: e(512, 3, 512, 3, 512, 0), want: e(1024, 3, 512, 0)},
		"nothing":                     {length: mib},
		"nothing but empty ones":      {length: mib, in: e(0, 1)},
		"one":                         {one: true, length: 4096, in: e(512, 3, 512, 3, 512, 0), want: e(1024, 3)},
		"one, longer":                 {one: true, length: 4096, in: e(mib, 3), want: e(4096, 3)},
		"compact, 1 TiB":              {length: 1 << 40, in: e(1<<40, 3), want: e(extent32Max, 3)},
		"extended, 1 TiB":             {gate: gate{extended: true}, length: 1 << 40, in: e(1<<40, 3), want: e(1<<40, 3)},
		"aligned, allocation":         {gate: gate{blockMin: 512}, length: mib, in: e(100, 0, 1000, 3, mib, 0), want: e(512, 0, 512, 3, mib-1024, 0)},
		"aligned, dirty":              {gate: gate{blockMin: 512}, context: 1, length: mib, in: e(100, 0, 1000, 1, mib, 0), want: e(1536, 1, mib-1536, 0)},
		"aligned, ends within":        {gate: gate{blockMin: 512}, length: mib, in: e(1024, 3, 100, 3), want: e(1024, 3, 512, 0)},
		"aligned, ends within, dirty": {gate: gate{blockMin: 512}, context: 1, length: mib, in: e(100, 1), want: e(512, 1)},
	} {
		c.gate.payloadMax = PayloadMax
		q := &request{Request: Request{Length: c.length, ReqOne: c.one}}
		s := &Status{Context: c.context, Extents: c.in}
		err := (&conn{gate: c.gate}).clip(q, s)
		if (err != nil) != (c.want == nil) || err == nil && !slices.Equal(s.Extents, c.want) {
			t.Errorf("%s: %v, %v, want %v", name, s.Extents, err, c.want)
		}
	}
	many := make([]Extent, 1<<20)
	for i := range many {
		many[i] = Extent{Length: 512, Flags: uint32(i & 1)}
	}
	s := &Status{Extents: many}
	if err := (&conn{gate: gate{payloadMax: 64 << 10}}).clip(&request{Request: Request{Length: 1 << 40}}, s); err != nil || len(s.Extents) != 4096 {
		t.Errorf("%d extents in a payload of 64 KiB, %v", len(s.Extents), err)
	}
}

type stoppingHaggler struct{ hagglerOf }

func (stoppingHaggler) stopping() bool { return true }

func TestNegotiationWhileStopping(t *testing.T) {
	for _, opt := range []uint32{optList, optInfo, optGo, optStartTLS, 99} {
		n := &negotiation{server: stoppingHaggler{}}
		out, what := negotiateAll(n, append([]byte{0, 0, 0, 3}, option(opt, nil)...))
		if typ := binary.BigEndian.Uint32(out[18+12:]); what != goOn || typ != repErrShutdown {
			t.Errorf("option %d: %#x, outcome %d", opt, typ, what)
		}
	}
	n := &negotiation{server: stoppingHaggler{}}
	if out, what := negotiateAll(n, append([]byte{0, 0, 0, 3}, option(optExportName, []byte("v"))...)); what != hangUp || len(out) > 18 {
		t.Errorf("EXPORT_NAME: %x, outcome %d", out, what)
	}
	n = &negotiation{server: stoppingHaggler{}}
	if out, what := negotiateAll(n, append([]byte{0, 0, 0, 3}, option(optAbort, nil)...)); what != hangUp || binary.BigEndian.Uint32(out[18+12:]) != repAck {
		t.Errorf("ABORT: %x, outcome %d", out, what)
	}
}
