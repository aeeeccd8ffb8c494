package main

import (
	"context"
	"errors"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/daemon"
	"github.com/blockstep/blockstep/internal/demo"
)

func (a *app) demoCmd() *cobra.Command {
	var story bool
	o := demo.Options{Status: clusterTable}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run three nodes and a volume on this machine, to see it work",
		Long: `Runs three nodes on loopback with a volume of 1 GiB, prints its NBD addresses, and
shows the status until Ctrl-C.

With --story the nodes are processes, and it tells a story on real data: it
writes an ext4 image through NBD, kills the primary in the middle, goes on on the
same session, brings the dead node back, and compares all three replicas byte by
byte. It ends with 0 only if all of that held.`,
		Args: noArgs,
	}
	f := cmd.Flags()
	f.BoolVar(&story, "story", false, "tell the story and end")
	f.StringVar(&o.From, "from", "", "with --story: directory whose files fill the image (default: the Go sources)")
	f.StringVar(&o.Dir, "dir", "", "directory for the nodes' data, which a later demo goes on with (default: a temporary one, removed at the end)")
	cmd.RunE = a.verb(func(ctx context.Context, _ []string) error {
		o.Out = a.out
		if !story {
			if o.From != "" {
				return control.Errorf(control.CodeUsage, "add --story, or leave it out", "--from belongs to --story")
			}
			return demo.Live(ctx, o)
		}
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		o.Exe = exe
		err = demo.Story(ctx, o)
		if err != nil && ctx.Err() != nil {
			return errors.New("interrupted")
		}
		return err
	})
	return cmd
}

// demoNodeCmd runs one node of the story; it is not for people.
func (a *app) demoNodeCmd() *cobra.Command {
	return &cobra.Command{
		Use: "demo-node", Short: "Run one node of the demo", Args: noArgs, Hidden: true,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			cfg, err := config.Load(a.config, nil)
			if err != nil {
				return err
			}
			level := new(slog.LevelVar)
			return daemon.Run(ctx, cfg, slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: level})), daemon.Hooks{
				Level: level, Load: func() (*config.Config, error) { return config.Load(a.config, nil) },
			})
		}),
	}
}
