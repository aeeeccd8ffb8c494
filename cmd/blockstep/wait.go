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
	// lookTime bounds the one look of a wait that may take no time.
	lookTime = 3 * time.Second
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
		Args: named("volume", 1, 1),
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
		if timeout < 0 {
			return control.Errorf(control.CodeUsage, "write it like 30s or 5m; 0s looks once", "--timeout %v is negative", timeout)
		}
		// It is looked at once, however short the time is.
		ctx, cancel := context.WithTimeout(ctx, max(timeout, lookTime))
		defer cancel()
		v, err := (&waiter{c: c, volume: args[0], what: what}).run(ctx, timeout)
		if err != nil {
			return err
		}
		return a.print(v, func(w io.Writer) { fmt.Fprintf(w, "%s: %s, primary %s\n", v.Volume, v.Health, orDash(v.Primary)) })
	})
	return cmd
}

// waiter is what a wait knows so far: errors on the way are kept, and say at the
// end why it did not come to it.
type waiter struct {
	c            *control.Client
	volume, what string
	why          string    // it does not hold
	reached      bool      // some daemon answered
	last         error     // while none did
	missing      time.Time // since when the volume is not known
}

// run polls until the condition holds, the time is over, or ctx ends. It looks
// at least once.
func (w *waiter) run(ctx context.Context, timeout time.Duration) (control.VolumeStatus, error) {
	over := time.After(timeout)
	tick := time.NewTicker(waitEvery)
	defer tick.Stop()
	for more := true; more; {
		if v, done, err := w.look(ctx); done {
			return v, err
		}
		select {
		case <-over:
			more = false
			continue
		default:
		}
		select {
		case <-ctx.Done():
			more = false
		case <-over:
			more = false
		case <-tick.C:
		}
	}
	var v control.VolumeStatus
	if ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return v, errors.New("interrupted")
	}
	if !w.reached && w.last != nil {
		return v, w.last
	}
	if w.why == "" {
		w.why = "the daemon gave no answer"
	}
	return v, control.Errorf(control.CodeTimeout, "look at blockstep status "+w.volume, "waited for %s in vain: %s", w.what, w.why)
}

// look looks once; done when the condition holds, or never will.
func (w *waiter) look(ctx context.Context) (v control.VolumeStatus, done bool, err error) {
	v, err = w.c.VolumeStatus(ctx, w.volume)
	if err == nil {
		w.reached, w.missing = true, time.Time{}
		w.why = fmt.Sprintf("%s is %s: %s", w.volume, v.Health, v.Reason)
		var not string
		if done, not, err = conditionHolds(ctx, w.c, v, w.what); done {
			return v, true, nil
		}
		if not != "" {
			w.why = not
		}
	}
	var e *control.Error
	if errors.As(err, &e) {
		w.reached = true
		if e.Code == control.CodeNotFound {
			if w.missing.IsZero() {
				w.missing = time.Now()
			} else if time.Since(w.missing) > missingFor {
				return v, true, err
			}
		}
	}
	if err != nil && ctx.Err() == nil {
		w.last = err
		w.why = err.Error()
	}
	return v, false, nil
}

// conditionHolds says in not why it does not hold, where the volume's own reason
// is not the one.
func conditionHolds(ctx context.Context, c *control.Client, v control.VolumeStatus, what string) (holds bool, not string, err error) {
	switch what {
	case "healthy":
		return v.Health == control.Healthy, "", nil
	case "primary":
		return v.Primary != "" && v.Health != control.Suspended, "", nil
	}
	s, err := c.Status(ctx)
	if err == nil && !s.Quorum {
		not = "there is no Raft leader; down: " + orDash(down(s.Nodes))
	}
	return s.Quorum, not, err
}
