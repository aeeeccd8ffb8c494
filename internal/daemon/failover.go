package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft"
	"github.com/blockstep/blockstep/raft/state"
)

// openFailover starts the controller, which acts while this node leads raft.
func (d *Daemon) openFailover() {
	d.failover = raft.NewController(raft.ControllerOptions{
		Cluster: d.raft, Replicas: replicasOf{d}, Logger: d.log, PowerLossGrace: d.cfg.Volume.PowerLossGrace,
	})
	d.wg.Go(func() {
		if err := d.failover.Run(d.ctx); err != nil && d.ctx.Err() == nil {
			d.fail(err)
		}
	})
}

// replicasOf is how the controller reaches replicas, here or on other nodes.
type replicasOf struct{ d *Daemon }

// epochCall asks a node about a volume and an epoch.
type epochCall struct {
	Volume ident.Volume `json:"volume"`
	Epoch  ident.Epoch  `json:"epoch"`
}

// Seal implements raft.Replicas.
func (r replicasOf) Seal(ctx context.Context, n ident.Node, vol ident.Volume, epoch ident.Epoch) (a ident.SealAnswer, err error) {
	if n == r.d.self {
		return r.d.serveSeal(ctx, n, epochCall{vol, epoch})
	}
	return a, r.d.rpc.call(ctx, n, "/node/v1/seal", epochCall{vol, epoch}, &a)
}

// Drain implements raft.Replicas.
func (r replicasOf) Drain(ctx context.Context, n ident.Node, vol ident.Volume, epoch ident.Epoch) error {
	if n == r.d.self {
		_, err := r.d.serveDrain(ctx, n, epochCall{vol, epoch})
		return err
	}
	return r.d.rpc.call(ctx, n, "/node/v1/drain", epochCall{vol, epoch}, nil)
}

// serveSeal asks the replica of this node. One that is not open does not
// answer: it may be a wiped disk, or about to open.
func (d *Daemon) serveSeal(ctx context.Context, _ ident.Node, c epochCall) (ident.SealAnswer, error) {
	v := d.volume(c.Volume)
	if v == nil || !v.replica.Load() {
		if err := d.problemOf(c.Volume); err != nil {
			return ident.SealAnswer{}, control.Errorf(control.CodeFailed, "", "the replica on %s is not open: %v", d.self, err)
		}
		return ident.SealAnswer{}, control.Errorf(control.CodeFailed, "", "the replica on %s is not open", d.self)
	}
	a, err := v.driver.Seal(ctx, c.Epoch)
	if err == nil {
		d.log.Info("seal", "volume", v.name, "epoch", c.Epoch, "answer", a.Refusal.String(), "position", a.Last, "amnesiac", a.Amnesiac)
	}
	return a, err
}

func (d *Daemon) serveDrain(ctx context.Context, _ ident.Node, c epochCall) (struct{}, error) {
	v := d.volume(c.Volume)
	if v == nil || !v.replica.Load() {
		return struct{}{}, nil
	}
	return struct{}{}, v.driver.Drain(ctx, c.Epoch)
}

// takeReport gives a replica's word to the controller; it is the leader's side.
func (d *Daemon) takeReport(m reportMsg) {
	if !d.live.Load().FailoverAuto && raft.ReportKind(m.Report.Kind) == raft.ReportLapsed {
		return // an operator decides: blockstep failover
	}
	d.failover.Report(m.Volume, m.Node, raft.ReportKind(m.Report.Kind), m.Report.Epoch)
}

func (d *Daemon) serveReport(_ context.Context, _ ident.Node, m reportMsg) (struct{}, error) {
	d.takeReport(m)
	return struct{}{}, nil
}

// operatorCall asks the leader's controller for a switchover, a fence or a failover.
type operatorCall struct {
	Volume     ident.Volume `json:"volume"`
	To         ident.Node   `json:"to"`
	Switchover bool         `json:"switchover"`
	Force      bool         `json:"force"`
	Fence      bool         `json:"fence,omitempty"`
}

// path is where the leader takes the call. A fence has its own: a release before would
// take it for a failover.
func (c operatorCall) path() string {
	if c.Fence {
		return "/node/v1/fence"
	}
	return "/node/v1/operate"
}

type operatorReply struct {
	Result state.Result `json:"result"`
	Again  bool         `json:"again,omitempty"` // the leader has changed: ask the new one
	Err    string       `json:"err,omitempty"`
	Next   string       `json:"next,omitempty"` // what to do about it
	// Already: of a change of the members, that it was done before.
	Already bool `json:"already,omitempty"`
}

// operate asks the controller, wherever the leader is, until it has done what
// was asked or ctx ends. Asking again is safe: a switchover to the node that is
// primary already does nothing, a failover begins from the newest epoch, and a fence
// ends who came meanwhile too.
func (d *Daemon) operate(ctx context.Context, c operatorCall) (state.Result, error) {
	last := "no Raft leader is known"
	for {
		reply, err := d.operateOnce(ctx, c)
		switch {
		case err == nil && !reply.Again && reply.Err == "":
			d.awaitSeen(ctx, reply.Result)
			return reply.Result, nil
		case err == nil && !reply.Again:
			return reply.Result, control.Errorf(control.CodeRefused, reply.Next, "%s", reply.Err)
		case err != nil:
			last = err.Error()
		case reply.Err != "":
			last = reply.Err
		}
		if !pause(ctx, applyPause) {
			if leader, _ := d.raft.Leader(); leader == "" {
				return state.Result{}, d.noLeader()
			}
			return state.Result{}, control.Errorf(control.CodeTimeout, "look at blockstep status: it may still happen, or a majority of the nodes is down", "not done in time: %s", last)
		}
	}
}

