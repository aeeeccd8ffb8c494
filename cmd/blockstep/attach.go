package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/control"
)

func (a *app) attachCmd() *cobra.Command {
	var r control.Attach
	var ifNeeded bool
	cmd := &cobra.Command{
		Use: "attach VOLUME [/dev/nbdN]", Short: "Connect a volume to a kernel device of this host",
		Args: func(cmd *cobra.Command, args []string) error {
			if err := named("volume", 1, 2)(cmd, args); err != nil || len(args) < 2 || args[1] != "" {
				return err
			}
			return errors.New(`the device is ""; leave it out for a free one, or name one like /dev/nbd0`)
		},
		Long: "Connects a volume to /dev/nbdN, or to a free one. The device stays while the\nvolume's primary moves between nodes.",
	}
	cmd.Flags().IntVar(&r.Connections, "connections", 0, "connections to the daemon (default 1)")
	cmd.Flags().BoolVar(&ifNeeded, "if-needed", false, "done when the volume is attached already, to whichever device")
	cmd.Flags().BoolVar(&r.ReadOnly, "read-only", false, "the device cannot be written")
	cmd.RunE = a.ask(changeTimeout, func(ctx context.Context, c *control.Client, args []string) error {
		if len(args) == 2 {
			r.Device = args[1]
		}
		out, err := c.Attach(ctx, args[0], r)
		if err != nil && ifNeeded {
			out, err = attached(ctx, c, args[0], err)
		}
		if err != nil {
			return err
		}
		warnings(a.err, out.Warnings)
		return a.print(out, func(w io.Writer) { fmt.Fprintf(w, "%s is attached as %s\n", out.Volume, out.Device) })
	})
	return cmd
}

// attached finds the attachment of a volume that serves; refused is returned
// when there is none.
func attached(ctx context.Context, c *control.Client, volume string, refused error) (control.Attachment, error) {
	list, err := c.Attachments(ctx)
	if err != nil {
		return control.Attachment{}, err
	}
	for _, t := range list {
		if t.Volume == volume && t.Lost == "" {
			return t, nil
		}
	}
	return control.Attachment{}, refused
}

func (a *app) detachCmd() *cobra.Command {
	return &cobra.Command{
		Use: "detach VOLUME", Short: "Disconnect a volume from its kernel device", Args: named("volume", 1, 1),
		RunE: a.ask(changeTimeout, func(ctx context.Context, c *control.Client, args []string) error {
			if err := c.Detach(ctx, args[0]); err != nil {
				return err
			}
			return a.print(map[string]string{"volume": args[0]}, func(w io.Writer) { fmt.Fprintf(w, "%s is detached\n", args[0]) })
		}),
	}
}

func (a *app) attachmentsCmd() *cobra.Command {
	return &cobra.Command{
		Use: "attachments", Short: "List the kernel devices of this host", Args: noArgs,
		RunE: a.ask(askTimeout, func(ctx context.Context, c *control.Client, _ []string) error {
			list, err := c.Attachments(ctx)
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) {
				rows := [][]string{{"VOLUME", "DEVICE", "CONNECTIONS", "READ-ONLY", "STATE"}}
				for _, t := range list {
					rows = append(rows, []string{t.Volume, t.Device, fmt.Sprint(t.Connections), yesNo(t.ReadOnly), attachmentState(t)})
				}
				columns(w, rows...)
			})
		}),
	}
}

func attachmentState(t control.Attachment) string {
	if t.Lost == "" {
		return "serves"
	}
	return "lost: " + t.Lost + "; unmount it, then run blockstep detach " + t.Volume
}
