package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

const (
	// createTime is how long a new volume may take until it serves.
	createTime = 30 * time.Second
	// changeTime bounds the other changes.
	changeTime = 30 * time.Second
	// forceTime bounds a failover: it may wait for leases to run out.
	forceTime = 60 * time.Second
	// electionTime is for how long a failover waits for a Raft leader: some elections.
	electionTime = 10 * time.Second
	// searchTime is how long after its start a node is taken to be looking for the
	// cluster still: some elections. readyTime is for how much of it one request
	// waits: shorter than the shortest look of the command.
	searchTime = 5 * time.Second
	readyTime  = 2500 * time.Millisecond
	// missingTime is how long a volume that is not known here is waited for: it
	// may have been created through another node a moment ago.
	missingTime = 500 * time.Millisecond
	// everywhereTime is how long a change is waited for on the other nodes that
	// are up.
	everywhereTime = 3 * time.Second
	// invalidateAsk is how long the node of a replica may take to give it up: the
	// change of the cluster state, and no more. It takes invalidateTime itself, so
	// that what kept it is heard.
	invalidateAsk  = 10 * time.Second
	invalidateTime = invalidateAsk - 2*time.Second
	// adminStopTime is what a stopping admin server gives its requests.
	adminStopTime = 2 * time.Second
)

// adminServer serves the admin API on the admin socket, and its reading half on
// the node's port.
type adminServer struct {
	local, remote *http.Server
}

func (d *Daemon) openAdmin() error {
	l := d.cfg.Admin.Listen
	ln, err := listenOn(l)
	if err != nil {
		return listenError("admin.listen", l.String(), err)
	}
	d.admin = &adminServer{
		local:  newHTTPServer(control.Handler(backend{d}, d.log, false), d.log),
		remote: newHTTPServer(control.Handler(backend{d}, d.log, true), d.log),
	}
	serve := func(s *http.Server, ln net.Listener) {
		d.wg.Go(func() {
			if err := s.Serve(ln); err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
				d.fail(fmt.Errorf("serving the admin API: %w", err))
			}
		})
	}
	serve(d.admin.local, ln)
	serve(d.admin.remote, d.mux.HTTP())
	return nil
}

func newHTTPServer(h http.Handler, logger *slog.Logger) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
}

// close ends the servers: what is under way gets a moment. It may be called on
// nil.
func (a *adminServer) close() {
	if a == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), adminStopTime)
	defer cancel()
	for _, s := range []*http.Server{a.local, a.remote} {
		if s.Shutdown(ctx) != nil {
			_ = s.Close() // its requests have had their time
		}
	}
}

// backend does what the admin API is asked for.
type backend struct{ d *Daemon }

var _ control.Backend = backend{}

// ready is an error while this node is no member of a cluster yet. One that is, and
// has just started, is given a moment to find the others.
func (b backend) ready(ctx context.Context) error {
	known := func(s *state.State) bool { return s.ClusterID != "" }
	if known(b.d.state()) {
		return nil
	}
	searches := searchTime - time.Since(b.d.start)
	if b.d.raft.Founding().Done && searches > 0 {
		wait, cancel := context.WithTimeout(ctx, min(searches, readyTime))
		defer cancel()
		if b.d.until(wait, known) {
			return nil
		}
		searches = searchTime - time.Since(b.d.start)
	}
	f := b.d.raft.Founding()
	if why := b.d.joining.Load(); why != nil && !f.Done {
		return *why
	}
	if f.Refused != nil {
		return control.Errorf(control.CodeFailed, "", "%v", f.Refused)
	}
	if err := b.d.raft.StoreError(); err != nil {
		return control.Errorf(control.CodeFailed, "make room in "+b.d.cfg.DataDir+", or mend its disk: it is tried again by itself",
			"this node cannot write its part of the cluster state: %v", err)
	}
	if why, next := b.d.displaced(b.d.cfg); why != "" {
		return control.Errorf(control.CodeFailed, next+"; if both are one place: start the nodes that are down",
			"this node has not heard the cluster state since its start, and may not be found: %s", why)
	}
	if f.Done && searches > 0 {
		return control.Errorf(control.CodeFailed, "run this again in some seconds: it takes a majority of the nodes, up and connected",
			"this node has started %v ago and is looking for the cluster: no Raft leader has reached it yet", time.Since(b.d.start).Round(100*time.Millisecond))
	}
	if f.Done {
		return control.Errorf(control.CodeFailed, "start the nodes that are down; only if a majority of them is gone for good: blockstep recover --help",
			"this node has not heard the cluster state since its start: there is no Raft leader that reaches it, which takes a majority of the nodes, up and connected")
	}
	why := f.Waiting
	if why == "" {
		why = "waiting for a Raft leader"
	}
	next := f.Next
	if next == "" {
		next = "start blockstepd on all nodes of the configuration"
	}
	return control.Errorf(control.CodeFailed, next, "the cluster is not founded yet: %s", why)
}

