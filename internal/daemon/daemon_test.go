package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/mux"
	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/raft"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication"
	"github.com/blockstep/blockstep/replication/core"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestTheLayersAgree holds together numbers that are defined on both sides of
// the daemon, since neither side may import the other.
func TestTheLayersAgree(t *testing.T) {
	for _, pair := range []struct {
		name string
		a, b int
	}{
		{"read", int(nbd.OpRead), int(replication.OpRead)},
		{"write", int(nbd.OpWrite), int(replication.OpWrite)},
		{"flush", int(nbd.OpFlush), int(replication.OpFlush)},
		{"trim", int(nbd.OpTrim), int(replication.OpTrim)},
		{"zero", int(nbd.OpZero), int(replication.OpZero)},
		{"cache", int(nbd.OpCache), int(replication.OpCache)},
		{"block status", int(nbd.OpBlockStatus), int(replication.OpBlockStatus)},
		{"lapsed", int(raft.ReportLapsed), int(core.ReportLapsed)},
		{"reseal", int(raft.ReportReseal), int(core.ReportReseal)},
		{"refused", int(raft.ReportRefused), int(core.ReportRefused)},
		{"stalled", int(raft.ReportStalled), int(core.ReportStalled)},
	} {
		if pair.a != pair.b {
			t.Errorf("%s is %d on one side and %d on the other", pair.name, pair.a, pair.b)
		}
	}
}

func TestErrorsReachTheClientAsTheyAre(t *testing.T) {
	for from, want := range map[error]error{
		replication.ErrIO:          nbd.ErrIO,
		replication.ErrNoSpace:     nbd.ErrNoSpace,
		replication.ErrRange:       nbd.ErrRange,
		replication.ErrReadOnly:    nbd.ErrReadOnly,
		replication.ErrUnsupported: nbd.ErrUnsupported,
		replication.ErrGeneration:  nbd.ErrSessionLost,
		replication.ErrTooOld:      nbd.ErrIO,
		replication.ErrClosed:      nbd.ErrShutdown,
		replication.ErrClientGone:  nbd.ErrIO,
	} {
		if got := nbdError(fmt.Errorf("wrapped: %w", from)); !errors.Is(got, want) || !errors.Is(got, from) {
			t.Errorf("%v becomes %v", from, got)
		}
	}
	if nbdError(nil) != nil {
		t.Error("no error becomes one")
	}
}

func TestCallsOfStrangersAreRefused(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	logger := slog.New(slog.DiscardHandler)
	m := mux.New(l, logger)
	go m.Serve()
	defer m.Close()
	srv := newRPCServer("prod", "alpha", logger)
	type ping struct{ N int }
	handle(srv, "/node/v1/ping", func(_ context.Context, from ident.Node, in ping) (string, error) {
		if in.N < 0 {
			return "", control.Errorf(control.CodeRefused, "be positive", "negative")
		}
		return fmt.Sprint(from, in.N), nil
	})
	go srv.http.Serve(m.Listener(mux.PrefaceNode))
	defer srv.http.Close()
	handle(srv, pathFounding, func(context.Context, ident.Node, struct{}) (string, error) { return "alpha", nil })
	var id string // of the cluster, as the caller knows it
	call := func(cluster string, to ident.Node, in any) (out string, err error) {
		c := newRPCClient(cluster, "beta", func(ident.Node) (string, bool) { return l.Addr().String(), true })
		if id != "" {
			c.id.Store(&id)
		}
		defer c.close()
		return out, c.call(t.Context(), to, "/node/v1/ping", in, &out)
	}
	if out, err := call("prod", "alpha", ping{5}); err != nil || out != "beta5" {
		t.Errorf("a good call: %q, %v", out, err)
	}
	for name, err := range map[string]error{
		"of another cluster": second(call("dev", "alpha", ping{})),
		"for another node":   second(call("prod", "gamma", ping{})),
		"refused":            second(call("prod", "alpha", ping{-1})),
		"not understood":     second(call("prod", "alpha", "x")),
	} {
		var e *control.Error
		if !errors.As(err, &e) || e.Next == "" {
			t.Errorf("a call %s: %v", name, err)
		}
	}

	// Of a cluster of the same name, as one is to another that a recovery has left behind.
	id = "0f0e"
	if _, err := call("prod", "alpha", ping{}); err != nil {
		t.Errorf("of one that does not know its own yet: %v", err)
	}
	own := "5e0a"
	srv.id.Store(&own)
	if _, err := call("prod", "alpha", ping{}); err == nil || !strings.Contains(err.Error(), "of id 5e0a, the caller to that of id 0f0e") {
		t.Errorf("of another id: %v", err)
	}
	c := newRPCClient("prod", "beta", func(ident.Node) (string, bool) { return l.Addr().String(), true })
	defer c.close()
	c.id.Store(&id)
	if err := c.call(t.Context(), "alpha", pathFounding, struct{}{}, new(string)); err != nil {
		t.Errorf("the question whose node it is: %v", err)
	}
	id = own
	if _, err := call("prod", "alpha", ping{}); err != nil {
		t.Errorf("of the same: %v", err)
	}
}

