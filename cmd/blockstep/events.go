package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/control"
)

func (a *app) eventsCmd() *cobra.Command {
	var follow bool
	var since string
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show what happened, one line each",
		Long: `Prints what happened in the cluster and on the node that is asked, oldest first:
failovers, replicas that left or came back, failed disks, discarded tails. With
--json each line is one object; its cursor can be passed to --since.`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on printing until Ctrl-C")
	cmd.Flags().StringVar(&since, "since", "", "begin after the event with this cursor")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		limit := askTimeout
		if follow {
			limit = 0
		}
		return a.ask(limit, func(ctx context.Context, c *control.Client, _ []string) error {
			err := c.Events(ctx, since, follow, a.printEvent)
			if follow && errors.Is(err, context.Canceled) {
				err = nil // Ctrl-C is how it ends
			}
			return err
		})(cmd, args)
	}
	return cmd
}

func (a *app) printEvent(e control.Event) error {
	if a.json {
		return json.NewEncoder(a.out).Encode(e)
	}
	about := e.Volume
	if about == "" {
		about = "cluster"
	}
	_, err := fmt.Fprintf(a.out, "%s  %-12s %-14s %s\n", e.Time.Local().Format(time.DateTime), about, e.Kind, e.Text)
	return err
}
