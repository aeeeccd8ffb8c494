package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"

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
			d.vmu.RLock() // a daemon whose tables are locked for ever does not live
			d.vmu.RUnlock()
			notify(d.log, "WATCHDOG=1")
		}
	}
}

// Version says which build this is.
func Version() string { return version.String() }
