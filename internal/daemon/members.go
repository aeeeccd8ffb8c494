package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication/core"
)

// Nodes implements control.Backend.
func (b backend) Nodes(ctx context.Context) ([]control.NodeStatus, error) {
	if err := b.ready(ctx); err != nil {
		return nil, err
	}
	return b.d.nodeStatuses(ctx), nil
}

// memberCall asks the leader to change the members.
type memberCall struct {
	Verb    string     `json:"verb"` // add, remove, replace
	Name    ident.Node `json:"name"`
	Address string     `json:"address,omitempty"`
	RaftID  string     `json:"raft_id,omitempty"`
	Witness bool       `json:"witness,omitempty"`
	// Invitation is the event that lets the node join by itself; 0: an operator
	// adds it.
	Invitation uint64 `json:"invitation,omitempty"`
}

// The events of a node's membership.
const (
	eventAdded    = "node-added"
	eventReplaced = "node-replaced"
	eventRemoved  = "node-removed"
)

// lastChange is the newest of these that the cluster state remembers of a node; ""
// when there is none.
func lastChange(st *state.State, n ident.Node) string {
	for i := len(st.Events) - 1; i >= 0; i-- {
		if e := &st.Events[i]; e.Node == n && slices.Contains([]string{eventAdded, eventReplaced, eventRemoved}, e.Name) {
			return e.Name
		}
	}
	return ""
}

// isDone reports whether the members are as a change would have them: by the same
// change, whose answer was lost, or by another one.
func (c *memberCall) isDone(st *state.State) bool {
	n := st.Nodes[c.Name]
	switch {
	case c.Verb == "remove":
		return n == nil && lastChange(st, c.Name) == eventRemoved
	case n == nil || n.Lost || n.RaftID != c.RaftID || c.Address != "" && n.Address != c.Address:
		return false
	}
	return c.Verb == "replace" || n.Witness == c.Witness
}

// serveMember is the leader's side of a change of the members. Asked again, it says
// that it is done: the first answer may have been lost.
func (d *Daemon) serveMember(ctx context.Context, _ ident.Node, c memberCall) (operatorReply, error) {
	// What is judged must not be a former leader's.
	err := d.raft.Barrier(ctx)
	if err == nil && c.isDone(d.state()) {
		return operatorReply{Already: true}, nil
	}
	if err != nil {
		return operatorReply{Err: err.Error(), Again: retryable(err)}, nil
	}
	switch c.Verb {
	case "add":
		joined := false
		if c.Invitation != 0 {
			joined, err = d.judgeInvitation(ctx, c)
		}
		if err == nil && !joined {
			err = d.raft.AddNode(ctx, state.Node{Name: c.Name, Address: c.Address, RaftID: c.RaftID, Witness: c.Witness})
		}
	case "remove":
		if why := d.quorumWithout(c.Name); why != "" {
			return operatorReply{Err: why}, nil
		}
		err = d.raft.RemoveNode(ctx, c.Name)
	case "replace":
		err = d.raft.ReplaceNode(ctx, c.Name, c.RaftID, c.Address)
	default:
		return operatorReply{}, control.Errorf(control.CodeUsage, "run the same version on all nodes", "unknown change %q", c.Verb)
	}
	var reply operatorReply
	if err != nil {
		reply.Err, reply.Again = d.plain(err), retryable(err)
	}
	return reply, nil
}

// quorumWithout says why the cluster state could not change any more without a
// node; "" when enough of the others are up. To take out one that is dead is
// always fine: it has no part in the majority.
func (d *Daemon) quorumWithout(gone ident.Node) string {
	var left, down []string
	for name, n := range d.state().Nodes {
		if name == gone || n.Lost {
			continue
		}
		left = append(left, string(name))
		if !d.nodeUp(name) {
			down = append(down, string(name))
		}
	}
	if 2*(len(left)-len(down)) > len(left) || len(left) == 0 {
		return ""
	}
	slices.Sort(down)
	return fmt.Sprintf("without %s the cluster would have no majority, since %s of the %d nodes that are left is not up: start it, or remove it first",
		gone, strings.Join(down, ", "), len(left))
}

