package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
)

// yesHelp is --yes, the same on each verb that destroys something.
const yesHelp = "do not ask (scripts are never asked: only a terminal is)"

// confirm shows what a verb is about to destroy and wants name typed, when a
// person sits there: both stdin and stderr are a terminal. A script has said
// what it wants by calling the verb, and is not asked. what is called only when
// it is shown.
//
// Ctrl-C ends ctx and no more: the read that nobody waits for then ends with the
// process.
func (a *app) confirm(ctx context.Context, yes bool, name string, what func() string) error {
	if yes || !a.terminal(a.in, a.err) {
		return nil
	}
	fmt.Fprintf(a.err, "%s\nType %s to go on: ", what(), name)
	typed := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(a.in).ReadString('\n')
		typed <- strings.TrimSpace(line)
	}()
	select {
	case <-ctx.Done():
		fmt.Fprintln(a.err)
		return control.Errorf(control.CodeFailed, "", "interrupted: nothing was done")
	case line := <-typed:
		if line == name {
			return nil
		}
		return control.Errorf(control.CodeRefused, "type the name, or add --yes", "nothing was done")
	}
}

// isTerminal reports whether all of them are terminals.
func isTerminal(files ...any) bool {
	for _, x := range files {
		f, ok := x.(*os.File)
		if !ok {
			return false
		}
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err != nil {
			return false
		}
	}
	return true
}

// aboutVolume says what a volume is, for somebody who is about to destroy it.
func aboutVolume(ctx context.Context, c *control.Client, name string) string {
	v, err := c.VolumeStatus(ctx, name)
	if err != nil {
		return fmt.Sprintf("(what %s holds cannot be shown: %v)", name, err)
	}
	s := fmt.Sprintf("%s: %s, %s, primary %s; replicas:", name, config.FormatSize(v.Size), v.Health, orDash(v.Primary))
	for _, r := range v.Replicas {
		s += fmt.Sprintf("\n  %s %s at %s", r.Node, r.State, orDash(r.Position))
	}
	return s
}

// clientsShown is how many of a node's clients are named.
const clientsShown = 4

// aboutClients says who uses a volume at the moment.
func aboutClients(ctx context.Context, c *control.Client, name string) string {
	list, err := c.VolumeClients(ctx, name)
	if err != nil {
		return fmt.Sprintf("(who uses it now cannot be shown: %v)", err)
	}
	all, lines := 0, ""
	for _, n := range list {
		all += len(n.Clients)
		switch who := n.Clients; {
		case n.Error != "":
			lines += fmt.Sprintf("\n  through %s: not known, %s", n.Node, n.Error)
		case len(who) > clientsShown:
			lines += fmt.Sprintf("\n  through %s: %d (%s and %d more)", n.Node, len(who), strings.Join(who[:clientsShown], ", "), len(who)-clientsShown)
		case len(who) > 0:
			lines += fmt.Sprintf("\n  through %s: %d (%s)", n.Node, len(who), strings.Join(who, ", "))
		}
	}
	switch all {
	case 0:
		return "no NBD client is connected to it" + lines
	case 1:
		return "1 NBD connection to it is open:" + lines
	}
	return fmt.Sprintf("%d NBD connections to it are open:", all) + lines
}

// aboutNode says what is on a node, for somebody who is about to take it out.
func aboutNode(ctx context.Context, c *control.Client, node string) string {
	vols, err := c.Volumes(ctx)
	if err != nil {
		return fmt.Sprintf("(what %s holds cannot be shown: %v)", node, err)
	}
	var holds []string
	for _, v := range vols {
		for _, r := range v.Replicas {
			if r.Node == node {
				holds = append(holds, fmt.Sprintf("  a replica of %s (%s), %s", v.Volume, config.FormatSize(v.Size), r.State))
			}
		}
	}
	if len(holds) == 0 {
		return node + " holds no replica."
	}
	return node + " holds:\n" + strings.Join(holds, "\n")
}
