package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/control"
)

const (
	// waitEvery is how often the condition is looked at.
	waitEvery = 100 * time.Millisecond
	// missingFor is how long a volume may be unknown before waiting for it ends:
	// a daemon that has just started does not know the cluster's volumes yet.
	missingFor = 3 * time.Second
)

func (a *app) waitCmd() *cobra.Command {
	var what string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "wait VOLUME --for healthy|primary|quorum",
		Short: "Wait for a volume, for scripts and units",
		Long: `Waits until the volume is as asked:
  healthy  every replica is up and in sync
  primary  some node serves it: clients get answers
  quorum   a majority of the nodes agrees, so that the cluster state can change

Exit codes: 0 it is so, 4 the time is over, 3 no daemon was reachable all the time.`,
		Args: cobra.ExactArgs(1),
	}
	cmd.Flags().StringVar(&what, "for", "", "healthy, primary or quorum (required)")
	cmd.Flags().DurationVar(&timeout, "timeout", 30*time.Second, "how long to wait")
	_ = cmd.MarkFlagRequired("for") // it is defined above
	cmd.RunE = a.verb(func(ctx context.Context, args []string) error {
		if !slices.Contains([]string{"healthy", "primary", "quorum"}, what) {
			return control.Errorf(control.CodeUsage, "allowed are healthy, primary and quorum", "cannot wait for %q", what)
		}
		c, err := a.dial()
		if err != nil {
			return err
		}
		defer c.Close()
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		v, err := waitFor(ctx, c, args[0], what)
		if err != nil {
			return err
		}
		return a.print(v, func(w io.Writer) { fmt.Fprintf(w, "%s: %s, primary %s\n", v.Volume, v.Health, orDash(v.Primary)) })
	})
	return cmd
}

// waitFor polls until the condition holds or ctx ends. Errors on the way are
// kept, and say at the end why it did not come to it.
func waitFor(ctx context.Context, c *control.Client, volume, what string) (control.VolumeStatus, error) {
	tick := time.NewTicker(waitEvery)
	defer tick.Stop()
	var last error
	why, reached := "", false
	var missing time.Time
	for {
		v, err := c.VolumeStatus(ctx, volume)
		var holds bool
		if err == nil {
			reached, missing = true, time.Time{}
			why = fmt.Sprintf("%s is %s: %s", volume, v.Health, v.Reason)
			if holds, err = conditionHolds(ctx, c, v, what); holds {
				return v, nil
			}
		}
		var e *control.Error
		if errors.As(err, &e) {
			reached = true
			if e.Code == control.CodeNotFound {
				if missing.IsZero() {
					missing = time.Now()
				} else if time.Since(missing) > missingFor {
					return v, err
				}
			}
		}
		if err != nil && ctx.Err() == nil {
			last = err
			why = err.Error()
		}
		select {
		case <-ctx.Done():
			if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return v, errors.New("interrupted")
			}
			if !reached && last != nil {
				return v, last
			}
			return v, control.Errorf(control.CodeTimeout, "look at blockstep status "+volume, "waited for %s in vain: %s", what, why)
		case <-tick.C:
		}
	}
}

func conditionHolds(ctx context.Context, c *control.Client, v control.VolumeStatus, what string) (bool, error) {
	switch what {
	case "healthy":
		return v.Health == control.Healthy, nil
	case "primary":
		return v.Primary != "" && v.Health != control.Suspended, nil
	}
	s, err := c.Status(ctx)
	return s.Quorum, err
}