// changeMember asks the leader until the outcome is definite. already says that the
// members were so before.
func (b backend) changeMember(ctx context.Context, c memberCall) (already bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	last := "no Raft leader is known"
	asked := false // somebody: what is done already may be our own doing
	for {
		var reply operatorReply
		var err error
		leader, address := b.d.raft.Leader()
		if leader == b.d.self {
			reply, err = b.d.serveMember(ctx, b.d.self, c)
		} else if leader != "" {
			err = b.d.rpc.callAddress(ctx, leader, address, "/node/v1/member", c, &reply)
		} else {
			reply.Again = true
		}
		switch {
		case err == nil && !reply.Again && reply.Err == "":
			b.awaitMember(ctx, c)
			return reply.Already && !asked, nil
		case err == nil && !reply.Again:
			return false, control.Errorf(control.CodeRefused, "", "%s", reply.Err)
		case err != nil:
			last = err.Error()
		case reply.Err != "":
			last = reply.Err
		}
		asked = asked || leader != ""
		if !pause(ctx, applyPause) {
			if leader, _ := b.d.raft.Leader(); leader == "" {
				return false, b.d.noLeader()
			}
			return false, control.Errorf(control.CodeTimeout, "look at blockstep node list: it may still happen, or a majority of the nodes is down", "not done in time: %s", last)
		}
	}
}

// awaitMember waits a moment until the local state shows a change, so that whoever
// asked for it finds it here. A node that is removed may never hear of it.
func (b backend) awaitMember(ctx context.Context, c memberCall) {
	if c.Name == b.d.self {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, seenWait)
	defer cancel()
	b.d.until(ctx, c.isDone)
}

// newcomer asks a node that is to join who it is.
func (b backend) newcomer(ctx context.Context, name ident.Node, address string) (raft.FoundInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*askNode)
	defer cancel()
	info, err := b.d.Founding(ctx, name, address)
	if errors.Is(err, raft.ErrDisagrees) {
		return info, control.Errorf(control.CodeRefused, "correct the address, or cluster and node in the configuration there", "%s cannot join from %s: %v", name, address, err)
	}
	if err != nil {
		return info, control.Errorf(control.CodeFailed, fmt.Sprintf("start blockstepd on %s with an empty data_dir and a configuration that lists all nodes, then run this again", name),
			"%s gives no answer at %s: %v", name, address, err)
	}
	if why := foreignTo(b.d.state(), info); why != "" {
		return info, control.Errorf(control.CodeRefused, fmt.Sprintf("empty its data_dir first, and start blockstepd there again: what that cluster has on %s is lost to it", name), "%s %s", name, why)
	}
	return info, nil
}

// foreignTo says of which cluster a node that is to join is a member; "" when of
// none, or of this one. To take it in would make a voter of it that two leaders
// fill: each would cut the other's commands from its log.
func foreignTo(st *state.State, info raft.FoundInfo) string {
	ours := func(raftID string) bool {
		for _, n := range st.Nodes {
			if n.RaftID == raftID {
				return true
			}
		}
		return false
	}
	switch {
	case info.ClusterID != "" && info.ClusterID != st.ClusterID:
		return "is a member of another cluster (id " + info.ClusterID + ")"
	case info.ClusterID == "" && info.Founded && !slices.ContainsFunc(info.Members, ours):
		return fmt.Sprintf("is a member of another cluster (its members: %s)", strings.Join(info.Members, ", "))
	}
	return ""
}

