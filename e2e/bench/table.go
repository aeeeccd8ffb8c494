package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// imageBytes is the size of the device in the table.
const imageBytes = 1 << 30

// aim is what blockstep's median should be, as a multiple of a peer's; a ratio
// of 0 is shown and not judged.
type aim struct {
	peer  string
	ratio float64
}

// row is one workload of the table.
type row struct {
	name string
	job  job
	aims []aim
	mb   bool // shown and judged in MB/s
	// cpuMax is the limit of CPU seconds per 100,000 operations; 0: none.
	cpuMax float64
}

// rows are the table of docs/performance.md.
var rows = []row{
	{name: "4k random write, depth 1", job: job{rw: "randwrite", bs: "4k", depth: 1}, aims: []aim{{sysQuorum, 1.3}, {sysMirror, 1}}},
	{name: "4k random write, depth 32", job: job{rw: "randwrite", bs: "4k", depth: 32}, aims: []aim{{sysQuorum, 3}, {sysMirror, 1.7}}, cpuMax: 5},
	{name: "4k random write + FLUSH, depth 1", job: job{rw: "randwrite", bs: "4k", depth: 1, extra: []string{"--fsync=1"}}, aims: []aim{{sysQuorum, 2}, {sysMirror, 1}}},
	{name: "64k random write, depth 16", job: job{rw: "randwrite", bs: "64k", depth: 16}, aims: []aim{{sysQuorum, 2}}},
	{name: "1M sequential write, depth 8", job: job{rw: "write", bs: "1M", depth: 8}, aims: []aim{{sysQuorum, 1.5}}, mb: true},
	{name: "4k random read, depth 1", job: job{rw: "randread", bs: "4k", depth: 1}, aims: []aim{{sysNbdkit, 0.7}}},
	{name: "4k random read, depth 32", job: job{rw: "randread", bs: "4k", depth: 32}, aims: []aim{{sysNbdkit, 0.7}}},
	{name: "1M sequential read, depth 8", job: job{rw: "read", bs: "1M", depth: 8}, aims: []aim{{sysNbdkit, 0.7}}, mb: true},
	{name: "4k 70/30 mixed, depth 32", job: job{rw: "randrw", bs: "4k", depth: 32, extra: []string{"--rwmixread=70"}}, aims: []aim{{sysQuorum, 3}, {sysMirror, 1}}},
}

// cell is one system's samples of one row.
type cell struct {
	System  string   `json:"system"`
	Samples []sample `json:"samples"`
}

func (c *cell) median(f func(*sample) float64) float64 {
	v := c.sorted(f)
	if len(v)%2 == 0 {
		return (v[len(v)/2-1] + v[len(v)/2]) / 2
	}
	return v[len(v)/2]
}

func (c *cell) sorted(f func(*sample) float64) []float64 {
	var v []float64
	for i := range c.Samples {
		v = append(v, f(&c.Samples[i]))
	}
	slices.Sort(v)
	return v
}

// resultRow is a row that was measured.
type resultRow struct {
	Name  string   `json:"name"`
	Cells []*cell  `json:"cells"`
	Notes []string `json:"judgement"`
	mb    bool
}

// report is what goes into the JSON file.
type report struct {
	Suite   string       `json:"suite"`
	Started time.Time    `json:"started"`
	Seconds float64      `json:"seconds_a_job"`
	Rounds  int          `json:"rounds"`
	Remote  bool         `json:"client_on_another_node"`
	Rows    []*resultRow `json:"rows"`
	Below   string       `json:"first_below_aim"`
	Verdict string       `json:"verdict"`
}

// runTable measures every row.
func runTable(ctx context.Context, o *options, rep *report) error {
	systems, err := startSystems(ctx, o)
	defer func() {
		for _, s := range systems {
			s.stop()
		}
	}()
	if err != nil {
		return err
	}
	for i := range rows {
		r := &rows[i]
		if !o.only.MatchString(r.name) {
			continue
		}
		res, err := measureRow(ctx, o, r, systems)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		judge(r, res, rep)
		rep.Rows = append(rep.Rows, res)
		printRow(res)
	}
	rep.Verdict = "every row is at or above its aim"
	if rep.Below != "" {
		rep.Verdict = "first row below its aim: " + rep.Below
	}
	return nil
}

