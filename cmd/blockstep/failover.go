package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/control"
)

func (a *app) switchoverCmd() *cobra.Command {
	var r control.Switchover
	cmd := &cobra.Command{
		Use: "switchover VOLUME --to NODE", Short: "Move the primary, planned: nothing lost, nothing refused", Args: named("volume", 1, 1),
		Long: "Moves the primary to another in-sync replica and returns when it serves there.\nClients see a short pause and no error.",
	}
	cmd.Flags().StringVar(&r.To, "to", "", "node that becomes primary (required)")
	_ = cmd.MarkFlagRequired("to") // it is defined above
	cmd.RunE = a.ask(changeTimeout, func(ctx context.Context, c *control.Client, args []string) error {
		if err := nodeNamesOf(cmd, "to", r.To); err != nil {
			return err
		}
		v, err := c.Switchover(ctx, args[0], r)
		if err != nil {
			return err
		}
		return a.print(v, func(w io.Writer) { fmt.Fprintf(w, "%s: primary is %s, epoch %d\n", v.Volume, v.Primary, v.Epoch) })
	})
	return cmd
}

func (a *app) failoverCmd() *cobra.Command {
	var r control.Failover
	var yes bool
	cmd := &cobra.Command{
		Use: "failover VOLUME", Short: "Name a new primary because the old one is gone", Args: named("volume", 1, 1),
		Long: `Names a new primary when automatic failover is off or cannot decide. It keeps to
the same rules: it is refused where a committed write could be lost.

--force --accept-data-loss goes round them: the replicas that can be reached
become the in-sync set, every NBD session ends with an error, and writes that only
the missing replicas hold are gone. A primary that still runs on a side that
cannot be reached is not stopped by it: make sure that it is off. When every
in-sync replica has failed, or --to names one that has, it is taken back with what
its disk holds still.`,
	}
	f := cmd.Flags()
	f.StringVar(&r.To, "to", "", "node that becomes primary (default: the best replica)")
	f.BoolVar(&r.Force, "force", false, "go on with too few replicas; needs --accept-data-loss")
	f.BoolVar(&r.AcceptDataLoss, "accept-data-loss", false, "with --force: writes may be gone")
	f.BoolVar(&yes, "yes", false, yesHelp)
	sure := func(ctx context.Context, c *control.Client, args []string) error {
		if err := nodeNamesOf(cmd, "to", r.To); err != nil {
			return err
		}
		if r.Force != r.AcceptDataLoss {
			return control.Errorf(control.CodeUsage, "give both, or neither", "--force and --accept-data-loss go together")
		}
		return a.confirm(ctx, yes || !r.Force, args[0], func() string {
			return aboutVolume(ctx, c, args[0]) + "\nWrites that only the replicas out of reach hold will be gone, and every NBD session ends with an\nerror. A primary that still runs out of reach is not stopped: make sure that it is off."
		})
	}
	cmd.RunE = a.askAfter(changeTimeout, sure, func(ctx context.Context, c *control.Client, args []string) error {
		res, err := c.Failover(ctx, args[0], r)
		if err != nil {
			return err
		}
		return a.print(res, func(w io.Writer) {
			fmt.Fprintf(w, "%s: primary is %s, epoch %d\n", args[0], res.Primary, res.Epoch)
			if res.Lost != "" {
				fmt.Fprintln(w, res.Lost)
			}
			// With too few copies it has a primary, and serves nobody.
			if v, err := c.VolumeStatus(ctx, args[0]); err == nil && v.Health == control.Suspended {
				reason(w, v)
			}
		})
	})
	return cmd
}