// checkNewAddress refuses an address at which the others could never reach the node.
func checkNewAddress(st *state.State, r control.AddNode) error {
	host, port, err := config.SplitAddress(r.Address, false)
	if err != nil {
		return control.Errorf(control.CodeUsage, "write it like --address 10.1.0.4:7700", "%v", err)
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		return control.Errorf(control.CodeUsage, fmt.Sprintf("write the address of %s itself, like --address 10.1.0.4:%s", r.Name, port), "%s is no address that other nodes can reach", r.Address)
	}
	for _, name := range st.NodeNames() {
		if n := st.Nodes[name]; string(name) != r.Name && n.Address == r.Address {
			return control.Errorf(control.CodeRefused, fmt.Sprintf("write the address of %s itself; if %s is gone for good and %s has its address: blockstep node remove %s first", r.Name, name, r.Name, name),
				"%s is the address of node %s", r.Address, name)
		}
	}
	return nil
}

// AddNode implements control.Backend.
func (b backend) AddNode(ctx context.Context, r control.AddNode) (control.AddedNode, error) {
	out := control.AddedNode{Name: r.Name, Address: r.Address, Witness: r.Witness}
	if err := b.ready(ctx); err != nil {
		return out, err
	}
	if err := config.CheckName("node", r.Name); err != nil {
		return out, control.Errorf(control.CodeUsage, "", "%v", err)
	}
	if err := checkNewAddress(b.d.state(), r); err != nil {
		return out, err
	}
	if n := b.d.state().Nodes[ident.Node(r.Name)]; n != nil {
		out.Already = true
		return out, b.memberAlready(ctx, n, r)
	}
	if r.Token {
		return b.invite(ctx, r)
	}
	info, err := b.newcomer(ctx, ident.Node(r.Name), r.Address)
	if err != nil {
		return out, err
	}
	out.Already, err = b.changeMember(ctx, memberCall{Verb: "add", Name: ident.Node(r.Name), Address: r.Address, RaftID: info.RaftID, Witness: r.Witness})
	return out, err
}

// memberAlready is what node add is answered for a node that is a member: nil when it
// is one just as it was asked for, so that who got no answer may ask again.
func (b backend) memberAlready(ctx context.Context, n *state.Node, r control.AddNode) error {
	refuse := func(format string, args ...any) error {
		return control.Errorf(control.CodeRefused, "for a new data_dir of it: blockstep node replace "+r.Name, format, args...)
	}
	switch {
	case r.Token || n.Lost:
		return refuse("node %s is a member already", r.Name)
	case n.Address != r.Address:
		return refuse("node %s is a member already, at %s", r.Name, n.Address)
	case n.Witness && !r.Witness:
		return refuse("node %s is a member already, as a witness", r.Name)
	case r.Witness && !n.Witness:
		return refuse("node %s is a member already, and no witness", r.Name)
	}
	var e *control.Error
	info, err := b.newcomer(ctx, n.Name, n.Address)
	switch {
	case err == nil && info.RaftID != n.RaftID:
		return refuse("node %s is a member already, and runs with another data_dir now", r.Name)
	case errors.As(err, &e) && e.Code == control.CodeRefused:
		return err
	}
	return nil // one that gives no answer now is a member as well
}

// ReplaceNode implements control.Backend.
func (b backend) ReplaceNode(ctx context.Context, node string) (out control.ChangedNode, err error) {
	if err := b.ready(ctx); err != nil {
		return out, err
	}
	if err := b.checkNode(node); err != nil {
		return out, err
	}
	known := b.d.state().Nodes[ident.Node(node)]
	info, err := b.newcomer(ctx, known.Name, known.Address)
	if err != nil {
		return out, err
	}
	if info.RaftID == known.RaftID && !known.Lost && lastChange(b.d.state(), known.Name) == eventReplaced {
		out.Already = true // perhaps by this very command, whose answer was lost
		return out, nil
	}
	if info.RaftID == known.RaftID {
		return out, control.Errorf(control.CodeRefused, "to resync one of its replicas: blockstep invalidate VOLUME --node "+node, "%s runs with the data directory that the cluster knows: there is nothing to replace", node)
	}
	out.Already, err = b.changeMember(ctx, memberCall{Verb: "replace", Name: known.Name, RaftID: info.RaftID})
	return out, err
}

