package raft

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	hraft "github.com/hashicorp/raft"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
)

// identityFile says whose data_dir this is. docs/format/control.md.
const identityFile = "cluster.json"

const (
	identityVersion = 1
	identityMax     = 64 << 10 // bytes: a handful of names, never more
)

// identity is what a node durably knows of itself before, and apart from, the
// Raft log.
type identity struct {
	V       int        `json:"v"`
	Cluster string     `json:"cluster"` // name
	Node    ident.Node `json:"node"`
	RaftID  string     `json:"raft_id"` // Node and a random id: a wiped data_dir gets another one

	// Founding is set, durably, before the cluster is bootstrapped: the exact
	// configuration, so that a crash in the middle ends in the same one.
	Founding []foundingServer `json:"founding,omitempty"`
	// ClusterID is set once the cluster state has named it: from then on a
	// data_dir without Raft's files has lost them.
	ClusterID string `json:"cluster_id,omitempty"`
}

type foundingServer struct {
	RaftID  string `json:"raft_id"`
	Address string `json:"address"`
}

// raftIDOf joins a name and a random part; '/' is in no name.
func raftIDOf(node ident.Node, random string) string { return string(node) + "/" + random }

// NodeOf gives the name in a Raft id.
func NodeOf(raftID string) ident.Node {
	name, _, _ := strings.Cut(raftID, "/")
	return ident.Node(name)
}

