package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

const (
	// tokenPrefix tells a join token from other secrets, and its version.
	tokenPrefix = "bsj1."
	// tokenLifeMax keeps a forgotten one from being good for ever.
	tokenLifeMax = 30 * 24 * time.Hour
	// invitationsMax bounds the tokens that wait to be used.
	invitationsMax = 64
	// joinEvery is how often a node that has a token asks to be let in.
	joinEvery = time.Second
	// joinTime bounds one such question: the answer waits for a change of the
	// members.
	joinTime = changeTime + 5*time.Second
)

// invite makes a token for a node that is to join by itself. What it stands for
// is in the cluster state, so that any member lets the node in.
func (b backend) invite(ctx context.Context, r control.AddNode) (control.AddedNode, error) {
	out := control.AddedNode{Name: r.Name, Address: r.Address, Witness: r.Witness}
	life := time.Duration(r.TokenSeconds) * time.Second
	if life <= 0 || life > tokenLifeMax {
		return out, control.Errorf(control.CodeUsage, fmt.Sprintf("allowed are 1s to %v", tokenLifeMax), "a token cannot be good for %v", life)
	}
	now := time.Now()
	open := 0
	for _, i := range b.d.state().Invitations() {
		if i.Expires > now.UnixNano() && i.Name != ident.Node(r.Name) {
			open++
		}
	}
	if open >= invitationsMax {
		return out, control.Errorf(control.CodeRefused, "use them, or wait until they expire", "%d join tokens wait to be used", open)
	}
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	token, expires := tokenPrefix+rand.Text(), now.Add(life)
	i := state.Invitation{Name: ident.Node(r.Name), Address: r.Address, Witness: r.Witness, Expires: expires.UnixNano()}
	if _, err := b.d.applyWhole(ctx, i.Command(token, expires.UTC().Format(time.RFC3339))); err != nil {
		return out, err
	}
	out.Token, out.Expires = token, &expires
	return out, nil
}

// invitation judges a token that node shows.
func invitation(st *state.State, token string, node ident.Node, now time.Time) (state.Invitation, error) {
	for _, i := range st.Invitations() {
		switch {
		case !i.IsFor(token):
		case i.Name != node:
			return i, control.Errorf(control.CodeRefused, "", "the token is for node %s", i.Name)
		case now.UnixNano() > i.Expires:
			return i, control.Errorf(control.CodeRefused, "", "the token has expired at %s", time.Unix(0, i.Expires).UTC().Format(time.RFC3339))
		default:
			return i, nil
		}
	}
	return state.Invitation{}, control.Errorf(control.CodeNotFound, "", "the token is not known")
}

// joinCall is a node that asks to be let in.
type joinCall struct {
	RaftID string `json:"raft_id"`
	Token  string `json:"token"`
}

// serveJoin lets a node in that shows a token. Asked again, it answers the same:
// the first answer may have been lost.
func (d *Daemon) serveJoin(ctx context.Context, from ident.Node, c joinCall) (struct{}, error) {
	st := d.state()
	if n := st.Nodes[from]; n != nil && n.RaftID == c.RaftID {
		return struct{}{}, nil
	}
	inv, err := invitation(st, c.Token, from, time.Now())
	if err != nil {
		return struct{}{}, err
	}
	_, err = backend{d}.changeMember(ctx, memberCall{Verb: "add", Name: from, Address: inv.Address, RaftID: c.RaftID, Witness: inv.Witness, Invitation: inv.ID})
	if err != nil {
		return struct{}{}, err
	}
	d.log.Info("a node joined with its token", "joined", from, "address", inv.Address)
	return struct{}{}, nil
}

// judgeInvitation is the Raft leader's word on an invitation: the node that was
// shown the token may be behind. joined: it has let the node in already, by a
// call whose outcome was not known.
func (d *Daemon) judgeInvitation(ctx context.Context, c memberCall) (joined bool, err error) {
	if err := d.raft.Barrier(ctx); err != nil {
		return false, err
	}
	st := d.state()
	if n := st.Nodes[c.Name]; n != nil && n.RaftID == c.RaftID {
		return true, nil
	}
	if !slices.ContainsFunc(st.Invitations(), func(i state.Invitation) bool { return i.ID == c.Invitation }) {
		return false, control.Errorf(control.CodeRefused, "", "the token of node %s was used, or a newer one took its place", c.Name)
	}
	return false, nil
}

// runJoin shows this node's token to the others until it is a member. What they
// say is kept for whoever asks this node how it is.
func (d *Daemon) runJoin(ctx context.Context) {
	said := ""
	for !d.raft.Founding().Done && d.state().ClusterID == "" {
		err := d.join(ctx)
		if err == nil {
			d.log.Info("joined the cluster with a token")
			return
		}
		d.joining.Store(&err)
		if said != err.Error() && ctx.Err() == nil {
			said = err.Error()
			d.log.Error("not joined yet", "err", err)
		}
		if !pause(ctx, joinEvery) {
			return
		}
	}
}

// join asks the other nodes of the configuration, one after the other. One that
// is behind, or of a release before, does not know the token.
func (d *Daemon) join(ctx context.Context) error {
	var silent []string
	c := joinCall{RaftID: d.raft.RaftID(), Token: d.cfg.Join.Token}
	for _, n := range d.cfg.Nodes {
		if n.Name == d.cfg.Node {
			continue
		}
		err := d.joinAt(ctx, n, c)
		var e *control.Error
		switch {
		case err == nil:
			return nil
		case errors.As(err, &e) && e.Code == control.CodeNotFound:
		case errors.As(err, &e):
			return control.Errorf(e.Code, d.newToken(), "%s does not let node %s join: %s", n.Name, d.self, e.Message)
		default:
			silent = append(silent, n.Name)
		}
	}
	if len(silent) > 0 {
		slices.Sort(silent)
		return control.Errorf(control.CodeFailed, d.newToken(), "no node that answers knows the join token, and %s gave no answer", strings.Join(silent, ", "))
	}
	return control.Errorf(control.CodeRefused, d.newToken(), "no node knows the join token: it is wrong, was used, or a newer one for this node took its place")
}

func (d *Daemon) joinAt(ctx context.Context, n config.Node, c joinCall) error {
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	return d.rpc.callAddress(ctx, ident.Node(n.Name), n.Address, "/node/v1/join", c, nil)
}

func (d *Daemon) newToken() string {
	return fmt.Sprintf("make a new one on a member: blockstep node add %s --address %s --token", d.self, d.cfg.Self().Address)
}
