package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/daemon"
)

func (a *app) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArgs,
		RunE: a.verb(func(context.Context, []string) error {
			return a.print(map[string]string{"version": daemon.Version()}, func(w io.Writer) { fmt.Fprintln(w, "blockstep", daemon.Version()) })
		}),
	}
}
