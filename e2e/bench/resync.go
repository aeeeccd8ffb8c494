package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"
)

const (
	// resyncAim is how much of a plain copy's rate a resync without clients has.
	resyncAim = 0.7
	// resyncTailAim is how much of the tail without a resync the clients see
	// while one runs.
	resyncTailAim = 2.0
)

// resyncJob is the clients' load beside a resync: one that the machine can
// serve, at a rate, so that the tail is no queue of the load's own.
var resyncJob = job{rw: "randwrite", bs: "4k", depth: 4, extra: []string{"--rate_iops=2000"}}

// runResync measures a whole resync without clients beside a plain copy of as
// many bytes from file to file over loopback, and the clients' tail with and
// without a resync under way.
func runResync(ctx context.Context, o *options, rep *report) error {
	c, err := startCluster(ctx, o.bin, o.dir)
	if err != nil {
		return err
	}
	defer c.stop()
	if err := c.create(ctx, "bench", imageBytes); err != nil {
		return err
	}
	primary, err := c.primary(ctx, "bench")
	if err != nil {
		return err
	}
	target := c.secondaries(primary)[0]
	if err := fill(ctx, c.uri(primary, "bench"), imageBytes); err != nil {
		return err
	}
	rep.Verdict = "resync: at or above its aims"
	if o.only.MatchString("idle") {
		if err := resyncIdle(ctx, o, rep, c, primary, target); err != nil {
			return fmt.Errorf("resync without clients: %w", err)
		}
	}
	if o.only.MatchString("busy") {
		if err := resyncBusy(ctx, o, rep, c, primary, target); err != nil {
			return fmt.Errorf("resync with clients: %w", err)
		}
	}
	if rep.Below != "" {
		rep.Verdict = "first row below its aim: " + rep.Below
	}
	return nil
}

// resyncIdle copies and resyncs in turns.
func resyncIdle(ctx context.Context, o *options, rep *report, c *cluster, primary, target string) error {
	found, err := filepath.Glob(filepath.Join(c.nodes[primary].dir, "data", "volumes", "*", "data"))
	if err != nil || len(found) != 1 {
		return fmt.Errorf("the backing store of %s: %v: %w", primary, found, err)
	}
	plain, sync := &cell{System: "plain copy"}, &cell{System: sysBlockstep}
	for range o.rounds {
		if err := c.healthy(ctx, "bench"); err != nil {
			return err
		}
		if _, err := settle(c.procs()); err != nil {
			return err
		}
		took, err := plainCopy(found[0], filepath.Join(o.dir, "copy"))
		if err != nil {
			return err
		}
		plain.Samples = append(plain.Samples, sample{MBps: imageBytes / took.Seconds() / 1e6})
		if took, err = resyncOnce(ctx, c, primary, target); err != nil {
			return err
		}
		sync.Samples = append(sync.Samples, sample{MBps: imageBytes / took.Seconds() / 1e6})
	}
	rate := func(s *sample) float64 { return s.MBps }
	ratio := sync.median(rate) / plain.median(rate)
	res := &resultRow{Name: "whole resync of 1 GiB, idle", Cells: []*cell{plain, sync}, mb: true}
	res.Notes = append(res.Notes, fmt.Sprintf("%.2f of a plain copy over loopback, aim %.2f", ratio, resyncAim))
	if ratio < resyncAim {
		rep.Below = res.Name
	}
	rep.Rows = append(rep.Rows, res)
	fmt.Printf("%s: plain copy %.0f MB/s, resync %.0f MB/s: %s\n", res.Name, plain.median(rate), sync.median(rate), res.Notes[0])
	return nil
}

