package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// cluster is three blockstepd on loopback, one volume on all of them.
type cluster struct {
	bin   string
	nodes map[string]*clusterNode
	names []string
}

type clusterNode struct {
	dir   string
	nbd   string // TCP address
	admin string
	proc  *process
}

// startCluster starts three nodes with default settings.
func startCluster(ctx context.Context, bin, dir string) (_ *cluster, err error) {
	c := &cluster{bin: bin, nodes: map[string]*clusterNode{}, names: []string{"alpha", "beta", "gamma"}}
	defer func() {
		if err != nil {
			c.stop()
		}
	}()
	var nodes strings.Builder
	for _, n := range c.names {
		addr, err := freeAddress()
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&nodes, "  %s: {address: %q}\n", n, addr)
	}
	for _, n := range c.names {
		if err := c.startNode(dir, n, nodes.String()); err != nil {
			return nil, err
		}
	}
	for _, n := range c.names {
		if err := awaitPort(ctx, c.nodes[n].nbd, c.nodes[n].proc); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *cluster) startNode(dir, name, nodes string) error {
	n := &clusterNode{dir: filepath.Join(dir, "blockstep-"+name)}
	c.nodes[name] = n
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		return err
	}
	var err error
	if n.nbd, err = freeAddress(); err != nil {
		return err
	}
	metrics, err := freeAddress()
	if err != nil {
		return err
	}
	n.admin = "unix://" + filepath.Join(n.dir, "admin.sock")
	file := filepath.Join(n.dir, "blockstep.yaml")
	text := fmt.Sprintf("cluster: bench\nnode: %s\ndata_dir: %s\nnodes:\n%snbd: {listen: [%q]}\nadmin: {listen: %q}\nmetrics: {listen: %q}\n",
		name, filepath.Join(n.dir, "data"), nodes, "tcp://"+n.nbd, n.admin, metrics)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return err
	}
	n.proc, err = startProcess(filepath.Join(n.dir, "log"), filepath.Join(c.bin, "blockstepd"), "--config", file)
	return err
}

func (c *cluster) stop() {
	for _, n := range c.nodes {
		n.proc.stop()
	}
}

func (c *cluster) procs() []*process {
	var ps []*process
	for _, n := range c.names {
		ps = append(ps, c.nodes[n].proc)
	}
	return ps
}

// cli runs the command line and returns what it prints.
func (c *cluster) cli(ctx context.Context, node string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(c.bin, "blockstep"), append([]string{"--admin", c.nodes[node].admin}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("blockstep %s: %w: %s", strings.Join(args, " "), err, tail(out))
	}
	return out, nil
}

// create makes a volume and waits until all its replicas are in sync.
func (c *cluster) create(ctx context.Context, name string, size int64, more ...string) error {
	args := append([]string{"volume", "create", name, "--size", fmt.Sprint(size)}, more...)
	if _, err := c.cli(ctx, c.names[0], args...); err != nil {
		return err
	}
	return c.healthy(ctx, name)
}

func (c *cluster) healthy(ctx context.Context, name string) error {
	_, err := c.cli(ctx, c.names[0], "wait", name, "--for", "healthy", "--timeout", "60s")
	return err
}

// primary returns the node that serves a volume.
func (c *cluster) primary(ctx context.Context, name string) (string, error) {
	out, err := c.cli(ctx, c.names[0], "--json", "status", name)
	if err != nil {
		return "", err
	}
	var s struct {
		Primary string `json:"primary"`
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return "", fmt.Errorf("read the status: %w", err)
	}
	if s.Primary == "" {
		return "", fmt.Errorf("volume %s has no primary", name)
	}
	return s.Primary, nil
}

// secondaries returns the other nodes.
func (c *cluster) secondaries(primary string) []string {
	var list []string
	for _, n := range c.names {
		if n != primary {
			list = append(list, n)
		}
	}
	return list
}

func (c *cluster) uri(node, volume string) string { return "nbd://" + c.nodes[node].nbd + "/" + volume }

// newBlockstep is three copies, acknowledged by two.
func newBlockstep(ctx context.Context, bin string, remote bool, dir string, size int64) (_ *system, err error) {
	c, err := startCluster(ctx, bin, dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.stop()
		}
	}()
	if err := c.create(ctx, "bench", size); err != nil {
		return nil, err
	}
	s := &system{name: sysBlockstep, procs: c.procs()}
	s.awake = func(ctx context.Context) error {
		node, err := c.primary(ctx, "bench")
		if err != nil {
			return err
		}
		if remote {
			node = c.secondaries(node)[0]
		}
		s.uri = c.uri(node, "bench")
		return nil
	}
	return s, s.awake(ctx)
}
