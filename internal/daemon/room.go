package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication"
)

// In the directory of a replica: its backing store, where it has no device, and its log.
const (
	storeFile = "data"
	logDir    = "log" // of its segments
)

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

// owed is how much the replicas of this node may take of the file system of the data_dir
// beyond what they take now, where the volumes are written full: of their sizes what is a
// hole yet, where they have no device, and of their logs. total is what it has in all.
func (d *Daemon) owed(total int64) (bytes int64, volumes []string) {
	for _, sv := range d.state().Live() {
		rep := sv.Replica(d.self)
		if rep == nil {
			continue
		}
		dir := d.replicaDir(sv.ID)
		var more int64
		if rep.Device == "" {
			more += max(int64(sv.Size)-max(takes(filepath.Join(dir, storeFile)), 0), 0)
		}
		retention := d.cfg.Volume.LogRetention
		if sv.Options.LogRetention > 0 {
			retention = sv.Options.LogRetention
		}
		log := replication.LogRoom(retention, sv.Size, total)
		if segments, err := d.fs.List(filepath.Join(dir, logDir)); err == nil {
			for _, name := range segments {
				log -= max(takes(filepath.Join(dir, logDir, name)), 0)
			}
		}
		bytes += more + max(log, 0)
		volumes = append(volumes, sv.Name)
	}
	return bytes, volumes
}

// examRoom looks whether the replicas that lie here may fill the disk.
func (d *Daemon) examRoom(e *exam) {
	const check = "room to grow"
	free, total, err := d.space(d.cfg.DataDir)
	if err != nil {
		return // the free space is not known: that is a finding of its own
	}
	owed, volumes := d.owed(total)
	state := control.FindingOK
	if owed > free {
		state = control.FindingWarn
	}
	if len(volumes) == 0 {
		e.add(check, state, "", "no replicas")
		return
	}
	e.add(check, state, "make "+d.cfg.DataDir+" larger, or see to it that the volumes are not written full: a replica without room is out until there is some",
		"%s free in %s, and the %s there (%s) may take %s more, logs included",
		config.RoundSize(free), d.cfg.DataDir, plural(len(volumes), "replica"), some(volumes), config.RoundSize(owed))
}

// someMost is how many names a text lists.
const someMost = 5

// some lists the first of some names.
func some(names []string) string {
	if len(names) <= someMost {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d others", strings.Join(names[:someMost], ", "), len(names)-someMost)
}

func plural(n int, what string) string {
	if n == 1 {
		return what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// thin warns of the nodes among those of a volume that have less free than it may come to
// take. That is allowed: it takes as much as is written.
func (d *Daemon) thin(ctx context.Context, volume string, size uint64, replicas []state.Replica) (out []control.Warning) {
	var nodes []ident.Node
	for _, r := range replicas {
		if r.Device == "" && d.nodeUp(r.Node) {
			nodes = append(nodes, r.Node)
		}
	}
	rooms := d.roomsAt(ctx, nodes, 0)
	for _, n := range nodes {
		if r := rooms[n]; r != nil && r.Free < int64(size) {
			out = append(out, control.Warning{
				Volume: volume,
				Text:   fmt.Sprintf("%s has %s free in its data_dir, and %s may come to take %s there", n, config.RoundSize(r.Free), volume, config.FormatSize(int64(size))),
				Next:   "see to it that it has more before that is written: a replica without room is out until there is some (blockstep doctor)",
			})
		}
	}
	return out
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
