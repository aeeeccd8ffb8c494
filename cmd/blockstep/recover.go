package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/daemon"
)

func (a *app) recoverCmd() *cobra.Command {
	var o daemon.RecoverOptions
	var yes bool
	cmd := &cobra.Command{
		Use: "recover", Short: "Go on without a majority of the nodes, when they are gone for good", Args: noArgs,
		Long: `For a cluster that lost the majority of its nodes for ever. It works on this node's
data directory, with blockstepd stopped, and makes this node (or those of --keep)
the whole Raft group. Without --yes it only shows what would happen.

What only the lost nodes knew of the cluster state is gone. The others must stay
off: two of them that come back together with their old data directories are a
second cluster. Let each come back empty, with "blockstep node replace NAME".
Afterwards start blockstepd, and give each volume that has no majority of its
in-sync replicas a primary: blockstep failover VOLUME --force --accept-data-loss.

With several survivors, run it on each with the same --keep before any is started;
or recover the one with the highest Raft index alone and replace the others.`,
		Example: "  systemctl stop blockstepd\n  blockstep recover\n  blockstep recover --yes\n  systemctl start blockstepd",
	}
	f := cmd.Flags()
	f.StringSliceVar(&o.Keep, "keep", nil, "nodes that go on, this one among them (default: this one alone)")
	f.BoolVar(&o.Force, "force", false, "also when a majority of the nodes answers")
	f.BoolVar(&yes, "yes", false, "do it")
	cmd.RunE = a.verb(func(ctx context.Context, _ []string) error {
		cfg, err := config.Load(a.config, nil)
		if err != nil {
			return err
		}
		o.Preview = true
		logger := slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelError}))
		look, err := daemon.Recover(ctx, cfg, o, logger)
		if err != nil {
			return err
		}
		if !yes {
			if a.json {
				if err := a.print(look, nil); err != nil {
					return err
				}
			} else {
				recoveryText(a.err, look, "would be")
			}
			if !a.terminal(a.in, a.err) {
				return control.Errorf(control.CodeRefused, "make sure that the lost nodes are off, then add --yes", "nothing was done")
			}
			if err := a.confirm(ctx, false, cfg.Cluster, func() string { return "\nThe lost nodes must be off and stay off. This cannot be undone." }); err != nil {
				return err
			}
		}
		o.Preview = false
		done, err := daemon.Recover(ctx, cfg, o, logger)
		if err != nil {
			return err
		}
		return a.print(done, func(w io.Writer) { recoveryText(w, done, "is") })
	})
	return cmd
}

func recoveryText(w io.Writer, r control.Recovery, is string) {
	fmt.Fprintf(w, "cluster %s %s recovered on %s, at Raft index %d; lost: %s\n", r.Cluster, is, strings.Join(r.Keep, ", "), r.Index, orDash(strings.Join(r.Lost, ", ")))
	for _, v := range r.Volumes {
		fmt.Fprintf(w, "volume %s: replicas that are left: %s; next: %s\n", v.Volume, orDash(strings.Join(v.Replicas, ", ")), v.Next)
	}
	if is == "is" {
		fmt.Fprintln(w, "next: start blockstepd here; then, for each lost node: start it on an empty data_dir, and run blockstep node replace NAME")
	}
}
