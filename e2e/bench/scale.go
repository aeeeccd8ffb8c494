package main

import (
	"context"
	"fmt"
	"time"
)

// scaleCase is one point of the curves.
type scaleCase struct {
	name    string
	job     job
	size    int64 // of each device, sparse
	volumes int   // that have the job at once; 0: one
}

func scaleCases() []scaleCase {
	var list []scaleCase
	add := func(name string, j job, size int64) { list = append(list, scaleCase{name: name, job: j, size: size}) }
	for _, d := range []int{1, 4, 16, 32, 64, 128, 256} {
		add(fmt.Sprintf("depth %d", d), job{rw: "randwrite", bs: "4k", depth: d}, imageBytes)
	}
	for _, n := range []int{1, 2, 4, 8, 16} {
		add(fmt.Sprintf("connections %d", n), job{rw: "randwrite", bs: "4k", depth: 8, jobs: n}, imageBytes)
	}
	for _, n := range []int{1, 2, 4, 8, 16, 32} {
		list = append(list, scaleCase{fmt.Sprintf("volumes %d", n), job{rw: "randwrite", bs: "4k", depth: 8}, volumeBytes, n})
	}
	for _, bs := range []string{"512", "4k", "16k", "64k", "256k", "1M", "4M"} {
		add("block size "+bs, job{rw: "randwrite", bs: bs, depth: 4}, imageBytes)
	}
	for _, g := range []int64{1, 64, 1024, 4096} {
		add(fmt.Sprintf("device %d GiB", g), job{rw: "randwrite", bs: "4k", depth: 16}, g<<30)
	}
	return list
}

// volumeBytes is the size of each of many volumes.
const volumeBytes = 256 << 20

// scaleVolumes are those that the suite has made, by their size.
type scaleVolumes struct {
	c    *cluster
	made map[int64][]string
}

// uris returns the first n volumes of that size, each at its primary; those that
// are missing are made.
func (v *scaleVolumes) uris(ctx context.Context, size int64, n int) ([]string, error) {
	for len(v.made[size]) < n {
		name := fmt.Sprintf("s%d-%d", size>>20, len(v.made[size]))
		if err := v.c.create(ctx, name, size); err != nil {
			return nil, err
		}
		v.made[size] = append(v.made[size], name)
	}
	var uris []string
	for _, name := range v.made[size][:n] {
		primary, err := v.c.primary(ctx, name)
		if err != nil {
			return nil, err
		}
		uris = append(uris, v.c.uri(primary, name))
	}
	return uris, nil
}

// peakMemory samples the anonymous memory of each process until stop is called,
// which returns the highest that one of them had.
func peakMemory(ps []*process) (stop func() int64) {
	done, result := make(chan struct{}), make(chan int64)
	go func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		var peak int64
		for {
			for _, p := range ps {
				peak = max(peak, p.rss())
			}
			select {
			case <-done:
				result <- peak
				return
			case <-tick.C:
			}
		}
	}()
	return func() int64 { close(done); return <-result }
}

// runScale prints throughput, tail and memory along each axis.
func runScale(ctx context.Context, o *options, rep *report) error {
	c, err := startCluster(ctx, o.bin, o.dir)
	if err != nil {
		return err
	}
	defer c.stop()
	rep.Verdict = "scale: see the rows"
	fmt.Printf("%-18s %8s %8s %9s %9s %9s %11s %22s\n", "", "IOPS", "MB/s", "p50 µs", "p99", "p99.9", "CPU s/100k", "MiB anonymous a node")
	volumes := scaleVolumes{c: c, made: map[int64][]string{}}
	for _, k := range scaleCases() {
		if !o.only.MatchString(k.name) {
			continue
		}
		uris, err := volumes.uris(ctx, k.size, max(k.volumes, 1))
		if err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
		k.job.also = uris[1:]
		s := &system{name: sysBlockstep, uri: uris[0], procs: c.procs(), bytes: k.size}
		stop := peakMemory(s.procs)
		sm, err := measure(ctx, s, k.job, o.seconds)
		sm.Peak = stop()
		if err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
		// Row by row: a suite that somebody ends early has said something.
		fmt.Printf("%-18s %8.0f %8.0f %9.0f %9.0f %9.0f %11.2f %22d\n", k.name, sm.IOPS, sm.MBps, sm.P50, sm.P99, sm.P999, sm.cpuPer100k(), sm.Peak>>20)
		rep.Rows = append(rep.Rows, &resultRow{Name: k.name, Cells: []*cell{{System: sysBlockstep, Samples: []sample{sm}}}})
	}
	return nil
}
