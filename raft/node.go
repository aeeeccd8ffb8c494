// Package raft is the control layer: the cluster state on hashicorp/raft, one
// group for the whole cluster, and the failover controller that runs on its
// leader. It knows nothing of blocks, and no client's write passes through it.
// DESIGN.md beside this file says why it is as it is.
//
// In this package "leader", "follower" and "term" are hashicorp/raft's words
// for the cluster state; a volume has a primary and an epoch.
package raft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/raft/state"
)

// ErrNotLeader is returned when a command is given to a node that is not the
// Raft leader. It comes as a *NotLeaderError, which says who is.
var ErrNotLeader = errors.New("not the Raft leader")

// ErrUnknownOutcome is returned when leadership was lost before a command was
// known to be committed: it may take effect or not. Sent again under the same
// ID it is answered as the first was.
var ErrUnknownOutcome = errors.New("the outcome is not known: ask again with the same command id")

// ErrShutdown is returned after Shutdown.
var ErrShutdown = errors.New("the cluster layer is shut down")

// NotLeaderError says who is the leader, as far as this node knows.
type NotLeaderError struct {
	Leader  ident.Node // "" when nobody is known
	Address string     // HOST:PORT
}

// Error names the leader.
func (e *NotLeaderError) Error() string {
	if e.Leader == "" {
		return "there is no Raft leader at the moment: a majority of the nodes must be up and connected"
	}
	return fmt.Sprintf("the Raft leader is %s at %s", e.Leader, e.Address)
}

// Is makes errors.Is(err, ErrNotLeader) true.
func (e *NotLeaderError) Is(target error) bool { return target == ErrNotLeader }

// Founder is a node of the configuration.
type Founder struct {
	Name    ident.Node
	Address string // HOST:PORT
	Witness bool
}

// Options configure a Node.
type Options struct {
	Dir      string     // data_dir: cluster.json and raft/ lie in it
	Node     ident.Node // own name; one of Founders, or a node that is to be added
	Cluster  string     // name
	Founders []Founder  // `nodes` of the configuration, the same on each node
	Address  string     // own HOST:PORT; "" takes it from Founders

	// Listener gives the connections that others dialled for Raft; Dial opens
	// one. The node closes the listener.
	Listener net.Listener
	Dial     func(ctx context.Context, address string) (net.Conn, error)
	Peers    Peers

	Logger *slog.Logger
	FS     vfs.FS // nil: the operating system's. Raft's own files are always there

	// Zero durations mean the defaults.
	HeartbeatTimeout   time.Duration // 700 ms: silence of the leader after which a follower stands
	ElectionTimeout    time.Duration // 700 ms: of one election
	LeaderLeaseTimeout time.Duration // 0.8 of HeartbeatTimeout, or all of one below 0.5 s: a leader that has no quorum for so long steps down
	StallTimeout       time.Duration // 5 s: a write to Raft's store that is out for longer counts as a hung disk
	CommitTimeout      time.Duration // 1 s: between messages to an idle follower (see runTell)
}

const (
	raftDir   = "raft"
	boltFile  = "raft.db"
	lockWait  = 2 * time.Second
	applyWait = 5 * time.Second // when the context has no deadline
	// transferWait is how long a leader that stops tries to hand over: it takes milliseconds.
	transferWait = time.Second
	// transferLook is how often it looks whether it leads still, should the news be lost.
	transferLook = 50 * time.Millisecond

	// The state is a few hundred KiB at most and is written whole: a snapshot
	// every thousand commands keeps the log, and so a restart, short.
	snapshotEvery   = 1024
	snapshotsKept   = 2
	trailingEntries = 1024
	logCacheEntries = 256

	// leaderPace is how much longer a leader's HeartbeatTimeout is than its
	// followers'. An interval of up to 0.4 of theirs still leaves them one to lose,
	// and is well within LeaderLeaseTimeout.
	leaderPace = 2
	// paceLeast is the shortest HeartbeatTimeout with which that is so: with a short one
	// a busy machine delays heartbeats by as much as they are apart.
	paceLeast = 500 * time.Millisecond
)

// Node is this node's part in the cluster state. Its methods may be called from
// several goroutines.
type Node struct {
	opts   Options
	log    *slog.Logger
	fs     vfs.FS
	fsm    *fsm
	watch  watchers
	raft   *hraft.Raft
	bolt   *raftboltdb.BoltStore
	trans  *hraft.NetworkTransport
	stream *boundStream
	disk   diskWatch

	ctx    context.Context // ends with Shutdown
	cancel context.CancelFunc
	wg     sync.WaitGroup

	idMu     sync.Mutex // guards identity and founding
	identity *identity
	founding FoundingStatus

	closeMu   sync.RWMutex // guards closed, and that nobody joins wg after it is set
	closed    bool
	closeOnce sync.Once
	closeErr  error
	haltOnce  sync.Once
	tell      chan struct{} // capacity 1: the followers should learn of a commit
	halted    chan struct{} // closed when a command could not be understood
}

