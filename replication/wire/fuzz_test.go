package wire

import (
	"bytes"
	"testing"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
)

// FuzzReader: no bytes make the reader panic, leak a buffer, or give a message
// whose own bytes differ from those that it was read from. The checksum of the
// header is made right first, since no fuzzer finds it.
func FuzzReader(f *testing.F) {
	for _, m := range samples(f) {
		f.Add(flat(f, 1, m))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= HeaderLen {
			if n := HeaderLen + int(le.Uint32(b[offBody:])); n <= len(b) {
				le.PutUint32(b[offCRC:], frameCRC(b[:n]))
			}
		}
		before := buf.InUse()
		r := NewReader(bytes.NewReader(b))
		for {
			var e Envelope
			start := r.Bytes()
			if err := r.Next(&e); err != nil {
				break
			}
			if again := flat(t, e.Volume, e.Msg); !bytes.Equal(again, b[start:r.Bytes()]) {
				t.Fatalf("read from %x\nwritten as %x", b[start:r.Bytes()], again)
			}
			e.Free()
		}
		if n := buf.InUse(); n != before {
			t.Fatalf("%d bytes of buffers are held, %d before", n, before)
		}
	})
}

func FuzzMarker(f *testing.F) {
	b, _ := EncodeMarker(nil, Marker{Type: MarkerEpoch, Node: "alpha"})
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := DecodeMarker(b)
		if err != nil {
			return
		}
		if again, err := EncodeMarker(nil, m); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%x became %x, %v", b, again, err)
		}
	})
}

func FuzzResyncData(f *testing.F) {
	d := ResyncData{
		Dirty: []byte("dirty"), Changes: []byte("changes"), History: []ident.EpochStart{{Epoch: 1, First: 2}},
		Dedup: []DedupEntry{{Session: 1, Request: 2, Seq: 3}}, DedupFloor: ident.Position{Epoch: 1, Seq: 1},
	}
	f.Add(d.Encode(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := DecodeResyncData(b)
		if err != nil {
			return
		}
		if again := d.Encode(nil); !bytes.Equal(again, b) {
			t.Fatalf("%x became %x", b, again)
		}
	})
}

func FuzzHello(f *testing.F) {
	b, _ := EncodeHello(nil, Hello{Min: 1, Max: 1, Cluster: "prod", From: "alpha", To: "beta"})
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > helloHead {
			le.PutUint32(b[8:], uint32(len(b)-helloHead))
			le.PutUint32(b[12:], Checksum(b[helloHead:]))
		}
		h, err := ReadHello(bytes.NewReader(b))
		if err != nil {
			return
		}
		if _, err := EncodeHello(nil, h); err != nil {
			t.Fatal(err)
		}
	})
}