// waitReady waits until the node is a member, as long as ctx allows.
func (b backend) waitReady(ctx context.Context) error {
	if b.d.until(ctx, func(s *state.State) bool { return s.ClusterID != "" }) {
		return nil
	}
	return b.ready(ctx)
}

// find finds a volume by its name.
func (b backend) find(ctx context.Context, name string) (*state.Volume, error) {
	if err := b.ready(ctx); err != nil {
		return nil, err
	}
	wait, cancel := context.WithTimeout(ctx, missingTime)
	defer cancel()
	var sv *state.Volume
	if b.d.until(wait, func(s *state.State) bool { sv = s.Volume(name); return sv != nil }) {
		return sv, nil
	}
	var names []string
	for _, v := range b.d.state().Live() {
		names = append(names, v.Name)
	}
	next := "there are no volumes; make one with blockstep volume create NAME --size 10GiB"
	if len(names) > 0 {
		next = "there are: " + strings.Join(names, ", ")
	}
	return nil, control.Errorf(control.CodeNotFound, next, "there is no volume %q", name)
}

// Status implements control.Backend.
func (b backend) Status(ctx context.Context) (control.ClusterStatus, error) {
	if err := b.ready(ctx); err != nil {
		return control.ClusterStatus{}, err
	}
	return b.d.clusterStatus(ctx), nil
}

// Volumes implements control.Backend.
func (b backend) Volumes(ctx context.Context) ([]control.VolumeStatus, error) {
	if err := b.ready(ctx); err != nil {
		return nil, err
	}
	return b.d.volumeStatuses(ctx), nil
}

// VolumeStatus implements control.Backend.
func (b backend) VolumeStatus(ctx context.Context, name string) (control.VolumeStatus, error) {
	sv, err := b.find(ctx, name)
	if err != nil {
		return control.VolumeStatus{}, err
	}
	return b.d.volumeStatus(ctx, sv), nil
}

// CreateVolume implements control.Backend.
func (b backend) CreateVolume(ctx context.Context, r control.CreateVolume) (control.VolumeStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, createTime)
	defer cancel()
	var none control.VolumeStatus
	if err := config.CheckName("volume", r.Name); err != nil {
		return none, control.Errorf(control.CodeUsage, "", "%v", err)
	}
	if err := checkSize(r.Size); err != nil {
		return none, err
	}
	if err := b.waitReady(ctx); err != nil {
		return none, err
	}
	cmd, err := b.createCommand(r)
	if err != nil {
		return none, err
	}
	if err := b.d.checkDevices(ctx, cmd); err != nil {
		return none, err
	}
	thin := b.d.thin(ctx, cmd.Name, cmd.Size, cmd.Replicas)
	res, err := b.d.applyWhole(ctx, state.Command{CreateVolume: cmd})
	if err != nil {
		return none, err
	}
	out, err := b.awaitServing(ctx, res.Volume, cmd)
	out.Warnings = thin
	return out, err
}