// DrainNode implements control.Backend. It moves the primaries away, then each
// replica for which another node has room. It takes as long as copying does; a
// drain that is cut off goes on when it is asked for again.
func (b backend) DrainNode(ctx context.Context, node string) error {
	if err := b.ready(ctx); err != nil {
		return err
	}
	if err := b.checkNode(node); err != nil {
		return err
	}
	n := ident.Node(node)
	var left, small, down []string
	for _, sv := range b.d.state().Live() {
		if sv.Primary == n {
			if err := b.d.moveAway(ctx, sv, n); err != nil {
				return err
			}
		}
		if sv.Replica(n) == nil {
			continue
		}
		moved, without, err := b.d.moveReplica(ctx, sv.ID, n)
		if err != nil {
			return err
		}
		if !moved {
			left = append(left, sv.Name)
			small = append(small, without...)
			down = append(down, slices.DeleteFunc(b.d.downWithout(sv), func(m string) bool { return m == node })...)
		}
	}
	if len(small) > 0 {
		last := &left[len(left)-1]
		*last += " (" + strings.Join(slices.Compact(small), ", ") + ")"
	}
	if len(left) > 0 {
		return nowhereTo(node, left, down, len(small) > 0)
	}
	return nil
}

// nowhereTo says which replicas a drain leaves where they are; down are nodes that could
// take some, and are not up, and small is whether one that is up had too little room.
func nowhereTo(node string, left, down []string, small bool) error {
	why, first := "no other node that is up is without a replica of ", "add a node that takes the replicas (blockstep node add)"
	switch {
	case small && len(down) > 0:
		why = "no other node that is up has room for its replicas of "
	case small:
		why = "no other node has room for its replicas of "
	}
	why += strings.Join(left, ", ")
	if slices.Sort(down); len(down) > 0 {
		names := strings.Join(slices.Compact(down), ", ")
		why += "; not up: " + names
		first = "start blockstepd on " + names + ", or " + first + ","
	}
	return control.Errorf(control.CodeRefused, "it is safe to stop the node for maintenance; to remove it, "+first+" and drain again, or go on with fewer copies: stop it, then blockstep node remove "+node+" --force",
		"%s is primary of nothing any more, but %s", node, why)
}

// moveAway switches a volume over to any other in-sync replica.
func (d *Daemon) moveAway(ctx context.Context, sv *state.Volume, from ident.Node) error {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	last := errors.New("no other replica is in sync")
	for _, to := range heirsOf(sv, d.state().Primaries()) {
		if last = d.switchover(ctx, sv.ID, to); last == nil {
			return nil
		}
	}
	code, next := control.CodeFailed, "see blockstep status "+sv.Name
	if len(sv.Replicas) == 1 {
		next = fmt.Sprintf("give it a second one: blockstep volume set %s --replicas 2; when that is in sync (blockstep wait %[1]s --for healthy) drain again", sv.Name)
	}
	if e := (*control.Error)(nil); errors.As(last, &e) {
		code, next, last = e.Code, e.Next, errors.New(e.Message)
	}
	return control.Errorf(code, next, "the primary of %s stays on %s: %v", sv.Name, from, last)
}

