package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/version"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication"
)

const (
	// doctorTime bounds what one node takes for its checks.
	doctorTime = 8 * time.Second
	// fsyncTries is how many fsyncs are timed; the median counts.
	fsyncTries = 7
	fsyncWarn  = 20 * time.Millisecond  // each FLUSH waits for one
	fsyncBad   = 500 * time.Millisecond // a lease of 1.5 s has no room for such
	rttWarn    = 10 * time.Millisecond  // each write waits for one
	clockWarn  = 500 * time.Millisecond // events of several nodes would be out of order
	filesWarn  = 4096                   // open files: connections, segments
	// certWarn is how long before its end a certificate is to be renewed: those
	// that are renewed by machines are so weeks before.
	certWarn = 14 * 24 * time.Hour
)

// doctorReport is what a node found at itself, and what is compared.
type doctorReport struct {
	Findings []control.Finding `json:"findings"`
	Version  string            `json:"version"`
	Shared   map[string]string `json:"shared"` // configuration that should be equal
	Clock    time.Time         `json:"clock"`
}

// exam collects findings of one node.
type exam struct {
	node string
	list []control.Finding
}

func (e *exam) add(check, state, next, format string, args ...any) {
	if state == control.FindingOK {
		next = ""
	}
	e.list = append(e.list, control.Finding{Node: e.node, Check: check, State: state, Text: fmt.Sprintf(format, args...), Next: next})
}

func (d *Daemon) serveDoctor(context.Context, ident.Node, struct{}) (doctorReport, error) {
	e := &exam{node: string(d.self)}
	e.host()
	e.disk(d.fs, d.cfg.DataDir)
	d.examRoom(e)
	if d.tls != nil {
		until, broken := d.tls.State()
		e.certificate(until, broken, time.Now())
	}
	d.examLinks(e)
	return doctorReport{Findings: e.list, Version: version.String(), Shared: d.live.Load().Shared(), Clock: time.Now()}, nil
}

// host looks at the kernel's side.
func (e *exam) host() {
	_, err := os.Stat("/sys/module/nbd")
	if err == nil {
		e.add("nbd module", control.FindingOK, "", "loaded")
	} else {
		e.add("nbd module", control.FindingWarn, "modprobe nbd, if volumes are to be attached on this host", "not loaded")
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil {
		state := control.FindingOK
		if files.Cur < filesWarn {
			state = control.FindingWarn
		}
		e.add("open files", state, "raise LimitNOFILE of the unit", "at most %d", files.Cur)
	}
	switch synced, err := unix.Adjtimex(&unix.Timex{}); {
	case err != nil:
		e.add("clock", control.FindingWarn, "look at timedatectl", "the kernel does not tell whether it is synchronised: %v", err)
	case synced == unix.TIME_ERROR:
		e.add("clock", control.FindingWarn, "start chrony or systemd-timesyncd (only the times of events depend on it)", "not synchronised")
	default:
		e.add("clock", control.FindingOK, "", "synchronised")
	}
}

// disk looks at the file system of the data directory: its free space, and how
// long an fsync takes.
func (e *exam) disk(fs vfs.FS, dir string) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		e.add("free space", control.FindingBad, "mend the file system", "%s: %v", dir, err)
	} else {
		free, all := int64(s.Bavail)*s.Bsize, int64(s.Blocks)*s.Bsize
		state := control.FindingOK
		switch {
		case free < replication.RoomNeeded(all, 0): // one that has left does not come back: docs/runbooks/disk-failed.md
			state = control.FindingBad
		case free < all/20:
			state = control.FindingWarn
		}
		e.add("free space", state, "make room in "+dir, "%s of %s in %s", config.RoundSize(free), config.RoundSize(all), dir)
	}
	took, err := fsyncTime(fs, dir)
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT): // no fault of the disk's
		e.add("fsync", control.FindingBad, "make room in "+dir, "%s: %v", dir, err)
	case err != nil:
		e.add("fsync", control.FindingBad, "mend the disk or the file system", "%s: %v", dir, err)
	case took > fsyncBad:
		e.add("fsync", control.FindingBad, "use a faster disk, or a controller with a protected cache", "%v in %s", took, dir)
	case took > fsyncWarn:
		e.add("fsync", control.FindingWarn, "each FLUSH waits for it: use a faster disk, or find out who else uses this one", "%v in %s", took, dir)
	default:
		e.add("fsync", control.FindingOK, "", "%v in %s", took, dir)
	}
}

// certificate looks at what NBD clients are shown: until when it is valid, and why
// the files hold another one by now that does not load.
func (e *exam) certificate(until time.Time, broken error, now time.Time) {
	const check, renew = "NBD certificate", "renew the files of nbd.tls: they are read again at the next handshake"
	end := "valid until " + until.UTC().Format(time.DateTime) + " UTC"
	ended := !now.Before(until)
	if ended {
		end = "it has ended, at " + until.UTC().Format(time.DateTime) + " UTC: clients that check it are not served"
	}
	switch {
	case broken != nil:
		e.add(check, control.FindingBad, "correct the files of nbd.tls before the daemon is started the next time; blockstepd --check-config says whether they are right", "the files have changed and do not load, and the certificate of before stays in use: %v; %s", broken, end)
	case ended:
		e.add(check, control.FindingBad, renew, "%s", end)
	case until.Sub(now) < certWarn:
		e.add(check, control.FindingWarn, renew, "%s", end)
	default:
		e.add(check, control.FindingOK, "", "%s", end)
	}
}