// VolumeSizeMax is how many bytes a volume has at most.
const VolumeSizeMax int64 = state.SizeMax

// checkSize says what is wrong with a size; the cluster state would refuse it too.
func checkSize(n int64) error {
	switch {
	case n <= 0:
		return control.Errorf(control.CodeUsage, "write it like 10GiB", "a volume needs a size")
	case n > VolumeSizeMax:
		return control.Errorf(control.CodeUsage, "make several", "%s is too large: a volume has at most %s", config.FormatSize(n), config.FormatSize(VolumeSizeMax))
	case n%state.SizeMultiple != 0:
		return control.Errorf(control.CodeUsage, fmt.Sprintf("the next one is %d", n-n%state.SizeMultiple+state.SizeMultiple), "%d bytes are no multiple of %d", n, state.SizeMultiple)
	}
	return nil
}

func (b backend) createCommand(r control.CreateVolume) (*state.CreateVolume, error) {
	st, defaults := b.d.state(), b.d.live.Load().Volume
	cmd := &state.CreateVolume{Name: r.Name, ID: newVolumeID(), Size: uint64(r.Size)}
	cmd.Options = state.Options{
		Ack: state.AckMode(r.Ack), MinCopies: r.MinCopy,
		OnNoQuorum: defaults.OnNoQuorum, AfterPowerLoss: defaults.AfterPowerLoss,
		ErrorAfterMillis: defaults.NoQuorumTimeout.Milliseconds(),
	}
	if r.Ack == "" {
		cmd.Options.Ack = state.AckMode(defaults.Ack)
	}
	names := r.Replicas
	if len(names) == 0 {
		for _, n := range st.NodeNames() {
			if !st.Nodes[n].Witness && !st.Nodes[n].Lost {
				names = append(names, string(n))
			}
		}
	}
	for node := range r.Devices {
		if !slices.Contains(names, node) {
			return nil, control.Errorf(control.CodeUsage, "the replicas are on "+strings.Join(names, ", "), "--device names %s, which has no replica", node)
		}
	}
	for _, n := range names {
		device := r.Devices[n]
		if device != "" {
			device = filepath.Clean(device) // the cluster state compares paths
		}
		cmd.Replicas = append(cmd.Replicas, state.Replica{Node: ident.Node(n), Device: device})
	}
	return cmd, nil
}

// awaitServing waits until a new volume has a primary in office, and is open on
// every node that is up.
func (b backend) awaitServing(ctx context.Context, id ident.Volume, cmd *state.CreateVolume) (control.VolumeStatus, error) {
	d := b.d
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		sv := d.state().Volumes[id]
		if sv != nil && d.primaryReport(ctx, sv).serving() {
			d.awaitEverywhere(ctx, id, func(r volumeReport) bool { return r.Open })
			return d.volumeStatus(ctx, sv), nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			why := ""
			if sv != nil {
				look, cancel := context.WithTimeout(context.Background(), 2*askNode)
				why = d.volumeStatus(look, sv).Reason
				cancel()
			}
			return control.VolumeStatus{}, control.Errorf(control.CodeTimeout, "it goes on by itself once they are up: blockstep wait "+cmd.Name+" --for primary",
				"volume %s is created but does not serve after %v: %s", cmd.Name, createTime, why)
		}
	}
}

// awaitEverywhere waits until a change of a volume is seen on every node that is
// up, so that whoever asked for it finds it there too.
func (d *Daemon) awaitEverywhere(ctx context.Context, id ident.Volume, seen func(volumeReport) bool) {
	ctx, cancel := context.WithTimeout(ctx, everywhereTime)
	defer cancel()
	for _, n := range d.state().NodeNames() {
		for n == d.self || d.linkUp(n) {
			if r := d.reportOf(ctx, n, id); !r.Reached || seen(r) || !pause(ctx, 10*time.Millisecond) {
				break
			}
		}
	}
}

