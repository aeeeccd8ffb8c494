package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

var knownRequests = regexp.MustCompile(`^\.(TH|SH|TP|B|PP|br|nf|fi)( |$)`)

// TestManPages: each verb that is no secret has a page, and nothing in a text is
// taken for a request of the formatter.
func TestManPages(t *testing.T) {
	root := (&app{terminal: isTerminal}).root()
	pages := manPages(root)
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "completion" || c.Name() == "help" {
			return
		}
		text, ok := pages[pageName(c)+".1"]
		if !ok {
			t.Errorf("%s has no page", c.CommandPath())
		}
		c.NonInheritedFlags()
		if c.Flags().Lookup("to") != nil && !strings.Contains(text, `\-\-to`) {
			t.Errorf("the page of %s lacks a flag", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
	for name, text := range pages {
		if !strings.HasPrefix(text, ".TH ") || !strings.Contains(text, "\n.SH NAME\n") || !strings.Contains(text, "\n.SH SEE ALSO\n") {
			t.Errorf("%s is no manual page:\n%s", name, text)
		}
		for _, line := range strings.Split(text, "\n") {
			if strings.HasPrefix(line, ".") && !knownRequests.MatchString(line) || strings.HasPrefix(line, "'") {
				t.Errorf("%s: %q is taken for a request", name, line)
			}
		}
	}
	if text := pages["blockstep.yaml.5"]; !strings.Contains(text, ".B volume.lease\n") || !strings.Contains(text, "BLOCKSTEP_VOLUME_LEASE") {
		t.Error("blockstep.yaml.5 lacks a key")
	}
}

// TestPagesAreWritten runs the verb.
func TestPagesAreWritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man")
	var out, errOut strings.Builder
	if code := run(t.Context(), []string{"man", "--dir", dir}, strings.NewReader(""), &out, &errOut); code != 0 {
		t.Fatalf("exit code %d: %s", code, errOut.String())
	}
	for _, name := range []string{"blockstep.1", "blockstep-volume-create.1", "blockstepd.8", "blockstep.yaml.5"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
}
