package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/version"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication/core"
)

// askNode is how long another node may take to tell about a volume. A stopped
// process answers nothing; the operator has to be told soon.
const askNode = time.Second

// volumeReport is what one node knows of a volume.
type volumeReport struct {
	Reached bool          `json:"reached"` // false: the node gave no answer
	RaftID  string        `json:"raft_id"` // of the data_dir that answers
	Relayed bool          `json:"-"`       // it gives this node no answer, and the primary hears it
	GivenUp bool          `json:"-"`       // a recovery from a lost majority went on without it
	Foreign bool          `json:"-"`       // what runs there has another data_dir than the cluster knows
	Open    bool          `json:"open"`
	Replica bool          `json:"replica"`
	Problem string        `json:"problem,omitempty"` // why its replica is not open
	Waits   bool          `json:"waits,omitempty"`   // the problem ends when somebody sees to its device
	Kept    bool          `json:"kept,omitempty"`    // the volume is deleted, and its replica here is there yet
	Stall   string        `json:"stall,omitempty"`   // why its disk is taken to hang
	Core    core.Status   `json:"core"`
	Held    int           `json:"held"`
	View    state.Volume  `json:"view"` // the cluster state as it sees it
	Waiting string        `json:"waiting,omitempty"`
	Manual  bool          `json:"manual,omitempty"` // it is the Raft leader, and replaces no primary by itself
	Leads   bool          `json:"leads,omitempty"`  // it is the Raft leader
	Device  string        `json:"device,omitempty"` // the kernel device that it is attached to on the node
	Took    time.Duration `json:"-"`
}

// serving reports whether the node says that it serves the volume as primary.
func (r volumeReport) serving() bool {
	return r.Reached && r.Replica && r.Core.Role == core.RolePrimary && !r.Core.Suspended
}

// servingAt is serving, in the epoch that the volume is at now.
func (r volumeReport) servingAt(e ident.Epoch) bool {
	return r.serving() && r.Core.View.Epoch == e
}

// inOffice reports whether the node says that it is primary, be it one that has
// too few copies to answer its clients: others can be copied from it.
func (r volumeReport) inOffice() bool {
	return r.Reached && r.Replica && r.Core.Role == core.RolePrimary
}

type volumeCall struct {
	Volume ident.Volume `json:"volume"`
}

// report is what this node knows of a volume.
func (d *Daemon) report(id ident.Volume) volumeReport {
	r := volumeReport{Reached: true, RaftID: d.raft.RaftID()}
	if sv := d.state().Volumes[id]; sv != nil {
		r.View = *sv
	}
	if r.View.ID == 0 || r.View.Deleted {
		_, err := os.Stat(d.replicaDir(id))
		r.Kept = err == nil
	}
	if err := d.problemOf(id); err != nil && !errors.Is(err, errNotCurrent) {
		r.Problem = err.Error()
		var e *deviceError
		r.Waits = errors.As(err, &e) && !d.hasFailed(&r.View)
	}
	if err := d.raft.StoreError(); err != nil && r.Problem == "" && d.volume(id) == nil {
		r.Problem = "it cannot write its part of the cluster state: " + err.Error()
	}
	if d.failover != nil {
		r.Waiting = d.failover.Waiting(id)
	}
	r.Leads = d.raft.IsLeader()
	r.Manual = r.Leads && !d.live.Load().FailoverAuto
	r.Device = d.deviceOf(r.View.Name)
	v := d.volume(id)
	if v == nil {
		return r
	}
	st := v.driver.Status()
	r.Stall = st.Stall
	r.Open, r.Replica, r.Core, r.Held = true, v.replica.Load(), st.Core, st.Held
	if rep := r.View.Replica(d.self); rep != nil && rep.Device != "" && r.Problem == "" && st.Core.Role == core.RoleFailed {
		// Nobody opens what has failed: only here it is seen that it is gone, too.
		if err := deviceHere(rep.Device, r.View.Size); err != nil {
			r.Problem = (&deviceError{rep.Device, err}).Error()
		}
	}
	return r
}

