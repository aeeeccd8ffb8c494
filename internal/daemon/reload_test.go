package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
)

// TestReload: what can change live does, what cannot is named, and a
// configuration that is wrong changes nothing.
func TestReload(t *testing.T) {
	alpha := newCluster(t, "")["alpha"]
	original, err := os.ReadFile(alpha.file)
	if err != nil {
		t.Fatal(err)
	}
	reload := func(extra string) (control.Reloaded, error) {
		t.Helper()
		if err := os.WriteFile(alpha.file, append(original[:len(original):len(original)], extra...), 0o600); err != nil {
			t.Fatal(err)
		}
		return alpha.client.Reload(t.Context())
	}
	expect := func(extra, applied, restart string) {
		t.Helper()
		out, err := reload(extra)
		if got := fmt.Sprint(out.Applied); err != nil || got != applied {
			t.Errorf("applied %v, want %v; %v", got, applied, err)
		}
		if got := fmt.Sprint(out.Restart); got != restart {
			t.Errorf("needs a restart %v, want %v", got, restart)
		}
	}
	expect("", "[]", "[]")
	expect("log: {level: debug}\nvolume: {ack: durable, lease: 2s}\nresync: {rate_max: 64MiB}\n", "[{log.level info debug} {volume.ack quorum durable} {resync.rate_max 0B 64MiB}]", "[{volume.lease 1.5s 2s}]")
	if alpha.level.Level() != slog.LevelDebug {
		t.Error("the level of the log is as it was")
	}
	if v := alpha.create("db", 1<<20); v.Ack != "durable" {
		t.Errorf("a new volume has ack %s", v.Ack)
	}
	if r := alpha.daemon.Load().resync.Load(); r.RateMax != 64<<20 {
		t.Errorf("resyncs run at most at %d", r.RateMax)
	}
	// Again: nothing is applied twice, and what needs a restart still does.
	expect("log: {level: debug}\nvolume: {ack: durable, lease: 2s}\nresync: {rate_max: 64MiB}\n", "[]", "[{volume.lease 1.5s 2s}]")
	if _, err := reload("log: {level: loud}\n"); err == nil || !strings.Contains(err.Error(), "log.level") || !strings.Contains(err.Error(), "allowed are debug, info, warn, error") {
		t.Errorf("a wrong configuration: %v", err)
	}
	if alpha.level.Level() != slog.LevelDebug {
		t.Error("a wrong configuration has changed the level")
	}
	expect("", "[{log.level debug info} {volume.ack durable quorum} {resync.rate_max 64MiB 0B}]", "[]")
	if alpha.level.Level() != slog.LevelInfo {
		t.Error("the level is not taken back")
	}

	// Another node's, or another cluster's, changes nothing.
	for from, to := range map[string]string{"node: alpha": "node: beta", "cluster: test": "cluster: prod"} {
		text := strings.Replace(string(original), from, to, 1) + "log: {level: debug}\n"
		if err := os.WriteFile(alpha.file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var e *control.Error
		if _, err := alpha.client.Reload(t.Context()); !errors.As(err, &e) || e.Code != control.CodeRefused || !strings.Contains(e.Message, "and this is node alpha of cluster test") {
			t.Errorf("%s: %v", to, err)
		}
		if alpha.level.Level() != slog.LevelInfo {
			t.Errorf("%s: its level is taken over", to)
		}
	}
}

// TestAnotherAddress: nodes is for the founding. A node whose address is another one
// since is where nobody looks for it: reload does not advise the restart that would do
// it, and after a restart everybody who asks is told what to do.
func TestAnotherAddress(t *testing.T) {
	nodes := newCluster(t, "")
	alpha, gamma := nodes["alpha"], nodes["gamma"]
	original, err := os.ReadFile(gamma.file)
	if err != nil {
		t.Fatal(err)
	}
	was, is := gamma.config().Self().Address, freeAddress(t)
	reload := func(old, now, next string) {
		t.Helper()
		if err := os.WriteFile(gamma.file, []byte(strings.Replace(string(original), old, now, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := gamma.client.Reload(t.Context())
		if err != nil || len(out.Restart) > 0 || len(out.Ignored) != 1 || !strings.Contains(out.Ignored[0].Next, next) {
			t.Errorf("%s instead of %s: %+v, %v", now, old, out, err)
		}
	}
	reload(alpha.config().Self().Address, freeAddress(t), "its members change with blockstep node add, remove and replace")
	back := "put nodes.gamma.address back to " + was
	reload(was, is, "before blockstepd is started again, "+back)

	gamma.halt()
	gamma.start()
	gamma.eventually(20*time.Second, "it says where the others look for it", func(ctx context.Context) error {
		_, err := gamma.client.Nodes(ctx)
		var e *control.Error
		if errors.As(err, &e) && strings.Contains(e.Message, "the cluster knows node gamma at "+was+", and nodes.gamma.address is "+is) && strings.Contains(e.Next, back) {
			return nil
		}
		return fmt.Errorf("it says %w", err)
	})
	if log := gamma.log.String(); !strings.Contains(log, "level=ERROR msg=\"the others do not find this node\"") {
		t.Error("its log does not say so")
	}
	gamma.halt()
	if err := os.WriteFile(gamma.file, original, 0o600); err != nil {
		t.Fatal(err)
	}
	gamma.start()
	gamma.eventually(20*time.Second, "it is back", func(ctx context.Context) error {
		_, err := gamma.client.Nodes(ctx)
		return err
	})
}