// Open opens the data_dir (making it when it is empty), starts hashicorp/raft
// and, when no cluster is there yet, takes part in founding one. It returns
// before a leader is known; Founding says what it waits for.
func Open(ctx context.Context, o Options) (*Node, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.FS == nil {
		o.FS = vfs.OS()
	}
	if err := checkOptions(&o); err != nil {
		return nil, err
	}
	if err := vfs.MakeDir(o.FS, filepath.Join(o.Dir, raftDir)); err != nil {
		return nil, fileError(o.Dir, fmt.Errorf("make data_dir: %w", err))
	}
	id, err := loadIdentity(o.FS, o.Dir, o.Cluster, o.Node, o.Logger)
	if err != nil {
		return nil, err
	}
	n := &Node{opts: o, log: o.Logger, fs: o.FS, identity: id, halted: make(chan struct{}), tell: make(chan struct{}, 1)}
	n.ctx, n.cancel = context.WithCancel(context.WithoutCancel(ctx))
	n.fsm = &fsm{changed: n.watch.wake, halt: n.halt}
	n.fsm.cur.Store(state.New())
	if err := n.start(ctx); err != nil {
		n.cancel()
		if n.stream != nil {
			_ = n.trans.Close()
		}
		if n.bolt != nil {
			_ = n.bolt.Close()
		}
		return nil, err
	}
	return n, nil
}

func checkOptions(o *Options) error {
	if !state.ValidName(string(o.Node)) || !state.ValidName(o.Cluster) {
		return fmt.Errorf("node %q, cluster %q: names are letters, digits, '.', '_', '-', at most %d", o.Node, o.Cluster, state.NameMax)
	}
	if o.Listener == nil || o.Dial == nil || o.Peers == nil {
		return errors.New("raft: Listener, Dial and Peers are needed")
	}
	seen := map[ident.Node]bool{}
	for _, f := range o.Founders {
		if !state.ValidName(string(f.Name)) || f.Address == "" || seen[f.Name] {
			return fmt.Errorf("nodes: %q at %q: each node needs a valid name of its own and an address", f.Name, f.Address)
		}
		seen[f.Name] = true
		if f.Name == o.Node && o.Address == "" {
			o.Address = f.Address
		}
	}
	if o.Address == "" {
		return fmt.Errorf("node %q is not among the nodes of the configuration: add it, or correct 'node'", o.Node)
	}
	setDefault(&o.HeartbeatTimeout, 700*time.Millisecond)
	setDefault(&o.ElectionTimeout, 700*time.Millisecond)
	lease := o.HeartbeatTimeout
	if lease >= paceLeast {
		lease = lease * 4 / 5 // less than followers wait, and much more than heartbeats are apart
	}
	setDefault(&o.LeaderLeaseTimeout, lease)
	setDefault(&o.CommitTimeout, time.Second)
	setDefault(&o.StallTimeout, 5*time.Second)
	return nil
}

func setDefault(d *time.Duration, v time.Duration) {
	if *d == 0 {
		*d = v
	}
}

// start opens the stores and the transport and starts hashicorp/raft.
func (n *Node) start(ctx context.Context) error {
	o := &n.opts
	dir := filepath.Join(o.Dir, raftDir)
	hlog := newHclog(o.Logger)
	bolt, err := openBolt(o.Dir)
	if err != nil {
		return err
	}
	n.bolt = bolt
	if err := reserveBolt(o.Dir); err != nil {
		o.Logger.Warn("no room is set aside for the cluster state: on a full disk this node can take no part in a change", "dir", o.Dir, "err", err)
	}
	store := &watchedStore{BoltStore: bolt, watch: &n.disk}
	logs, err := hraft.NewLogCache(logCacheEntries, store)
	if err != nil {
		return fmt.Errorf("raft log cache: %w", err)
	}
	snaps, err := hraft.NewFileSnapshotStoreWithLogger(dir, snapshotsKept, hlog)
	if err != nil {
		return fmt.Errorf("open snapshots in %s: %w", dir, err)
	}
	// Neither library syncs the directory in which it makes its files.
	if err := n.fs.SyncDir(dir); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	n.stream = newBoundStream(ctx, o, n.identity.RaftID, o.Address, n.ClusterID)
	n.trans = hraft.NewNetworkTransportWithConfig(&hraft.NetworkTransportConfig{
		Stream: n.stream, MaxPool: 3, Timeout: ioTimeout, Logger: hlog,
	})
	cfg := hraft.DefaultConfig()
	cfg.LocalID = hraft.ServerID(n.identity.RaftID)
	cfg.Logger = hlog
	cfg.HeartbeatTimeout, cfg.ElectionTimeout = o.HeartbeatTimeout, o.ElectionTimeout
	cfg.LeaderLeaseTimeout, cfg.CommitTimeout = o.LeaderLeaseTimeout, o.CommitTimeout
	cfg.SnapshotThreshold, cfg.TrailingLogs = snapshotEvery, trailingEntries
	cfg.NoLegacyTelemetry = true

	founded, err := n.beforeRaft(cfg, logs, store, snaps)
	if err != nil {
		return err
	}
	n.raft, err = hraft.NewRaft(cfg, n.fsm, logs, store, snaps, n.trans)
	if err != nil {
		return fmt.Errorf("start raft: %w", err)
	}
	n.observe()
	n.wg.Add(3)
	go n.runDiskWatch()
	go n.runLeader()
	go n.runTell()
	if !founded {
		n.wg.Add(1)
		go n.runFounding()
	}
	return nil
}

