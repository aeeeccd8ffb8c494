package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"time"
)

// job is one fio job.
type job struct {
	rw    string // fio's readwrite
	bs    string
	depth int
	jobs  int      // connections; 0: one
	also  []string // further exports that have the same load at the same time
	extra []string
}

// sample is what one fio job measured.
type sample struct {
	IOPS float64 `json:"iops"`
	MBps float64 `json:"mb_per_s"` // 10^6 bytes
	// Latencies of completion in µs; of the writes if there are any.
	P50  float64 `json:"p50_us"`
	P99  float64 `json:"p99_us"`
	P999 float64 `json:"p99_9_us"`
	Max  float64 `json:"max_us"`
	Ops  float64 `json:"ops"`
	// CPU is utime+stime of all daemons in seconds, until they have settled
	// after the job: what they put off is theirs as well.
	CPU float64 `json:"cpu_s"`
	// Peak is the highest anonymous memory of one daemon, in bytes; 0: not sampled.
	Peak int64 `json:"peak_bytes,omitempty"`
}

// cpuPer100k returns CPU seconds per 100,000 operations.
func (s *sample) cpuPer100k() float64 { return s.CPU / s.Ops * 1e5 }

// side is one direction in fio's JSON.
type side struct {
	IOPS    float64 `json:"iops"`
	Bytes   float64 `json:"io_bytes"`
	BW      float64 `json:"bw_bytes"`
	Ops     float64 `json:"total_ios"`
	Latency struct {
		Max         float64            `json:"max"`
		Percentiles map[string]float64 `json:"percentile"`
	} `json:"clat_ns"`
}

// fioSlack is what a job may take beyond its length. fio 3.33's nbd engine
// sleeps for ever in poll when libnbd has received all outstanding replies while
// it was sending the last request; errHung then says so.
const fioSlack = 8 * time.Second

var errHung = errors.New("fio waits for replies that it has received")

// fioTries is how often a job that hung is started again.
const fioTries = 4

// fill writes the whole device once, with bytes that are not zero.
func fill(ctx context.Context, uri string, size int64) error {
	out, err := exec.CommandContext(ctx, "nbdcopy", "--", "[", "nbdkit", "pattern", strconv.FormatInt(size, 10), "]", uri).CombinedOutput()
	if err != nil {
		return fmt.Errorf("nbdcopy to %s: %w: %s", uri, err, tail(out))
	}
	return nil
}

// runFio runs one job against an export.
func runFio(ctx context.Context, uri string, j job, seconds float64, size int64) (sample, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Duration(seconds*1e9)+fioSlack, errHung)
	defer cancel()
	args := []string{
		"--ioengine=nbd", "--rw=" + j.rw, "--bs=" + j.bs,
		"--iodepth=" + strconv.Itoa(j.depth), "--size=" + strconv.FormatInt(size, 10),
		"--output-format=json", "--group_reporting=1", "--numjobs=" + strconv.Itoa(max(j.jobs, 1)),
		"--randrepeat=0", "--norandommap=1", "--thread=1",
		"--time_based=1", fmt.Sprintf("--runtime=%.0fms", seconds*1000),
	}
	args = append(args, j.extra...) // all of them before the first name: they hold for each
	for i, uri := range append([]string{uri}, j.also...) {
		args = append(args, "--name=bench"+strconv.Itoa(i), "--uri="+uri)
	}
	cmd := exec.CommandContext(ctx, "fio", args...)
	var errText bytes.Buffer
	cmd.Stderr = &errText
	out, err := cmd.Output()
	if err != nil && errors.Is(context.Cause(ctx), errHung) {
		fmt.Fprintf(os.Stderr, "bench: %v: %s %s depth %d\n", errHung, j.rw, j.bs, j.depth)
		return sample{}, errHung
	}
	if err != nil {
		return sample{}, fmt.Errorf("fio %s: %w: %s", uri, err, tail(errText.Bytes()))
	}
	return parseFio(out)
}

// parseFio reads fio's JSON. The nbd engine prints a line of its own before it.
func parseFio(out []byte) (sample, error) {
	at := bytes.IndexByte(out, '{')
	if at < 0 {
		return sample{}, fmt.Errorf("fio printed no JSON: %s", tail(out))
	}
	var r struct {
		Jobs []struct {
			Error int  `json:"error"`
			Read  side `json:"read"`
			Write side `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out[at:], &r); err != nil {
		return sample{}, fmt.Errorf("read fio's JSON: %w", err)
	}
	if len(r.Jobs) != 1 || r.Jobs[0].Error != 0 {
		return sample{}, fmt.Errorf("fio failed: %s", tail(out))
	}
	read, write := r.Jobs[0].Read, r.Jobs[0].Write
	lat := write.Latency
	if write.Ops == 0 {
		lat = read.Latency
	}
	us := func(p string) float64 { return lat.Percentiles[p] / 1e3 }
	return sample{
		IOPS: read.IOPS + write.IOPS, MBps: (read.BW + write.BW) / 1e6, Ops: read.Ops + write.Ops,
		P50: us("50.000000"), P99: us("99.000000"), P999: us("99.900000"), Max: lat.Max / 1e3,
	}, nil
}

// tail returns the end of a program's output.
func tail(b []byte) string {
	b = bytes.TrimSpace(b)
	return string(b[max(0, len(b)-400):])
}
