package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/daemon"
)

func (a *app) volumeCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "volume COMMAND", Short: "Create, list, resize and delete volumes"})
	cmd.AddCommand(a.volumeCreateCmd(), a.volumeListCmd(), a.volumeDeleteCmd(), a.volumeResizeCmd(), a.volumeSetCmd())
	return cmd
}

// parseSize reads a size argument; what is wrong with it is bad usage.
func parseSize(s string) (int64, error) {
	n, err := config.ParseSize(s)
	if err != nil {
		return 0, control.Errorf(control.CodeUsage, "", "%v", err)
	}
	return n, nil
}

// parseVolumeSize is parseSize of a whole volume.
func parseVolumeSize(s string) (int64, error) {
	if _, err := config.ParseSize(s); errors.Is(err, config.ErrSizeRange) {
		return 0, control.Errorf(control.CodeUsage, "a volume has at most "+config.FormatSize(daemon.VolumeSizeMax), "%v", err)
	}
	return parseSize(s)
}

func (a *app) volumeCreateCmd() *cobra.Command {
	var size string
	var r control.CreateVolume
	var devices []string
	var yes bool
	cmd := &cobra.Command{
		Use:   "create NAME --size SIZE",
		Short: "Create a volume, and return when it serves",
		Long: `Creates a volume with a replica on each node that is no witness, or on those
named with --replicas, and returns when its primary serves. The volume is then
the NBD export NAME on every node.

It reads as zeroes: what is on a device that is named with --device is gone. The
device must be there, large enough, and used by nobody.

Ack says what the answer to a write waits for:
  quorum   (default) a majority of the in-sync set holds it; a FLUSH makes it durable on a majority
  durable  a majority has fsynced it
  local    the primary holds it; a failover may lose the last writes`,
		Example: "  blockstep volume create db --size 10GiB\n  blockstep volume create db --size 10GiB --replicas alpha,beta --device alpha=/dev/vg0/db",
		Args:    named("volume", 1, 1),
	}
	f := cmd.Flags()
	f.StringVar(&size, "size", "", "size, for example 10GiB (required)")
	f.StringSliceVar(&r.Replicas, "replicas", nil, "nodes that get a replica (default: all that are no witness)")
	f.StringArrayVar(&devices, "device", nil, "NODE=/dev/… for a backing device instead of a file, which is erased; once for each node")
	f.StringVar(&r.Ack, "ack", "", "quorum, durable or local")
	f.IntVar(&r.MinCopy, "min-copies", 0, "fewest in-sync replicas that writes go on with (default: 2 with three or more replicas, else 1)")
	_ = cmd.MarkFlagRequired("size") // it is defined above
	f.BoolVar(&yes, "yes", false, yesHelp)
	sure := func(ctx context.Context, _ *control.Client, args []string) (err error) {
		if err := nodeNamesOf(cmd, "replicas", r.Replicas...); err != nil {
			return err
		}
		if r.Size, err = parseVolumeSize(size); err != nil {
			return err
		}
		if r.Devices, err = parseDevices(devices); err != nil {
			return err
		}
		return a.confirm(ctx, yes || len(devices) == 0, args[0], func() string {
			return "What is on " + strings.Join(devices, " and ") + " is gone then."
		})
	}
	cmd.RunE = a.askAfter(changeTimeout, sure, func(ctx context.Context, c *control.Client, args []string) error {
		r.Name = args[0]
		v, err := c.CreateVolume(ctx, r)
		if err != nil {
			return err
		}
		warnings(a.err, v.Warnings)
		return a.print(v, func(w io.Writer) {
			fmt.Fprintf(w, "volume %s of %s serves, primary %s\n", v.Volume, config.FormatSize(v.Size), v.Primary)
		})
	})
	return cmd
}

func parseDevices(list []string) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range list {
		node, path, ok := strings.Cut(s, "=")
		if !ok || node == "" || path == "" {
			return nil, control.Errorf(control.CodeUsage, "write it like --device alpha=/dev/vg0/db", "--device %q is not NODE=PATH", s)
		}
		if out[node] != "" {
			return nil, control.Errorf(control.CodeUsage, "give one device for each node", "--device names %s twice, with %s and %s", node, out[node], path)
		}
		out[node] = path
	}
	return out, nil
}

func (a *app) volumeListCmd() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the volumes", Args: noArgs,
		RunE: a.ask(askTimeout, func(ctx context.Context, c *control.Client, _ []string) error {
			vols, err := c.Volumes(ctx)
			if err != nil {
				return err
			}
			return a.print(vols, func(w io.Writer) {
				if len(vols) == 0 {
					fmt.Fprintln(w, "no volumes; next: blockstep volume create NAME --size 10GiB")
					return
				}
				volumeTable(w, vols)
				for _, same := range alike(vols) {
					fmt.Fprintln(w)
					reason(w, same)
				}
			})
		}),
	}
}

