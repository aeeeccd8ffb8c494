package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
)

// counted refuses a number of arguments that is not from least to most, and
// names the one that is missing, as the verb's use does, or too many.
func counted(cmd *cobra.Command, args []string, least, most int) error {
	if len(args) > most {
		return fmt.Errorf("unexpected argument %q", args[most])
	}
	if len(args) >= least {
		return nil
	}
	words := strings.Fields(cmd.Use)[1:]
	return fmt.Errorf("missing %s", strings.Join(words[len(args):least], " and "))
}

// noArgs is the check of a verb without arguments.
func noArgs(cmd *cobra.Command, args []string) error { return counted(cmd, args, 0, 0) }

// named makes the check of a verb whose first argument names a thing: from one
// argument to most. A name that can be none is bad usage; an empty one is a
// script's variable that was not set.
func named(thing string, least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := counted(cmd, args, least, most); err != nil || len(args) == 0 {
			return err
		}
		return config.CheckName(thing, args[0])
	}
}

// group makes a command that only holds others refuse what it does not know.
// Without a RunE cobra would print the help for an unknown verb too, and call
// that success.
func group(cmd *cobra.Command) *cobra.Command {
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		return unknown(cmd, args[0])
	}
	return cmd
}

// unknown says that cmd holds no such command, and which ones it does.
func unknown(cmd *cobra.Command, name string) error {
	cmd.SuggestionsMinimumDistance = 2 // letters; 0 would be none
	if like := cmd.SuggestionsFor(name); len(like) > 0 {
		return fmt.Errorf("unknown command %q; did you mean %s?", name, strings.Join(like, " or "))
	}
	var names []string
	for _, c := range cmd.Commands() {
		if !c.Hidden {
			names = append(names, c.Name())
		}
	}
	if len(names) == 0 {
		return fmt.Errorf("%s has no command %q: it holds none", cmd.CommandPath(), name)
	}
	return fmt.Errorf("unknown command %q; allowed here: %s", name, strings.Join(names, ", "))
}

// helpCmd is cobra's, but for a command that is not there: cobra calls that
// success.
func helpCmd() *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND]...", Short: "Show the help of a command",
		Long: "Shows the help of a command, as COMMAND --help does.",
		ValidArgsFunction: func(cmd *cobra.Command, args []string, typed string) (names []string, _ cobra.ShellCompDirective) {
			of, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			for _, c := range of.Commands() {
				if !c.Hidden && strings.HasPrefix(c.Name(), typed) {
					names = append(names, cobra.CompletionWithDesc(c.Name(), c.Short))
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			of, rest, err := cmd.Root().Find(args)
			if err != nil {
				return err
			}
			if len(rest) > 0 {
				return unknown(of, rest[0])
			}
			of.InitDefaultHelpFlag() // cobra does so only for the command that runs
			of.InitDefaultVersionFlag()
			return of.Help()
		},
	}
}

// nodeNamesOf checks a flag that names nodes, if it is given: an empty list is
// a script's variable that was not set, and not the default.
func nodeNamesOf(cmd *cobra.Command, flag string, names ...string) error {
	if !cmd.Flags().Changed(flag) {
		return nil
	}
	if len(names) == 0 {
		names = []string{""}
	}
	for i, n := range names {
		if err := config.CheckName("node", n); err != nil {
			return control.Errorf(control.CodeUsage, "", "--%s: %v", flag, err)
		}
		if slices.Contains(names[:i], n) {
			return control.Errorf(control.CodeUsage, "", "--%s: node %s is named twice", flag, n)
		}
	}
	return nil
}
