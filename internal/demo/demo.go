// Package demo runs three nodes on loopback, with real TCP between them and a
// data directory each. Live shows them in this process until it is stopped;
// Story runs them as processes, kills one in the middle of writing a real
// filesystem image, and holds everything up to its promise.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/daemon"
)

const (
	volumeName = "demo"
	configFile = "blockstep.yaml"
	volumeSize = 1 << 30 // bytes
	// foundTime is how long three empty nodes may take to become a cluster.
	foundTime = 30 * time.Second
)

var nodeNames = []string{"alpha", "beta", "gamma"}

// Options say how a demo runs.
type Options struct {
	Dir  string    // of the nodes' data; "": a temporary one, removed at the end
	From string    // Story: the tree whose files fill the image; "": the Go sources
	Out  io.Writer // what the reader sees
	// Status writes the live status of a cluster.
	Status func(w io.Writer, s control.ClusterStatus)
	// Exe is this program; Story starts it as Exe demo-node --config FILE.
	Exe string
}

// node is one of the three.
type node struct {
	name    string
	address string // HOST:PORT
	nbdTCP  string // HOST:PORT
	nbdSock string
	admin   string
	config  string // file
	log     string // file
	client  *control.Client
}

// makeNodes chooses ports, writes the configurations and returns the nodes. In the
// directory of an earlier demo the ports are those of then: a node keeps its address.
func makeNodes(dir string) ([]*node, error) {
	ports, err := portsOf(dir)
	if err == nil && ports == nil {
		ports, err = freePorts(2 * len(nodeNames))
	}
	if err != nil {
		return nil, err
	}
	var nodes []*node
	for i, name := range nodeNames {
		base := filepath.Join(dir, name)
		if err := os.MkdirAll(base, 0o700); err != nil {
			return nil, fmt.Errorf("making the demo's directory: %w; name another with --dir", err)
		}
		n := &node{
			name: name, address: ports[2*i], nbdTCP: ports[2*i+1],
			nbdSock: filepath.Join(base, "nbd.sock"), admin: filepath.Join(base, "admin.sock"),
			config: filepath.Join(base, configFile), log: filepath.Join(base, "log"),
		}
		if n.client, err = control.Dial("unix://" + n.admin); err != nil {
			return nil, err
		}
		nodes = append(nodes, n)
	}
	for _, n := range nodes {
		if err := n.writeConfig(nodes); err != nil {
			return nil, err
		}
	}
	return nodes, nil
}

func (n *node) writeConfig(all []*node) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# Written by blockstep demo.\ncluster: demo\nnode: %s\ndata_dir: %q\nnodes:\n", n.name, filepath.Join(filepath.Dir(n.config), "data"))
	for _, m := range all {
		fmt.Fprintf(&b, "  %s: {address: %q}\n", m.name, m.address)
	}
	fmt.Fprintf(&b, "nbd: {listen: [%q, %q]}\nadmin: {listen: %q}\n", "unix://"+n.nbdSock, "tcp://"+n.nbdTCP, "unix://"+n.admin)
	if err := os.WriteFile(n.config, []byte(b.String()), 0o600); err != nil {
		return fmt.Errorf("writing the demo's configuration: %w", err)
	}
	return nil
}

// portsOf finds the addresses of an earlier demo in dir; nil when there was none.
func portsOf(dir string) ([]string, error) {
	var out []string
	for _, name := range nodeNames {
		file := filepath.Join(dir, name, configFile)
		c, err := config.Load(file, nil)
		if _, none := os.Stat(file); errors.Is(none, os.ErrNotExist) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("the configuration of an earlier demo is not one any more: %w; or name another directory with --dir", err)
		}
		i := slices.IndexFunc(c.NBD.Listen, func(l config.Listener) bool { return l.Network == "tcp" })
		if i < 0 {
			return nil, fmt.Errorf("%s has no nbd.listen on tcp, so it is none of a demo; name another directory with --dir", file)
		}
		out = append(out, c.Self().Address, c.NBD.Listen[i].Address)
	}
	return out, nil
}

// freePorts finds addresses on loopback that nobody listens on.
func freePorts(n int) ([]string, error) {
	var out []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("looking for a free port: %w", err)
		}
		defer l.Close() // all are held until all are found, so that none comes twice
		out = append(out, l.Addr().String())
	}
	return out, nil
}

// directory makes the demo's directory; remove takes it away if it is ours.
func (o *Options) directory() (dir string, remove func(), err error) {
	if o.Dir != "" {
		if dir, err = filepath.Abs(o.Dir); err == nil {
			err = os.MkdirAll(dir, 0o700)
		}
		return dir, func() {}, err
	}
	// Short: a unix socket's path has 107 bytes.
	dir, err = os.MkdirTemp("", "blockstep-demo-")
	if err != nil {
		return "", nil, fmt.Errorf("making the demo's directory: %w; name one with --dir", err)
	}
	return dir, func() { _ = os.RemoveAll(dir) }, nil // what stays is in the system's temporary directory
}