func (d *Daemon) operateOnce(ctx context.Context, c operatorCall) (reply operatorReply, err error) {
	if d.raft.IsLeader() {
		return d.serveOperate(ctx, d.self, c)
	}
	leader, address := d.raft.Leader()
	if leader == "" {
		return operatorReply{Again: true}, nil
	}
	return reply, d.rpc.callAddress(ctx, leader, address, c.path(), c, &reply)
}

func (d *Daemon) serveOperate(ctx context.Context, _ ident.Node, c operatorCall) (reply operatorReply, _ error) {
	// The leader is who seals the target: one that it does not hear would cost
	// the clients some epochs, and then be refused as behind.
	if v := d.state().Volumes[c.Volume]; c.Switchover && v != nil && v.Primary != c.To && v.Replica(c.To) != nil && !d.nodeUp(c.To) {
		reply.Err = fmt.Sprintf("%s is not up, as the Raft leader %s sees it", c.To, d.self)
		reply.Next = "start blockstepd there; " + d.choices(ctx, v, c.To)
		return reply, nil
	}
	var err error
	switch {
	case c.Switchover:
		err = d.failover.Switchover(ctx, c.Volume, c.To)
	case c.Fence:
		reply.Result, err = d.failover.Fence(ctx, c.Volume)
	default:
		reply.Result, err = d.failover.Failover(ctx, c.Volume, c.To, c.Force)
	}
	if err != nil {
		reply.Err = d.plain(err)
		if lacking := (*raft.LackingError)(nil); errors.As(err, &lacking) {
			reply.Next = lackingNext(lacking.Nodes)
		}
		if v := d.state().Volumes[c.Volume]; v != nil && errors.Is(err, raft.ErrTarget) {
			reply.Next = d.choices(ctx, v, c.To)
		}
		reply.Again = errors.Is(err, raft.ErrNotLeader) || errors.Is(err, raft.ErrStopped) || errors.Is(err, raft.ErrUnknownOutcome)
		return reply, nil
	}
	if v := d.state().Volumes[c.Volume]; v != nil {
		reply.Result = state.Result{OK: true, Loss: reply.Result.Loss, Volume: v.ID, Epoch: v.Epoch, SetVersion: v.SetVersion}
	}
	if err := reply.Result.Err(); err != nil {
		reply.Err = d.plain(err)
	}
	return reply, nil
}

// choices says which nodes could be the primary of a volume in the place of one that
// cannot, as far as this node sees now, and how the others are.
func (d *Daemon) choices(ctx context.Context, sv *state.Volume, not ident.Node) string {
	return choicesOf(d.volumeStatus(ctx, sv), string(not))
}

func choicesOf(st control.VolumeStatus, not string) string {
	var can, cannot []string
	for _, r := range st.Replicas {
		switch {
		case r.Node == not || r.Node == st.Primary:
		case r.State != control.InSync:
			cannot = append(cannot, fmt.Sprintf("%s (%s)", r.Node, r.State))
		case !slices.Contains(st.InSync, r.Node):
			cannot = append(cannot, fmt.Sprintf("%s (not in the in-sync set)", r.Node))
		default:
			can = append(can, r.Node)
		}
	}
	switch {
	case len(can)+len(cannot) == 0:
		return "no other node has a replica that could take over"
	case len(can) == 0:
		return "no other can take over now: " + strings.Join(cannot, ", ")
	case len(cannot) == 0:
		return "can take over: " + strings.Join(can, ", ")
	}
	return "can take over: " + strings.Join(can, ", ") + "; cannot: " + strings.Join(cannot, ", ")
}

// switchover moves a volume's primary and returns when the new one serves.
func (d *Daemon) switchover(ctx context.Context, vol ident.Volume, to ident.Node) error {
	res, err := d.operate(ctx, operatorCall{Volume: vol, To: to, Switchover: true})
	if err != nil {
		return err
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		sv := d.state().Volumes[vol]
		if sv == nil || sv.Deleted {
			return control.Errorf(control.CodeNotFound, "", "the volume was deleted meanwhile")
		}
		if sv.Epoch >= res.Epoch && sv.Primary != to {
			// It died in between, or was moved on by somebody else.
			return control.Errorf(control.CodeRefused, "look at blockstep status "+sv.Name, "%s became primary of %s and lost it again to %s", to, sv.Name, sv.Primary)
		}
		if st := d.primaryReport(ctx, sv); st.serving() && sv.Primary == to {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return control.Errorf(control.CodeTimeout, "look at blockstep status "+sv.Name, "%s is primary of %s now, and does not serve yet", sv.Primary, sv.Name)
		}
	}
}
