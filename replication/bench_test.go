package replication

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

// loneLinks are the links of a node that has no peers.
type loneLinks struct{}

func (loneLinks) Send(_ ident.Node, _ ident.Volume, m wire.Message) { wire.ReleasePayloads(m) }
func (loneLinks) FlushSoon()                                        {}
func (loneLinks) Flush()                                            {}
func (loneLinks) Echo(ident.Node) int64                             { return 1 }
func (loneLinks) EchoAge(ident.Node, int64) time.Duration           { return 0 }

// loneCluster is the cluster state of a volume with one replica.
type loneCluster struct{}

func (loneCluster) ProposeSet(context.Context, ident.Volume, core.SetProposal) (bool, error) {
	return false, nil
}
func (loneCluster) Report(ident.Volume, core.Report)               {}
func (loneCluster) MarkFailed(ident.Volume, ident.Replica, string) {}
func (loneCluster) Event(ident.Volume, core.Event)                 {}

// openLone opens a volume with one replica on the machine's file system, as its
// primary.
func openLone(tb testing.TB, size uint64) (*Volume, *Session) {
	tb.Helper()
	return openLoneOn(tb, size, vfs.OS(), Limits{})
}

// openLoneOn is openLone on a file system, with limits.
func openLoneOn(tb testing.TB, size uint64, fs vfs.FS, limits Limits) (*Volume, *Session) {
	tb.Helper()
	return openLoneWith(tb, size, Options{Limits: limits, Replica: &ReplicaOptions{FS: fs}})
}

// openLoneWith is openLone with other options.
func openLoneWith(tb testing.TB, size uint64, o Options) (*Volume, *Session) {
	tb.Helper()
	o.Volume, o.Name, o.Node, o.Links, o.Cluster = testVolume, "lone", "n1", loneLinks{}, loneCluster{}
	o.Replica.Dir, o.Replica.BootID = tb.TempDir(), "b"
	id, err := CreateReplica(tb.Context(), o, size)
	if err != nil {
		tb.Fatal(err)
	}
	view := core.View{Size: size, MinCopies: 1, Set: []ident.Node{"n1"}, Members: []core.Member{{Node: "n1", Replica: id}}}
	o.View = &view
	v, err := Open(context.Background(), o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := v.Stop(); err != nil {
			tb.Error(err)
		}
	})
	a, err := v.Seal(context.Background(), 1)
	if err != nil || a.Refusal != ident.SealAccepted {
		tb.Fatal(err, a)
	}
	view.Epoch, view.Primary, view.Incarnation, view.Position = 1, "n1", a.Incarnation, a.Last
	v.SetView(view)
	s, err := v.OpenSession(context.Background(), Client{Local: true, Gone: func() bool { return false }, Kill: func(error) {}})
	if err != nil {
		tb.Fatal(err)
	}
	return v, s
}

// run keeps depth requests in flight until n are done. fill prepares each.
func runRequests(tb testing.TB, s *Session, n, depth int, fill func(r *Request)) {
	done := make(chan *Request, depth)
	var failure error
	complete := func(r *Request, err error) {
		if err != nil {
			failure = err
		}
		done <- r
	}
	free := make([]*Request, 0, depth)
	for range depth {
		free = append(free, &Request{Complete: complete})
	}
	inFlight := 0
	for n > 0 || inFlight > 0 {
		for n > 0 && len(free) > 0 {
			r := free[len(free)-1]
			free = free[:len(free)-1]
			fill(r)
			n--
			inFlight++
			s.Submit(r)
		}
		r := <-done
		r.Data.Release()
		r.Data = nil
		inFlight--
		free = append(free, r)
	}
	if failure != nil {
		tb.Fatal(failure)
	}
}

func benchRequests(b *testing.B, op Op, size, depth int, fua bool) {
	const volume = 256 << 20
	_, s := openLone(b, volume)
	fill := func(r *Request) {
		r.Op, r.FUA, r.Length = op, fua, uint64(size)
		r.Offset = uint64(rand.IntN(volume/size)) * uint64(size)
		r.Data = buf.Get(size)
	}
	runRequests(b, s, 1, 1, fill)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	b.ResetTimer()
	runRequests(b, s, b.N, depth, fill)
}

func BenchmarkWrite4K1(b *testing.B)   { benchRequests(b, OpWrite, 4096, 1, false) }
func BenchmarkWrite4K32(b *testing.B)  { benchRequests(b, OpWrite, 4096, 32, false) }
func BenchmarkWrite1M8(b *testing.B)   { benchRequests(b, OpWrite, 1<<20, 8, false) }
func BenchmarkWriteFUA4K(b *testing.B) { benchRequests(b, OpWrite, 4096, 8, true) }
func BenchmarkRead4K1(b *testing.B)    { benchRequests(b, OpRead, 4096, 1, false) }
func BenchmarkRead4K32(b *testing.B)   { benchRequests(b, OpRead, 4096, 32, false) }
