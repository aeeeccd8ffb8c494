package daemon

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
)

const (
	// tokenPrefix tells a join token from other secrets, and its version.
	tokenPrefix = "bsj1."
	// tokenLifeMax keeps a forgotten one from being good for ever.
	tokenLifeMax = 30 * 24 * time.Hour
	// invitationsMax bounds the tokens that wait to be used at a node.
	invitationsMax = 64
	// joinEvery is how often a node that has a token asks to be let in.
	joinEvery = time.Second
	// joinTime bounds one such question: the answer waits for a change of the
	// members.
	joinTime = changeTime + 5*time.Second
)

// invitation is what a join token stands for. It is in the memory of the daemon
// that made it: a token is made to be used soon, and once.
type invitation struct {
	node    control.AddNode
	expires time.Time
}

// invitations are the tokens of this node that are not used yet, by their hash:
// who reads the memory of a daemon does not get in with it.
type invitations struct {
	mu   sync.Mutex // guards what follows
	open map[[sha256.Size]byte]invitation
}

// add makes a token.
func (i *invitations) add(r control.AddNode, life time.Duration, now time.Time) (string, time.Time, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for h, inv := range i.open {
		if now.After(inv.expires) || inv.node.Name == r.Name {
			delete(i.open, h) // a newer one for a name takes the older one's place
		}
	}
	if len(i.open) >= invitationsMax {
		return "", time.Time{}, control.Errorf(control.CodeRefused, "use them, or wait until they expire", "%d join tokens wait to be used", len(i.open))
	}
	token := tokenPrefix + rand.Text()
	inv := invitation{node: r, expires: now.Add(life)}
	if i.open == nil {
		i.open = map[[sha256.Size]byte]invitation{}
	}
	i.open[sha256.Sum256([]byte(token))] = inv
	return token, inv.expires, nil
}

// find judges a token that node shows.
func (i *invitations) find(token string, node ident.Node, now time.Time) (invitation, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	inv, ok := i.open[sha256.Sum256([]byte(token))]
	switch {
	case !ok:
		return inv, control.Errorf(control.CodeNotFound, "", "the token is not known")
	case inv.node.Name != string(node):
		return inv, control.Errorf(control.CodeRefused, "", "the token is for node %s", inv.node.Name)
	case now.After(inv.expires):
		return inv, control.Errorf(control.CodeRefused, "", "the token has expired at %s", inv.expires.Format(time.RFC3339))
	}
	return inv, nil
}

// use ends a token.
func (i *invitations) use(token string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.open, sha256.Sum256([]byte(token)))
}

// invite makes a token for a node that is to join by itself.
func (b backend) invite(r control.AddNode) (control.AddedNode, error) {
	out := control.AddedNode{Name: r.Name, Address: r.Address, Witness: r.Witness}
	life := time.Duration(r.TokenSeconds) * time.Second
	if life <= 0 || life > tokenLifeMax {
		return out, control.Errorf(control.CodeUsage, fmt.Sprintf("allowed are 1s to %v", tokenLifeMax), "a token cannot be good for %v", life)
	}
	if b.d.state().Nodes[ident.Node(r.Name)] != nil {
		return out, control.Errorf(control.CodeRefused, "for a new data_dir of it: blockstep node replace "+r.Name, "node %s is a member already", r.Name)
	}
	var err error
	var expires time.Time
	out.Token, expires, err = b.d.invited.add(r, life, time.Now())
	out.Expires = &expires
	return out, err
}

// joinCall is a node that asks to be let in.
type joinCall struct {
	RaftID string `json:"raft_id"`
	Token  string `json:"token"`
}

// serveJoin lets a node in that shows a token of this one.
func (d *Daemon) serveJoin(ctx context.Context, from ident.Node, c joinCall) (struct{}, error) {
	inv, err := d.invited.find(c.Token, from, time.Now())
	if err != nil {
		return struct{}{}, err
	}
	err = backend{d}.changeMember(ctx, memberCall{Verb: "add", Name: from, Address: inv.node.Address, RaftID: c.RaftID, Witness: inv.node.Witness})
	if err != nil {
		return struct{}{}, err
	}
	d.invited.use(c.Token)
	d.log.Info("a node joined with its token", "joined", from, "address", inv.node.Address)
	return struct{}{}, nil
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

// join asks the other nodes of the configuration, one after the other. The one
// that made the token knows it; the others do not.
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
	return control.Errorf(control.CodeRefused, d.newToken(), "no node knows the join token: it is wrong, was used, or the daemon that made it was restarted")
}

func (d *Daemon) joinAt(ctx context.Context, n config.Node, c joinCall) error {
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	return d.rpc.callAddress(ctx, ident.Node(n.Name), n.Address, "/node/v1/join", c, nil)
}

func (d *Daemon) newToken() string {
	return fmt.Sprintf("make a new one on a member: blockstep node add %s --address %s --token", d.self, d.cfg.Self().Address)
}