// DeleteVolume implements control.Backend.
func (b backend) DeleteVolume(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	sv, err := b.find(ctx, name)
	if err != nil {
		return err
	}
	if err := b.refuseAttached(ctx, sv); err != nil {
		return err
	}
	err = b.d.applyTo(ctx, sv, state.Command{DeleteVolume: &state.DeleteVolume{Volume: sv.ID}})
	if err == nil {
		b.d.awaitEverywhere(ctx, sv.ID, func(r volumeReport) bool { return (r.View.ID == 0 || r.View.Deleted) && !r.Kept })
	}
	return err
}

// deviceOf names the kernel device of this node that a volume is attached to;
// "" when it is attached to none.
func (d *Daemon) deviceOf(volume string) string {
	m := d.attached.Load()
	if m == nil {
		return ""
	}
	for _, r := range m.List() {
		if r.Volume == volume && r.Index >= 0 {
			return r.Device()
		}
	}
	return ""
}

// refuseAttached keeps a volume that is a kernel device somewhere: a mounted
// filesystem would lose its disk. A node that is down cannot be asked; its
// device serves nobody.
func (b backend) refuseAttached(ctx context.Context, sv *state.Volume) error {
	return attachedRefusal(sv.Name, b.devices(ctx, sv, func(ident.Node) bool { return true }))
}

// devices asks nodes as which kernel devices they have a volume.
func (b backend) devices(ctx context.Context, sv *state.Volume, asked func(ident.Node) bool) map[ident.Node]string {
	var mu sync.Mutex
	var wg sync.WaitGroup
	devices := map[ident.Node]string{}
	for _, n := range b.d.state().NodeNames() {
		if !asked(n) {
			continue
		}
		wg.Go(func() {
			if r := b.d.reportOf(ctx, n, sv.ID); r.Device != "" {
				mu.Lock()
				defer mu.Unlock()
				devices[n] = r.Device
			}
		})
	}
	wg.Wait()
	return devices
}

// attachedRefusal says where a volume is attached, and how to end that; nil when
// it is attached nowhere.
func attachedRefusal(volume string, devices map[ident.Node]string) error {
	if len(devices) == 0 {
		return nil
	}
	where, on := whereAttached(devices)
	return control.Errorf(control.CodeRefused,
		fmt.Sprintf("unmount it there, run blockstep detach %s on %s, then delete it", volume, on),
		"volume %s is attached as %s", volume, where)
}

// whereAttached lists the devices with their nodes, and the nodes.
func whereAttached(devices map[ident.Node]string) (where, on string) {
	var pairs, nodes []string
	for _, n := range slices.Sorted(maps.Keys(devices)) {
		pairs = append(pairs, fmt.Sprintf("%s on %s", devices[n], n))
		nodes = append(nodes, string(n))
	}
	return strings.Join(pairs, " and as "), strings.Join(nodes, " and on ")
}

// ResizeVolume implements control.Backend.
func (b backend) ResizeVolume(ctx context.Context, name string, r control.Resize) (control.VolumeStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	sv, err := b.find(ctx, name)
	if err != nil {
		return control.VolumeStatus{}, err
	}
	if err := checkSize(r.Size); err != nil {
		return control.VolumeStatus{}, err
	}
	cmd := state.Command{ResizeVolume: &state.ResizeVolume{Volume: sv.ID, Size: uint64(r.Size)}}
	if _, res := b.d.state().Apply(cmd); !res.OK {
		return control.VolumeStatus{}, b.d.refusal(res.Err()) // before any replica grows
	}
	if err := b.d.growReplicas(ctx, sv, uint64(r.Size)); err != nil {
		return control.VolumeStatus{}, err
	}
	if err := b.d.applyTo(ctx, sv, cmd); err != nil {
		return control.VolumeStatus{}, err
	}
	b.d.awaitEverywhere(ctx, sv.ID, func(v volumeReport) bool { return v.View.Size >= uint64(r.Size) })
	return b.VolumeStatus(ctx, name)
}