// hasFailed reports whether the cluster state says that the replica that lies
// here has failed: what brings it back is an operator's word, and its device
// alone does not. One that is being made anew is not there.
func (d *Daemon) hasFailed(sv *state.Volume) bool {
	rep := sv.Replica(d.self)
	if rep == nil || !rep.Failed {
		return false
	}
	id, err := d.localReplica(d.replicaDir(sv.ID))
	return err == nil && id == rep.Replica
}

func (d *Daemon) serveReportOf(_ context.Context, _ ident.Node, c volumeCall) (volumeReport, error) {
	return d.report(c.Volume), nil
}

// reportOf asks a node what it knows of a volume.
func (d *Daemon) reportOf(ctx context.Context, n ident.Node, id ident.Volume) volumeReport {
	if n == d.self {
		return d.report(id)
	}
	ctx, cancel := context.WithTimeout(ctx, askNode)
	defer cancel()
	var r volumeReport
	err := d.rpc.call(ctx, n, "/node/v1/volume", volumeCall{id}, &r)
	switch m := d.state().Nodes[n]; {
	case err == nil && m != nil && m.RaftID != r.RaftID:
		// Whatever it says, it is not the node that the cluster knows.
		return volumeReport{Foreign: true}
	case m != nil && m.Lost:
		return volumeReport{GivenUp: true}
	case err != nil:
		return volumeReport{}
	}
	r.Reached = true
	return r
}

// primaryReport asks the primary that the local cluster state names.
func (d *Daemon) primaryReport(ctx context.Context, sv *state.Volume) volumeReport {
	if sv.Primary == "" {
		return volumeReport{}
	}
	return d.reportOf(ctx, sv.Primary, sv.ID)
}

// reports asks every replica's node and the Raft leader at once.
func (d *Daemon) reports(ctx context.Context, sv *state.Volume) map[ident.Node]volumeReport {
	var mu sync.Mutex
	var wg sync.WaitGroup
	out := map[ident.Node]volumeReport{}
	ask := map[ident.Node]bool{}
	for _, r := range sv.Replicas {
		ask[r.Node] = true
	}
	if leader, _ := d.raft.Leader(); leader != "" {
		ask[leader] = true // it knows what the failover waits for
	}
	for n := range ask {
		wg.Go(func() {
			rep := d.reportOf(ctx, n, sv.ID)
			mu.Lock()
			defer mu.Unlock()
			out[n] = rep
		})
	}
	wg.Wait()
	return out
}

// volumeStatus is the status of a volume as the nodes together know it.
func (d *Daemon) volumeStatus(ctx context.Context, sv *state.Volume) control.VolumeStatus {
	reports := d.reports(ctx, sv)
	d.relay(ctx, sv, reports)
	return statusOf(sv, reports)
}

// relayWait is how long the primary is given to hear again from a replica that
// gives this node no answer: some of its heartbeats, and not quite a lease.
const relayWait = 800 * time.Millisecond

// relay finds the replicas that only this node does not reach: those that the
// primary has heard since this node had asked them in vain. A replica that has
// just died has been heard lately too, but not since.
func (d *Daemon) relay(ctx context.Context, sv *state.Volume, reports map[ident.Node]volumeReport) {
	primary := reports[sv.Primary]
	lost := func() (names []ident.Node) {
		for _, r := range sv.Replicas {
			p := primary.peer(r.Node)
			if own := reports[r.Node]; r.Node != sv.Primary && !own.Reached && !own.Foreign && !own.Relayed && p != nil && p.Connected {
				names = append(names, r.Node)
			}
		}
		return names
	}
	began := time.Now()
	for primary.serving() && len(lost()) > 0 && time.Since(began) < relayWait && pause(ctx, relayWait/8) {
		asked := time.Now()
		primary = d.primaryReport(ctx, sv)
		for _, n := range lost() {
			if ago := primary.peer(n).HeardAgo; ago >= 0 && time.Duration(ago) < asked.Sub(began) {
				reports[n] = volumeReport{Relayed: true}
			}
		}
	}
}

