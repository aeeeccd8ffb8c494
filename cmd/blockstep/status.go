package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
)

// watchEvery is the pace of --watch.
const watchEvery = time.Second

func (a *app) statusCmd() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "status [VOLUME]",
		Short: "Show nodes, volumes and replicas, what is wrong and what to do",
		Long: `Shows the nodes, the Raft leader and each volume: its health, its primary and
epoch, each replica's state, and, when it is not healthy, the reason and the next
command to type. With VOLUME, that one in detail.

Health: healthy (every replica is up and in sync), degraded (serving with fewer),
suspended (nobody serves: I/O is held and goes on by itself, it does not fail).`,
		Args: named("volume", 0, 1),
	}
	cmd.Flags().BoolVar(&watch, "watch", false, "show it anew each second until Ctrl-C")
	show := func(ctx context.Context, c *control.Client, args []string, w io.Writer) error {
		if len(args) == 1 {
			v, err := c.VolumeStatus(ctx, args[0])
			if err != nil {
				return err
			}
			return a.print(v, func(io.Writer) { volumeDetail(w, v) })
		}
		s, err := c.Status(ctx)
		if err != nil {
			return err
		}
		return a.print(s, func(io.Writer) { clusterTable(w, s) })
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !watch {
			return a.ask(askTimeout, func(ctx context.Context, c *control.Client, args []string) error {
				return show(ctx, c, args, a.out)
			})(cmd, args)
		}
		return a.ask(0, func(ctx context.Context, c *control.Client, args []string) error {
			return a.watch(ctx, func(w io.Writer) error { return show(ctx, c, args, w) })
		})(cmd, args)
	}
	return cmd
}