// observe wakes the watchers when another node becomes leader.
func (n *Node) observe() {
	ch := make(chan hraft.Observation, 16)
	o := hraft.NewObserver(ch, false, func(o *hraft.Observation) bool {
		switch o.Data.(type) {
		case hraft.LeaderObservation, hraft.RaftState:
			return true
		}
		return false
	})
	n.raft.RegisterObserver(o)
	n.wg.Add(1)
	go n.runObserve(ch, o)
}

func (n *Node) runObserve(ch <-chan hraft.Observation, o *hraft.Observer) {
	defer n.wg.Done()
	defer n.raft.DeregisterObserver(o)
	for {
		select {
		case <-ch:
			n.pace()
			n.watch.wake()
		case <-n.ctx.Done():
			return
		}
	}
}

// pace has hashicorp/raft send heartbeats half as often while this node leads. It
// sends them each 1 to 2 tenths of HeartbeatTimeout, which is also the silence
// after which a follower stands: the former is the leader's own, so only a leader's
// is longer. Heartbeats are two thirds of what wakes an idle node.
func (n *Node) pace() {
	rc := n.raft.ReloadableConfig()
	rc.HeartbeatTimeout, rc.ElectionTimeout = n.opts.HeartbeatTimeout, n.opts.ElectionTimeout
	if n.IsLeader() && rc.HeartbeatTimeout >= paceLeast {
		rc.HeartbeatTimeout *= leaderPace
		rc.ElectionTimeout = max(rc.ElectionTimeout, rc.HeartbeatTimeout)
	}
	if err := n.raft.ReloadConfig(rc); err != nil {
		n.log.Error("raft: the pace of heartbeats could not be set", "err", err)
	}
}

// halt is called by the state machine when it must not go on: raft stops, and
// with it this node's vote and its leadership.
func (n *Node) halt(err error) {
	n.log.Error("the cluster state cannot go on at this node", "err", err)
	n.haltOnce.Do(func() { close(n.halted) })
	n.watch.wake()
}

// Halted is closed when this build cannot understand the cluster's log (Err
// says why): the daemon stops, and a newer build goes on from here.
func (n *Node) Halted() <-chan struct{} { return n.halted }

// Err is what stopped the cluster layer at this node, nil while it runs.
func (n *Node) Err() error { return n.fsm.stopped() }

// State is the cluster state as far as this node has applied it. It never
// changes; ask again for a newer one.
func (n *Node) State() *state.State { return n.fsm.cur.Load() }

// Leader names the Raft leader as far as this node knows; "" when nobody is.
func (n *Node) Leader() (name ident.Node, address string) {
	addr, id := n.raft.LeaderWithID()
	if id == "" {
		return "", ""
	}
	_, address = splitAddress(addr)
	return NodeOf(string(id)), address
}

// Term is hashicorp/raft's current term at this node: it rises with each
// election of a leader of the cluster state.
func (n *Node) Term() uint64 { return n.raft.CurrentTerm() }

// IsLeader reports whether this node is the Raft leader.
func (n *Node) IsLeader() bool { return n.raft.State() == hraft.Leader }

// Apply gives a command to the cluster, at the leader only, and waits until it
// is applied here. ID and Time are filled when they are empty. A refused command
// is no error: look at Result.Err. Errors: ErrNotLeader, ErrUnknownOutcome,
// ErrShutdown, or the context's (then the outcome is unknown as well).
func (n *Node) Apply(ctx context.Context, c state.Command) (state.Result, error) {
	if c.ID == "" {
		c.ID = NewCommandID()
	}
	if c.Time == 0 {
		c.Time = time.Now().UnixNano()
	}
	b, err := c.Encode()
	if err != nil {
		return state.Result{}, err
	}
	f := n.raft.Apply(b, timeLeft(ctx))
	if err := n.wait(ctx, f); err != nil {
		return state.Result{}, fmt.Errorf("%s: %w", c.Kind(), err)
	}
	switch r := f.Response().(type) {
	case state.Result:
		n.Tell()
		return r, nil
	case error:
		return state.Result{}, r
	}
	return state.Result{}, fmt.Errorf("%s: the state machine gave no result", c.Kind())
}

