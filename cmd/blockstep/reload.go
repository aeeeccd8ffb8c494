package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/control"
)

func (a *app) reloadCmd() *cobra.Command {
	return &cobra.Command{
		Use: "reload", Short: "Have the daemon read its configuration again", Args: noArgs,
		Long: `Has the daemon on this host read its configuration again, as SIGHUP does. What can
change while it runs is applied; what cannot is named, and stays as it was until
the daemon is restarted. A configuration that is not valid, or is another node's,
changes nothing.`,
		RunE: a.ask(askTimeout, func(ctx context.Context, c *control.Client, _ []string) error {
			out, err := c.Reload(ctx)
			if err != nil {
				return err
			}
			return a.print(out, func(w io.Writer) {
				for _, k := range out.Applied {
					fmt.Fprintf(w, "applied: %s is %s, was %s\n", k.Key, orDash(k.New), orDash(k.Old))
				}
				for _, k := range out.Restart {
					fmt.Fprintf(w, "needs a restart of blockstepd: %s becomes %s, is %s\n", k.Key, orDash(k.New), orDash(k.Old))
				}
				for _, k := range out.Ignored {
					fmt.Fprintf(w, "without effect: %s is %s, was %s\n  next: %s\n", k.Key, orDash(k.New), orDash(k.Old), k.Next)
				}
				if len(out.Applied)+len(out.Restart)+len(out.Ignored) == 0 {
					fmt.Fprintln(w, "nothing has changed")
				}
			})
		}),
	}
}
