package raft

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// Founding: all nodes start with empty data_dirs from the same configuration,
// in any order, any of them late, with no other step. Each writes its Raft id
// durably and tells it to whoever asks. The founder with the lowest name, once
// it has heard *all* founders, and none of them knows of a cluster, bootstraps
// with exactly those ids; the leader then reaches the others. Nobody else ever
// bootstraps, and nobody does who has heard of a cluster. DESIGN.md goes through
// the crashes between the steps.

// FoundInfo is a node's answer about founding.
type FoundInfo struct {
	Node      ident.Node `json:"node"`
	RaftID    string     `json:"raft_id"`
	Cluster   string     `json:"cluster"`    // name
	ClusterID string     `json:"cluster_id"` // "" before it is known
	Founded   bool       `json:"founded"`    // it has Raft state: a cluster was founded
	Members   []string   `json:"members"`    // Raft ids of the configuration it knows
	// Addresses are those of Members, in their order; null from a release that does
	// not tell.
	Addresses []string `json:"addresses"`
	Founders  []string `json:"founders"` // NAME@ADDRESS of its configuration, sorted
	// Witnesses are the names of those of them that store nothing, sorted; null from
	// a release that does not tell.
	Witnesses []string `json:"witnesses"`
}

// ErrDisagrees is returned (wrapped) by Peers.Founding when the other node has
// answered, and its configuration and ours are not of one cluster.
var ErrDisagrees = errors.New("its configuration is another one")

// Peers asks another node about founding, over whatever the daemon speaks
// between nodes.
type Peers interface {
	Founding(ctx context.Context, node ident.Node, address string) (FoundInfo, error)
}

// FoundingStatus says how far this node is.
type FoundingStatus struct {
	Done    bool       // it is a member, or was one at the start
	Refused error      // it cannot become one without an operator
	Waiting string     // for the operator: what it waits for
	For     ident.Node // whom it waits for, the first one
	Next    string     // what to do about it; "": start the nodes
}

const (
	foundingEvery = 250 * time.Millisecond // between rounds of questions
	foundingAsk   = 2 * time.Second        // deadline of one question
)

// FoundInfo is what this node answers to Peers.Founding.
func (n *Node) FoundInfo() FoundInfo {
	n.idMu.Lock()
	id := *n.identity
	done := n.founding.Done
	n.idMu.Unlock()
	info := FoundInfo{
		Node: id.Node, RaftID: id.RaftID, Cluster: id.Cluster, ClusterID: n.ClusterID(),
		Founders: n.founderList(), Witnesses: n.witnesses(),
	}
	info.Members, info.Addresses = n.memberAddresses()
	info.Founded = done || len(info.Members) > 0 || len(id.Founding) > 0 || id.ClusterID != ""
	return info
}

// Founding says how far this node is in becoming a member.
func (n *Node) Founding() FoundingStatus {
	n.idMu.Lock()
	defer n.idMu.Unlock()
	return n.founding
}

func (n *Node) setFounding(s FoundingStatus) {
	n.idMu.Lock()
	old := n.founding
	n.founding = s
	n.idMu.Unlock()
	if old.Waiting == s.Waiting && old.Done == s.Done && (old.Refused == nil) == (s.Refused == nil) {
		return
	}
	switch {
	case s.Refused != nil:
		n.log.Error("this node is no member of the cluster", "err", s.Refused)
	case s.Done:
		n.log.Info("this node is a member of the cluster")
	default:
		n.log.Info("founding", "waiting", s.Waiting)
	}
	n.watch.wake()
}

// members lists the Raft ids of the configuration that this node knows.
func (n *Node) members() []string {
	ids, _ := n.memberAddresses()
	return ids
}

// memberAddresses lists the Raft ids of the configuration that this node knows, and
// the address of each.
func (n *Node) memberAddresses() (ids, addresses []string) {
	f := n.raft.GetConfiguration()
	if f.Error() != nil {
		return nil, nil
	}
	for _, s := range f.Configuration().Servers {
		_, address := splitAddress(s.Address)
		ids, addresses = append(ids, string(s.ID)), append(addresses, address)
	}
	return ids, addresses
}

func (n *Node) founderList() []string {
	var out []string
	for _, f := range n.opts.Founders {
		out = append(out, fmt.Sprintf("%s@%s", f.Name, f.Address))
	}
	slices.Sort(out)
	return out
}

func (n *Node) witnesses() []string {
	out := []string{}
	for _, f := range n.opts.Founders {
		if f.Witness {
			out = append(out, string(f.Name))
		}
	}
	slices.Sort(out)
	return out
}

