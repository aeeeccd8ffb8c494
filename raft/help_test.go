package raft

import (
	"path/filepath"
	"testing"

	raftboltdb "github.com/hashicorp/raft-boltdb/v2"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/raft/state"
)

func fsOf(o *Options) vfs.FS {
	if o.FS != nil {
		return o.FS
	}
	return vfs.OS()
}

// setTerm writes what a bootstrap writes first.
func setTerm(t *testing.T, dir string, term uint64) {
	t.Helper()
	b, err := raftboltdb.NewBoltStore(filepath.Join(dir, raftDir, boltFile))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.SetUint64([]byte("CurrentTerm"), term); err != nil {
		t.Fatal(err)
	}
}

func createTwo() state.Command {
	return state.Command{CreateVolume: &state.CreateVolume{
		Name: "v", ID: 1, Size: 1 << 20, Replicas: []state.Replica{{Node: "alpha"}, {Node: "beta"}},
	}}
}

func register(n ident.Node, id ident.Replica) state.Command {
	return state.Command{RegisterReplica: &state.RegisterReplica{Volume: 1, Node: n, Replica: id}}
}