// peer is what a primary knows of another replica; nil when it knows nothing.
func (r *volumeReport) peer(n ident.Node) *core.PeerStatus {
	i := slices.IndexFunc(r.Core.Peers, func(p core.PeerStatus) bool { return p.Node == n })
	if i < 0 {
		return nil
	}
	return &r.Core.Peers[i]
}

// statusOf puts the nodes' reports together.
func statusOf(sv *state.Volume, reports map[ident.Node]volumeReport) control.VolumeStatus {
	// A node that sees more than this one knows a newer state.
	for _, r := range reports {
		if v := r.View; r.Reached && v.ID == sv.ID && (v.Epoch > sv.Epoch || v.Epoch == sv.Epoch && v.SetVersion > sv.SetVersion) {
			sv = &r.View
		}
	}
	out := control.VolumeStatus{
		Volume: sv.Name, ID: fmt.Sprintf("%016x", uint64(sv.ID)), Size: int64(sv.Size), Epoch: uint64(sv.Epoch),
		Ack: string(sv.Options.Ack), MinCopies: sv.Options.MinCopies, Generation: sv.Generation,
		InSync: []string{}, Replicas: []control.ReplicaStatus{},
	}
	for _, n := range sv.InSync {
		out.InSync = append(out.InSync, string(n))
	}
	primary := reports[sv.Primary]
	serving := primary.servingAt(sv.Epoch)
	if serving {
		out.Primary = string(sv.Primary)
		out.Position = primary.Core.Last.String()
	}
	for _, r := range sv.Replicas {
		out.Replicas = append(out.Replicas, replicaStatus(sv, r, reports, serving))
	}
	judge(&out, sv, reports, serving)
	return out
}

// replicaStatus says how one replica is. While a primary serves, its word counts:
// it knows what each replica holds. Otherwise the replica's own does.
func replicaStatus(sv *state.Volume, r state.Replica, reports map[ident.Node]volumeReport, serving bool) control.ReplicaStatus {
	out := control.ReplicaStatus{Node: string(r.Node), State: control.Absent}
	own, primary := reports[r.Node], reports[sv.Primary]
	if own.Reached && own.Replica {
		out.Position = own.Core.Last.String()
		out.State = control.ReplicaState(own.Core.State)
		if out.State == control.Failed {
			out.Reason = own.Core.Reason
		}
	}
	if own.Reached && !own.Replica && own.Problem != "" {
		out.State, out.Reason = control.Failed, own.Problem
	}
	if serving && r.Node != sv.Primary && out.State != control.Failed {
		if p := primary.peer(r.Node); p != nil {
			takePeer(&out, *p)
			if own.Relayed {
				out.Position = primary.positionAt(p.Matched)
				out.Reason = relayedReason
			}
		} else if own.Reached {
			out.State = control.CatchingUp
		}
		switch {
		case out.State != control.InSync || own.Relayed && sv.InSet(r.Node):
		case !own.Reached || !own.Replica:
			// The primary has not noticed yet that it went.
			out.State = control.Absent
		case !sv.InSet(r.Node):
			out.State = control.CatchingUp
		}
	}
	if p := primary.peer(r.Node); !serving && own.Reached && own.Replica && out.State != control.Failed && primary.brings(sv, p) {
		takePeer(&out, *p) // nobody is served, perhaps for want of just this one
	}
	if own.Stall != "" && out.State != control.Failed {
		// It holds what it has, and is of no use until the disk answers.
		out.Reason = own.Stall
		if out.State == control.InSync {
			out.State = control.CatchingUp
		}
	}
	if r.Failed {
		out.State, out.Reason = control.Failed, r.Reason
		if own.Problem != "" && !strings.Contains(own.Problem, r.Reason) {
			out.Reason = own.Problem + "; before that: " + r.Reason
		}
	}
	if own.Reached && !own.Replica && own.Waits {
		// Also one that had failed: it is being made anew.
		out.State, out.Reason = control.Absent, own.Problem
	}
	switch {
	case own.Foreign:
		out.Reason = foreignReason
	case own.GivenUp && out.State == control.Absent:
		out.Reason = lostReason
	}
	return out
}