// SetOptions implements control.Backend.
func (b backend) SetOptions(ctx context.Context, name string, r control.SetOptions) (control.VolumeStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	sv, err := b.find(ctx, name)
	if err != nil {
		return control.VolumeStatus{}, err
	}
	if r == (control.SetOptions{}) {
		return control.VolumeStatus{}, control.Errorf(control.CodeUsage, "see blockstep volume set --help", "there is nothing to set")
	}
	if err := b.d.setOptions(ctx, sv, r); err != nil {
		return control.VolumeStatus{}, err
	}
	want := func(o state.Options) bool {
		return (r.MinCopies == nil || o.MinCopies == *r.MinCopies) && (r.ResyncRateMax == nil || o.ResyncRateMax == *r.ResyncRateMax) &&
			(r.ResyncRateMin == nil || o.ResyncRateMin == *r.ResyncRateMin)
	}
	b.d.awaitEverywhere(ctx, sv.ID, func(v volumeReport) bool {
		return want(v.View.Options) && (r.Replicas == nil || v.View.Staying() >= *r.Replicas)
	})
	out, err := b.VolumeStatus(ctx, name)
	if now := b.d.state().Volumes[sv.ID]; now != nil && r.Replicas != nil {
		added := slices.DeleteFunc(slices.Clone(now.Replicas), func(r state.Replica) bool { return sv.Replica(r.Node) != nil })
		out.Warnings = b.d.thin(ctx, name, now.Size, added)
	}
	return out, err
}

// Switchover implements control.Backend.
func (b backend) Switchover(ctx context.Context, name string, r control.Switchover) (control.VolumeStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	sv, err := b.find(ctx, name)
	if err != nil {
		return control.VolumeStatus{}, err
	}
	if err := b.checkReplica(ctx, sv, r.To); err != nil {
		return control.VolumeStatus{}, err
	}
	if err := b.d.switchover(ctx, sv.ID, ident.Node(r.To)); err != nil {
		return control.VolumeStatus{}, err
	}
	return b.VolumeStatus(ctx, name)
}

func (b backend) checkNode(name string) error {
	st := b.d.state()
	if st.Nodes[ident.Node(name)] != nil {
		return nil
	}
	var names []string
	for _, n := range st.NodeNames() {
		names = append(names, string(n))
	}
	return control.Errorf(control.CodeNotFound, "the nodes are "+strings.Join(names, ", "), "there is no node %q", name)
}

// awaitLeader waits for as long as an election of a Raft leader may take: where a
// majority of the nodes is gone, to wait longer for one is to be silent for nothing.
func (b backend) awaitLeader(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, electionTime)
	defer cancel()
	if b.d.until(ctx, func(*state.State) bool { leader, _ := b.d.raft.Leader(); return leader != "" }) {
		return nil
	}
	return b.d.noLeader()
}

