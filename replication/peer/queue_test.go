package peer

import (
	"bytes"
	"net"
	"testing"

	"pgregory.net/rapid"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// tube collects a stream's rounds as a socket would, in pieces of any size.
func tube(s *stream, out *bytes.Buffer, limit func() int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.round.done() && !s.nextLocked() {
		return false
	}
	for !s.round.done() {
		part := s.round.vec[s.round.at]
		n := min(len(part), limit())
		out.Write(part[:n])
		s.round.advance(n)
	}
	return true
}

// Whatever is queued and however it is written: every frame comes out whole,
// those of a volume in their order, answers in theirs; every payload goes back.
func TestQueueKeepsOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		before := buf.InUse()
		a, b := net.Pipe()
		defer a.Close()
		defer b.Close()
		s := newStream(a, newWriter(a), Limits{QueueBytes: 1 << 30, QueueFrames: 1 << 20}, 1, wire.VersionMax)
		var out bytes.Buffer
		sent, acks, total := map[ident.Volume]int{}, 0, 0
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			vol := ident.Volume(rapid.IntRange(1, 3).Draw(t, "vol"))
			var m wire.Message
			switch rapid.IntRange(0, 5).Draw(t, "what") {
			case 0:
				acks++
				m = &wire.Ack{Matched: ident.Seq(acks)}
			case 1: // a request for a lease: Commit numbers it in its volume
				sent[vol]++
				m = &wire.Append{Commit: ident.Seq(sent[vol])}
			case 2:
				sent[vol]++
				w := write(1, rapid.SampledFrom([]int{1, inlinePayload, 4096}).Draw(t, "size"))
				w.Commit = ident.Seq(sent[vol])
				m = w
			case 3:
				sent[vol]++
				w := write(1, rapid.SampledFrom([]int{smallBytes + 1, 300 << 10}).Draw(t, "size"))
				w.Commit = ident.Seq(sent[vol])
				m = w
			case 4:
				sent[vol]++
				m = &wire.Forward{Op: wire.OpForget, ID: uint64(sent[vol])}
			case 5:
				step := rapid.SampledFrom([]int{1 << 20, 1000, 7 << 10}).Draw(t, "cut")
				tube(s, &out, func() int { return step })
				continue
			}
			total++
			if err := s.push(vol, m); err != nil {
				t.Fatal(err)
			}
		}
		for tube(s, &out, func() int { return 1 << 20 }) {
		}
		if bytes, frames := s.queued(); bytes != 0 || frames != 0 {
			t.Fatalf("%d bytes in %d frames are left", bytes, frames)
		}
		s.fail(errClosed)
		r := wire.NewReader(&out)
		seen, acked := map[ident.Volume]int{}, 0
		for range total {
			var e wire.Envelope
			if err := r.Next(&e); err != nil {
				t.Fatal(err)
			}
			number := 0
			switch m := e.Msg.(type) {
			case *wire.Ack:
				if acked++; m.Matched != ident.Seq(acked) {
					t.Fatalf("ack %d after %d", m.Matched, acked-1)
				}
			case *wire.Append:
				number = int(m.Commit)
			case *wire.Forward:
				number = int(m.ID)
			}
			if number != 0 {
				if seen[e.Volume]++; number != seen[e.Volume] {
					t.Fatalf("volume %d: %d after %d", e.Volume, number, seen[e.Volume]-1)
				}
			}
			e.Free()
		}
		if n := buf.InUse(); n != before {
			t.Fatalf("%d bytes of buffers are held, %d before", n, before)
		}
	})
}

// One volume's resync delays neither the lease nor the small writes of another,
// and is not starved by them.
func TestBulkDelaysOnlyItsOwnVolume(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	s := newStream(a, newWriter(a), Limits{QueueBytes: 1 << 30, QueueFrames: 1 << 20}, 1, wire.VersionMax)
	defer s.fail(errClosed)
	for i := 1; i <= 20; i++ {
		if err := s.push(1, write(i, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	for i := 1; i <= 500; i++ {
		if err := s.push(2, write(i, 4096)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.push(1, &wire.Append{Commit: 1}); err != nil {
		t.Fatal(err)
	}
	if err := s.push(3, &wire.Append{Commit: 3}); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for tube(s, &out, func() int { return 1 << 20 }) {
	}
	r := wire.NewReader(&out)
	var order []ident.Volume
	last := map[ident.Volume]int{}
	for range 522 {
		var e wire.Envelope
		if err := r.Next(&e); err != nil {
			t.Fatal(err)
		}
		order = append(order, e.Volume)
		last[e.Volume] = len(order)
		e.Free()
	}
	if order[0] != 3 {
		t.Errorf("the lease of an idle volume was not first: %v", order[:10])
	}
	if last[2] > 510+9 || last[2] < 500 || last[1] != 522 {
		t.Errorf("small writes ended at %d, bulk at %d", last[2], last[1])
	}
	first := 0
	for order[first] != 1 {
		first++
	}
	if first > 1+roundBytes/4096 {
		t.Errorf("bulk began only after %d messages", first)
	}
}