func second(_ string, err error) error { return err }

// TestJudge pins what an operator reads.
func TestJudge(t *testing.T) {
	serving := volumeReport{Reached: true, Open: true, Replica: true, Core: core.Status{
		Role: core.RolePrimary, State: "InSync", View: core.View{Epoch: 4}, Last: ident.Position{Epoch: 4, Seq: 9},
		Peers: []core.PeerStatus{{Node: "beta", State: "InSync"}, {Node: "gamma", State: "InSync"}},
	}}
	up := volumeReport{Reached: true, Open: true, Replica: true, Core: core.Status{State: "InSync", Last: ident.Position{Epoch: 4, Seq: 9}}}
	peers := func(beta, gamma string) volumeReport {
		r := serving
		r.Core.Peers = []core.PeerStatus{{Node: "beta", State: beta, LagBytes: 77}, {Node: "gamma", State: gamma}}
		return r
	}
	unheard := serving
	unheard.Core.Peers = serving.Core.Peers[1:]
	waiting := volumeReport{Reached: true, Open: true, Problem: devicePrefix + "/dev/sdb: it is in use", Waits: true}
	missing := volumeReport{Reached: true, Open: true, Problem: devicePrefix + "/dev/sdb: there is no such device", Waits: true}
	gone := volumeReport{Reached: true, Open: true, Replica: true, Problem: missing.Problem, Core: core.Status{Role: core.RoleFailed, State: "Failed"}}
	closed := volumeReport{Reached: true, Open: true, Problem: "replica failed: no more sectors; if its disk is lost: blockstep invalidate db --node beta"}
	full := volumeReport{Reached: true, Open: true, Replica: true, Core: core.Status{Role: core.RoleFailed, State: "Failed", Reason: "append: no space left on device"}}
	wiped := volumeReport{Reached: true, Open: true, Problem: "it is gone"}
	manual := up
	manual.Manual = true
	suspended := serving
	suspended.Core.Suspended = true
	for _, tc := range []struct {
		name    string
		reports map[ident.Node]volumeReport
		failed  string
		health  control.Health
		states  string
		reason  string
		next    string
	}{
		{"all is well", map[ident.Node]volumeReport{"alpha": serving, "beta": up, "gamma": up}, "", control.Healthy, "InSync InSync InSync", "", ""},
		{
			"one is dead",
			map[ident.Node]volumeReport{"alpha": peers("Absent", "InSync"), "gamma": up},
			"", control.Degraded, "InSync Absent InSync", "beta is Absent", "start blockstepd on beta, or check its network",
		},
		{
			"one was never heard, and is dead",
			map[ident.Node]volumeReport{"alpha": unheard, "gamma": up},
			"", control.Degraded, "InSync Absent InSync", "beta is Absent", "start blockstepd on beta, or check its network",
		},
		{
			"a device is busy",
			map[ident.Node]volumeReport{"alpha": unheard, "beta": waiting, "gamma": up},
			"", control.Degraded, "InSync Absent InSync", "beta is Absent (backing device /dev/sdb: it is in use)",
			"see to the device on beta: it is tried again by itself (blockstep wait db --for healthy)",
		},
		{
			"a device is busy, and the primary still counts on it",
			map[ident.Node]volumeReport{"alpha": serving, "beta": waiting, "gamma": up},
			"", control.Degraded, "InSync Absent InSync", "beta is Absent (backing device /dev/sdb: it is in use)",
			"see to the device on beta: it is tried again by itself (blockstep wait db --for healthy)",
		},
		{
			"a device is busy when its replica is to be made anew",
			map[ident.Node]volumeReport{"alpha": peers("Failed", "InSync"), "beta": waiting, "gamma": up},
			"invalidated by an operator", control.Degraded, "InSync Absent InSync", "beta is Absent (backing device /dev/sdb: it is in use)",
			"see to the device on beta: it is tried again by itself (blockstep wait db --for healthy)",
		},
		{
			"a device is busy, and there is no primary for want of it",
			map[ident.Node]volumeReport{"alpha": waiting, "beta": waiting, "gamma": up},
			"", control.Suspended, "Absent Absent InSync",
			"no primary serves it; alpha is Absent (backing device /dev/sdb: it is in use), beta is Absent (backing device /dev/sdb: it is in use)",
			"see to the device on alpha: it is tried again by itself (blockstep wait db --for healthy)",
		},
		{
			"one catches up",
			map[ident.Node]volumeReport{"alpha": peers("CatchingUp", "InSync"), "beta": up, "gamma": up},
			"", control.Degraded, "InSync CatchingUp InSync", "beta is CatchingUp", "wait: it comes back by itself (blockstep wait db --for healthy)",
		},
		{
			"a disk failed",
			map[ident.Node]volumeReport{"alpha": peers("Failed", "InSync"), "beta": up, "gamma": up},
			"no more sectors", control.Degraded, "InSync Failed InSync", "beta is Failed (no more sectors)", "replace the disk of beta, then: blockstep invalidate db --node beta",
		},
		{
			"a disk failed, and now is gone",
			map[ident.Node]volumeReport{"alpha": peers("Failed", "InSync"), "beta": gone, "gamma": up},
			"no more sectors", control.Degraded, "InSync Failed InSync",
			"beta is Failed (backing device /dev/sdb: there is no such device; before that: no more sectors)",
			"replace the disk of beta, then: blockstep invalidate db --node beta",
		},
		{
			"a replica that failed does not open, for the same reason",
			map[ident.Node]volumeReport{"alpha": peers("Failed", "InSync"), "beta": closed, "gamma": up},
			"no more sectors", control.Degraded, "InSync Failed InSync", "beta is Failed (no more sectors)",
			"replace the disk of beta, then: blockstep invalidate db --node beta",
		},
		{
			"a device is missing",
			map[ident.Node]volumeReport{"alpha": unheard, "beta": missing, "gamma": up},
			"", control.Degraded, "InSync Absent InSync", "beta is Absent (backing device /dev/sdb: there is no such device)",
			"see to the device on beta: it is tried again by itself (blockstep wait db --for healthy); if its content is lost: blockstep invalidate db --node beta",
		},
		{
			"a disk is full",
			map[ident.Node]volumeReport{"alpha": peers("Failed", "InSync"), "beta": full, "gamma": up},
			"", control.Degraded, "InSync Failed InSync", "beta is Failed (append: no space left on device)",
			"make room on beta: it comes back by itself (blockstep wait db --for healthy)",
		},
		{
			"the primary is dead",
			map[ident.Node]volumeReport{"beta": up, "gamma": up},
			"", control.Suspended, "Absent InSync InSync", "its primary alpha gives no answer; alpha is Absent", "start blockstepd on alpha, or check its network",
		},
		{
			"the primary is dead, and automatic failover is off",
			map[ident.Node]volumeReport{"beta": up, "gamma": manual},
			"", control.Suspended, "Absent InSync InSync", "its primary alpha gives no answer; automatic failover is off (failover.auto); alpha is Absent", "blockstep failover db",
		},
		{
			"the primary was started again, and automatic failover is off",
			map[ident.Node]volumeReport{"alpha": up, "beta": up, "gamma": manual},
			"", control.Suspended, "InSync InSync InSync", "no primary serves it; automatic failover is off (failover.auto)", "blockstep failover db",
		},
		{
			"most are dead, and automatic failover is off",
			map[ident.Node]volumeReport{"gamma": manual},
			"", control.Suspended, "Absent Absent InSync", "its primary alpha gives no answer; automatic failover is off (failover.auto); alpha is Absent, beta is Absent", "start blockstepd on alpha, or check its network",
		},
		{
			"the primary is alone, and no other is left",
			map[ident.Node]volumeReport{"alpha": suspended, "beta": wiped, "gamma": wiped},
			"", control.Suspended, "InSync Failed Failed",
			"its primary alpha has no majority of the in-sync set, or too few copies (min_copies 2); beta is Failed (it is gone), gamma is Failed (it is gone)",
			"bring back what is missing on beta, gamma (a mount, a disk): it is tried again by itself; only if it is lost: blockstep failover db --force --accept-data-loss",
		},
		{
			"the primary is alone",
			map[ident.Node]volumeReport{"alpha": suspended},
			"", control.Suspended, "InSync Absent Absent",
			"its primary alpha has no majority of the in-sync set, or too few copies (min_copies 2); beta is Absent, gamma is Absent",
			"start blockstepd on beta, or check its network",
		},
		{
			"the primary is alone, and the cluster state can change",
			map[ident.Node]volumeReport{"alpha": suspended, "delta": {Reached: true, Leads: true}},
			"", control.Suspended, "InSync Absent Absent",
			"its primary alpha has no majority of the in-sync set, or too few copies (min_copies 2); to go on with alpha alone: blockstep volume set db --min-copies 1; beta is Absent, gamma is Absent",
			"start blockstepd on beta, or check its network",
		},
		{
			"the primary has not heard of one that is there",
			map[ident.Node]volumeReport{"alpha": suspended, "beta": up, "delta": {Reached: true, Leads: true}},
			"", control.Suspended, "InSync InSync Absent",
			"its primary alpha has no majority of the in-sync set, or too few copies (min_copies 2); gamma is Absent",
			"start blockstepd on gamma, or check its network",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sv := &state.Volume{Name: "db", Epoch: 4, Primary: "alpha", InSync: []ident.Node{"alpha", "beta", "gamma"}, Options: state.Options{MinCopies: 2}}
			for _, n := range sv.InSync {
				sv.Replicas = append(sv.Replicas, state.Replica{Node: n})
			}
			sv.Replicas[1].Failed, sv.Replicas[1].Reason = tc.failed != "", tc.failed
			got := statusOf(sv, tc.reports)
			var states []string
			for _, r := range got.Replicas {
				states = append(states, string(r.State))
			}
			if got.Health != tc.health || strings.Join(states, " ") != tc.states || got.Reason != tc.reason || got.Next != tc.next {
				t.Errorf("got %s (%s), reason %q, next %q", got.Health, strings.Join(states, " "), got.Reason, got.Next)
			}
		})
	}
}