// plainCopy sends a file through a TCP connection on loopback into another file
// and fsyncs it: what any copy must do at the least.
func plainCopy(from, to string) (took time.Duration, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	in, err := os.Open(from)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	began := time.Now()
	sent := make(chan error, 1)
	go func() {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err == nil {
			// Through a buffer, as a program that looks at the bytes does.
			_, err = io.CopyBuffer(struct{ io.Writer }{conn}, struct{ io.Reader }{in}, make([]byte, 1<<20))
			err = errors.Join(err, conn.Close())
		}
		sent <- err
	}()
	conn, err := l.Accept()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	out, err := os.Create(to)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, out.Close(), os.Remove(to)) }()
	if _, err := io.CopyBuffer(struct{ io.Writer }{out}, bufio.NewReaderSize(conn, 1<<20), make([]byte, 1<<20)); err != nil {
		return 0, err
	}
	if err := errors.Join(<-sent, out.Sync()); err != nil {
		return 0, err
	}
	return time.Since(began), nil
}

// resyncOnce has the target copied anew and returns how long that took, from the
// command to its return to the in-sync set.
func resyncOnce(ctx context.Context, c *cluster, primary, target string) (time.Duration, error) {
	began := time.Now()
	if err := c.startResync(ctx, primary, target); err != nil {
		return 0, err
	}
	if _, err := c.cli(ctx, primary, "wait", "bench", "--for", "healthy", "--timeout", "100s"); err != nil {
		return 0, err
	}
	return time.Since(began), nil
}

// startResync invalidates a replica and returns when it is seen to be resynced.
func (c *cluster) startResync(ctx context.Context, primary, target string) error {
	if _, err := c.cli(ctx, primary, "invalidate", "bench", "--node", target); err != nil {
		return err
	}
	for ctx.Err() == nil {
		out, err := c.cli(ctx, primary, "--json", "status", "bench")
		if err != nil {
			return err
		}
		var st struct {
			Replicas []struct {
				Node  string `json:"node"`
				State string `json:"state"`
			} `json:"replicas"`
		}
		if err := json.Unmarshal(out, &st); err != nil {
			return fmt.Errorf("read the status: %w", err)
		}
		for _, r := range st.Replicas {
			if r.Node == target && r.State == "Resyncing" {
				return nil
			}
		}
	}
	return ctx.Err()
}

// resyncBusy measures the clients' tail without and with a resync, in turns.
func resyncBusy(ctx context.Context, o *options, rep *report, c *cluster, primary, target string) error {
	s := &system{name: sysBlockstep, uri: c.uri(primary, "bench"), procs: c.procs(), awake: func(context.Context) error { return nil }}
	calm, beside := &cell{System: "no resync"}, &cell{System: "resync"}
	for range o.rounds {
		if err := c.healthy(ctx, "bench"); err != nil {
			return err
		}
		sm, err := measure(ctx, s, resyncJob, o.seconds)
		if err != nil {
			return err
		}
		calm.Samples = append(calm.Samples, sm)
		// Client I/O first: the resync is to meet it, not to have a start.
		type measured struct {
			sample sample
			err    error
		}
		done := make(chan measured, 1)
		go func() {
			sm, err := runFio(ctx, s.uri, resyncJob, o.seconds+1, imageBytes)
			done <- measured{sm, err}
		}()
		if err := c.startResync(ctx, primary, target); err != nil {
			return err
		}
		m := <-done
		if m.err != nil {
			return m.err
		}
		beside.Samples = append(beside.Samples, m.sample)
		if _, err := c.cli(ctx, primary, "wait", "bench", "--for", "healthy", "--timeout", "100s"); err != nil {
			return err
		}
	}
	p99 := func(s *sample) float64 { return s.P99 }
	ratio := beside.median(p99) / calm.median(p99)
	res := &resultRow{Name: "4k random write beside a resync", Cells: []*cell{calm, beside}}
	res.Notes = append(res.Notes, fmt.Sprintf("p99 is %.2f of what it is without, aim %.1f at the most", ratio, resyncTailAim))
	if ratio > resyncTailAim && rep.Below == "" {
		rep.Below = res.Name
	}
	rep.Rows = append(rep.Rows, res)
	fmt.Printf("%s: p99 %.0f µs, without %.0f µs: %s\n", res.Name, beside.median(p99), calm.median(p99), res.Notes[0])
	return nil
}
