package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// The exit codes of the blockstep command.
const (
	exitOK = iota
	exitRefused
	exitUsage
	exitNoDaemon
	exitTimeout
)

// volumeStatus is the contract of `status VOLUME --json`, the part that the
// design promises. It is spelled out here, and not imported, so that a change
// of the daemon's own types that breaks scripts breaks a test.
type volumeStatus struct {
	Volume   string          `json:"volume"`
	Size     int64           `json:"size"`
	Primary  string          `json:"primary"`
	Epoch    int64           `json:"epoch"`
	Health   string          `json:"health"`
	InSync   []string        `json:"in_sync"`
	Replicas []replicaStatus `json:"replicas"`
}

type replicaStatus struct {
	Node       string          `json:"node"`
	State      string          `json:"state"`
	Reason     string          `json:"reason"`
	Position   json.RawMessage `json:"position"`
	LagBytes   int64           `json:"lag_bytes"`
	DirtyBytes int64           `json:"dirty_bytes"`
	Resync     json.RawMessage `json:"resync"`
}

// replica finds a node's replica in a status.
func (s volumeStatus) replica(node string) replicaStatus {
	for _, r := range s.Replicas {
		if r.Node == node {
			return r
		}
	}
	return replicaStatus{}
}

// blockstep runs the command and returns its output (both streams) and its exit
// code.
func blockstep(limit time.Duration, args ...string) (string, int) {
	stdout, stderr, code := blockstep2(limit, args...)
	return stdout + stderr, code
}

func blockstep2(limit time.Duration, args ...string) (stdout, stderr string, code int) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var outBuf, errBuf bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(binDir, "blockstep"), args...)
	cmd.Stdout, cmd.Stderr = &outBuf, &errBuf
	err := cmd.Run()
	stdout, stderr = outBuf.String(), errBuf.String()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return stdout, stderr, exitOK
	case ctx.Err() != nil:
		return stdout, stderr + fmt.Sprintf("\n(killed by the test after %v)", limit), -1
	case errors.As(err, &exit):
		return stdout, stderr, exit.ExitCode()
	}
	return stdout, stderr + err.Error(), -1
}

// cliRaw runs a verb against this node.
func (n *node) cliRaw(limit time.Duration, args ...string) (string, int) {
	return blockstep(limit, append([]string{"--admin", "unix://" + n.admin}, args...)...)
}

// cli runs a verb against this node; it must succeed.
func (n *node) cli(args ...string) string {
	n.c.t.Helper()
	out, code := n.cliRaw(90*time.Second, args...)
	if code != exitOK {
		n.c.t.Fatalf("blockstep %s at %s: exit code %d:\n%s", strings.Join(args, " "), n.name, code, out)
	}
	return out
}

// cliFails runs a verb that must fail with this exit code and say these words.
func (n *node) cliFails(code int, words []string, args ...string) string {
	n.c.t.Helper()
	out, got := n.cliRaw(60*time.Second, args...)
	if got != code {
		n.c.t.Errorf("blockstep %s at %s: exit code %d, want %d:\n%s", strings.Join(args, " "), n.name, got, code, out)
	}
	for _, word := range words {
		if !strings.Contains(out, word) {
			n.c.t.Errorf("blockstep %s: the error does not name %q:\n%s", strings.Join(args, " "), word, out)
		}
	}
	return out
}

// jsonOf runs a verb with --json and decodes what it prints on stdout.
func (n *node) jsonOf(v any, args ...string) {
	n.c.t.Helper()
	args = append([]string{"--admin", "unix://" + n.admin, "--json"}, args...)
	stdout, stderr, code := blockstep2(30*time.Second, args...)
	if code != exitOK {
		n.c.t.Fatalf("blockstep %s: exit code %d:\n%s%s", strings.Join(args, " "), code, stdout, stderr)
	}
	if err := json.Unmarshal([]byte(stdout), v); err != nil {
		n.c.t.Fatalf("blockstep %s: %v in:\n%s", strings.Join(args, " "), err, stdout)
	}
}

// status is `status VOLUME --json`.
func (n *node) status(volume string) volumeStatus {
	n.c.t.Helper()
	var st volumeStatus
	n.jsonOf(&st, "status", volume)
	return st
}

// tryStatus is status for a cluster that may be in the middle of something.
func (n *node) tryStatus(volume string) (volumeStatus, bool) {
	var st volumeStatus
	stdout, _, code := blockstep2(5*time.Second, "--admin", "unix://"+n.admin, "--json", "status", volume)
	if code != exitOK || json.Unmarshal([]byte(stdout), &st) != nil {
		return volumeStatus{}, false
	}
	return st, true
}

// waitReady waits until the daemon answers and the cluster has a leader.
func (n *node) waitReady() {
	n.c.t.Helper()
	eventually(n.c.t, 30*time.Second, n.name+" answers `node list`", func() bool {
		if !n.running() {
			n.c.t.Fatalf("%s ended:\n%s", n.name, n.tail(40))
		}
		_, code := n.cliRaw(10*time.Second, "node", "list")
		return code == exitOK
	})
}