// Failover implements control.Backend.
func (b backend) Failover(ctx context.Context, name string, r control.Failover) (control.FailoverResult, error) {
	var none control.FailoverResult
	ctx, cancel := context.WithTimeout(ctx, forceTime)
	defer cancel()
	sv, err := b.find(ctx, name)
	if err != nil {
		return none, err
	}
	if r.Force != r.AcceptDataLoss {
		return none, control.Errorf(control.CodeUsage, "give both, or neither", "force and accept_data_loss go together")
	}
	if err := b.awaitLeader(ctx); err != nil {
		return none, err
	}
	if err := b.checkTarget(ctx, sv, r.To); err != nil {
		return none, err
	}
	if st := b.d.primaryReport(ctx, sv); st.serving() {
		return none, control.Errorf(control.CodeRefused, fmt.Sprintf("to move it, run blockstep switchover %s --to NODE", name), "the primary %s of %s serves: there is nothing to fail over from", sv.Primary, name)
	}
	res, err := b.d.operate(ctx, operatorCall{Volume: sv.ID, To: ident.Node(r.To), Force: r.Force})
	if err != nil {
		return none, err
	}
	out := control.FailoverResult{Epoch: uint64(res.Epoch)}
	if now := b.d.state().Volumes[sv.ID]; now != nil {
		out.Primary, out.Epoch = string(now.Primary), uint64(now.Epoch)
	}
	if res.Loss != state.LossNone || r.Force {
		out.Lost = "answered writes that only the missing replicas hold are gone; every NBD session from before ends with an error. A primary that still runs on a side that cannot be reached is not stopped by this: make sure that it is off."
	}
	if rep := sv.Replica(ident.Node(out.Primary)); rep != nil && rep.Failed {
		out.Lost = fmt.Sprintf("the replica on %s, which had failed (%s), is taken back with what its disk held still: check the content (fsck). What it had acknowledged and not fsynced may be gone, and ", out.Primary, rep.Reason) + out.Lost
	}
	if r.To == "" || out.Primary == r.To {
		return out, nil
	}
	// The best replica is the one that is promoted; to is a switchover afterwards.
	if err := b.d.switchover(ctx, sv.ID, ident.Node(r.To)); err != nil {
		return none, control.Errorf(control.CodeFailed, fmt.Sprintf("when it is in sync: blockstep switchover %s --to %s", name, r.To),
			"%s has a primary again, %s, which could not be moved to %s: %v", name, out.Primary, r.To, err)
	}
	if now := b.d.state().Volumes[sv.ID]; now != nil {
		out.Primary, out.Epoch = string(now.Primary), uint64(now.Epoch)
	}
	return out, nil
}

// checkTarget says why a node cannot be the next primary of a volume; "" leaves
// the choice.
func (b backend) checkTarget(ctx context.Context, sv *state.Volume, node string) error {
	if node == "" {
		return nil
	}
	if err := b.checkReplica(ctx, sv, node); err != nil {
		return err
	}
	if n := ident.Node(node); !b.d.nodeUp(n) {
		return control.Errorf(control.CodeRefused, "leave --to out, or start blockstepd there; "+b.d.choices(ctx, sv, n), "%s is not up", node)
	}
	return nil
}

// checkReplica says which nodes could be the primary, where the one that is named
// has no replica.
func (b backend) checkReplica(ctx context.Context, sv *state.Volume, node string) error {
	n := ident.Node(node)
	switch {
	case sv.Replica(n) != nil:
		return nil
	case b.d.state().Nodes[n] == nil:
		return control.Errorf(control.CodeNotFound, b.d.choices(ctx, sv, n), "there is no node %q", node)
	}
	return control.Errorf(control.CodeRefused, b.d.choices(ctx, sv, n), "%s has no replica on %s", sv.Name, node)
}

// Invalidate implements control.Backend.
func (b backend) Invalidate(ctx context.Context, name string, r control.Invalidate) error {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	sv, err := b.find(ctx, name)
	if err != nil {
		return err
	}
	if err := b.checkNode(r.Node); err != nil {
		return err
	}
	if ident.Node(r.Node) == b.d.self {
		return b.d.invalidateHere(ctx, sv)
	}
	ask, cancelAsk := context.WithTimeout(ctx, invalidateAsk)
	defer cancelAsk()
	err = b.d.rpc.call(ask, ident.Node(r.Node), "/node/v1/invalidate", volumeCall{sv.ID}, nil)
	var e *control.Error
	switch {
	case err == nil || errors.As(err, &e):
	case errors.Is(err, context.DeadlineExceeded):
		return control.Errorf(control.CodeTimeout, "look at blockstep status "+name+": it may still happen", "%s gives no answer in time: %v", r.Node, err)
	default:
		return control.Errorf(control.CodeFailed, "start blockstepd on "+r.Node, "%s cannot be asked: %v", r.Node, err)
	}
	return err
}