func (a *app) invalidateCmd() *cobra.Command {
	var r control.Invalidate
	var yes bool
	cmd := &cobra.Command{
		Use: "invalidate VOLUME --node NODE", Short: "Resync one replica anew", Args: named("volume", 1, 1),
		Long: "Throws one replica's content away and copies it anew from the others.",
	}
	cmd.Flags().StringVar(&r.Node, "node", "", "node whose replica is resynced (required)")
	cmd.Flags().BoolVar(&yes, "yes", false, yesHelp)
	_ = cmd.MarkFlagRequired("node") // it is defined above
	sure := func(ctx context.Context, c *control.Client, args []string) error {
		if err := nodeNamesOf(cmd, "node", r.Node); err != nil {
			return err
		}
		return a.confirm(ctx, yes, args[0], func() string {
			return aboutVolume(ctx, c, args[0]) + "\nThe replica on " + r.Node + " is thrown away and copied whole from the others; until then there is one good replica less."
		})
	}
	cmd.RunE = a.askAfter(changeTimeout, sure, func(ctx context.Context, c *control.Client, args []string) error {
		if err := c.Invalidate(ctx, args[0], r); err != nil {
			return err
		}
		return a.print(map[string]string{"volume": args[0], "node": r.Node}, func(w io.Writer) {
			fmt.Fprintf(w, "the replica of %s on %s is being resynced; next: blockstep status %s --watch\n", args[0], r.Node, args[0])
		})
	})
	return cmd
}

func (a *app) verifyCmd() *cobra.Command {
	var r control.Verify
	cmd := &cobra.Command{
		Use: "verify VOLUME", Short: "Compare the replicas online", Args: named("volume", 1, 1),
		Long: "Compares the replicas that are in sync, at one log position while clients go on, and\nsays which were not. Exit code 1 when they differ and were not repaired. Where very\nmuch differs it ends early and says up to where it compared; with --repair it goes on\nto the end. A volume is compared by one run at a time, and two through one node: a\nsecond run of a volume is refused, one too many waits.",
	}
	cmd.Flags().BoolVar(&r.Repair, "repair", false, "write what the majority has where a replica differs")
	cmd.RunE = a.ask(0, func(ctx context.Context, c *control.Client, args []string) error {
		var last control.VerifyProgress
		err := c.Verify(ctx, args[0], r, func(p control.VerifyProgress) error {
			last = p
			switch {
			case a.json:
			case p.Waits != "":
				fmt.Fprintln(a.err, p.Waits)
			case p.TotalBytes > 0:
				fmt.Fprintf(a.err, "\rcompared %d%%", 100*p.DoneBytes/p.TotalBytes)
			}
			return nil
		})
		if err != nil {
			return err
		}
		return a.verified(args[0], last)
	})
	return cmd
}

func (a *app) verified(volume string, p control.VerifyProgress) error {
	open := 0
	for _, e := range p.Found {
		if !e.Repaired {
			open++
		}
	}
	if err := a.print(p, func(w io.Writer) {
		fmt.Fprintln(a.err)
		for _, e := range p.Found {
			fmt.Fprintf(w, "%s differs at %d, %d bytes, repaired: %s\n", e.Node, e.Offset, e.Length, yesNo(e.Repaired))
		}
		if p.More > 0 {
			fmt.Fprintf(w, "and %d ranges more, repaired: yes\n", p.More)
		}
		switch {
		case len(p.LeftOut) > 0 && len(p.Found) == 0:
			fmt.Fprintf(w, "the replicas of %s on %s are equal; not compared, since not in sync: %s (blockstep status %[1]s)\n",
				volume, strings.Join(p.Compared, ", "), strings.Join(p.LeftOut, ", "))
		case len(p.LeftOut) > 0:
			fmt.Fprintf(w, "compared: %s; not, since not in sync: %s (blockstep status %s)\n", strings.Join(p.Compared, ", "), strings.Join(p.LeftOut, ", "), volume)
		case len(p.Found) == 0:
			fmt.Fprintf(w, "all replicas of %s are equal\n", volume)
		}
	}); err != nil {
		return err
	}
	switch {
	case open > 0 && p.DoneBytes < p.TotalBytes:
		return control.Errorf(control.CodeFailed, fmt.Sprintf("run blockstep verify %s --repair, which goes on to the end", volume),
			"compared up to %d of %d bytes: %d ranges differ", p.DoneBytes, p.TotalBytes, open)
	case open > 0:
		return control.Errorf(control.CodeFailed, fmt.Sprintf("run blockstep verify %s --repair", volume), "%d ranges differ", open)
	}
	return nil
}