// moveReplica gives a volume a replica on another node in the place of the one
// on from. The old one goes only when the new one is in sync, so there are never
// fewer good copies than before. It reports false when no node has room, and which
// have too little. A new one that fails is taken away again.
func (d *Daemon) moveReplica(ctx context.Context, id ident.Volume, from ident.Node) (moved bool, without []string, err error) {
	sv := d.state().Volumes[id]
	to := joining(d.state(), sv, from)
	if to == "" {
		to = filled(d.state(), sv, from)
	}
	if to == "" || !d.nodeUp(to) {
		if to, without = d.placeFor(ctx, sv); to == "" {
			return false, without, nil
		}
		res, err := d.addReplica(ctx, id, to, 0)
		if err == nil && !res.OK {
			err = deletedMeanwhile(sv, d.refusal(res.Err()))
		}
		if err != nil {
			return false, nil, err
		}
		if _, err := d.applyWhole(ctx, state.Command{AddEvent: &state.AddEvent{Event: moves(sv.Name, from, to)}}); err != nil {
			return false, nil, err
		}
	}
	why, err := d.awaitFilled(ctx, id, to)
	if why != "" {
		_, err := d.applyWhole(ctx, state.Command{RemoveReplica: &state.RemoveReplica{Volume: id, Node: to}})
		if err != nil {
			return false, nil, fmt.Errorf("the new replica of %s on %s failed (%s), and cannot be taken away again: %w", sv.Name, to, why, err)
		}
		return false, nil, control.Errorf(control.CodeFailed, fmt.Sprintf("see to the disk of %s, or add a node that takes the replicas (blockstep node add), then drain again", to),
			"the new replica of %s on %s failed, and was taken away again: %s; nothing else has changed: the one on %s is there", sv.Name, to, why, from)
	}
	if err != nil {
		return false, nil, fmt.Errorf("the new replica of %s on %s is not in sync yet: %w", sv.Name, to, err)
	}
	if _, err := d.applyWhole(ctx, state.Command{RemoveReplica: &state.RemoveReplica{Volume: id, Node: from}}); err != nil {
		return false, nil, err
	}
	err = d.awaitVolume(ctx, id, func(v *state.Volume) bool { return v.Replica(from) == nil })
	return err == nil, nil, err
}

const (
	// fillLook is how often a new replica that is waited for is looked at.
	fillLook = time.Second
	// fillFails is how long it may be in want of something that may come by itself
	// until it counts as failed.
	fillFails = 4 * time.Second
)

// awaitFilled waits until a new replica is in sync. why is the reason, when it has
// failed meanwhile.
func (d *Daemon) awaitFilled(ctx context.Context, id ident.Volume, to ident.Node) (why string, err error) {
	var since time.Time // of trouble; zero while there is none
	for {
		look, cancel := context.WithTimeout(ctx, fillLook)
		err := d.awaitVolume(look, id, func(v *state.Volume) bool {
			r := v.Replica(to)
			return v.InSet(to) || r == nil || r.Failed
		})
		cancel()
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			return "", err
		}
		sv := d.state().Volumes[id]
		if sv == nil || sv.InSet(to) {
			return "", nil
		}
		if sv.Replica(to) == nil {
			return "", errors.New("it was removed meanwhile")
		}
		why, final := trouble(sv.Replica(to), d.reportOf(ctx, to, id))
		switch {
		case why == "":
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
		}
		if why != "" && (final || time.Since(since) >= fillFails) {
			return why, nil
		}
		if err == nil && !pause(ctx, fillLook) { // it is not that nothing has changed: do not spin
			return "", ctx.Err()
		}
	}
}

// trouble is why a new replica will not be in sync; final says that this does not end
// by itself.
func trouble(rep *state.Replica, r volumeReport) (why string, final bool) {
	switch {
	case rep.Failed && rep.Reason != invalidReason && !strings.HasPrefix(rep.Reason, replacedReason):
		return rep.Reason, true
	case r.Reached && r.Replica && r.Core.Role == core.RoleFailed:
		return r.Core.Reason, false
	case r.Reached && !r.Replica:
		return r.Problem, false
	}
	return "", false
}

// eventMoves says for whose place a drain has added a replica. It is an event so that
// a drain that was cut off knows its own, and so does a release before (adr/0019).
const (
	eventMoves = "replica-moves"
	fieldFrom  = "from"
)