// lostReason is why a member has no vote after a recovery.
const lostReason = "it was given up when the cluster state was recovered"

// foreignReason is why a node that runs is absent all the same.
const foreignReason = "it runs with an empty or another data_dir"

// relayedReason is said of a replica whose node this one does not reach.
const relayedReason = "the node that was asked does not reach it, its primary does"

// positionAt is the position of a seq that a replica holds, where that is of the
// primary's own epoch; "" else.
func (r *volumeReport) positionAt(seq ident.Seq) string {
	if seq == 0 || seq < r.Core.View.Position.Seq {
		return ""
	}
	return ident.Position{Epoch: r.Core.View.Epoch, Seq: seq}.String()
}

func takePeer(out *control.ReplicaStatus, p core.PeerStatus) {
	out.State = control.ReplicaState(p.State)
	out.LagBytes, out.DirtyBytes = p.LagBytes, p.DirtyBytes
	if p.ResyncTotal > 0 {
		out.Resync = &control.Resync{DoneBytes: p.ResyncDone, TotalBytes: p.ResyncTotal, Rate: p.ResyncRate}
		if p.ResyncRate > 0 {
			left := (p.DirtyBytes + p.ResyncRate - 1) / p.ResyncRate
			out.Resync.Left = &left
		}
	}
}

// judge sets health, reason and the next step.
func judge(out *control.VolumeStatus, sv *state.Volume, reports map[ident.Node]volumeReport, serving bool) {
	var off []string
	for _, r := range out.Replicas {
		if r.State == control.InSync && slices.Contains(out.InSync, r.Node) {
			continue
		}
		word := r.Node + " is " + string(r.State)
		if r.Reason != "" {
			word += " (" + r.Reason + ")"
		}
		off = append(off, word)
	}
	out.Next = nextStep(out, sv, serving, reports[sv.Primary].inOffice())
	switch {
	case !serving:
		out.Health = control.Suspended
		what, next := awaited(out, sv, reports[sv.Primary])
		if out.Reason = suspendedReason(sv, reports, withFewer(out, sv, reports)+what, off); what != "" {
			out.Next = next
		}
		if awaitsOperator(sv, reports) && canSeal(out, sv) {
			out.Next = "blockstep failover " + sv.Name
		}
		if out.Next == "" {
			out.Next = "wait: it goes on by itself (blockstep wait " + sv.Name + " --for primary)"
		}
	case len(off) > 0:
		out.Health, out.Reason = control.Degraded, strings.Join(off, ", ")
	default:
		out.Health, out.Next = control.Healthy, ""
	}
}

// awaitsOperator reports whether nobody is in office or about to be, and only an
// operator changes that: also a primary that is started again is none any more.
func awaitsOperator(sv *state.Volume, reports map[ident.Node]volumeReport) bool {
	p := reports[sv.Primary]
	if sv.Primary == "" || p.inOffice() || p.Reached && p.Core.Role == core.RolePrimaryElect {
		return false
	}
	for _, r := range reports {
		if r.Manual {
			return true
		}
	}
	return false
}

// canSeal reports whether enough of the in-sync set is there for a failover that
// loses nothing.
func canSeal(out *control.VolumeStatus, sv *state.Volume) bool {
	n := 0
	for _, r := range out.Replicas {
		if r.State == control.InSync && sv.InSet(ident.Node(r.Node)) {
			n++
		}
	}
	return n >= sv.SealsNeeded()
}

