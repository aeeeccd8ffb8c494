package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// sysBefore is a second blockstep, of other binaries: what a change is
// measured against.
const sysBefore = "before"

// runCompare measures every row with two builds of blockstep, interleaved.
func runCompare(ctx context.Context, o *options, rep *report) error {
	if o.against == "" {
		return errors.New("the compare suite needs -against DIR: other binaries")
	}
	var systems []*system
	defer func() {
		for _, s := range systems {
			s.stop()
		}
	}()
	for _, side := range []struct{ name, bin string }{{sysBefore, o.against}, {sysBlockstep, o.bin}} {
		dir := filepath.Join(o.dir, side.name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		s, err := newBlockstep(ctx, side.bin, o.remote, dir, imageBytes)
		if err != nil {
			return err
		}
		s.name = side.name
		systems = append(systems, s)
		fmt.Fprintf(os.Stderr, "filling %s\n", s.name)
		if err := fill(ctx, s.uri, imageBytes); err != nil {
			return err
		}
	}
	rep.Verdict = "compare: see the rows"
	for i := range rows {
		// Judged by the build before: a ratio, and no aim.
		r := row{name: rows[i].name, job: rows[i].job, mb: rows[i].mb, aims: []aim{{peer: sysBefore}}}
		if !o.only.MatchString(r.name) {
			continue
		}
		res, err := measureRow(ctx, o, &r, systems)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		judge(&r, res, rep)
		rep.Rows = append(rep.Rows, res)
		printRow(res)
	}
	return nil
}
