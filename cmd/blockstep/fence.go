package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/control"
)

func (a *app) fenceCmd() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "fence VOLUME", Short: "End every session of a volume, also on hosts out of reach", Args: named("volume", 1, 1),
		Long: `Every NBD session and kernel device that has the volume open ends with an error, on
all hosts, also on those that are cut off or stand still: when this returns 0, nothing
that they still hold is written any more. Sessions opened afterwards work. No answered
write is lost, and the primary stays where it is, if it can.

Use it before a file system is mounted on another host than the one that had it. A
kernel device that was fenced fails its I/O: unmount, detach, attach. A client that
connects again by itself, as qemu with reconnect-delay does, is fenced only until it
has: it must be stopped.

When it fails it is not in force; to run it again is safe at any time.`,
	}
	cmd.Flags().BoolVar(&yes, "yes", false, yesHelp)
	sure := func(ctx context.Context, c *control.Client, args []string) error {
		return a.confirm(ctx, yes, args[0], func() string {
			return aboutVolume(ctx, c, args[0]) + "\n" + aboutClients(ctx, c, args[0]) + "\nEach of them ends with an error, and a file system that is mounted from one fails."
		})
	}
	cmd.RunE = a.askAfter(changeTimeout, sure, func(ctx context.Context, c *control.Client, args []string) error {
		res, err := c.Fence(ctx, args[0])
		if err != nil {
			return err
		}
		return a.print(res, func(w io.Writer) { fenced(w, res) })
	})
	return cmd
}

// fenced tells what a fence has ended.
func fenced(w io.Writer, res control.FenceResult) {
	fmt.Fprintf(w, "%s: fenced, primary is %s, epoch %d\n", res.Volume, res.Primary, res.Epoch)
	for _, n := range res.Ended {
		var had []string
		if n.Device != "" {
			had = append(had, n.Device)
		}
		had = append(had, n.Clients...)
		switch {
		case n.Error != "":
			fmt.Fprintf(w, "ended on %s: whatever was open, not known what: %s\n", n.Node, n.Error)
		case len(had) > 0:
			fmt.Fprintf(w, "ended on %s: %s\n", n.Node, strings.Join(had, ", "))
		}
	}
	if res.Lost != "" {
		fmt.Fprintln(w, res.Lost)
	}
}
