// Command bench measures blockstep against what else keeps several copies of a
// block device, side by side on this machine, and judges the ratios by the aims
// of docs/performance.md.
//
// The peers are built from the distribution's packages: nbdkit's file plugin
// (no replication), qemu-storage-daemon's mirror (two copies) and its quorum
// driver (three copies). All of them, and three blockstepd, run during the whole
// measurement; each round runs the same fio job against one after the other, so
// that a machine that others use as well hits all of them alike. Absolute
// numbers of two machines, or of two runs, cannot be compared; ratios of one run
// can.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"
)

// options are the command's flags.
type options struct {
	suite   string
	bin     string
	against string
	dir     string
	json    string
	only    *regexp.Regexp
	rounds  int
	seconds float64
	quick   bool
	remote  bool
	strict  bool
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parse() (options, error) {
	var o options
	var only string
	flag.StringVar(&o.suite, "suite", "table", "table, compare, stress, scale or resync")
	flag.StringVar(&o.bin, "bin", "bin", "directory of blockstep and blockstepd")
	flag.StringVar(&o.against, "against", "", "directory of other binaries, for the compare suite")
	flag.StringVar(&o.dir, "dir", "", "where the images go (default: a new directory under TMPDIR)")
	flag.StringVar(&o.json, "json", "", "write the results to this file")
	flag.StringVar(&only, "only", "", "regular expression of the rows to run")
	flag.IntVar(&o.rounds, "rounds", 3, "interleaved rounds a row")
	flag.Float64Var(&o.seconds, "seconds", 3, "length of one fio job")
	flag.BoolVar(&o.quick, "quick", false, "two rounds of one second, and only the peers that a row is judged by")
	flag.BoolVar(&o.remote, "remote", false, "the client of blockstep is attached to a node that is not the primary's")
	flag.BoolVar(&o.strict, "strict", false, "end with an error if a row is below its aim")
	flag.Parse()
	if flag.NArg() > 0 || o.rounds < 1 || o.seconds <= 0 {
		flag.Usage()
		return o, errors.New("bad usage")
	}
	if o.quick {
		o.rounds, o.seconds = 2, 1
	}
	var err error
	if o.only, err = regexp.Compile(only); err != nil {
		return o, fmt.Errorf("-only: %w", err)
	}
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return o, err
	}
	if o.against != "" {
		o.against, err = filepath.Abs(o.against)
	}
	return o, err
}

func run(ctx context.Context) (err error) {
	o, err := parse()
	if err != nil {
		return err
	}
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "bs-bench-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(o.dir)) }()
	}
	report := &report{Suite: o.suite, Started: time.Now().UTC(), Seconds: o.seconds, Rounds: o.rounds, Remote: o.remote}
	switch o.suite {
	case "table":
		err = runTable(ctx, &o, report)
	case "compare":
		err = runCompare(ctx, &o, report)
	case "stress":
		err = runStress(ctx, &o, report)
	case "scale":
		err = runScale(ctx, &o, report)
	case "resync":
		err = runResync(ctx, &o, report)
	default:
		err = fmt.Errorf("no suite %q: table, compare, stress, scale or resync", o.suite)
	}
	if err != nil {
		return err
	}
	if o.json != "" {
		if err := writeJSON(o.json, report); err != nil {
			return err
		}
	}
	fmt.Println(report.Verdict)
	if o.strict && report.Below != "" {
		return errors.New("a row is below its aim")
	}
	return nil
}

func writeJSON(name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, append(b, '\n'), 0o644)
}