// TestWhatASuspendedVolumeWaitsFor: where a primary has too few copies to serve, in
// office or on its way there, and brings another replica up to date with which they are
// enough, it says so and how far that is. Where that one would not do, it does not.
func TestWhatASuspendedVolumeWaitsFor(t *testing.T) {
	up := volumeReport{Reached: true, Open: true, Replica: true, Core: core.Status{State: "CatchingUp"}}
	resyncing := core.PeerStatus{
		Node: "gamma", State: "Resyncing", Connected: true, DirtyBytes: 24 << 20, ResyncDone: 8 << 20, ResyncTotal: 32 << 20, ResyncRate: 1 << 20,
	}
	catching := core.PeerStatus{Node: "gamma", State: "CatchingUp", Connected: true, LagBytes: 3 << 20}
	begins := core.PeerStatus{Node: "gamma", State: "Resyncing", Connected: true, DirtyBytes: 24 << 20}
	lost := core.PeerStatus{Node: "gamma", State: "Absent"}
	alive := core.PeerStatus{Node: "beta", State: "InSync", Connected: true}
	const wait, sooner = "wait: it serves once gamma is in sync (blockstep wait db --for primary)", ", or sooner when blockstepd runs on beta again"
	for _, tc := range []struct {
		name   string
		role   core.Role
		set    string
		peers  []core.PeerStatus
		reason string
		next   string
	}{
		{
			"on its way, with a resync", core.RolePrimaryElect, "alpha beta",
			[]core.PeerStatus{resyncing},
			"alpha is taking office; it serves once the resync of gamma is done (25% of 32MiB, 24s left); beta is Absent, gamma is Resyncing", wait + sooner,
		},
		{
			"in office, with a resync", core.RolePrimary, "alpha beta",
			[]core.PeerStatus{resyncing},
			"no majority of the in-sync set, or too few copies (min_copies 2); it serves once the resync of gamma is done (25% of 32MiB, 24s left); beta is Absent", wait + sooner,
		},
		{
			"in office, with too few copies", core.RolePrimary, "alpha",
			[]core.PeerStatus{resyncing},
			"--min-copies 1; it serves once the resync of gamma is done (25% of 32MiB, 24s left); beta is Absent, gamma is Resyncing", wait,
		},
		{
			"a resync that begins", core.RolePrimaryElect, "alpha beta",
			[]core.PeerStatus{begins},
			"alpha is taking office; it serves once the resync of gamma is done (24MiB); beta is Absent", wait + sooner,
		},
		{
			"from the log", core.RolePrimaryElect, "alpha beta",
			[]core.PeerStatus{catching},
			"alpha is taking office; it serves once gamma has caught up (3MiB of log); beta is Absent, gamma is CatchingUp", wait + sooner,
		},
		{
			"the other one is not there", core.RolePrimaryElect, "alpha beta",
			[]core.PeerStatus{lost},
			"alpha is taking office; beta is Absent, gamma is CatchingUp", "start blockstepd on beta, or check its network",
		},
		{
			"enough of the in-sync set is there", core.RolePrimaryElect, "alpha beta",
			[]core.PeerStatus{alive, resyncing},
			"alpha is taking office; beta is Absent, gamma is Resyncing", "start blockstepd on beta, or check its network",
		},
		{
			"one more is not enough", core.RolePrimaryElect, "alpha beta delta epsilon",
			[]core.PeerStatus{resyncing},
			"alpha is taking office; beta is Absent, gamma is Resyncing, delta is Absent, epsilon is Absent", "start blockstepd on beta, or check its network",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sv := &state.Volume{Name: "db", Epoch: 4, Primary: "alpha", Options: state.Options{MinCopies: 2}}
			for _, n := range []ident.Node{"alpha", "beta", "gamma", "delta", "epsilon"} {
				if in := strings.Contains(tc.set, string(n)); in {
					sv.InSync = append(sv.InSync, n)
					sv.Replicas = append(sv.Replicas, state.Replica{Node: n})
				} else if n == "beta" || n == "gamma" {
					sv.Replicas = append(sv.Replicas, state.Replica{Node: n})
				}
			}
			primary := volumeReport{Reached: true, Open: true, Replica: true, Core: core.Status{
				Role: tc.role, State: "InSync", Suspended: true, View: core.View{Epoch: 4}, Peers: tc.peers,
			}}
			got := statusOf(sv, map[ident.Node]volumeReport{"alpha": primary, "gamma": up})
			if got.Health != control.Suspended || !strings.Contains(got.Reason, tc.reason) || got.Next != tc.next {
				t.Errorf("%s: %s; next: %s", got.Health, got.Reason, got.Next)
			}
			for _, r := range got.Replicas {
				if p := tc.peers[len(tc.peers)-1]; r.Node == "gamma" && (r.DirtyBytes != p.DirtyBytes || r.LagBytes != p.LagBytes || (r.Resync != nil) != (p.ResyncTotal > 0)) {
					t.Errorf("gamma: %+v", r)
				}
			}
			primary.Core.View.Epoch = 3 // its reign is over
			if got := statusOf(sv, map[ident.Node]volumeReport{"alpha": primary, "gamma": up}); strings.Contains(got.Reason, "it serves once") {
				t.Errorf("a former primary: %s", got.Reason)
			}
		})
	}
}