// startSystems starts all of them and fills their devices, so that no block
// is allocated while it is measured.
func startSystems(ctx context.Context, o *options) (systems []*system, err error) {
	makers := []func() (*system, error){
		func() (*system, error) { return newNbdkit(ctx, o.dir, imageBytes) },
		func() (*system, error) { return newMirror(ctx, o.dir, imageBytes) },
		func() (*system, error) { return newQuorum(ctx, o.dir, imageBytes) },
		func() (*system, error) { return newBlockstep(ctx, o.bin, o.remote, o.dir, imageBytes) },
	}
	for _, mk := range makers {
		s, err := mk()
		if err != nil {
			return systems, err
		}
		systems = append(systems, s)
		fmt.Fprintf(os.Stderr, "filling %s\n", s.name)
		if err := fill(ctx, s.uri, imageBytes); err != nil {
			return systems, err
		}
	}
	return systems, nil
}

func measureRow(ctx context.Context, o *options, r *row, systems []*system) (*resultRow, error) {
	res := &resultRow{Name: r.name, mb: r.mb}
	for _, s := range systems {
		if !o.quick || s.name == sysBlockstep || slices.ContainsFunc(r.aims, func(a aim) bool { return a.peer == s.name }) {
			res.Cells = append(res.Cells, &cell{System: s.name})
		}
	}
	for range o.rounds {
		for _, c := range res.Cells {
			i := slices.IndexFunc(systems, func(s *system) bool { return s.name == c.System })
			sm, err := measure(ctx, systems[i], r.job, o.seconds)
			if err != nil {
				return nil, err
			}
			c.Samples = append(c.Samples, sm)
		}
	}
	return res, nil
}

// measure runs one job against one system, with no dirty page left of the job
// before.
func measure(ctx context.Context, s *system, j job, seconds float64) (sm sample, err error) {
	for range fioTries {
		if s.awake != nil {
			if err := s.awake(ctx); err != nil {
				return sample{}, err
			}
		}
		syscall.Sync()
		before, err := settle(s.procs)
		if err != nil {
			return sample{}, err
		}
		sm, err = runFio(ctx, s.uri, j, seconds, cmp.Or(s.bytes, imageBytes))
		if errors.Is(err, errHung) {
			continue
		}
		if err != nil {
			return sample{}, err
		}
		after, err := settle(s.procs)
		sm.CPU = after - before
		return sm, err
	}
	return sample{}, errHung
}

// judge compares blockstep's median with its aims.
func judge(r *row, res *resultRow, rep *report) {
	metric := func(s *sample) float64 { return s.IOPS }
	if r.mb {
		metric = func(s *sample) float64 { return s.MBps }
	}
	find := func(name string) *cell {
		i := slices.IndexFunc(res.Cells, func(c *cell) bool { return c.System == name })
		return res.Cells[i]
	}
	ours := find(sysBlockstep)
	note := func(ok bool, format string, args ...any) {
		text := fmt.Sprintf(format, args...)
		if !ok {
			text += "  BELOW"
			if rep.Below == "" {
				rep.Below = r.name + ": " + text
			}
		}
		res.Notes = append(res.Notes, text)
	}
	for _, a := range r.aims {
		got := ours.median(metric) / find(a.peer).median(metric)
		if a.ratio == 0 {
			note(true, "%.2fx %s", got, a.peer)
			continue
		}
		note(got >= a.ratio, "%.2fx %s, aim %.1fx", got, a.peer, a.ratio)
	}
	if r.cpuMax > 0 {
		got := ours.median((*sample).cpuPer100k)
		note(got <= r.cpuMax, "%.2f CPU s per 100k, aim at most %.0f", got, r.cpuMax)
	}
}

// printRow prints one row: medians, and the range of the rounds.
func printRow(res *resultRow) {
	fmt.Printf("\n%s: %s\n", res.Name, strings.Join(res.Notes, "; "))
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	unit, metric := "IOPS", func(s *sample) float64 { return s.IOPS }
	if res.mb {
		unit, metric = "MB/s", func(s *sample) float64 { return s.MBps }
	}
	fmt.Fprintf(w, "\t%s\trange\tp50 µs\tp99\tp99.9\tCPU s/100k\t\n", unit)
	for _, c := range res.Cells {
		v := c.sorted(metric)
		fmt.Fprintf(w, "%s\t%.0f\t%.0f-%.0f\t%.0f\t%.0f\t%.0f\t%.2f\t\n", c.System, c.median(metric), v[0], v[len(v)-1],
			c.median(func(s *sample) float64 { return s.P50 }), c.median(func(s *sample) float64 { return s.P99 }),
			c.median(func(s *sample) float64 { return s.P999 }), c.median((*sample).cpuPer100k))
	}
	_ = w.Flush() // standard output
}
