package peer

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// TestVersionsAreAgreedOn links releases that know different versions of the
// frame. Each receiver takes frames of the version that was agreed on only, so
// that what arrives shows what was sent.
func TestVersionsAreAgreedOn(t *testing.T) {
	for _, tc := range []struct{ a, b, link wire.Versions }{
		{wire.Versions{Min: 1, Max: 1}, wire.Versions{Min: 1, Max: 2}, wire.Versions{Min: 1, Max: 1}}, // N-1 and N
		{wire.Versions{Min: 1, Max: 2}, wire.Versions{Min: 1, Max: 2}, wire.Versions{Min: 2, Max: 2}}, // N and N
		{wire.Versions{Min: 1, Max: 2}, wire.Versions{Min: 2, Max: 3}, wire.Versions{Min: 2, Max: 2}}, // N and N+1
	} {
		t.Run(fmt.Sprintf("%d-%d and %d-%d", tc.a.Min, tc.a.Max, tc.b.Min, tc.b.Max), func(t *testing.T) {
			n := newNetwork(t, false)
			ra, rb := newRecorder(), newRecorder()
			a := n.add("alpha", ra, func(o *Options) { o.Versions = tc.a })
			b := n.add("beta", rb, func(o *Options) { o.Versions = tc.b })
			both := []ident.Node{"alpha", "beta"}
			a.SetPeers(both)
			b.SetPeers(both)
			ra.want(t, "up beta")
			rb.want(t, "up alpha")
			for seq := 1; seq <= 3; seq++ {
				a.Send("beta", 7, write(seq, 4096))
				b.Send("alpha", 7, &wire.Ack{Epoch: 1, Matched: ident.Seq(seq)})
				a.Flush()
				b.Flush()
				e := rb.next(t)
				e.Free()
				e = ra.next(t)
				e.Free()
			}
			for _, l := range []*stream{a.link("beta").out.Load(), b.link("alpha").out.Load()} {
				if !tc.link.Has(l.version) {
					t.Errorf("a link has version %d, want %d", l.version, tc.link.Max)
				}
			}
		})
	}
}

// TestNoVersionInCommon: the log says what to do, and nothing is delivered.
func TestNoVersionInCommon(t *testing.T) {
	n := newNetwork(t, false)
	ra, rb := newRecorder(), newRecorder()
	a := n.add("alpha", ra, func(o *Options) { o.Versions = wire.Versions{Min: 1, Max: 1} })
	b := n.add("beta", rb, func(o *Options) { o.Versions = wire.Versions{Min: 2, Max: 3} })
	a.SetPeers([]ident.Node{"alpha", "beta"})
	b.SetPeers([]ident.Node{"alpha", "beta"})
	const want = "node beta refuses the link: it knows versions 2 to 3, we 1 to 1: upgrade the older node"
	deadline := time.Now().Add(patience)
	for {
		status := a.Status()
		if len(status) == 1 && strings.Contains(status[0].Error, want) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the link says %+v", status)
		}
		time.Sleep(time.Millisecond)
	}
	if len(ra.events)+len(rb.events) > 0 {
		t.Error("a link is up")
	}
}

// TestFramesOfAnotherVersion: a frame that is not of the link's version ends
// the connection, newer or older.
func TestFramesOfAnotherVersion(t *testing.T) {
	frame, _, err := wire.AppendFrameAs(2, nil, nil, 1, &wire.Ping{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		version uint8
		want    error
	}{{1, wire.ErrNewer}, {2, nil}, {3, wire.ErrMalformed}} {
		var e wire.Envelope
		err := wire.NewReaderOf(strings.NewReader(string(frame)), wire.Versions{Min: tc.version, Max: tc.version}).Next(&e)
		if !errors.Is(err, tc.want) {
			t.Errorf("on a link of version %d: %v, want %v", tc.version, err, tc.want)
		}
	}
}