// TestNextWithoutAPrimary: nothing can be copied from nobody, so what is suggested
// is never invalidate.
func TestNextWithoutAPrimary(t *testing.T) {
	up := volumeReport{Reached: true, Open: true, Replica: true, Core: core.Status{State: "InSync"}}
	const force = "blockstep failover db --force --accept-data-loss"
	for _, tc := range []struct {
		name   string
		failed string // nodes
		away   string
		next   string
	}{
		{"all have failed", "alpha beta gamma", "", force},
		{"a majority has failed", "alpha beta", "", force},
		{"a majority has failed, and one is away", "alpha beta", "gamma", "start blockstepd on gamma, or check its network"},
		{"one has failed, and one is away", "alpha", "beta", "start blockstepd on beta, or check its network"},
		{"one has failed, and there is no primary yet", "alpha", "", "wait: it goes on by itself (blockstep wait db --for primary)"},
	} {
		for _, wiped := range []bool{false, true} { // or their directories are gone, which only they know
			sv := &state.Volume{Name: "db", Epoch: 4, Primary: "alpha", InSync: []ident.Node{"alpha", "beta", "gamma"}, Options: state.Options{MinCopies: 2}}
			reports := map[ident.Node]volumeReport{}
			for _, n := range sv.InSync {
				failed := strings.Contains(tc.failed, string(n))
				sv.Replicas = append(sv.Replicas, state.Replica{Node: n, Replica: 1, Failed: failed && !wiped, Reason: "no more sectors"})
				switch {
				case tc.away == string(n):
				case failed && wiped:
					reports[n] = volumeReport{Reached: true, Open: true, Problem: "the replica that was here is gone"}
				default:
					reports[n] = up
				}
			}
			want := tc.next
			if wiped && want == force {
				want = "bring back what is missing on " + strings.ReplaceAll(tc.failed, " ", ", ") + " (a mount, a disk): it is tried again by itself; only if it is lost: " + force
			}
			if got := statusOf(sv, reports); got.Next != want || got.Health != control.Suspended {
				t.Errorf("%s, wiped %v: %s, next %q, want %q", tc.name, wiped, got.Health, got.Next, want)
			}
		}
	}
}

func TestCursor(t *testing.T) {
	for _, s := range []string{"", "1.2", "0.0", "1.2.0011aaff"} {
		if _, err := parseCursor(s); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{"1", "1.", "a.b", "1.2.3", "-1.2", "01.2", "1.2.0011AAFF", "1.2.", "99999999999999999999.1"} {
		if _, err := parseCursor(s); err == nil {
			t.Errorf("%q is taken for a cursor", s)
		}
	}
}