// beforeRaft looks at what the data_dir holds before raft starts. It ends a
// bootstrap that a crash cut off, and reports whether this node has Raft state.
func (n *Node) beforeRaft(cfg *hraft.Config, logs hraft.LogStore, stable hraft.StableStore, snaps hraft.SnapshotStore) (founded bool, err error) {
	has, err := hraft.HasExistingState(logs, stable, snaps)
	if err != nil {
		return false, fmt.Errorf("read the Raft log: %w", err)
	}
	last, err := logs.LastIndex()
	if err != nil {
		return false, fmt.Errorf("read the Raft log: %w", err)
	}
	list, err := snaps.List()
	if err != nil {
		return false, fmt.Errorf("list the Raft snapshots: %w", err)
	}
	empty := last == 0 && len(list) == 0
	if n.identity.ClusterID != "" && empty {
		return false, fmt.Errorf("data_dir %s was a member of cluster %s (%s) and has lost its Raft log: empty the data_dir, then run 'blockstep node replace %s' on another node",
			n.opts.Dir, n.identity.Cluster, n.identity.ClusterID, n.opts.Node)
	}
	if err := n.checkClusterID(logs, snaps, list); err != nil {
		return false, err
	}
	if len(n.identity.Founding) > 0 && empty {
		// The crash came between the mark and the end of the bootstrap. Nobody
		// has been contacted under this configuration: do it again. The term may
		// have been written before the entry, and would forbid it.
		if err := stable.SetUint64([]byte("CurrentTerm"), 0); err != nil {
			return false, fmt.Errorf("write the Raft log: %w", err)
		}
		if err := hraft.BootstrapCluster(cfg, logs, stable, snaps, n.trans, configurationOf(n.identity.Founding)); err != nil {
			return false, fmt.Errorf("bootstrap: %w", err)
		}
		has = true
	}
	founded = has && !empty || len(n.identity.Founding) > 0
	if founded {
		n.founding = FoundingStatus{Done: true}
	}
	return founded, nil
}

func configurationOf(servers []foundingServer) hraft.Configuration {
	var c hraft.Configuration
	for _, s := range servers {
		c.Servers = append(c.Servers, hraft.Server{ID: hraft.ServerID(s.RaftID), Address: serverAddress(s.RaftID, s.Address)})
	}
	return c
}

// runFounding asks the other founders until this node is a member.
func (n *Node) runFounding() {
	defer n.wg.Done()
	for {
		if slices.Contains(n.members(), n.RaftID()) {
			n.setFounding(FoundingStatus{Done: true})
			return
		}
		s, err := n.foundingRound()
		if err != nil {
			s.Waiting = err.Error()
			n.log.Error("founding failed, it is tried again", "err", err)
		}
		n.setFounding(s)
		if s.Done || !pause(n.ctx, foundingEvery) {
			return
		}
	}
}

// RaftID is this node's name and random id.
func (n *Node) RaftID() string {
	n.idMu.Lock()
	defer n.idMu.Unlock()
	return n.identity.RaftID
}

// foundingRound asks everyone once and does what follows.
func (n *Node) foundingRound() (FoundingStatus, error) {
	infos, silent, unfit := n.askFounders()
	if s, ok := n.judgeFounded(infos); ok {
		return s, nil
	}
	first := slices.Min(founderNames(n.opts.Founders))
	isFounder := slices.Contains(founderNames(n.opts.Founders), n.opts.Node)
	switch {
	case !isFounder:
		return FoundingStatus{Waiting: fmt.Sprintf("this node is not among the founding nodes: run 'blockstep node add %s --address %s' on a member", n.opts.Node, n.opts.Address)}, nil
	case len(unfit) > 0:
		// To start the others would not help.
		return FoundingStatus{
			For: unfit[0].node, Waiting: fmt.Sprintf("%s does not fit: %v", unfit[0].node, unfit[0].err),
			Next: "correct cluster or nodes in one of the configurations (they are the same on each node), then start that node again",
		}, nil
	case len(silent) > 0:
		// The lowest founder waits for all; the others wait with it, and say
		// for whom the founding waits.
		return FoundingStatus{For: silent[0], Waiting: fmt.Sprintf("founding needs all nodes once; no answer yet from %s", joinNodes(silent))}, nil
	case first != n.opts.Node:
		return FoundingStatus{For: first, Waiting: fmt.Sprintf("%s founds the cluster: waiting for it", first)}, nil
	}
	if err := n.bootstrap(infos); err != nil {
		return FoundingStatus{}, err
	}
	return FoundingStatus{Done: true}, nil
}

func founderNames(fs []Founder) []ident.Node {
	out := make([]ident.Node, 0, len(fs))
	for _, f := range fs {
		out = append(out, f.Name)
	}
	return out
}

func joinNodes(names []ident.Node) string {
	s := make([]string, len(names))
	for i, n := range names {
		s[i] = string(n)
	}
	return strings.Join(s, ", ")
}

