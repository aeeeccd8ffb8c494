package main

import (
	"context"
	"fmt"
	"os"
	"text/tabwriter"
)

// scaleCase is one point of the curves.
type scaleCase struct {
	name string
	job  job
	size int64 // of the device, sparse
}

func scaleCases() []scaleCase {
	var list []scaleCase
	add := func(name string, j job, size int64) { list = append(list, scaleCase{name, j, size}) }
	for _, d := range []int{1, 4, 16, 64, 256} {
		add(fmt.Sprintf("depth %d", d), job{rw: "randwrite", bs: "4k", depth: d}, imageBytes)
	}
	for _, n := range []int{1, 4, 16} {
		add(fmt.Sprintf("connections %d", n), job{rw: "randwrite", bs: "4k", depth: 8, jobs: n}, imageBytes)
	}
	for _, bs := range []string{"512", "4k", "64k", "1M", "4M"} {
		add("block size "+bs, job{rw: "randwrite", bs: bs, depth: 4}, imageBytes)
	}
	for _, g := range []int64{1, 64, 4096} {
		add(fmt.Sprintf("device %d GiB", g), job{rw: "randwrite", bs: "4k", depth: 16}, g<<30)
	}
	return list
}

// runScale prints throughput, tail and memory along each axis.
func runScale(ctx context.Context, o *options, rep *report) error {
	c, err := startCluster(ctx, o.bin, o.dir)
	if err != nil {
		return err
	}
	defer c.stop()
	rep.Verdict = "scale: see the rows"
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\tIOPS\tMB/s\tp50 µs\tp99\tCPU s/100k\tMiB resident, primary\t\n")
	volumes := map[int64]string{}
	for _, k := range scaleCases() {
		if !o.only.MatchString(k.name) {
			continue
		}
		if volumes[k.size] == "" {
			volumes[k.size] = fmt.Sprintf("s%d", k.size>>30)
			if err := c.create(ctx, volumes[k.size], k.size); err != nil {
				return err
			}
		}
		primary, err := c.primary(ctx, volumes[k.size])
		if err != nil {
			return err
		}
		s := &system{name: sysBlockstep, uri: c.uri(primary, volumes[k.size]), procs: c.procs()}
		sm, err := measure(ctx, s, k.job, o.seconds)
		if err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
		fmt.Fprintf(w, "%s\t%.0f\t%.0f\t%.0f\t%.0f\t%.2f\t%d\t\n", k.name, sm.IOPS, sm.MBps, sm.P50, sm.P99, sm.cpuPer100k(), c.nodes[primary].proc.rss()>>20)
		rep.Rows = append(rep.Rows, &resultRow{Name: k.name, Cells: []*cell{{System: sysBlockstep, Samples: []sample{sm}}}})
	}
	return w.Flush()
}
