package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication"
)

// storeFile is the backing store of a replica without a device, in its directory.
const storeFile = "data"

// spaceOf is how many bytes are free in the file system of a directory, and how many
// it has.
func spaceOf(dir string) (free, all int64, err error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(s.Bavail) * s.Bsize, int64(s.Blocks) * s.Bsize, nil
}

// roomReport is how much room a node has in its data_dir, where the replicas lie that
// have no device of their own.
type roomReport struct {
	Free  int64 `json:"free"`  // bytes
	Total int64 `json:"total"` // bytes
	// Used is what the replica here takes of the volume that was asked about, in
	// bytes; -1 when that is not known.
	Used int64 `json:"used"`
}

func (d *Daemon) serveRoom(_ context.Context, _ ident.Node, c volumeCall) (r roomReport, err error) {
	r.Used = -1
	if r.Free, r.Total, err = d.space(d.cfg.DataDir); err != nil {
		return r, err
	}
	if sv := d.state().Volumes[c.Volume]; sv != nil {
		if rep := sv.Replica(d.self); rep != nil && rep.Device == "" {
			r.Used = takes(filepath.Join(d.replicaDir(c.Volume), storeFile))
		}
	}
	return r, nil
}

// takes is how many bytes of its file system a file takes: fewer than its size where
// it has holes; -1 when that is not known.
func takes(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil {
		return -1
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return -1
	}
	return st.Blocks * 512
}

// roomAt asks a node for its room; nil when it does not say, as one of an earlier
// release does not.
func (d *Daemon) roomAt(ctx context.Context, n ident.Node, id ident.Volume) *roomReport {
	var r roomReport
	var err error
	if n == d.self {
		r, err = d.serveRoom(ctx, n, volumeCall{id})
	} else {
		for range 2 { // a connection that was kept may be of before its restart
			ask, cancel := context.WithTimeout(ctx, askNode)
			err = d.rpc.call(ask, n, "/node/v1/room", volumeCall{id}, &r)
			cancel()
			if err == nil {
				break
			}
		}
	}
	if err != nil {
		d.log.Debug("a node does not say how much room it has", "node", n, "err", err)
		return nil
	}
	return &r
}

// roomsAt asks several nodes at once.
func (d *Daemon) roomsAt(ctx context.Context, nodes []ident.Node, id ident.Volume) map[ident.Node]*roomReport {
	var mu sync.Mutex
	var wg sync.WaitGroup
	out := map[ident.Node]*roomReport{}
	for _, n := range nodes {
		wg.Go(func() {
			r := d.roomAt(ctx, n, id)
			mu.Lock()
			defer mu.Unlock()
			out[n] = r
		})
	}
	wg.Wait()
	return out
}

// placeFor is the node for one more replica of a volume: up, without one, and with room
// for what the primary's takes now. Those that have room for the whole volume come
// first, then those with the fewest replicas. It is "" when there is none; without says
// which have too little room.
func (d *Daemon) placeFor(ctx context.Context, sv *state.Volume) (best ident.Node, without []string) {
	st := d.state()
	var nodes []ident.Node
	for _, name := range st.NodeNames() {
		if !st.Nodes[name].Witness && sv.Replica(name) == nil && d.nodeUp(name) {
			nodes = append(nodes, name)
		}
	}
	if len(nodes) == 0 {
		return "", nil
	}
	need := int64(sv.Size)
	if sv.Primary != "" {
		if r := d.roomAt(ctx, sv.Primary, sv.ID); r != nil && r.Used >= 0 {
			need = min(need, r.Used)
		}
	}
	rooms := d.roomsAt(ctx, nodes, sv.ID)
	load := func(n ident.Node) (thin bool, replicas int) {
		for _, v := range st.Live() {
			if v.Replica(n) != nil {
				replicas++
			}
		}
		return rooms[n] != nil && rooms[n].Free < int64(sv.Size), replicas
	}
	for _, n := range nodes {
		if r := rooms[n]; r != nil {
			if least := need + replication.RoomNeeded(r.Total, 0); r.Free < least {
				without = append(without, fmt.Sprintf("%s has %s free, and it takes %s", n, config.RoundSize(r.Free), config.RoundSize(least)))
				continue
			}
		}
		if best == "" {
			best = n
			continue
		}
		bestThin, bestHas := load(best)
		if thin, has := load(n); thin != bestThin && bestThin || thin == bestThin && has < bestHas {
			best = n
		}
	}
	return best, without
}