// unfitNode is a founder whose answer does not go together with our configuration.
type unfitNode struct {
	node ident.Node
	err  error
}

// askFounders asks all others at once. silent are those that gave no answer, unfit
// those whose answer does not fit; both sorted.
func (n *Node) askFounders() (infos map[ident.Node]FoundInfo, silent []ident.Node, unfit []unfitNode) {
	type answer struct {
		from Founder
		info FoundInfo
		err  error
	}
	ctx, cancel := context.WithTimeout(n.ctx, foundingAsk)
	defer cancel()
	others := slices.DeleteFunc(slices.Clone(n.opts.Founders), func(f Founder) bool { return f.Name == n.opts.Node })
	ch := make(chan answer, len(others))
	for _, f := range others {
		go func() {
			info, err := n.opts.Peers.Founding(ctx, f.Name, f.Address)
			ch <- answer{f, info, err}
		}()
	}
	infos = map[ident.Node]FoundInfo{}
	for range others {
		a := <-ch
		if a.err == nil {
			a.err = n.fits(a.from.Name, a.info)
		}
		switch {
		case a.err == nil:
			infos[a.from.Name] = a.info
		case errors.Is(a.err, ErrDisagrees):
			unfit = append(unfit, unfitNode{a.from.Name, a.err})
		default:
			if !errors.Is(a.err, context.Canceled) {
				n.log.Debug("founding: no answer", "node", a.from.Name, "err", a.err)
			}
			silent = append(silent, a.from.Name)
		}
	}
	slices.Sort(silent)
	slices.SortFunc(unfit, func(a, b unfitNode) int { return strings.Compare(string(a.node), string(b.node)) })
	return infos, silent, unfit
}

// disagreement is an ErrDisagrees with a reason of its own.
type disagreement struct{ reason string }

func (d disagreement) Error() string        { return d.reason }
func (d disagreement) Is(target error) bool { return target == ErrDisagrees }

// fits says why the answer of a founder does not go together with our configuration.
func (n *Node) fits(name ident.Node, i FoundInfo) error {
	reason := ""
	switch {
	case i.Node != name:
		reason = fmt.Sprintf("it calls itself %q", i.Node)
	case i.Cluster != n.opts.Cluster:
		reason = fmt.Sprintf("it belongs to cluster %q, this node to %q", i.Cluster, n.opts.Cluster)
	case !i.Founded && !slices.Equal(i.Founders, n.founderList()):
		reason = fmt.Sprintf("its configuration names other nodes (%s) than this node's (%s)", strings.Join(i.Founders, ", "), strings.Join(n.founderList(), ", "))
	case !i.Founded && i.Witnesses != nil && !slices.Equal(i.Witnesses, n.witnesses()):
		reason = fmt.Sprintf("its configuration has other witnesses (%s) than this node's (%s)", strings.Join(i.Witnesses, ", "), strings.Join(n.witnesses(), ", "))
	}
	if reason == "" {
		return nil
	}
	return disagreement{reason}
}

// judgeFounded looks for a cluster among the answers: with one, this node is a
// member that the leader will reach, or it is refused. It never founds another.
func (n *Node) judgeFounded(infos map[ident.Node]FoundInfo) (FoundingStatus, bool) {
	own := n.RaftID()
	var founded []FoundInfo
	for _, i := range infos {
		if i.Founded {
			founded = append(founded, i)
		}
	}
	if len(founded) == 0 {
		return FoundingStatus{}, false
	}
	// A follower may know an old configuration: one that has us decides.
	for _, i := range founded {
		if slices.Contains(i.Members, own) {
			return FoundingStatus{For: i.Node, Waiting: "this node is a member: waiting for the Raft leader to reach it"}, true
		}
	}
	for _, i := range founded {
		for _, m := range i.Members {
			if NodeOf(m) == n.opts.Node {
				return FoundingStatus{Refused: fmt.Errorf("the data_dir %s is new, but %s says that cluster %s knows node %s with another one (%s): "+
					"it does not vote twice; run 'blockstep node replace %s' on another node", n.opts.Dir, i.Node, n.opts.Cluster, n.opts.Node, m, n.opts.Node)}, true
			}
		}
	}
	for _, i := range founded {
		if len(i.Members) > 0 {
			return FoundingStatus{Refused: fmt.Errorf("cluster %s was founded without node %s: run 'blockstep node add %s --address %s' on a member", n.opts.Cluster, n.opts.Node, n.opts.Node, n.opts.Address)}, true
		}
	}
	return FoundingStatus{For: founded[0].Node, Waiting: fmt.Sprintf("%s has begun to found the cluster: waiting for it", founded[0].Node)}, true
}