func (a *app) volumeDeleteCmd() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "delete NAME", Short: "Delete a volume and the content of all its replicas", Args: named("volume", 1, 1),
		Long: "Deletes a volume: its content is gone on every node. On a terminal it shows what\nthat is and who is connected to it, and wants the volume's name typed, unless --yes\nis given. NBD clients do not keep it from that. A volume that is\nattached to a kernel device is not deleted.",
	}
	cmd.Flags().BoolVar(&yes, "yes", false, yesHelp)
	sure := func(ctx context.Context, c *control.Client, args []string) error {
		return a.confirm(ctx, yes, args[0], func() string {
			return aboutVolume(ctx, c, args[0]) + "\n" + aboutClients(ctx, c, args[0]) + "\nThis deletes it and its content on every node."
		})
	}
	cmd.RunE = a.askAfter(changeTimeout, sure, func(ctx context.Context, c *control.Client, args []string) error {
		if err := c.DeleteVolume(ctx, args[0]); err != nil {
			return err
		}
		return a.print(map[string]any{"volume": args[0], "deleted": true}, func(w io.Writer) { fmt.Fprintf(w, "volume %s is deleted\n", args[0]) })
	})
	return cmd
}

func (a *app) volumeResizeCmd() *cobra.Command {
	return &cobra.Command{
		Use: "resize NAME SIZE", Short: "Make a volume larger, online", Args: named("volume", 2, 2),
		Long: "Makes a volume larger on all its replicas. SIZE is what it has then, not what is\nadded. NBD clients see the new size when they connect again. A volume cannot be\nmade smaller.",
		RunE: a.ask(changeTimeout, func(ctx context.Context, c *control.Client, args []string) error {
			n, err := parseVolumeSize(args[1])
			if err != nil {
				return err
			}
			v, err := c.ResizeVolume(ctx, args[0], control.Resize{Size: n})
			if err != nil {
				return err
			}
			return a.print(v, func(w io.Writer) { fmt.Fprintf(w, "volume %s has %s\n", v.Volume, config.FormatSize(v.Size)) })
		}),
	}
}

func (a *app) volumeSetCmd() *cobra.Command {
	var copies, replicas int
	var most, least string
	cmd := &cobra.Command{
		Use: "set NAME", Short: "Change options of a volume, online", Args: named("volume", 1, 1),
		Long: `Changes what is given, and leaves the rest.

--min-copies is the fewest in-sync replicas that writes go on with. With fewer the
volume holds its I/O; to have it go on on the one copy that is left, set it to 1.

--replicas makes more replicas, on nodes that have none: the one with the fewest
first. It returns when they are there; that they are copied is waited for with
blockstep wait NAME --for healthy. Fewer are made by node drain and node remove.`,
		Example: "  blockstep volume set db --min-copies 1\n  blockstep volume set db --replicas 3\n  blockstep volume set db --resync-rate-max 50MiB",
	}
	f := cmd.Flags()
	f.IntVar(&copies, "min-copies", 0, "fewest in-sync replicas that writes go on with")
	f.IntVar(&replicas, "replicas", 0, "how many replicas it shall have; never fewer than it has")
	f.StringVar(&most, "resync-rate-max", "", "ceiling of a resync, bytes a second; 0: as the nodes are configured")
	f.StringVar(&least, "resync-rate-min", "", "what a resync gets beside client I/O, bytes a second; 0: as the nodes are configured")
	cmd.RunE = a.ask(changeTimeout, func(ctx context.Context, c *control.Client, args []string) error {
		var r control.SetOptions
		if f.Changed("min-copies") {
			r.MinCopies = &copies
		}
		if f.Changed("replicas") {
			r.Replicas = &replicas
		}
		for flag, to := range map[string]**int64{"resync-rate-max": &r.ResyncRateMax, "resync-rate-min": &r.ResyncRateMin} {
			if !f.Changed(flag) {
				continue
			}
			n, err := parseSize(f.Lookup(flag).Value.String())
			if err != nil {
				return err
			}
			*to = &n
		}
		if r == (control.SetOptions{}) {
			return control.Errorf(control.CodeUsage, "give --min-copies, --replicas, --resync-rate-max or --resync-rate-min", "there is nothing to set")
		}
		v, err := c.SetOptions(ctx, args[0], r)
		if err != nil {
			return err
		}
		warnings(a.err, v.Warnings)
		return a.print(v, func(w io.Writer) {
			volumeDetail(w, v)
			if r.Replicas != nil && v.Health != control.Healthy {
				fmt.Fprintf(w, "\nto wait until all of them are in sync: blockstep wait %s --for healthy\n", v.Volume)
			}
		})
	})
	return cmd
}
