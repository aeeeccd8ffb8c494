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

// eventsAgain is the pause before a follower that lost its daemon asks again.
const eventsAgain = 250 * time.Millisecond

func (a *app) eventsCmd() *cobra.Command {
	var follow bool
	var since string
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show what happened, one line each",
		Long: `Prints what happened in the cluster and on the node that is asked, oldest first:
failovers, replicas that left or came back, failed disks, discarded tails. With
--json each line is one object; its cursor can be passed to --since.

With --follow it goes on until Ctrl-C. When the daemon is restarted meanwhile it
waits, and goes on after the last event that it printed: none is missing, none
comes twice. (What a node alone noticed is forgotten when its daemon ends.)`,
		Example: "  blockstep events --follow\n  blockstep events --json --since 57.12.9f3a01c4",
		Args:    noArgs,
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on printing until Ctrl-C")
	cmd.Flags().StringVar(&since, "since", "", "begin after the event with this cursor")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !follow {
			return a.ask(askTimeout, func(ctx context.Context, c *control.Client, _ []string) error {
				return c.Events(ctx, since, false, a.printEvent)
			})(cmd, args)
		}
		return a.ask(0, func(ctx context.Context, c *control.Client, _ []string) error {
			return a.followEvents(ctx, c, since)
		})(cmd, args)
	}
	return cmd
}

// followEvents prints until ctx ends. A daemon that goes away is waited for once
// it has been reached, and asked for what came after the last event printed.
func (a *app) followEvents(ctx context.Context, c *control.Client, since string) error {
	reached, told := false, false
	for {
		err := c.Follow(ctx, since, func() { reached, told = true, false }, func(e control.Event) error {
			if err := a.printEvent(e); err != nil {
				return err
			}
			since = e.Cursor
			return nil
		})
		if ctx.Err() != nil {
			return nil //nolint:nilerr // Ctrl-C is how it ends
		}
		if err != nil && (!reached || !errors.Is(err, control.ErrUnreachable)) {
			return err
		}
		if !told {
			told = true
			fmt.Fprintln(a.err, "blockstep: the daemon is gone; going on with its events when it is back (Ctrl-C ends)")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(eventsAgain):
		}
	}
}

func (a *app) printEvent(e control.Event) error {
	if a.json {
		return json.NewEncoder(a.out).Encode(e)
	}
	about := e.Volume
	if about == "" {
		about = "cluster"
	}
	_, err := fmt.Fprintf(a.out, "%s  %-12s %-*s %s\n", e.Time.Local().Format(time.DateTime), about, kindWidth, e.Kind, e.Text)
	return err
}

// kindWidth is what the longest kind of event takes: events come one by one, so
// that the column cannot be fitted to those that are shown.
var kindWidth = func() (width int) {
	for _, k := range control.EventKinds {
		width = max(width, len(k))
	}
	return width
}()
