// Command blockstepd runs one node of a blockstep cluster in the foreground. It
// logs to stderr, tells systemd when it is ready, and stops cleanly on SIGTERM.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/daemon"
)

// The exit codes: 0 stopped as asked, 1 failed, 2 bad usage or configuration, 3
// removed from the cluster. The unit has systemd not restart after the last.
const (
	exitDone    = 0
	exitFailed  = 1
	exitUsage   = 2
	exitRemoved = 3
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is main without the process.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	fs := pflag.NewFlagSet("blockstepd", pflag.ContinueOnError)
	fs.SetOutput(errOut)
	fs.Usage = func() {
		fmt.Fprintf(errOut, "usage: blockstepd [--config FILE] [flags]\n\nRuns one node of a blockstep cluster in the foreground. Each key of the\nconfiguration is also an environment variable BLOCKSTEP_*.\n\n%s", fs.FlagUsages())
	}
	config.DaemonFlags(fs)
	switch err := fs.Parse(args); {
	case errors.Is(err, pflag.ErrHelp):
		return exitDone
	case err != nil:
		fmt.Fprintf(errOut, "blockstepd: %v\nhelp: blockstepd --help\n", err)
		return exitUsage
	case fs.NArg() > 0:
		fmt.Fprintf(errOut, "blockstepd: unexpected argument %q; it takes flags only\nhelp: blockstepd --help\n", fs.Arg(0))
		return exitUsage
	}
	// They are defined, and boolean and string: DaemonFlags.
	file, _ := fs.GetString("config")
	check, _ := fs.GetBool("check-config")
	if version, _ := fs.GetBool("version"); version {
		fmt.Fprintln(out, "blockstepd", daemon.Version())
		return exitDone
	}
	cfg, err := config.Load(file, fs)
	if err != nil {
		fmt.Fprintf(errOut, "blockstepd: %v\n", err)
		return exitUsage
	}
	if check {
		if err := daemon.CheckFiles(cfg); err != nil {
			fmt.Fprintf(errOut, "blockstepd: %v\n", err)
			return exitUsage
		}
		fmt.Fprintf(out, "%s is valid: node %s of cluster %s, %d nodes\n", cfg.File, cfg.Node, cfg.Cluster, len(cfg.Nodes))
		return exitDone
	}
	level := new(slog.LevelVar)
	level.Set(daemon.LogLevel(cfg))
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	hooks := daemon.Hooks{Level: level, Hangup: hangup, Load: func() (*config.Config, error) { return config.Load(file, fs) }}
	if os.Getenv("GOMEMLIMIT") == "" {
		hooks.MemoryLimit = func(n int64) { debug.SetMemoryLimit(n) }
	}
	sockets, err := daemon.Inherited()
	if err == nil {
		err = daemon.Run(ctx, cfg, newLogger(cfg.Log.Format, level, errOut), hooks, sockets...)
	}
	switch {
	case errors.Is(err, daemon.ErrRemoved):
		fmt.Fprintf(errOut, "blockstepd: %v\n", err)
		if cfg.OnRemoved == config.OnRemovedWait {
			fmt.Fprintln(errOut, "blockstepd: it serves nothing, and waits to be stopped (on_removed: wait)")
			<-ctx.Done()
		}
		return exitRemoved
	case err != nil:
		fmt.Fprintf(errOut, "blockstepd: %v\n", err)
		return exitFailed
	}
	return exitDone
}

func newLogger(format string, level slog.Leveler, w io.Writer) *slog.Logger {
	opts := &slog.HandlerOptions{Level: level}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}
