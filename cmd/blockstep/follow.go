package main

import (
	"context"
	"fmt"
	"os/exec"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/control"
)

const (
	// followEvery is how often the primary is looked at.
	followEvery = time.Second
	// followBlind is for how long the daemon may give no answer before this node
	// counts as one that is not primary: longer than a restart takes.
	followBlind = 15 * time.Second
)

func (a *app) followCmd() *cobra.Command {
	var start, stop string
	cmd := &cobra.Command{
		Use: "follow VOLUME --start COMMAND --stop COMMAND", Short: "Run a command when this node becomes primary, and another when it no longer is",
		Args: named("volume", 1, 1),
		Long: "Runs until it is interrupted. The commands are run by sh; one that fails is run\nagain. blockstep-follow@VOLUME.service uses it for blockstep-primary@VOLUME.target.",
	}
	cmd.Flags().StringVar(&start, "start", "", "run when this node is primary (required)")
	cmd.Flags().StringVar(&stop, "stop", "", "run when it is not (required)")
	_ = cmd.MarkFlagRequired("start") // they are defined above
	_ = cmd.MarkFlagRequired("stop")
	cmd.RunE = a.ask(0, func(ctx context.Context, c *control.Client, args []string) error {
		return a.follow(ctx, c, args[0], start, stop)
	})
	return cmd
}

// follow compares what is with what was last acted on.
func (a *app) follow(ctx context.Context, c *control.Client, volume, start, stop string) error {
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	acted, is := "", false
	seen := time.Now()
	for {
		if primary, err := primaryHere(ctx, c, volume); err == nil {
			is, seen = primary, time.Now()
		} else if time.Since(seen) > followBlind {
			is = false
		}
		want := stop
		if is {
			want = start
		}
		if want != acted {
			run := exec.CommandContext(ctx, "sh", "-c", want)
			run.Stdout, run.Stderr = a.out, a.err
			if err := run.Run(); err != nil {
				fmt.Fprintf(a.err, "blockstep: %s: %v; trying again\n", want, err)
			} else {
				acted = want
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// primaryHere asks the daemon whether its own node is the volume's primary.
func primaryHere(ctx context.Context, c *control.Client, volume string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	s, err := c.Status(ctx)
	if err != nil {
		return false, err
	}
	for _, v := range s.Volumes {
		if v.Volume == volume {
			return v.Primary == s.Node && v.Health != control.Suspended, nil
		}
	}
	return false, nil
}