// fsyncTime is the median time of a write of 4 KiB with its fsync.
func fsyncTime(fs vfs.FS, dir string) (took time.Duration, err error) {
	name := filepath.Join(dir, "doctor.tmp")
	if err := fs.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("removing an old probe: %w", err)
	}
	f, err := fs.Open(name, vfs.Create)
	if err != nil {
		return 0, fmt.Errorf("making a probe: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close(), fs.Remove(name)) }()
	var all []time.Duration
	for i := range fsyncTries {
		start := time.Now()
		if _, err := f.WriteAt(make([]byte, 4096), int64(i)*4096); err != nil {
			return 0, fmt.Errorf("writing a probe: %w", err)
		}
		if err := f.Sync(); err != nil {
			return 0, fmt.Errorf("fsync of a probe: %w", err)
		}
		all = append(all, time.Since(start))
	}
	slices.Sort(all)
	return all[fsyncTries/2].Round(10 * time.Microsecond), nil
}

// examLinks looks at the way to each other member.
func (d *Daemon) examLinks(e *exam) {
	for _, l := range d.links.Status() {
		check := "link to " + string(l.Node)
		switch {
		case !l.Connected || !l.Heard:
			address, _ := d.addressOf(l.Node)
			e.add(check, control.FindingBad, fmt.Sprintf("start blockstepd on %s, or let %s through the firewall, both ways", l.Node, address), "down: %s", orNothing(l.Error))
		case l.RTT > rttWarn:
			e.add(check, control.FindingWarn, "each write waits for it", "up, round trip %v", l.RTT.Round(10*time.Microsecond))
		default:
			e.add(check, control.FindingOK, "", "up, round trip %v", l.RTT.Round(10*time.Microsecond))
		}
	}
}

func orNothing(s string) string {
	if s == "" {
		return "nothing is heard from it"
	}
	return s
}

// Doctor implements control.Backend: each node looks at itself, at once; then
// what they say is compared.
func (b backend) Doctor(ctx context.Context) ([]control.Finding, error) {
	if err := b.ready(ctx); err != nil {
		return nil, err
	}
	d := b.d
	own, err := d.serveDoctor(ctx, d.self, struct{}{})
	if err != nil {
		return nil, err
	}
	cluster := &exam{node: string(d.self)}
	if leader, _ := d.raft.Leader(); leader == "" {
		cluster.add("Raft leader", control.FindingBad, "start the nodes that are down, or check the network between them", "none: the cluster state cannot change")
	} else {
		cluster.add("Raft leader", control.FindingOK, "", "%s", leader)
	}
	for _, v := range d.volumeStatuses(ctx) {
		state := map[control.Health]string{control.Healthy: control.FindingOK, control.Degraded: control.FindingWarn, control.Suspended: control.FindingBad}[v.Health]
		cluster.add("volume "+v.Volume, state, v.Next, "%s", strings.TrimSuffix(string(v.Health)+": "+v.Reason, ": "))
	}
	for _, v := range d.state().Live() {
		if needsEach(v) {
			text, next := eachNeeded(v)
			cluster.add("copies of "+v.Name, control.FindingWarn, next, "%s", text)
		}
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	found := map[ident.Node][]control.Finding{}
	for _, n := range d.state().NodeNames() {
		if n == d.self {
			continue
		}
		wg.Go(func() {
			list := d.examOther(ctx, n, own)
			mu.Lock()
			defer mu.Unlock()
			found[n] = list
		})
	}
	wg.Wait()
	out := append(cluster.list, own.Findings...)
	for _, n := range slices.Sorted(maps.Keys(found)) {
		out = append(out, found[n]...)
	}
	return out, nil
}

// examOther asks another node, and compares it with this one.
func (d *Daemon) examOther(ctx context.Context, n ident.Node, own doctorReport) []control.Finding {
	ctx, cancel := context.WithTimeout(ctx, doctorTime)
	defer cancel()
	e := &exam{node: string(n)}
	var r doctorReport
	before := time.Now()
	if err := d.rpc.call(ctx, n, "/node/v1/doctor", struct{}{}, &r); err != nil {
		e.add("daemon", control.FindingBad, "start blockstepd on "+string(n)+", or check its network", "gives no answer: %v", err)
		return e.list
	}
	after := time.Now()
	e.list = append(e.list, r.Findings...)
	if r.Version != own.Version {
		e.add("version", control.FindingWarn, "end the upgrade: the same release on all nodes", "%s, %s has %s", r.Version, d.self, own.Version)
	}
	// Its clock was read between the two times of ours.
	if off := max(before.Sub(r.Clock), r.Clock.Sub(after)); off > clockWarn {
		e.add("clock", control.FindingWarn, "start chrony or systemd-timesyncd on both", "differs by %v from that of %s", off.Round(time.Millisecond), d.self)
	}
	agree := true
	for _, key := range slices.Sorted(maps.Keys(own.Shared)) {
		if theirs, ok := r.Shared[key]; ok && theirs != own.Shared[key] {
			agree = false
			state, next := control.FindingBad, "write the same on all nodes, then blockstep reload or a restart"
			if key == "nodes" {
				state, next = control.FindingWarn, "write the same on all nodes" // after the founding the cluster state has them
			}
			e.add("configuration", state, next, "%s is %q, on %s %q", key, theirs, d.self, own.Shared[key])
		}
	}
	if agree {
		e.add("configuration", control.FindingOK, "", "as on %s", d.self)
	}
	return e.list
}
