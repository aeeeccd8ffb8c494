package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/daemon"
)

// The exit codes, a promise to scripts.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitUnreachable = 3
	exitTimeout     = 4
)

const (
	// askTimeout bounds verbs that only read.
	askTimeout = 15 * time.Second
	// readTimeoutMax is the longest of them: whoever waits for longer has asked
	// for a change.
	readTimeoutMax = doctorTimeout
	// changeTimeout bounds verbs that change something; it is longer than any
	// limit that the daemon sets itself.
	changeTimeout = 90 * time.Second
)

// app is what the verbs share.
type app struct {
	in       io.Reader
	out, err io.Writer
	stdout   io.Writer // what is behind out, for who needs the file itself
	config   string
	admin    string
	json     bool
	terminal func(...any) bool // whether a person sits there
}

// runError marks an error of a verb that ran; every other error is one of usage.
type runError struct{ err error }

func (e *runError) Error() string { return e.err.Error() }
func (e *runError) Unwrap() error { return e.err }

// run is main without the process: it returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	return (&app{in: in, out: out, err: errOut, terminal: isTerminal}).main(ctx, args)
}

func (a *app) main(ctx context.Context, args []string) int {
	errOut := a.err
	printed := &sink{w: a.out}
	a.stdout, a.out = a.out, printed
	root := a.root()
	root.SetArgs(args)
	root.SetIn(a.in)
	root.SetErr(errOut)
	cmd, err := root.ExecuteContextC(ctx)
	if lost := printed.failed(); lost != nil && (err == nil || errors.Is(err, lost)) {
		fmt.Fprintf(errOut, "blockstep: the output is not whole: %v\n", lost)
		return exitFailed
	}
	if err == nil {
		return exitDone
	}
	code := exitCode(err)
	fmt.Fprintf(errOut, "blockstep: %v\n", err)
	var ran *runError
	if !errors.As(err, &ran) {
		fmt.Fprintf(errOut, "usage: %s\nhelp:  %s --help\n", cmd.UseLine(), cmd.CommandPath())
	}
	return code
}

// exitCode is the one place where an error becomes an exit code.
func exitCode(err error) int {
	var ran *runError
	if !errors.As(err, &ran) {
		return exitUsage
	}
	var bad *config.Error
	if errors.As(err, &bad) {
		return exitUsage
	}
	var e *control.Error
	if errors.As(err, &e) {
		switch e.Code {
		case control.CodeUsage:
			return exitUsage
		case control.CodeTimeout:
			return exitTimeout
		case control.CodeRefused, control.CodeFailed, control.CodeNotFound, control.CodeReadOnly:
			return exitFailed
		}
		return exitFailed
	}
	switch {
	case errors.Is(err, control.ErrUnreachable):
		return exitUnreachable
	case errors.Is(err, context.DeadlineExceeded):
		return exitTimeout
	}
	return exitFailed
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:     "blockstep",
		Version: daemon.Version(),
		Short:   "Operate replicated block volumes",
		Long: `blockstep operates a cluster of blockstepd daemons through the admin socket of
the daemon on this host. Start with "blockstep status"; to see the whole thing
work on this machine alone, "blockstep demo".

Exit codes: 0 done, 1 refused or failed, 2 bad usage, 3 no daemon reachable, 4 timed out.`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(flagError)
	root.SetOut(a.out) // the completion's commands take it when they are made
	root.SetVersionTemplate("blockstep {{.Version}}\n")
	group(root)
	f := root.PersistentFlags()
	f.StringVar(&a.config, "config", "", "configuration file, for the admin address (default: "+config.EnvFile+", else "+config.DefaultFile+")")
	f.StringVar(&a.admin, "admin", "", "admin address: unix:///PATH, or tcp://HOST:PORT of a node for reading verbs")
	f.BoolVar(&a.json, "json", false, "print JSON instead of tables")
	root.AddCommand(
		a.statusCmd(), a.eventsCmd(), a.volumeCmd(), a.nodeCmd(), a.waitCmd(),
		a.switchoverCmd(), a.failoverCmd(), a.fenceCmd(), a.verifyCmd(), a.invalidateCmd(),
		a.attachCmd(), a.detachCmd(), a.attachmentsCmd(), a.followCmd(),
		a.demoCmd(), a.demoNodeCmd(), a.versionCmd(), a.manCmd(root), a.reloadCmd(), a.recoverCmd(), a.doctorCmd(),
	)
	// "volume list" and its sisters, also without the word.
	for _, short := range []*cobra.Command{a.volumeListCmd(), a.volumeDeleteCmd(), a.volumeResizeCmd()} {
		short.Hidden = true
		root.AddCommand(short)
	}
	root.SetHelpCommand(helpCmd())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			group(c)
			for _, shell := range c.Commands() {
				shell.Args = noArgs
			}
		}
	}
	a.addCompletion(root)
	return root
}

