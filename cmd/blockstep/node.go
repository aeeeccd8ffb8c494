package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/control"
)

func (a *app) nodeCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "node COMMAND", Short: "List and change the members of the cluster"})
	cmd.AddCommand(
		a.nodeListCmd(), a.nodeAddCmd(),
		a.nodeRemoveCmd(),
		a.nodeChangeCmd("replace", "Accept a member's empty data directory: it votes anew and its replicas are synced whole",
			"For a member whose disk or machine was lost: start blockstepd there with an empty\ndata directory, then run this on another node. What the old one promised is\nforgotten with its id; its replicas are copied whole from the others.", "may join anew"),
		a.nodeChangeCmd("drain", "Move primaries and then replicas away from a member",
			"Moves the primaries away, then gives each volume a replica on another node before\nthe one here goes. It takes as long as copying does; cut off, it goes on when it is\nrun again. A node with too little room is not chosen, and a new replica that fails is\ntaken away again.", "is drained"),
	)
	return cmd
}

func nodeTable(w io.Writer, nodes []control.NodeStatus) {
	rows := [][]string{{"NODE", "STATE", "ADDRESS", "ROLE", ""}}
	for _, n := range nodes {
		state, role := "down", "member"
		if n.Up {
			state = "up"
		}
		if n.Witness {
			role = "witness"
		}
		if n.Leader {
			role += ", Raft leader"
		}
		if !n.Voter {
			role += ", no vote"
		}
		rows = append(rows, []string{n.Name, state, n.Address, role, n.Error})
	}
	columns(w, rows...)
}

func (a *app) nodeListCmd() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the members", Args: noArgs,
		RunE: a.ask(askTimeout, func(ctx context.Context, c *control.Client, _ []string) error {
			nodes, err := c.Nodes(ctx)
			if err != nil {
				return err
			}
			return a.print(nodes, func(w io.Writer) { nodeTable(w, nodes) })
		}),
	}
}

func (a *app) nodeAddCmd() *cobra.Command {
	var r control.AddNode
	var life time.Duration
	cmd := &cobra.Command{
		Use: "add NAME --address HOST:PORT", Short: "Add a member", Args: named("node", 1, 1),
		Long: `Adds a member. Start blockstepd on it first, with an empty data directory and a
configuration that lists all nodes, itself included: it waits to be added.

With --token the order is the other one: it prints a token, good once, for that
name and address, and for the time of --expires. The new node is given it as
BLOCKSTEP_JOIN_TOKEN, or in the file that join.token_file names, and joins by
itself when it is started, whichever member answers it. A newer token for the
same name takes the place of the one before.`,
		Example: "  blockstep node add delta --address 10.1.0.4:7700\n  blockstep node add delta --address 10.1.0.4:7700 --token --expires 24h",
	}
	cmd.Flags().StringVar(&r.Address, "address", "", "the node's HOST:PORT (required)")
	cmd.Flags().BoolVar(&r.Witness, "witness", false, "it votes and stores nothing")
	cmd.Flags().BoolVar(&r.Token, "token", false, "print a token with which it joins by itself")
	cmd.Flags().DurationVar(&life, "expires", time.Hour, "with --token: how long it is good")
	_ = cmd.MarkFlagRequired("address") // it is defined above
	cmd.RunE = a.ask(changeTimeout, func(ctx context.Context, c *control.Client, args []string) error {
		if cmd.Flags().Changed("expires") && !r.Token {
			return control.Errorf(control.CodeUsage, "add --token, or leave it out", "--expires belongs to --token")
		}
		r.Name = args[0]
		if r.Token {
			r.TokenSeconds = int64(life / time.Second)
		}
		out, err := c.AddNode(ctx, r)
		if err != nil {
			return err
		}
		return a.print(out, func(w io.Writer) {
			if out.Already {
				fmt.Fprintf(w, "node %s is a member already; next: blockstep node list\n", out.Name)
				return
			}
			if out.Token == "" {
				fmt.Fprintf(w, "node %s is a member; next: blockstep node list\n", out.Name)
				return
			}
			fmt.Fprintln(w, out.Token)
			fmt.Fprintf(a.err, "good once, for node %s at %s, until %s\nnext, on %s: BLOCKSTEP_JOIN_TOKEN=%s in /etc/default/blockstepd, then start blockstepd\n",
				out.Name, out.Address, out.Expires.Local().Format(time.DateTime), out.Name, out.Token)
		})
	})
	return cmd
}