// createVolume founds the cluster and makes the volume.
func createVolume(ctx context.Context, n *node, size int64) (control.VolumeStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, foundTime)
	defer cancel()
	if _, err := poll(ctx, func() (struct{}, bool, error) {
		_, err := n.client.Nodes(ctx)
		return struct{}{}, err == nil, err
	}); err != nil {
		return control.VolumeStatus{}, fmt.Errorf("waiting for the cluster: %w", err)
	}
	v, err := n.client.CreateVolume(ctx, control.CreateVolume{Name: volumeName, Size: size})
	var e *control.Error
	if errors.As(err, &e) && e.Code == control.CodeRefused && strings.Contains(e.Message, "already") {
		return poll(ctx, func() (control.VolumeStatus, bool, error) { // --dir of an earlier demo
			v, err := n.client.VolumeStatus(ctx, volumeName)
			return v, err == nil && v.Primary != "", err
		})
	}
	return v, err
}

// poll asks until done, or until ctx ends; the last error says why not.
func poll[T any](ctx context.Context, ask func() (v T, done bool, err error)) (T, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		v, done, err := ask()
		if done {
			return v, nil
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = ctx.Err()
			}
			return v, err
		case <-tick.C:
		}
	}
}

// Live runs three nodes in this process with a volume of 1 GiB, and shows their
// status until ctx ends.
func Live(ctx context.Context, o Options) error {
	dir, remove, err := o.directory()
	if err != nil {
		return err
	}
	defer remove()
	nodes, err := makeNodes(dir)
	if err != nil {
		return err
	}
	run, stop := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop(nil)
	for _, n := range nodes {
		wg.Go(func() {
			if err := n.runHere(run); err != nil {
				stop(fmt.Errorf("node %s: %w", n.name, err))
			}
		})
	}
	v, err := createVolume(run, nodes[0], volumeSize)
	if err != nil {
		if cause := context.Cause(run); cause != nil && ctx.Err() == nil {
			return cause
		}
		return err
	}
	fmt.Fprintf(o.Out, "Three nodes run on loopback; their data and logs are in %s.\n", dir)
	fmt.Fprintf(o.Out, "Volume %s of %s is served by every node; the primary is %s.\n\n", v.Volume, config.FormatSize(v.Size), v.Primary)
	for _, n := range nodes {
		fmt.Fprintf(o.Out, "  %-6s nbd://%s/%s   nbd+unix:///%s?socket=%s\n", n.name, n.nbdTCP, volumeName, volumeName, n.nbdSock)
	}
	fmt.Fprintf(o.Out, "\nTry, in another terminal:\n  %[1]s --admin unix://%[2]s status %[3]s\n  qemu-img info nbd://%[4]s/%[3]s\n  %[1]s --admin unix://%[2]s switchover %[3]s --to beta\n\nCtrl-C ends it.\n\n",
		command(), nodes[0].admin, volumeName, nodes[1].nbdTCP)
	watch(run, nodes, o)
	if cause := context.Cause(run); ctx.Err() == nil && cause != nil {
		return cause
	}
	fmt.Fprintln(o.Out, "stopping")
	return nil
}

// command is what calls this program from any directory: its name, where the
// shell finds it by that, else its path.
func command() string {
	exe, err := os.Executable()
	if err != nil {
		return "blockstep"
	}
	name := filepath.Base(exe)
	if found, err := exec.LookPath(name); err == nil {
		if found, err = filepath.EvalSymlinks(found); err == nil && found == exe {
			return name
		}
	}
	return exe
}

// runHere runs one node in this process; its log goes to its file.
func (n *node) runHere(ctx context.Context) error {
	cfg, err := config.Load(n.config, nil)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(n.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("opening the log: %w", err)
	}
	defer f.Close()
	return daemon.Run(ctx, cfg, slog.New(slog.NewTextHandler(f, nil)), daemon.Hooks{})
}

// watch prints the status whenever it has changed.
func watch(ctx context.Context, nodes []*node, o Options) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	last := ""
	for {
		for _, n := range nodes {
			s, err := n.client.Status(ctx)
			if err != nil {
				continue
			}
			var b strings.Builder
			o.Status(&b, s)
			if b.String() != last {
				last = b.String()
				fmt.Fprintf(o.Out, "--- %s\n%s\n", time.Now().Format(time.TimeOnly), last)
			}
			break
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
