package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/control"
)

// completeTime bounds the question to the daemon behind a press of Tab.
const completeTime = time.Second

// completer makes the words for one argument or flag.
type completer = func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective)

// fromDaemon completes with what the daemon knows; with nothing when it is not
// reached, since a shell has no place for an error.
func (a *app) fromDaemon(words func(ctx context.Context, c *control.Client) []string) completer {
	return func(_ *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
		c, err := a.dial()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer c.Close()
		ctx, cancel := context.WithTimeout(context.Background(), completeTime)
		defer cancel()
		var out []string
		for _, w := range words(ctx, c) {
			if strings.HasPrefix(w, typed) {
				out = append(out, w)
			}
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

func (a *app) volumeNames() completer {
	return a.fromDaemon(func(ctx context.Context, c *control.Client) (out []string) {
		vols, err := c.Volumes(ctx)
		if err != nil {
			return nil
		}
		for _, v := range vols {
			out = append(out, v.Volume)
		}
		return out
	})
}

func (a *app) nodeNames() completer {
	return a.fromDaemon(func(ctx context.Context, c *control.Client) (out []string) {
		nodes, err := c.Nodes(ctx)
		if err != nil {
			return nil
		}
		for _, n := range nodes {
			out = append(out, n.Name)
		}
		return out
	})
}

func oneOf(words ...string) completer {
	return func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return words, cobra.ShellCompDirectiveNoFileComp
	}
}

// first completes the first argument only.
func first(f completer) completer {
	return func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return f(cmd, args, typed)
	}
}

// addCompletion gives each verb below cmd the completion of its arguments and
// flags, by what they are called.
func (a *app) addCompletion(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		a.addCompletion(c)
	}
	switch _, arg, _ := strings.Cut(cmd.Use, " "); {
	case strings.HasPrefix(arg, "VOLUME"), strings.HasPrefix(arg, "[VOLUME]"):
		cmd.ValidArgsFunction = first(a.volumeNames())
	case strings.HasPrefix(arg, "NAME") && cmd.Name() != "create" && cmd.Name() != "add":
		cmd.ValidArgsFunction = first(a.volumeNames())
		if cmd.HasParent() && cmd.Parent().Name() == "node" {
			cmd.ValidArgsFunction = first(a.nodeNames())
		}
	case cmd.ValidArgsFunction == nil && len(cmd.ValidArgs) == 0:
		cmd.ValidArgsFunction = cobra.NoFileCompletions
	}
	for flag, f := range map[string]completer{
		"to": a.nodeNames(), "node": a.nodeNames(), "replicas": a.nodeNames(),
		"for": oneOf("healthy", "primary", "quorum"), "ack": oneOf("quorum", "durable", "local"),
	} {
		if cmd.Flags().Lookup(flag) != nil {
			_ = cmd.RegisterFlagCompletionFunc(flag, f) // the flag is there, and has none yet
		}
	}
}
