package main

import (
	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
)

// named makes the check of a verb whose first argument names a thing: from one
// argument to most. A name that can be none is bad usage; an empty one is a
// script's variable that was not set.
func named(thing string, least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		count := cobra.RangeArgs(least, most)
		if least == most {
			count = cobra.ExactArgs(least)
		}
		if err := count(cmd, args); err != nil || len(args) == 0 {
			return err
		}
		return config.CheckName(thing, args[0])
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
	for _, n := range names {
		if err := config.CheckName("node", n); err != nil {
			return control.Errorf(control.CodeUsage, "", "--%s: %v", flag, err)
		}
	}
	return nil
}
