package main

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// typed runs the command line as it is typed and gives its exit code and what
// it says.
func typed(t *testing.T, args ...string) (code int, out, says string) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(context.Background(), args, strings.NewReader(""), &o, &e)
	return code, o.String(), e.String()
}

// runnable are all commands, each by the words that are typed for it.
func runnable(cmd *cobra.Command) (all [][]string) {
	words := strings.Fields(cmd.CommandPath())[1:]
	all = append(all, words)
	for _, c := range cmd.Commands() {
		all = append(all, runnable(c)...)
	}
	return all
}

// TestEveryVerbRefusesWhatItDoesNotKnow types each verb with a flag that is
// none, with an argument too many, without its arguments, and beside an unknown
// word: each ends with 2, on a line that names it, and does nothing.
func TestEveryVerbRefusesWhatItDoesNotKnow(t *testing.T) {
	root := (&app{}).root()
	verbs := runnable(root)
	if len(verbs) < 30 {
		t.Fatalf("only %d verbs: %q", len(verbs), verbs)
	}
	usage := func(says string, args ...string) {
		t.Helper()
		code, out, err := typed(t, args...)
		line, rest, _ := strings.Cut(err, "\n")
		if code != exitUsage || !strings.Contains(line, says) || out != "" {
			t.Errorf("%q: %d, want %d and a line with %q; it says %q, and %q", args, code, exitUsage, says, err, out)
		}
		if !strings.Contains(rest, "usage: blockstep") || !strings.Contains(rest, "help:  blockstep") {
			t.Errorf("%q does not say where to read on: %q", args, err)
		}
	}
	for _, words := range verbs {
		cmd, _, err := root.Find(words)
		if err != nil {
			t.Fatal(err)
		}
		with := func(more ...string) []string { return append(append([]string{}, words...), more...) }
		usage("unknown flag: --no-such-flag", with("--no-such-flag")...)
		if cmd.HasSubCommands() || cmd.Name() == "help" {
			usage(`unknown command "no-such"`, with("no-such")...)
			continue
		}
		usage(`unexpected argument "too-many"`, append(with(strings.Fields(strings.Repeat("a ", most(cmd)))...), "too-many")...)
		if _, arg, _ := strings.Cut(cmd.Use, " "); arg != "" && arg[0] >= 'A' && arg[0] <= 'Z' {
			usage("missing "+strings.Fields(arg)[0], words...)
		}
		usage(`unknown command "no-such"`, append([]string{"help", "no-such"}, words...)...)
		usage(`has no command "no-such"`, append(append([]string{"help"}, words...), "no-such")...)
	}
	for typo, says := range map[string]string{"statsu": "did you mean status?", "volume lisst": "did you mean list?", "volume": ""} {
		code, _, err := typed(t, strings.Fields(typo)...)
		if want := map[bool]int{true: exitUsage, false: exitDone}[says != ""]; code != want || !strings.Contains(err, says) {
			t.Errorf("%s: %d, want %d, and %q: %q", typo, code, want, says, err)
		}
	}
}

// most is how many arguments a verb takes, by its use.
func most(cmd *cobra.Command) int {
	n := 0
	for _, w := range strings.Fields(cmd.Use)[1:] {
		if strings.HasPrefix(w, "--") {
			break
		}
		n++
	}
	return n
}

// TestHelpOfEachVerb: help VERB and VERB --help are the same, and no error.
func TestHelpOfEachVerb(t *testing.T) {
	for _, words := range runnable((&app{}).root()) {
		one, asHelp, err1 := typed(t, append([]string{"help"}, words...)...)
		two, asFlag, err2 := typed(t, append(append([]string{}, words...), "--help")...)
		if one != exitDone || two != exitDone || asHelp != asFlag || !strings.Contains(asHelp, "Usage:") || err1+err2 != "" {
			t.Errorf("%q: %d and %d, %q\n%s\n%s", words, one, two, err1+err2, asHelp, asFlag)
		}
	}
}