// bootstrap founds the cluster with exactly the ids that were heard.
func (n *Node) bootstrap(infos map[ident.Node]FoundInfo) error {
	var servers []foundingServer
	for _, f := range n.opts.Founders {
		id := n.RaftID()
		if f.Name != n.opts.Node {
			id = infos[f.Name].RaftID
		}
		if NodeOf(id) != f.Name {
			return fmt.Errorf("node %s gave the Raft id %q, which is not its own", f.Name, id)
		}
		servers = append(servers, foundingServer{RaftID: id, Address: f.Address})
	}
	n.idMu.Lock()
	marked := *n.identity
	marked.Founding = servers
	err := writeIdentity(n.fs, n.opts.Dir, &marked)
	if err == nil {
		n.identity = &marked
	}
	n.idMu.Unlock()
	if err != nil {
		return err
	}
	if err := n.raft.BootstrapCluster(configurationOf(servers)).Error(); err != nil && !errors.Is(err, hraft.ErrCantBootstrap) {
		return fmt.Errorf("bootstrap: %w", err)
	}
	n.log.Info("cluster founded", "cluster", n.opts.Cluster, "nodes", len(servers))
	return nil
}

// KnownAddress is where the cluster knows this node: "" when it is no member yet. It
// is what the others connect to, whatever the configuration says since.
func (n *Node) KnownAddress() string {
	f := n.raft.GetConfiguration()
	if f.Error() != nil {
		return ""
	}
	for _, s := range f.Configuration().Servers {
		if string(s.ID) == n.RaftID() {
			_, address := splitAddress(s.Address)
			return address
		}
	}
	return ""
}

// ClusterID is the id of the cluster that this node is a member of; "" before it
// is known. After a start raft applies its log only when a leader says how far: until
// then it is what the data_dir remembers.
func (n *Node) ClusterID() string {
	if id := n.State().ClusterID; id != "" {
		return id
	}
	n.idMu.Lock()
	defer n.idMu.Unlock()
	return n.identity.ClusterID
}

// markMember makes durable that this node belongs to the cluster. A cluster
// state of another cluster than the data_dir's is an error of which nothing can
// come but harm: two clusters would share a node's name and replicas.
func (n *Node) markMember(clusterID string) error {
	n.idMu.Lock()
	defer n.idMu.Unlock()
	if n.identity.ClusterID == clusterID {
		return nil
	}
	if n.identity.ClusterID != "" {
		return n.identity.foreign(n.opts.Dir, clusterID)
	}
	marked := *n.identity
	marked.ClusterID = clusterID
	if err := writeIdentity(n.fs, n.opts.Dir, &marked); err != nil {
		return err
	}
	n.identity = &marked
	return nil
}

// checkClusterID compares the identity with what lies in raft/, before anything
// runs. What a leader says later is compared when it has come (markMember).
func (n *Node) checkClusterID(logs hraft.LogStore, snaps hraft.SnapshotStore, list []*hraft.SnapshotMeta) error {
	if n.identity.ClusterID == "" {
		return nil
	}
	id, err := storedClusterID(logs, snaps, list)
	if err != nil || id == "" || id == n.identity.ClusterID {
		return err
	}
	return n.identity.foreign(n.opts.Dir, id)
}

// storedClusterID finds which cluster a Raft log is of: "" when it does not say.
// The newest snapshot has it, and before there is one, the first command.
func storedClusterID(logs hraft.LogStore, snaps hraft.SnapshotStore, list []*hraft.SnapshotMeta) (string, error) {
	if len(list) > 0 {
		_, r, err := snaps.Open(list[0].ID)
		if err != nil {
			return "", nil //nolint:nilerr // hashicorp/raft takes an older one, or says what is wrong
		}
		defer func() { _ = r.Close() }() // it was only read
		b, err := io.ReadAll(io.LimitReader(r, snapshotMax))
		if err != nil {
			return "", fmt.Errorf("read the Raft snapshot: %w", err)
		}
		if s, err := state.Decode(b); err == nil {
			return s.ClusterID, nil
		}
		return "", nil // of a newer build, or damaged: whoever restores it says so
	}
	first, err := logs.FirstIndex()
	if err != nil {
		return "", fmt.Errorf("read the Raft log: %w", err)
	}
	last, err := logs.LastIndex()
	if err != nil {
		return "", fmt.Errorf("read the Raft log: %w", err)
	}
	for i := first; i > 0 && i <= last; i++ {
		var l hraft.Log
		if err := logs.GetLog(i, &l); err != nil {
			return "", fmt.Errorf("read the Raft log: %w", err)
		}
		if l.Type != hraft.LogCommand {
			continue
		}
		// A later one is refused, so the first one counts.
		if c, err := state.DecodeCommand(l.Data); err == nil && c.InitCluster != nil {
			return c.InitCluster.ClusterID, nil
		}
	}
	return "", nil
}
