package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
)

// manCmd writes the manual pages: they are made from the commands and from the
// table of configuration keys, so that they cannot say anything else.
func (a *app) manCmd(root *cobra.Command) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "man --dir DIR", Short: "Write the manual pages", Args: noArgs, Hidden: true,
		Long: "Writes blockstep.1, a page for each verb, blockstepd.8 and blockstep.yaml.5 into DIR.",
	}
	cmd.Flags().StringVar(&dir, "dir", "", "directory, made when it is not there (required)")
	_ = cmd.MarkFlagRequired("dir") // it is defined above
	cmd.RunE = a.verb(func(context.Context, []string) error {
		pages := manPages(root)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return control.Errorf(control.CodeFailed, "name a directory that this user may write", "%v", err)
		}
		for name, text := range pages {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				return control.Errorf(control.CodeFailed, "", "%v", err)
			}
		}
		return a.print(map[string]any{"dir": dir, "pages": len(pages)}, func(w io.Writer) { fmt.Fprintf(w, "%d manual pages in %s\n", len(pages), dir) })
	})
	return cmd
}

// manPages makes each page: its file's name to its text.
func manPages(root *cobra.Command) map[string]string {
	pages := map[string]string{"blockstepd.8": daemonPage(), "blockstep.yaml.5": filePage()}
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "help" || c.HasParent() && c.Parent().Name() == "completion" {
			return
		}
		pages[pageName(c)+".1"] = verbPage(c)
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
	return pages
}

func pageName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// page begins a manual page. Without a date: the same source makes the same page.
func page(name, section, what string) *strings.Builder {
	var b strings.Builder
	fmt.Fprintf(&b, ".TH %s %s \"\" blockstep \"blockstep manual\"\n.SH NAME\n%s \\- %s\n", roff(strings.ToUpper(name)), section, roff(name), roff(what))
	return &b
}

func verbPage(c *cobra.Command) string {
	b := page(pageName(c), "1", lowerFirst(c.Short))
	use := c.UseLine()
	fmt.Fprintf(b, ".SH SYNOPSIS\n.B %s\n.SH DESCRIPTION\n", roff(use))
	long := c.Long
	if long == "" {
		long = c.Short + "."
	}
	prose(b, long)
	if c.Example != "" {
		fmt.Fprintf(b, ".SH EXAMPLES\n.nf\n%s\n.fi\n", roff(c.Example))
	}
	flagSection(b, "OPTIONS", c.NonInheritedFlags())
	flagSection(b, "GLOBAL OPTIONS", c.InheritedFlags())
	var also []string
	if c.HasParent() {
		also = append(also, pageName(c.Parent())+"(1)")
	} else {
		fmt.Fprint(b, ".SH COMMANDS\n")
	}
	for _, sub := range c.Commands() {
		if sub.Hidden || sub.Name() == "help" || c.Name() == "completion" {
			continue
		}
		if !c.HasParent() {
			fmt.Fprintf(b, ".TP\n.B %s\n%s\n", roff(sub.Name()), roff(sub.Short+"."))
		}
		also = append(also, pageName(sub)+"(1)")
	}
	fmt.Fprint(b, ".SH EXIT STATUS\n0 done, 1 refused or failed, 2 bad usage, 3 no daemon reachable, 4 timed out.\n")
	if !c.HasParent() {
		fmt.Fprint(b, ".SH ENVIRONMENT\n.TP\n.B BLOCKSTEP_ADMIN\nadmin address when neither --admin nor --config is given\n.TP\n.B BLOCKSTEP_CONFIG\nconfiguration file when no --config is given\n")
		fmt.Fprintf(b, ".SH FILES\n%s\n", roff(config.DefaultFile))
	}
	also = append(also, "blockstepd(8)", "blockstep.yaml(5)")
	fmt.Fprintf(b, ".SH SEE ALSO\n%s\n", roff(strings.Join(also, ", ")))
	return b.String()
}

func flagSection(b *strings.Builder, title string, fs *pflag.FlagSet) {
	if !fs.HasAvailableFlags() {
		return
	}
	fmt.Fprintf(b, ".SH %s\n", title)
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		if t := f.Value.Type(); t != "bool" {
			name += "=" + strings.ToUpper(t)
		}
		fmt.Fprintf(b, ".TP\n.B %s\n%s\n", roff(name), roff(f.Usage))
	})
}

func daemonPage() string {
	b := page("blockstepd", "8", "run one node of a blockstep cluster")
	fmt.Fprint(b, ".SH SYNOPSIS\n.B blockstepd [\\-\\-config FILE] [flags]\n.SH DESCRIPTION\n")
	prose(b, `Runs one node in the foreground, logs to stderr, tells systemd when it is ready,
and stops cleanly on SIGTERM: volumes whose primary is here move to other nodes
first. On SIGHUP it reads its configuration again and applies what can change
while it runs; the log names what needs a restart.

Exit status: 0 stopped as asked, 1 failed, 2 bad usage or configuration, 3 the
node was removed from the cluster (blockstepd.service is not restarted then; with
on_removed: wait it waits to be stopped first).`)
	fs := pflag.NewFlagSet("blockstepd", pflag.ContinueOnError)
	config.DaemonFlags(fs)
	flagSection(b, "OPTIONS", fs)
	fmt.Fprint(b, ".SH SEE ALSO\nblockstep(1), blockstep.yaml(5)\n")
	return b.String()
}

func filePage() string {
	b := page("blockstep.yaml", "5", "configuration of blockstep")
	fmt.Fprint(b, ".SH DESCRIPTION\n")
	prose(b, `One YAML file, the same on each node but for node. A flag of blockstepd goes
before the environment, the environment before the file. An unknown key is an
error. "blockstepd --check-config" says what is wrong; "blockstep reload" applies
what can change while the daemon runs.`)
	fmt.Fprint(b, ".SH KEYS\n")
	for _, k := range config.Keys() {
		fmt.Fprintf(b, ".TP\n.B %s\n%s\n", roff(k.Name), roff(k.Help))
		for _, line := range []string{k.Allowed, k.Default, k.Env, k.Live} {
			if line != "" {
				fmt.Fprintf(b, ".br\n%s\n", roff(line))
			}
		}
	}
	fmt.Fprint(b, ".SH SEE ALSO\nblockstepd(8), blockstep(1)\n")
	return b.String()
}

// prose writes paragraphs; lines that begin with blanks stay as they are.
func prose(b *strings.Builder, text string) {
	for i, para := range strings.Split(strings.TrimSpace(text), "\n\n") {
		if i > 0 {
			b.WriteString(".PP\n")
		}
		verbatim := false
		for line := range strings.SplitSeq(para, "\n") {
			if now := strings.HasPrefix(line, " "); now != verbatim {
				verbatim = now
				if verbatim {
					b.WriteString(".nf\n")
				} else {
					b.WriteString(".fi\n")
				}
			}
			b.WriteString(roff(line) + "\n")
		}
		if verbatim {
			b.WriteString(".fi\n")
		}
	}
}

// roff keeps text from being taken for requests of the formatter.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}

func lowerFirst(s string) string {
	if s == "" {
		return s
	}
	return strings.ToLower(s[:1]) + s[1:]
}