// randomID is 128 random bits in hexadecimal.
func randomID() string {
	var b [16]byte
	// crypto/rand.Read never fails (it stops the process instead).
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// NewCommandID makes an id for a command that may have to be sent twice.
func NewCommandID() string { return randomID() }

// loadIdentity reads the identity of a data_dir, or makes one, durably. It
// refuses a data_dir of another cluster or node, unless nothing was ever founded
// with it: then it makes a new one.
func loadIdentity(fsys vfs.FS, dir, cluster string, node ident.Node, log *slog.Logger) (*identity, error) {
	path := filepath.Join(dir, identityFile)
	id, err := readIdentity(fsys, path)
	if errors.Is(err, fs.ErrNotExist) {
		if names, err := fsys.List(filepath.Join(dir, raftDir)); err == nil && len(names) > 0 {
			return nil, fmt.Errorf("%s is missing, but %s holds a Raft log: the data_dir is damaged; restore %s, or empty the data_dir and run 'blockstep node replace %s' on another node",
				path, filepath.Join(dir, raftDir), identityFile, node)
		}
		return newIdentity(fsys, dir, cluster, node)
	}
	if err != nil {
		return nil, err
	}
	old, refused := id, id.check(dir, cluster, node)
	if refused == nil {
		return id, nil
	}
	if !old.whileUnfounded(fsys, dir, func() { id, err = newIdentity(fsys, dir, cluster, node) }) {
		return nil, refused
	}
	if err != nil {
		return nil, err
	}
	log.Warn("the data_dir was never part of a founded cluster: it takes the names of the configuration", "data_dir", dir, "rule", "never-founded",
		"cluster_from", old.Cluster, "cluster_to", id.Cluster, "node_from", old.Node, "node_to", id.Node)
	return id, nil
}

// newIdentity makes one, durably. Its Raft id was never told to anybody.
func newIdentity(fsys vfs.FS, dir, cluster string, node ident.Node) (*identity, error) {
	id := &identity{V: identityVersion, Cluster: cluster, Node: node, RaftID: raftIDOf(node, randomID()[:16])}
	return id, writeIdentity(fsys, dir, id)
}

// check refuses other names than those that the data_dir was made under.
func (id *identity) check(dir, cluster string, node ident.Node) error {
	const giveUp = "if what it holds is wanted no more, and node %s is no member of cluster %s any more, empty it"
	if id.Cluster != cluster {
		return fmt.Errorf("data_dir %s belongs to cluster %q, and the configuration says %q: correct 'cluster' or 'data_dir'; "+giveUp, dir, id.Cluster, cluster, id.Node, id.Cluster)
	}
	if id.Node != node {
		return fmt.Errorf("data_dir %s belongs to node %q, and the configuration says %q: correct 'node' or 'data_dir'; "+giveUp, dir, id.Node, node, id.Node, id.Cluster)
	}
	return nil
}

// whileUnfounded calls then, unless it is nil, when the data_dir provably was never
// part of a founded cluster, with its Raft log locked, and reports whether it was so:
// no bootstrap was begun, no cluster state was seen, no term, vote, entry or snapshot
// was written, and nothing else lies there. What it promised is then nothing, and to
// empty it would lose nothing: under a new Raft id it is as good as empty, even if
// somebody has founded a cluster with the old one, which stays refused until it is
// replaced. Whatever cannot be read proves nothing.
func (id *identity) whileUnfounded(fsys vfs.FS, dir string, then func()) bool {
	if id.ClusterID != "" || len(id.Founding) > 0 {
		return false
	}
	names, err := fsys.List(dir)
	if err != nil {
		return false
	}
	for _, name := range names {
		switch name {
		case identityFile, identityFile + ".new", raftDir, "lost+found":
		default:
			return false
		}
	}
	snaps, err := fsys.List(filepath.Join(dir, raftDir, "snapshots"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) || len(snaps) > 0 {
		return false
	}
	names, err = fsys.List(filepath.Join(dir, raftDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	if slices.Contains(names, boltFile) {
		// It is locked if a daemon runs on it.
		bolt, err := openBolt(dir)
		if err != nil {
			return false
		}
		defer func() { _ = bolt.Close() }() // it was only read
		if has, err := hraft.HasExistingState(bolt, bolt, hraft.NewDiscardSnapshotStore()); err != nil || has {
			return false
		}
	}
	if then != nil {
		then()
	}
	return true
}

// errForeign is wrapped by the error of a data_dir whose parts are of two clusters.
var errForeign = errors.New("its parts are of two clusters")

// foreign is the error of a Raft log, or a leader, of another cluster.
func (id *identity) foreign(dir, other string) error {
	path := filepath.Join(dir, identityFile)
	return fmt.Errorf("data_dir %s: %w: %s says cluster_id %s, and the cluster state is that of %s; restore the %s that belongs to %s (a copy of this data_dir has it), or empty the data_dir and run 'blockstep node replace %s' on another node",
		dir, errForeign, path, id.ClusterID, other, identityFile, filepath.Join(dir, raftDir), id.Node)
}

// CheckDir refuses a data_dir of another cluster or node before anything is
// opened; an empty one is as good as ours, and so is one that was never part of a
// founded cluster.
func CheckDir(fsys vfs.FS, dir, cluster string, node ident.Node) error {
	id, err := readIdentity(fsys, filepath.Join(dir, identityFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	refused := id.check(dir, cluster, node)
	if refused != nil && id.whileUnfounded(fsys, dir, nil) {
		return nil
	}
	return refused
}

func readIdentity(fsys vfs.FS, path string) (*identity, error) {
	f, err := fsys.Open(path, vfs.ReadOnly)
	if err != nil {
		return nil, fileError(filepath.Dir(path), fmt.Errorf("open identity: %w", err))
	}
	defer func() { _ = f.Close() }() // it was only read
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if size > identityMax {
		return nil, fmt.Errorf("%s has %d bytes: it is no identity file", path, size)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	var id identity
	if err := json.Unmarshal(b, &id); err != nil {
		return nil, fmt.Errorf("%s is damaged (%w): restore it, or empty the data_dir and replace the node", path, err)
	}
	if id.V > identityVersion {
		return nil, fmt.Errorf("%s has version %d, this build knows %d: upgrade blockstep on this node", path, id.V, identityVersion)
	}
	if id.V < 1 || id.RaftID == "" || id.Node == "" || NodeOf(id.RaftID) != id.Node {
		return nil, fmt.Errorf("%s is damaged: it names no node and Raft id", path)
	}
	return &id, nil
}

// writeIdentity replaces the file atomically and durably.
func writeIdentity(fsys vfs.FS, dir string, id *identity) error {
	b, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return fmt.Errorf("encode identity: %w", err)
	}
	path := filepath.Join(dir, identityFile)
	err = vfs.ReplaceFile(fsys, path, append(b, '\n'))
	if err != nil {
		return fileError(dir, fmt.Errorf("write %s: %w", path, err))
	}
	return nil
}

// fileError adds what to do about an error of a data_dir's file system, where that
// is known.
func fileError(dir string, err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: make room in %s", err, dir)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: let the user that runs blockstepd read and write %s and all that is in it", err, dir)
	}
	return err
}
