package main

import (
	"context"
	"fmt"
	"syscall"
)

// stressJob is the write load under which nodes are stopped.
var stressJob = job{rw: "randwrite", bs: "4k", depth: 32}

// runStress measures what a stopped secondary does to the tail of the writes,
// and what ack mode durable costs.
func runStress(ctx context.Context, o *options, rep *report) error {
	c, err := startCluster(ctx, o.bin, o.dir)
	if err != nil {
		return err
	}
	defer c.stop()
	rep.Verdict = "stress: see the rows"
	for _, ack := range []string{"quorum", "durable"} {
		if err := c.create(ctx, ack, imageBytes, "--ack", ack); err != nil {
			return err
		}
	}
	primary, err := c.primary(ctx, "quorum")
	if err != nil {
		return err
	}
	stopped := c.nodes[c.secondaries(primary)[0]].proc
	cases := []struct {
		name, volume string
		halt         bool
	}{{"quorum", "quorum", false}, {"quorum, one secondary stopped", "quorum", true}, {"durable", "durable", false}}
	for _, k := range cases {
		if !o.only.MatchString(k.name) {
			continue
		}
		res := &resultRow{Name: "4k random write, depth 32: " + k.name, Cells: []*cell{{System: sysBlockstep}}}
		for range o.rounds {
			sm, err := stressOnce(ctx, o, c, k.volume, stopped, k.halt)
			if err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
			res.Cells[0].Samples = append(res.Cells[0].Samples, sm)
		}
		rep.Rows = append(rep.Rows, res)
		printRow(res)
	}
	return nil
}

// stressOnce runs the load, with one node stopped if halt is set, and waits
// until all is whole again.
func stressOnce(ctx context.Context, o *options, c *cluster, volume string, node *process, halt bool) (sample, error) {
	if err := c.healthy(ctx, volume); err != nil {
		return sample{}, err
	}
	s := &system{name: sysBlockstep, procs: c.procs(), awake: func(ctx context.Context) error { return nil }}
	primary, err := c.primary(ctx, volume)
	if err != nil {
		return sample{}, err
	}
	s.uri = c.uri(primary, volume)
	if !halt {
		return measure(ctx, s, stressJob, o.seconds)
	}
	if err := node.signal(syscall.SIGSTOP); err != nil {
		return sample{}, err
	}
	sm, err := measure(ctx, s, stressJob, o.seconds)
	if cerr := node.signal(syscall.SIGCONT); err == nil {
		err = cerr
	}
	return sm, err
}
