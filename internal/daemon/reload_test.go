package daemon

import (
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"

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
}
