package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/version"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/raft"
)

// reachTime is how long another node's port may take to accept.
const reachTime = 2 * time.Second

// ExamineHost looks at this host without a daemon: why it does not run, or what
// would keep it from running well. The configuration is the file's, in the
// environment of the caller; down is why no daemon is reached.
func ExamineHost(ctx context.Context, file string, down error) []control.Finding {
	cfg, err := config.Load(file, nil)
	e := &exam{node: "this host"}
	if err == nil {
		e.node = cfg.Node
	}
	e.add("daemon", control.FindingBad, "do what is said below, then start it: systemctl start blockstepd (its last words: journalctl -u blockstepd -n 20)", "%v", down)
	e.add("version", control.FindingOK, "", "%s", version.String())
	if err != nil {
		for _, one := range unjoin(err) {
			e.add("configuration", control.FindingBad, "correct it; blockstepd --check-config says whether it is right", "%v", one)
		}
		e.host()
		return e.list
	}
	e.add("configuration", control.FindingOK, "", "%s is valid: node %s of cluster %s", cfg.File, cfg.Node, cfg.Cluster)
	switch files, err := openTLS(cfg, nil); {
	case err != nil:
		e.add("NBD certificate", control.FindingBad, "", "%v", err)
	case files != nil:
		until, _ := files.State()
		e.certificate(until, nil, time.Now())
	}
	e.host()
	e.dataDir(cfg)
	e.port(cfg)
	if _, err := readBootID(cfg.BootIDFile); err != nil {
		e.add("boot id", control.FindingBad, "correct boot_id_file", "%v", err)
	}
	e.neighbours(ctx, cfg)
	return e.list
}

// unjoin takes errors.Join apart.
func unjoin(err error) []error {
	var many interface{ Unwrap() []error }
	if errors.As(err, &many) {
		return many.Unwrap()
	}
	return []error{err}
}

// dataDir looks at the data directory, or at where it will be.
func (e *exam) dataDir(cfg *config.Config) {
	dir := cfg.DataDir
	_, err := os.Stat(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		e.add("data_dir", control.FindingBad, "run it as the user of blockstepd (root), or mend the file system", "%v", err)
		return
	}
	if err == nil {
		if err := raft.CheckDir(vfs.OS(), dir, cfg.Cluster, ident.Node(cfg.Node)); err != nil {
			e.add("data_dir", control.FindingBad, "", "%v", err)
		} else {
			e.add("data_dir", control.FindingOK, "", "%s", dir)
		}
		e.disk(vfs.OS(), dir)
		return
	}
	e.add("data_dir", control.FindingOK, "", "%s is not there yet: it is made at the first start", dir)
	for dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		if _, err := os.Stat(dir); err == nil {
			break
		}
	}
	e.disk(vfs.OS(), dir)
}

// port looks at whether the daemon could listen.
func (e *exam) port(cfg *config.Config) {
	address := cfg.Self().Address
	l, err := net.Listen("tcp", address)
	if err != nil {
		e.add("node port", control.FindingBad, "", "%v", listenError("nodes."+cfg.Node+".address", address, err))
		return
	}
	e.add("node port", control.FindingOK, "", "%s is free", address)
	_ = l.Close() // nothing was accepted
}

// neighbours looks at whether the other nodes' ports answer.
func (e *exam) neighbours(ctx context.Context, cfg *config.Config) {
	errs := make([]error, len(cfg.Nodes))
	var wg sync.WaitGroup
	for i, n := range cfg.Nodes {
		if n.Name == cfg.Node {
			continue
		}
		wg.Go(func() {
			d := net.Dialer{Timeout: reachTime}
			conn, err := d.DialContext(ctx, "tcp", n.Address)
			if err == nil {
				err = conn.Close()
			}
			errs[i] = err
		})
	}
	wg.Wait()
	for i, n := range cfg.Nodes {
		check := "port of " + n.Name
		switch {
		case n.Name == cfg.Node:
		case errs[i] != nil:
			e.add(check, control.FindingWarn, fmt.Sprintf("start blockstepd on %s, or let %s through the firewall", n.Name, n.Address), "%v", errs[i])
		default:
			e.add(check, control.FindingOK, "", "%s accepts", n.Address)
		}
	}
}