// Tell has the leader speak to its followers now: to one that has just started too,
// which hears of no commit before. At a follower it does nothing.
func (n *Node) Tell() {
	select {
	case n.tell <- struct{}{}:
	default:
	}
}

// runTell lets the followers learn of a commit at once. hashicorp/raft tells
// them with the next entry, or after CommitTimeout. A short CommitTimeout costs
// CPU for ever (three idle nodes on loopback, all that they do: 5.0 % of a core at
// 100 ms, 4.0 % at 1 s); an empty entry costs a few milliseconds, and only when
// there is news.
func (n *Node) runTell() {
	defer n.wg.Done()
	for {
		select {
		case <-n.tell:
		case <-n.ctx.Done():
			return
		}
		if err := n.raft.Barrier(applyWait).Error(); err != nil {
			n.log.Debug("raft: the followers learn of a commit later", "err", err)
		}
	}
}

// Barrier waits until everything that was committed before is applied here. It
// works at the leader only.
func (n *Node) Barrier(ctx context.Context) error { return n.wait(ctx, n.raft.Barrier(timeLeft(ctx))) }

// TransferLeadership hands Raft's leadership to another node, and returns when this one
// leads no more. It gives up after twice ElectionTimeout, since hashicorp/raft does after
// one.
func (n *Node) TransferLeadership(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*n.opts.ElectionTimeout)
	defer cancel()
	changed, stop := n.watch.add()
	defer stop()
	look := time.NewTicker(transferLook)
	defer look.Stop()
	// Its future is not waited for: one that comes when raft ends is never answered.
	_ = n.raft.LeadershipTransfer()
	for n.IsLeader() {
		select {
		case <-changed:
		case <-look.C:
		case <-n.ctx.Done():
			return ErrShutdown
		case <-ctx.Done():
			return fmt.Errorf("%w: nobody has taken the leadership over: %w", ErrUnknownOutcome, ctx.Err())
		}
	}
	return nil
}

func timeLeft(ctx context.Context) time.Duration {
	if d, ok := ctx.Deadline(); ok {
		return max(time.Until(d), time.Millisecond)
	}
	return applyWait
}

// wait waits for a future under a context and translates its error.
func (n *Node) wait(ctx context.Context, f hraft.Future) error {
	done := make(chan error, 1)
	n.closeMu.RLock()
	if n.closed {
		n.closeMu.RUnlock()
		return ErrShutdown
	}
	n.wg.Add(1)
	n.closeMu.RUnlock()
	go n.runWait(f, done)
	select {
	case err := <-done:
		return n.translate(err)
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrUnknownOutcome, ctx.Err())
	}
}

// runWait ends at the latest with raft's shutdown, which answers each future (but that
// of a leadership transfer).
func (n *Node) runWait(f hraft.Future, done chan<- error) {
	defer n.wg.Done()
	done <- f.Error()
}

func (n *Node) translate(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, hraft.ErrNotLeader), errors.Is(err, hraft.ErrLeadershipTransferInProgress), errors.Is(err, hraft.ErrEnqueueTimeout):
		name, address := n.Leader()
		if name == n.opts.Node {
			name, address = "", ""
		}
		return &NotLeaderError{Leader: name, Address: address}
	case errors.Is(err, hraft.ErrLeadershipLost), errors.Is(err, hraft.ErrAbortedByRestore):
		return fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	case errors.Is(err, hraft.ErrRaftShutdown):
		return ErrShutdown
	}
	return err
}

// Shutdown stops raft and waits for all that it started. The log keeps what was
// committed; a leader hands over first, so that no election timeout is lost.
func (n *Node) Shutdown() error {
	n.closeOnce.Do(func() {
		if n.IsLeader() && len(n.State().Nodes) > 1 {
			// To nodes that are gone too it would take until this one no longer leads: most of
			// HeartbeatTimeout.
			ctx, cancel := context.WithTimeout(n.ctx, min(n.opts.ElectionTimeout, transferWait))
			if err := n.TransferLeadership(ctx); err != nil {
				n.log.Debug("raft: leadership was not handed over", "err", err)
			}
			cancel()
		}
		n.closeMu.Lock()
		n.closed = true
		n.closeMu.Unlock()
		n.cancel()
		err := n.raft.Shutdown().Error()
		n.wg.Wait()
		n.watch.wake() // whoever follows the leader learns that it is not this one
		if terr := n.trans.Close(); err == nil {
			err = terr
		}
		if berr := n.bolt.Close(); err == nil {
			err = berr
		}
		n.closeErr = err
	})
	return n.closeErr
}
