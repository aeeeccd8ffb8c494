package peer

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// counter is a Handler that counts entries, and acks them if told to.
type counter struct {
	*recorder
	m     atomic.Pointer[Manager]
	acks  bool
	seen  atomic.Int64
	calls atomic.Int64
	wake  chan struct{}
}

func newCounter(acks bool) *counter {
	return &counter{recorder: newRecorder(), acks: acks, wake: make(chan struct{}, 1)}
}

func (*counter) Settle(ident.Node, []ident.Volume) {}

func (c *counter) Messages(from ident.Node, batch []wire.Envelope) {
	m := c.m.Load()
	for i := range batch {
		if c.acks {
			ack := wire.Ack{Epoch: 1, Matched: batch[i].Msg.(*wire.Append).Entries[0].Pos.Seq}
			m.Send(from, batch[i].Volume, &ack)
		}
		batch[i].Free()
	}
	if c.acks {
		m.Flush()
	}
	c.calls.Add(1)
	c.seen.Add(int64(len(batch)))
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *counter) wait(n int64) {
	for c.seen.Load() < n {
		<-c.wake
	}
}

func benchPair(b *testing.B, acks bool) (m *Manager, ca, cb *counter) {
	n := newNetwork(b, false)
	ca, cb = newCounter(false), newCounter(acks)
	m, mb := n.add("alpha", ca, nil), n.add("beta", cb, nil)
	ca.m.Store(m)
	cb.m.Store(mb)
	m.SetPeers([]ident.Node{"beta"})
	mb.SetPeers([]ident.Node{"alpha"})
	ca.want(b, "up beta")
	cb.want(b, "up alpha")
	return m, ca, cb
}

// One write and its ack, with depth of them on the way: what a replicated
// write of 4 KiB costs on the links, both ends included.
func BenchmarkRoundTrip(b *testing.B) {
	for _, depth := range []int64{1, 16, 128} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			m, ca, _ := benchPair(b, true)
			w := write(1, 4096)
			b.SetBytes(4096)
			b.ReportAllocs()
			sent := int64(0)
			for b.Loop() {
				wire.RetainPayloads(w)
				m.Send("beta", 1, w)
				m.Flush()
				sent++
				ca.wait(sent - depth + 1)
			}
			ca.wait(sent)
		})
	}
}

func BenchmarkOneWay(b *testing.B) {
	for _, size := range []int{512, 4096, 65536, 1 << 20} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			m, _, cb := benchPair(b, false)
			w := write(1, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			sent := int64(0)
			depth := max(int64(4<<20/size), 4)
			for b.Loop() {
				wire.RetainPayloads(w)
				m.Send("beta", 1, w)
				m.Flush()
				sent++
				cb.wait(sent - depth)
			}
			cb.wait(sent)
			b.ReportMetric(float64(cb.seen.Load())/float64(max(cb.calls.Load(), 1)), "msgs/batch")
			runtime.KeepAlive(w)
		})
	}
}