// watch shows anew until ctx ends. On a terminal each frame is drawn over the
// last one, so that nothing flickers; elsewhere frames follow one another. A
// daemon that is not reachable, or cannot answer, for a while is shown as such,
// since that is when one watches.
func (a *app) watch(ctx context.Context, show func(w io.Writer) error) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	screen := a.terminal(a.stdout, a.stdout)
	for {
		var frame bytes.Buffer
		err := show(&frame)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if !passes(err) {
				return err
			}
			if a.json {
				fmt.Fprintln(a.err, err)
			}
			frame.Reset()
			fmt.Fprintln(&frame, err)
		}
		if !a.json {
			if err := a.draw(frame.String(), screen); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// passes reports whether an error may be gone at the next look: there is no
// daemon, or one that has just started and does not know its cluster yet.
func passes(err error) bool {
	if e := (*control.Error)(nil); errors.As(err, &e) && e.Code == control.CodeFailed {
		return true
	}
	c := exitCode(&runError{err})
	return c == exitUnreachable || c == exitTimeout
}

// draw writes one frame of a live screen: home, each line cleared to its end,
// and what an earlier, longer frame left below.
func (a *app) draw(frame string, screen bool) error {
	head := fmt.Sprintf("%s  (every %v, Ctrl-C ends)", time.Now().Format(time.TimeOnly), watchEvery)
	text := head + "\n\n" + frame
	if screen {
		text = "\x1b[H" + strings.ReplaceAll(text, "\n", "\x1b[K\n") + "\x1b[J"
	} else {
		text += "\n"
	}
	_, err := io.WriteString(a.out, text)
	return err
}

// clusterTable begins with what an operator must know: what is wrong, why, and
// what to type. The tables below it are for reading on.
func clusterTable(w io.Writer, s control.ClusterStatus) {
	verdict(w, s)
	leader := "no Raft leader"
	if s.Leader != "" {
		leader = "Raft leader " + s.Leader
	}
	fmt.Fprintf(w, "\ncluster %s, seen from %s: %s\n\n", s.Cluster, s.Node, leader)
	nodeTable(w, s.Nodes)
	fmt.Fprintln(w)
	if len(s.Volumes) == 0 {
		fmt.Fprintln(w, "no volumes; next: blockstep volume create NAME --size 10GiB")
		return
	}
	volumeTable(w, s.Volumes)
}

// verdict is the answer to "is anything wrong": suspended volumes first, then
// the cluster state, then what still serves.
func verdict(w io.Writer, s control.ClusterStatus) {
	well := true
	worst := func(h control.Health) {
		for _, same := range alike(s.Volumes) {
			if same.Health == h {
				reason(w, same)
				well = false
			}
		}
	}
	worst(control.Suspended)
	if !s.Quorum {
		well = false
		fmt.Fprintf(w, "there is no Raft leader: nothing can be created, moved or failed over; I/O goes on where a primary serves\n  next: %s\n", leaderNext(s.Nodes))
	}
	worst(control.Degraded)
	if off := down(s.Nodes); off != "" && well {
		well = false
		fmt.Fprintf(w, "all volumes are healthy, but not every node is up\n  next: start blockstepd on %s, or check its network\n", off)
	}
	if well {
		fmt.Fprintf(w, "all is well: %s, %s\n", count(len(s.Volumes), "healthy volume"), count(len(s.Nodes), "node")+" up")
	}
}

// leaderNext is what to do when there is no Raft leader.
func leaderNext(nodes []control.NodeStatus) string {
	if off := down(nodes); off != "" {
		return fmt.Sprintf("start blockstepd on %s, or check the network between the nodes", off)
	}
	return "wait: one is elected within seconds; if none is, check the network between the nodes"
}

// down lists the nodes that are not reached.
func down(nodes []control.NodeStatus) string {
	var out []string
	for _, n := range nodes {
		if !n.Up {
			out = append(out, n.Name)
		}
	}
	return strings.Join(out, ", ")
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func volumeTable(w io.Writer, vols []control.VolumeStatus) {
	rows := [][]string{{"VOLUME", "HEALTH", "SIZE", "PRIMARY", "EPOCH", "POSITION", "REPLICAS"}}
	for _, v := range vols {
		var reps []string
		for _, r := range v.Replicas {
			reps = append(reps, r.Node+" "+string(r.State))
		}
		rows = append(rows, []string{v.Volume, string(v.Health), config.FormatSize(v.Size), orDash(v.Primary), fmt.Sprint(v.Epoch), orDash(v.Position), strings.Join(reps, ", ")})
	}
	columns(w, rows...)
}

// alike puts volumes that are unwell in the same way together: when a node is
// down it is all of them, and one line says it.
func alike(vols []control.VolumeStatus) []control.VolumeStatus {
	var out []control.VolumeStatus
	for _, v := range vols {
		if v.Health == control.Healthy {
			continue
		}
		i := slices.IndexFunc(out, func(o control.VolumeStatus) bool {
			return o.Health == v.Health && o.Reason == v.Reason && strings.ReplaceAll(o.Next, o.ID, v.Volume) == v.Next
		})
		if i < 0 {
			v.ID = v.Volume // the first of its kind, while Volume lists all
			out = append(out, v)
			continue
		}
		out[i].Volume += ", " + v.Volume
	}
	return out
}

func reason(w io.Writer, v control.VolumeStatus) {
	is := "is"
	if strings.Contains(v.Volume, ", ") {
		is = "are"
	}
	fmt.Fprintf(w, "%s %s %s: %s\n", v.Volume, is, v.Health, v.Reason)
	if v.Next != "" {
		fmt.Fprintf(w, "  next: %s\n", v.Next)
	}
}

func volumeDetail(w io.Writer, v control.VolumeStatus) {
	if v.Health == control.Healthy {
		fmt.Fprintf(w, "%s is healthy\n", v.Volume)
	} else {
		reason(w, v)
	}
	fmt.Fprintf(w, "\nsize %s (%d bytes), primary %s, epoch %d, position %s, ack %s, min copies %d\n\n",
		config.FormatSize(v.Size), v.Size, orDash(v.Primary), v.Epoch, orDash(v.Position), v.Ack, v.MinCopies)
	rows := [][]string{{"REPLICA", "STATE", "IN-SYNC SET", "POSITION", "LAG", "DIRTY", "RESYNC", ""}}
	for _, r := range v.Replicas {
		name := r.Node
		if name == v.Primary {
			name += " (primary)"
		}
		rows = append(rows, []string{
			name, string(r.State), yesNo(slices.Contains(v.InSync, r.Node)), orDash(r.Position),
			config.FormatSize(r.LagBytes), config.FormatSize(r.DirtyBytes), progress(r.Resync), r.Reason,
		})
	}
	columns(w, rows...)
}

func progress(r *control.Resync) string {
	if r == nil {
		return "-"
	}
	percent := 100.0
	if r.TotalBytes > 0 {
		percent = 100 * float64(r.DoneBytes) / float64(r.TotalBytes)
	}
	text := fmt.Sprintf("%.0f%% of %s", percent, config.FormatSize(r.TotalBytes))
	if r.Rate > 0 {
		text += fmt.Sprintf(", %s/s", config.FormatSize(r.Rate))
	}
	if r.Left != nil {
		text += fmt.Sprintf(", %v left", time.Duration(*r.Left)*time.Second)
	}
	return text
}
