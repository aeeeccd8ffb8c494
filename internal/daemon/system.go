package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/version"
)

// bootIDMax bounds what is read as a boot id.
const bootIDMax = 4096

// readBootID reads the file that changes with each boot of the machine.
func readBootID(path string) (string, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("boot_id_file: %w; leave the key out to use the kernel's", err)
	}
	id := strings.TrimSpace(string(raw))
	if id == "" || len(raw) > bootIDMax {
		return "", fmt.Errorf("boot_id_file: %s holds no boot id; leave the key out to use the kernel's", path)
	}
	return id, nil
}

// notify tells systemd, if it started us.
func notify(logger *slog.Logger, what string) {
	if _, err := sd.SdNotify(false, what); err != nil {
		logger.Warn("systemd could not be told", "what", what, "err", err)
	}
}

const (
	// beatEvery is how often the daemon looks whether it lives.
	beatEvery = time.Second
	// beatLate is after how long without a beat /healthz says that it does not,
	// and systemd's watchdog is told nothing more: longer than a machine under
	// heavy load keeps a goroutine waiting, shorter than WatchdogSec of the unit.
	beatLate = 10 * time.Second
)

// runBeat notes that the daemon lives. One whose tables are locked for ever does
// not.
func (d *Daemon) runBeat(ctx context.Context) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	trimmed := time.Now()
	for {
		if time.Since(trimmed) >= trimEvery {
			buf.Trim()
			trimmed = time.Now()
		}
		d.vmu.RLock()
		d.beat.Store(int64(time.Since(d.start)))
		d.vmu.RUnlock()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// dead says why the daemon had better be started again; "" while it lives. A
// disk that hangs, or a cluster without a majority, is no reason: a restart heals
// neither.
func (d *Daemon) dead() string {
	if since := time.Since(d.start) - time.Duration(d.beat.Load()); since > beatLate {
		return fmt.Sprintf("the daemon stands still since %v", since.Round(time.Second))
	}
	return ""
}

// runWatchdog tells systemd that we live, twice in the time that it allows.
func (d *Daemon) runWatchdog(ctx context.Context) {
	every, err := sd.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return
	}
	tick := time.NewTicker(every / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if why := d.dead(); why != "" {
				d.log.Error("systemd's watchdog is told nothing", "reason", why)
				continue
			}
			notify(d.log, "WATCHDOG=1")
		}
	}
}

// Version says which build this is.
func Version() string { return version.String() }