func moves(volume string, from, to ident.Node) state.Event {
	return state.Event{
		Name: eventMoves, Volume: volume, Node: to, Fields: map[string]string{fieldFrom: string(from)},
		Text: fmt.Sprintf("volume %s: the replica on %s is to take the place of the one on %s, which is drained", volume, to, from),
	}
}

// stays says of a replica that a drain has added that it is one of as many as were asked
// for since: no drain takes another one away for it.
func stays(volume string, node ident.Node) state.Event {
	return state.Event{
		Name: eventMoves, Volume: volume, Node: node, Fields: map[string]string{fieldFrom: string(node)},
		Text: fmt.Sprintf("volume %s: the replica on %s, which a drain had added, stays beside the others", volume, node),
	}
}

// joining is a replica that was added for from's place and has never been in sync: by a
// drain that was cut off, which goes on with it. One that was added as one more, or for
// another's place, is none: there would be a copy fewer than was asked for. Nor is one
// that was a member before and is away or on its way back.
func joining(st *state.State, sv *state.Volume, from ident.Node) ident.Node {
	for _, r := range sv.Replicas {
		if r.Node == from || sv.InSet(r.Node) || r.Failed {
			continue
		}
		if of, ok := filling(st, sv.Name, r.Node); ok && of == from {
			return r.Node
		}
	}
	return ""
}

// filled is a replica that was added for from's place and is in sync by now: of a drain that
// was cut off meanwhile, which has only from's to take away.
func filled(st *state.State, sv *state.Volume, from ident.Node) ident.Node {
	var other []ident.Node // of which something newer is known
	for i := len(st.Events) - 1; i >= 0; i-- {
		e := &st.Events[i]
		switch {
		case e.Volume != sv.Name:
		case e.Name == "volume-created", e.Name == "replica-added" && e.Node == from:
			return "" // what is older is of another volume, or of a replica that was there before
		case slices.Contains(other, e.Node):
		case e.Name == eventMoves && e.Fields[fieldFrom] == string(from) && e.Node != from:
			if r := sv.Replica(e.Node); r != nil && sv.InSet(e.Node) && !r.Failed && !r.Leaving {
				return e.Node
			}
		case e.Name == eventMoves, e.Name == "replica-added":
			other = append(other, e.Node)
		}
	}
	return ""
}

// moving is a replica that a drain is about to move, and where to.
func moving(st *state.State, sv *state.Volume) (from, to ident.Node, ok bool) {
	for _, r := range sv.Replicas {
		if to = joining(st, sv, r.Node); to != "" {
			return r.Node, to, true
		}
	}
	return "", "", false
}

// filling reports whether the events tell that a replica was added to a volume, and not
// that it has been in sync since; from is the one for whose place a drain has added it.
func filling(st *state.State, volume string, node ident.Node) (from ident.Node, ok bool) {
	for i := len(st.Events) - 1; i >= 0; i-- {
		e := &st.Events[i]
		switch {
		case e.Volume != volume:
		case e.Name == eventMoves && e.Node == node && from == "":
			from = ident.Node(e.Fields[fieldFrom])
		case e.Name == "replica-added" && e.Node == node:
			return from, true
		case e.Name == "set-changed" && slices.Contains(strings.Fields(strings.Trim(e.Fields["to"], "[]")), string(node)):
			return "", false
		case e.Name == "volume-created":
			return "", false // what is older is of another one of that name
		}
	}
	return "", false
}

// awaitVolume waits until the cluster state of a volume is as asked.
func (d *Daemon) awaitVolume(ctx context.Context, id ident.Volume, holds func(*state.Volume) bool) error {
	ok := d.until(ctx, func(s *state.State) bool {
		v := s.Volumes[id]
		return v == nil || v.Deleted || holds(v)
	})
	if !ok {
		return ctx.Err()
	}
	if v := d.state().Volumes[id]; v == nil || v.Deleted {
		return control.Errorf(control.CodeNotFound, "", "the volume was deleted meanwhile")
	}
	return nil
}
