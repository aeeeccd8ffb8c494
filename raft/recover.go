package raft

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/raft/state"
)

// ErrNoState is returned by Recover for a data_dir without cluster state.
var ErrNoState = errors.New("there is no cluster state to recover from")

// errPreview ends a recovery before anything is written.
var errPreview = errors.New("only a look")

// Recovery is a recovery from a lost majority, of one data_dir whose daemon is
// stopped. The nodes of Keep, and no others, are the Raft group from then on.
type Recovery struct {
	Dir     string // data_dir
	Cluster string
	Node    ident.Node
	Keep    []ident.Node // Node among them; each runs the same recovery
	Preview bool         // only look what it would do
	Logger  *slog.Logger
	FS      vfs.FS
}

// Recovered says what a recovery did, or would do.
type Recovered struct {
	State *state.State // from which the node goes on
	Index uint64       // of the last entry of its Raft log: the higher, the newer its state
}

// Recover writes a snapshot in which Keep is the Raft group, and empties the
// Raft log: hashicorp/raft's RecoverCluster. Every entry of the log counts as
// committed, also one that the lost majority never had; what only the lost
// nodes had is gone. A crash in the middle leaves the old state or the new one.
func Recover(r Recovery) (out Recovered, err error) {
	if r.Logger == nil {
		r.Logger = slog.New(slog.DiscardHandler)
	}
	if r.FS == nil {
		r.FS = vfs.OS()
	}
	if !slices.Contains(r.Keep, r.Node) {
		return out, fmt.Errorf("node %s is not among those that are kept, %v", r.Node, r.Keep)
	}
	id, err := readIdentity(r.FS, filepath.Join(r.Dir, identityFile))
	if err != nil {
		return out, fmt.Errorf("%w in %s: %w", ErrNoState, r.Dir, err)
	}
	if err := id.check(r.Dir, r.Cluster, r.Node); err != nil {
		return out, err
	}
	bolt, err := openBolt(r.Dir)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, bolt.Close()) }()
	dir := filepath.Join(r.Dir, raftDir)
	hlog := newHclog(r.Logger)
	snaps, err := hraft.NewFileSnapshotStoreWithLogger(dir, snapshotsKept, hlog)
	if err != nil {
		return out, fmt.Errorf("open snapshots in %s: %w", dir, err)
	}
	// What the group is can only be known when the state is read: so twice.
	look := &recoverFSM{fsm: newFSM(), keep: r.Keep, preview: true}
	if err := recoverInto(look, id.RaftID, bolt, snaps, hlog, hraft.Configuration{
		Servers: []hraft.Server{{ID: hraft.ServerID(id.RaftID), Address: serverAddress(id.RaftID, "preview")}},
	}); !errors.Is(look.err, errPreview) {
		if look.err != nil {
			err = look.err // the other one says it once more
		}
		return out, err
	}
	if out.Index, err = lastIndex(bolt, snaps); err != nil {
		return out, err
	}
	out.State = look.next
	before := look.cur.Load().ClusterID
	if id.ClusterID != "" && id.ClusterID != before {
		return out, id.foreign(r.Dir, before)
	}
	if r.Preview {
		return out, nil
	}
	if before != out.State.ClusterID {
		// After a crash in the middle the state, the old one or the new, names it
		// when the node starts.
		unnamed := *id
		unnamed.ClusterID = ""
		if err := writeIdentity(r.FS, r.Dir, &unnamed); err != nil {
			return out, err
		}
	}
	var group hraft.Configuration
	for _, name := range r.Keep {
		n := look.next.Nodes[name]
		group.Servers = append(group.Servers, hraft.Server{ID: hraft.ServerID(n.RaftID), Address: serverAddress(n.RaftID, n.Address)})
	}
	if err := recoverInto(&recoverFSM{fsm: newFSM(), keep: r.Keep}, id.RaftID, bolt, snaps, hlog, group); err != nil {
		return out, fmt.Errorf("recover the cluster state: %w", err)
	}
	named := *id
	named.ClusterID = out.State.ClusterID
	return out, writeIdentity(r.FS, r.Dir, &named)
}

func newFSM() *fsm {
	f := &fsm{changed: func() {}, halt: func(error) {}}
	f.cur.Store(state.New())
	return f
}

func recoverInto(f *recoverFSM, raftID string, bolt *raftboltdb.BoltStore, snaps hraft.SnapshotStore, hlog hclog.Logger, group hraft.Configuration) error {
	cfg := hraft.DefaultConfig()
	cfg.LocalID, cfg.Logger, cfg.NoLegacyTelemetry = hraft.ServerID(raftID), hlog, true
	// Only its encoding of addresses is used.
	_, trans := hraft.NewInmemTransport("")
	defer func() { _ = trans.Close() }() // it is in memory
	return hraft.RecoverCluster(cfg, f, bolt, bolt, snaps, trans, group)
}

func lastIndex(logs hraft.LogStore, snaps hraft.SnapshotStore) (uint64, error) {
	last, err := logs.LastIndex()
	if err != nil {
		return 0, fmt.Errorf("read the Raft log: %w", err)
	}
	list, err := snaps.List()
	if err != nil {
		return 0, fmt.Errorf("list the Raft snapshots: %w", err)
	}
	for _, s := range list {
		last = max(last, s.Index)
	}
	return last, nil
}

// recoverFSM is the state machine of a recovery: what it gives as its snapshot
// is the recovered state.
type recoverFSM struct {
	*fsm
	keep    []ident.Node
	preview bool
	next    *state.State
	err     error // of Snapshot
}

// Snapshot hands over the recovered state.
func (f *recoverFSM) Snapshot() (hraft.FSMSnapshot, error) {
	if f.err = f.stopped(); f.err != nil {
		return nil, f.err
	}
	if f.next, f.err = f.cur.Load().Recovered(f.keep); f.err != nil {
		return nil, f.err
	}
	if f.preview {
		f.err = errPreview
		return nil, f.err
	}
	return &snapshot{f.next}, nil
}
