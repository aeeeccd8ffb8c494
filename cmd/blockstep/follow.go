package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/control"
)

const (
	// followEvery is how often the primary is looked at when no event says that
	// something has changed: a volume that is suspended says nothing.
	followEvery = 3 * time.Second
	// followAgain is the pause before a command that failed, or a daemon that gave
	// no answer, is tried again.
	followAgain = time.Second
	// followBlind is for how long the daemon may give no answer before this node
	// counts as one that is not primary: longer than a restart takes.
	followBlind = 15 * time.Second
)

func (a *app) followCmd() *cobra.Command {
	var start, stop string
	cmd := &cobra.Command{
		Use: "follow VOLUME --start COMMAND --stop COMMAND", Short: "Run a command when this node becomes primary, and another when it no longer is",
		Args: named("volume", 1, 1),
		Long: "Runs until it is interrupted. The commands are run by sh; one that fails is run\nagain. A volume that does not exist is said once, and waited for. blockstep-follow@VOLUME.service uses it for blockstep-primary@VOLUME.target.",
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

// follow compares what is with what was last acted on, whenever something
// happens to the volume.
func (a *app) follow(ctx context.Context, c *control.Client, volume, start, stop string) error {
	ctx, cancel := context.WithCancel(ctx)
	news := make(chan struct{}, 1)
	var wg sync.WaitGroup
	wg.Go(func() { runNews(ctx, c, volume, news) })
	defer wg.Wait()
	defer cancel()
	acted, is, self, told := "", false, "", false
	seen := time.Now()
	for {
		pause := followEvery
		primary, err := primaryHere(ctx, c, volume, &self)
		missing := (*control.Error)(nil)
		switch {
		case errors.As(err, &missing) && missing.Code == control.CodeNotFound:
			if !told { // it may come later, and the name may be mistyped
				fmt.Fprintf(a.err, "blockstep: %v; waiting for it\n", missing)
			}
			is, told, seen = false, true, time.Now()
		case err == nil:
			is, told, seen = primary, false, time.Now()
		default:
			pause = followAgain
			if time.Since(seen) > followBlind {
				is = false
			}
		}
		want := stop
		if is {
			want = start
		}
		if want != acted {
			run := exec.CommandContext(ctx, "sh", "-c", want)
			run.Stdout, run.Stderr = a.stdout, a.err
			if err := run.Run(); err != nil && ctx.Err() == nil {
				fmt.Fprintf(a.err, "blockstep: %s: %v; trying again\n", want, err)
				pause = followAgain
			} else {
				acted = want
			}
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-news:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// runNews says when something happened to a volume, until ctx ends. While the
// daemon is away there is none.
func runNews(ctx context.Context, c *control.Client, volume string, news chan<- struct{}) {
	since := ""
	for ctx.Err() == nil {
		err := c.Follow(ctx, since, func() {}, func(e control.Event) error {
			since = e.Cursor
			if e.Volume == volume {
				select {
				case news <- struct{}{}:
				default: // it has one waiting that covers this one
				}
			}
			return nil
		})
		if refused := (*control.Error)(nil); errors.As(err, &refused) {
			since = "" // of another daemon
		}
		select {
		case <-ctx.Done():
		case <-time.After(followAgain):
		}
	}
}

// primaryHere asks the daemon whether its own node, whose name is kept in self,
// is the volume's primary.
func primaryHere(ctx context.Context, c *control.Client, volume string, self *string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if *self == "" {
		s, err := c.Status(ctx)
		if err != nil {
			return false, err
		}
		*self = s.Node
	}
	v, err := c.VolumeStatus(ctx, volume)
	if err != nil {
		return false, err
	}
	return v.Primary == *self && v.Health != control.Suspended, nil
}
