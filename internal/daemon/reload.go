package daemon

import (
	"context"
	"log/slog"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
)

// LogLevel is the level that a configuration asks for.
func LogLevel(c *config.Config) slog.Level {
	return map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}[c.Log.Level]
}

// runHangups reads the configuration again at each SIGHUP.
func (d *Daemon) runHangups(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.hooks.Hangup: // nil receives nothing
			if _, err := d.reload(); err != nil {
				d.log.Error("the configuration stays as it was", "err", err)
			}
		}
	}
}

// reload reads the configuration again and applies what can change live. One
// that is not valid, or that is another node's, changes nothing.
func (d *Daemon) reload() (control.Reloaded, error) {
	out := control.Reloaded{Applied: []control.KeyChange{}, Restart: []control.KeyChange{}}
	if d.hooks.Load == nil {
		return out, control.Errorf(control.CodeFailed, "restart it instead", "this daemon cannot read its configuration again")
	}
	d.rlmu.Lock()
	defer d.rlmu.Unlock()
	now, err := d.hooks.Load()
	if err != nil {
		return out, control.Errorf(control.CodeFailed, "correct it, then run blockstep reload again", "the configuration stays as it was: %v", err)
	}
	if now.Node != d.cfg.Node || now.Cluster != d.cfg.Cluster {
		return out, control.Errorf(control.CodeRefused, "name its own configuration, or correct node and cluster in "+now.File,
			"the configuration stays as it was: what %s says is for node %s of cluster %s, and this is node %s of cluster %s", now.File, now.Node, now.Cluster, d.cfg.Node, d.cfg.Cluster)
	}
	founded := d.raft.FoundInfo().Founded
	for _, c := range config.Diff(d.live.Load(), now) {
		if c.Live {
			out.Applied = append(out.Applied, control.KeyChange{Key: c.Key, Old: c.Old, New: c.New})
		}
	}
	// What needs a restart is told against the start, however often one reloads.
	for _, c := range config.Diff(d.cfg, now) {
		switch {
		case c.Live:
		case c.Key == "nodes" && founded:
			out.Ignored = append(out.Ignored, control.IgnoredChange{Key: c.Key, Old: c.Old, New: c.New, Next: d.nodesNext(now)})
		default:
			out.Restart = append(out.Restart, control.KeyChange{Key: c.Key, Old: c.Old, New: c.New})
		}
	}
	d.live.Store(now)
	d.applyLive(now)
	for _, c := range out.Applied {
		d.log.Info("configuration: applied", "key", c.Key, "old", c.Old, "new", c.New)
	}
	for _, c := range out.Restart {
		d.log.Warn("configuration: needs a restart of blockstepd", "key", c.Key, "old", c.Old, "new", c.New)
	}
	for _, c := range out.Ignored {
		d.log.Warn("configuration: without effect", "key", c.Key, "old", c.Old, "new", c.New, "next", c.Next)
	}
	return out, nil
}

// nodesNext is what to do in the place of another list of nodes, which is for the
// founding alone.
func (d *Daemon) nodesNext(now *config.Config) string {
	if _, next := d.displaced(now); next != "" {
		return "before blockstepd is started again, " + next
	}
	return "the cluster is founded: its members change with blockstep node add, remove and replace"
}

// applyLive sets what is not read from d.live where it is used.
func (d *Daemon) applyLive(c *config.Config) {
	if d.hooks.Level != nil {
		d.hooks.Level.Set(LogLevel(c))
	}
	d.setResync(c.Resync)
}

// Reload implements control.Backend.
func (b backend) Reload(context.Context) (control.Reloaded, error) { return b.d.reload() }