// flagError words what is wrong with a flag, where the words would be Go's.
func flagError(_ *cobra.Command, err error) error {
	var bad *pflag.InvalidValueError
	if errors.As(err, &bad) && bad.GetFlag().Value.Type() == "duration" {
		return fmt.Errorf("--%s %q is not a duration: write it like 10s or 5m", bad.GetFlag().Name, bad.GetValue())
	}
	return err
}

// verb makes the RunE of a verb: its error counts as one of the run.
func (a *app) verb(f func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := f(cmd.Context(), args); err != nil {
			return &runError{err}
		}
		return nil
	}
}

// ask makes the RunE of a verb that speaks to the daemon within limit (0: none).
func (a *app) ask(limit time.Duration, f talk) func(*cobra.Command, []string) error {
	return a.askAfter(limit, func(context.Context, *control.Client, []string) error { return nil }, f)
}

// talk is what a verb does with the daemon.
type talk = func(ctx context.Context, c *control.Client, args []string) error

// askAfter is ask with something before it that may take as long as a person
// takes.
func (a *app) askAfter(limit time.Duration, before, f talk) func(*cobra.Command, []string) error {
	return a.verb(func(ctx context.Context, args []string) error {
		c, err := a.dial()
		if err != nil {
			return err
		}
		defer c.Close()
		if err := before(ctx, c, args); err != nil {
			return err
		}
		if limit > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, limit)
			defer cancel()
		}
		err = f(ctx, c, args)
		if errors.Is(err, context.Canceled) {
			return interrupted(limit)
		}
		if errors.Is(err, context.DeadlineExceeded) && limit <= readTimeoutMax {
			return control.Errorf(control.CodeTimeout, "look at its log, and whether its process stands still or its disk hangs; another node tells as much: --admin tcp://HOST:PORT", "the daemon gives no answer within %v", limit)
		}
		if errors.Is(err, context.DeadlineExceeded) {
			return control.Errorf(control.CodeTimeout, "it may still happen: look at blockstep status and at the daemon's log", "no answer within %v", limit)
		}
		return err
	})
}

// interrupted is how a verb ends on Ctrl-C that does not end by it as planned.
func interrupted(limit time.Duration) error {
	if limit <= readTimeoutMax {
		return errors.New("interrupted")
	}
	return control.Errorf(control.CodeFailed, "it may still happen: look at blockstep status", "interrupted")
}

// dial finds the daemon: --admin, --config, BLOCKSTEP_ADMIN,
// BLOCKSTEP_ADMIN_LISTEN, the default file, the default socket.
func (a *app) dial() (*control.Client, error) {
	address := a.admin
	if address == "" && a.config == "" {
		address = os.Getenv("BLOCKSTEP_ADMIN")
	}
	if address == "" {
		var err error
		if address, err = a.adminOfConfig(); err != nil {
			return nil, err
		}
	}
	return control.Dial(address)
}

func (a *app) adminOfConfig() (string, error) {
	file := config.FileOr(a.config)
	if file == config.DefaultFile && a.config == "" && !exists(file) {
		return config.AdminDefault(), nil
	}
	return config.AdminAddress(file)
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

// print writes v as JSON with --json, otherwise calls table.
func (a *app) print(v any, table func(w io.Writer)) error {
	if !a.json {
		table(a.out)
		return nil
	}
	enc := json.NewEncoder(a.out)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// sink passes on what is printed, and remembers that it could not be: most of
// those who print have nobody to tell, and a script must not take half a table
// on a full disk for the whole.
type sink struct {
	w io.Writer

	mu  sync.Mutex
	err error // the first
}

func (s *sink) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.err == nil {
			s.err = err
		}
	}
	return n, err
}

func (s *sink) failed() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// columns writes rows of cells, tab-separated, as an aligned table.
func columns(w io.Writer, rows ...[]string) {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(t, strings.TrimRight(strings.Join(r, "\t"), "\t"))
	}
	_ = t.Flush() // the sink remembers
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