// suspendedReason says why nobody serves a volume; more, how that may end.
func suspendedReason(sv *state.Volume, reports map[ident.Node]volumeReport, more string, off []string) string {
	reason := "no primary serves it"
	primary := reports[sv.Primary]
	switch {
	case sv.Primary == "":
		reason = "it has no primary yet"
	case !primary.Reached:
		reason = fmt.Sprintf("its primary %s gives no answer", sv.Primary)
	case primary.Core.Role == core.RolePrimaryElect:
		reason = fmt.Sprintf("%s is taking office", sv.Primary)
	case primary.Core.Suspended && len(sv.InSync) < sv.Options.MinCopies:
		reason = fmt.Sprintf("its primary %s has %d in sync, too few copies (min_copies %d); to go on with those: blockstep volume set %s --min-copies %[2]d",
			sv.Primary, len(sv.InSync), sv.Options.MinCopies, sv.Name)
	case primary.Core.Suspended:
		reason = fmt.Sprintf("its primary %s has no majority of the in-sync set, or too few copies (min_copies %d)", sv.Primary, sv.Options.MinCopies)
	}
	reason += more
	if awaitsOperator(sv, reports) {
		reason += "; automatic failover is off (failover.auto)"
	}
	for _, r := range reports {
		if r.Waiting != "" {
			reason += "; the failover waits: " + r.Waiting
			break
		}
	}
	if len(off) > 0 {
		reason += "; " + strings.Join(off, ", ")
	}
	return reason
}

// foreign finds the members whose address answers with another data_dir than the
// cluster knows: a wiped or swapped disk, which is no member.
func (d *Daemon) foreign(ctx context.Context, answers map[ident.Node]bool) map[ident.Node]bool {
	ctx, cancel := context.WithTimeout(ctx, askNode)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	out := map[ident.Node]bool{}
	for name, m := range d.state().Nodes {
		if !answers[name] {
			continue
		}
		wg.Go(func() {
			info, err := d.Founding(ctx, name, m.Address)
			if err == nil && info.RaftID != m.RaftID {
				mu.Lock()
				defer mu.Unlock()
				out[name] = true
			}
		})
	}
	wg.Wait()
	return out
}

// nodeStatuses lists the members as this node sees them.
func (d *Daemon) nodeStatuses(ctx context.Context) []control.NodeStatus {
	st := d.state()
	leader, _ := d.raft.Leader()
	errs := map[ident.Node]string{}
	up := map[ident.Node]bool{}
	for _, l := range d.links.Status() {
		up[l.Node] = l.Connected && l.Heard
		if !up[l.Node] {
			errs[l.Node] = l.Error
		}
	}
	for n := range d.foreign(ctx, up) {
		up[n] = false
		errs[n] = foreignReason + "; next: blockstep node replace " + string(n)
	}
	for name, m := range st.Nodes {
		if m.Lost {
			up[name] = false
			errs[name] = lostReason + "; next: start blockstepd there on an empty data_dir, then blockstep node replace " + string(name)
		}
	}
	up[d.self] = true
	if why, next := d.displaced(d.cfg); why != "" {
		errs[d.self] = why + "; next: " + next
	}
	out := []control.NodeStatus{}
	for _, name := range st.NodeNames() {
		n := st.Nodes[name]
		out = append(out, control.NodeStatus{
			Name: string(name), Address: n.Address, Witness: n.Witness, Up: up[name],
			Leader: name == leader, Voter: !n.Lost, Error: errs[name],
		})
	}
	return out
}

// clusterStatus is everything, volumes asked for at once.
func (d *Daemon) clusterStatus(ctx context.Context) control.ClusterStatus {
	leader, _ := d.raft.Leader()
	return control.ClusterStatus{
		Cluster: d.cfg.Cluster, Node: string(d.self), Version: version.String(),
		Leader: string(leader), Term: d.raft.Term(), Quorum: leader != "",
		Nodes: d.nodeStatuses(ctx), Volumes: d.volumeStatuses(ctx),
	}
}

func (d *Daemon) volumeStatuses(ctx context.Context) []control.VolumeStatus {
	live := d.state().Live()
	out := make([]control.VolumeStatus, len(live))
	var wg sync.WaitGroup
	slots := make(chan struct{}, rpcConnsPerPeer)
	for i, sv := range live {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			out[i] = d.volumeStatus(ctx, sv)
		})
	}
	wg.Wait()
	return out
}