func (a *app) nodeRemoveCmd() *cobra.Command {
	var r control.RemoveNode
	yes := false
	cmd := &cobra.Command{
		Use: "remove NAME", Short: "Remove a member that has no replica any more, or is gone for good", Args: named("node", 1, 1),
		Long: `Ends a member's membership: its daemon is told, says so in its log and stops, and
its data directory is never used again. Refused while it holds a replica (drain it
first), and where the members that are left would have no quorum.

--force is for a node that is down and never comes back: its replicas are given
up, where others are in sync. It is refused for a volume that would be lost, and
says what to do about that one.`,
	}
	cmd.Flags().BoolVar(&r.Force, "force", false, "give the replicas of a dead node up")
	cmd.Flags().BoolVar(&yes, "yes", false, yesHelp)
	sure := func(ctx context.Context, c *control.Client, args []string) error {
		return a.confirm(ctx, yes, args[0], func() string {
			return aboutNode(ctx, c, args[0]) + "\nThis ends its membership; its data directory is never used again."
		})
	}
	cmd.RunE = a.askAfter(removeTimeout, sure, func(ctx context.Context, c *control.Client, args []string) error {
		out, err := c.RemoveNode(ctx, args[0], r)
		if err != nil {
			return err
		}
		return a.changed(nodeChanged{args[0], "remove", out.Already, out.Warnings}, "is removed")
	})
	return cmd
}

// nodeChanged is what a change of a member prints.
type nodeChanged struct {
	Node    string `json:"node"`
	Done    string `json:"done"` // the verb
	Already bool   `json:"already,omitempty"`

	Warnings []control.Warning `json:"warnings,omitempty"`
}

func (a *app) changed(n nodeChanged, done string) error {
	return a.print(n, func(w io.Writer) {
		if n.Already {
			done += " already"
		}
		fmt.Fprintf(w, "node %s %s\n", n.Node, done)
		warnings(w, n.Warnings)
	})
}

func warnings(w io.Writer, list []control.Warning) {
	for _, warn := range list {
		fmt.Fprintf(w, "warning: %s\n  next: %s\n", warn.Text, warn.Next)
	}
}

// drainEvery is the pace of the lines that a drain tells its progress with.
const drainEvery = 2 * time.Second

// runDrainTold tells how far a drain is until ctx ends: a line for each volume, when
// there is news of it.
func (a *app) runDrainTold(ctx context.Context, c *control.Client, node string) {
	tick := time.NewTicker(drainEvery)
	defer tick.Stop()
	told := map[string]bool{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		vols, err := c.Volumes(ctx)
		if err != nil {
			continue // the drain itself says what is wrong
		}
		for _, line := range drainLines(vols, node) {
			if !told[line] {
				told[line] = true
				fmt.Fprintln(a.err, line)
			}
		}
	}
}

// drainLines says which replicas are brought up to date while a node is drained.
func drainLines(vols []control.VolumeStatus, node string) (lines []string) {
	for _, v := range vols {
		if !slices.ContainsFunc(v.Replicas, func(r control.ReplicaStatus) bool { return r.Node == node }) {
			continue
		}
		for _, r := range v.Replicas {
			if r.Node == node || r.State == control.InSync {
				continue
			}
			line := fmt.Sprintf("%s: the replica on %s is %s", v.Volume, r.Node, r.State)
			if r.Resync != nil {
				line += ", " + progress(r.Resync)
			}
			if r.Reason != "" {
				line += ": " + r.Reason
			}
			lines = append(lines, line)
		}
	}
	return lines
}

// removeTimeout leaves each of some volumes the time to change its in-sync set.
const removeTimeout = 10 * time.Minute

// drainTimeout is longer than copying any replica takes.
const drainTimeout = 7 * 24 * time.Hour

func (a *app) nodeChangeCmd(verb, short, long, done string) *cobra.Command {
	limit := changeTimeout
	if verb == "drain" {
		limit = drainTimeout
	}
	yes := false
	cmd := &cobra.Command{Use: verb + " NAME", Short: short, Long: long, Args: named("node", 1, 1)}
	if verb != "drain" {
		cmd.Flags().BoolVar(&yes, "yes", false, yesHelp)
	}
	sure := func(ctx context.Context, c *control.Client, args []string) error {
		return a.confirm(ctx, yes || verb == "drain", args[0], func() string {
			return aboutNode(ctx, c, args[0]) + "\nThis ends its membership; its data directory is never used again."
		})
	}
	cmd.RunE = a.askAfter(limit, sure, func(ctx context.Context, c *control.Client, args []string) error {
		if verb == "drain" && !a.json {
			told, stop := context.WithCancel(ctx)
			var wg sync.WaitGroup
			wg.Go(func() { a.runDrainTold(told, c, args[0]) })
			defer wg.Wait()
			defer stop()
		}
		out, err := c.ChangeNode(ctx, args[0], verb)
		if err != nil {
			return err
		}
		return a.changed(nodeChanged{args[0], verb, out.Already, out.Warnings}, done)
	})
	return cmd
}
