// Command blockstep operates a cluster: it speaks to the admin socket of
// the daemon on its host, and to nothing else. Exit codes: 0 done, 1 refused or
// failed, 2 bad usage, 3 no daemon reachable, 4 timed out.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
