package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/daemon"
)

// doctorTimeout is longer than the slowest node may take.
const doctorTimeout = 30 * time.Second

func (a *app) doctorCmd() *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "Check hosts, disks, network and configuration of all nodes", Args: noArgs,
		Long: `Has each node look at its host (nbd module, limits, clock), at its disk (free
space, how long an fsync takes) and at its links, compares versions, clocks and
configurations of the nodes, and says what to do about what it finds. Exit code 1
when something has to be mended; a warning alone is none.

Without a daemon on this host it looks at the configuration, the host, the disk
and the ports by itself, says why the daemon may not run, and ends with 3.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := a.dial(); errors.As(err, new(*config.Error)) {
				return a.verb(func(ctx context.Context, _ []string) error {
					return a.examineHost(ctx, errors.New("it is not known where: the configuration is not valid"), err)
				})(cmd, args)
			}
			return a.ask(doctorTimeout, a.doctor)(cmd, args)
		},
	}
}

func (a *app) doctor(ctx context.Context, c *control.Client, _ []string) error {
	list, err := c.Doctor(ctx)
	if errors.Is(err, control.ErrUnreachable) && c.Local() {
		return a.examineHost(ctx, err, err)
	}
	if err != nil {
		return err
	}
	if err := a.print(list, func(w io.Writer) { doctorTable(w, list) }); err != nil {
		return err
	}
	bad := 0
	for _, f := range list {
		if f.State == control.FindingBad {
			bad++
		}
	}
	if bad > 0 {
		return control.Errorf(control.CodeFailed, "do what stands beside it, then run blockstep doctor again", "%s to be mended", count(bad, "thing"))
	}
	return nil
}

// examineHost is the doctor where no daemon is reached; err is how it ends.
func (a *app) examineHost(ctx context.Context, down, err error) error {
	list := daemon.ExamineHost(ctx, a.config, down)
	if perr := a.print(list, func(w io.Writer) { doctorTable(w, list) }); perr != nil {
		return perr
	}
	return err
}

func doctorTable(w io.Writer, list []control.Finding) {
	rows := [][]string{{"NODE", "", "CHECK", "FOUND"}}
	for _, f := range list {
		rows = append(rows, []string{f.Node, f.State, f.Check, f.Text})
	}
	columns(w, rows...)
	for _, f := range list {
		if f.State != control.FindingOK && f.Next != "" {
			fmt.Fprintf(w, "\n%s: %s: %s: %s\n  next: %s", f.State, f.Node, f.Check, f.Text, f.Next)
		}
	}
	fmt.Fprintln(w)
}
