package raft

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log" //nolint:depguard // hclog.Logger has it in its signatures
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"
)

// hclogger lets hashicorp/raft log through slog. What raft calls Info is a
// step of its own work, of interest when something is wrong: it becomes Debug.
// The state changes that an operator wants are logged by this package.
type hclogger struct {
	l    *slog.Logger
	name string
	args []any
	said *said // shared by all that are made from one
}

const (
	// repeatEvery is how often one and the same complaint is worth a line: raft
	// tries a dead node several times a second, and says so each time.
	repeatEvery = 30 * time.Second
	// saidMax bounds the complaints that are remembered.
	saidMax = 256
)

// said remembers when a complaint was logged last.
type said struct {
	mu sync.Mutex
	at map[string]time.Time
}

// again reports whether key was logged a short time ago.
func (s *said) again(key string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if last, ok := s.at[key]; ok && now.Sub(last) < repeatEvery {
		return true
	}
	if len(s.at) >= saidMax {
		clear(s.at)
	}
	s.at[key] = now
	return false
}

var _ hclog.Logger = (*hclogger)(nil)

func newHclog(l *slog.Logger) *hclogger {
	return &hclogger{l: l.With("layer", "raft"), name: "raft", said: &said{at: map[string]time.Time{}}}
}

func slogLevel(level hclog.Level) slog.Level {
	switch level {
	case hclog.Error:
		return slog.LevelError
	case hclog.Warn:
		return slog.LevelWarn
	case hclog.NoLevel, hclog.Trace, hclog.Debug, hclog.Info, hclog.Off:
	}
	return slog.LevelDebug
}

func (h *hclogger) Log(level hclog.Level, msg string, args ...any) {
	at := slogLevel(level)
	if !h.l.Enabled(context.Background(), at) {
		return
	}
	out := make([]any, 0, len(args))
	for i, a := range args {
		// hclog has verbs of its own for values.
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			a = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
		}
		if err, ok := a.(error); ok && ownEnd(err) {
			at = slog.LevelDebug
		}
		if i%2 == 0 {
			a = fmt.Sprint(a)
		}
		out = append(out, a)
	}
	if at >= slog.LevelWarn && h.said.again(complaint(msg, out), time.Now()) {
		at = slog.LevelDebug
	}
	h.l.Log(context.Background(), at, msg, out...) //nolint:sloglint // the message is hashicorp/raft's
}

// ownEnd reports whether an error is what a connection says that this node has
// closed, or ended with the node: no complaint, and said after the last word that a
// node has for its operator.
func ownEnd(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, hraft.ErrTransportShutdown) || errors.Is(err, hraft.ErrRaftShutdown)
}

// complaint names what is complained of: the message, and about whom.
func complaint(msg string, args []any) string {
	for i := 0; i+1 < len(args); i += 2 {
		if k := args[i]; k == "peer" || k == "server-id" || k == "target" {
			return fmt.Sprint(msg, args[i+1])
		}
	}
	return msg
}

func (h *hclogger) Trace(msg string, args ...any) { h.Log(hclog.Trace, msg, args...) }
func (h *hclogger) Debug(msg string, args ...any) { h.Log(hclog.Debug, msg, args...) }
func (h *hclogger) Info(msg string, args ...any)  { h.Log(hclog.Info, msg, args...) }
func (h *hclogger) Warn(msg string, args ...any)  { h.Log(hclog.Warn, msg, args...) }
func (h *hclogger) Error(msg string, args ...any) { h.Log(hclog.Error, msg, args...) }

func (h *hclogger) enabled(level slog.Level) bool { return h.l.Enabled(context.Background(), level) }

func (h *hclogger) IsTrace() bool { return false }
func (h *hclogger) IsDebug() bool { return h.enabled(slog.LevelDebug) }
func (h *hclogger) IsInfo() bool  { return h.enabled(slog.LevelDebug) }
func (h *hclogger) IsWarn() bool  { return h.enabled(slog.LevelWarn) }
func (h *hclogger) IsError() bool { return h.enabled(slog.LevelError) }

func (h *hclogger) ImpliedArgs() []any { return h.args }

func (h *hclogger) With(args ...any) hclog.Logger {
	return &hclogger{l: h.l.With(args...), name: h.name, args: append(append([]any{}, h.args...), args...), said: h.said}
}

func (h *hclogger) Name() string                   { return h.name }
func (h *hclogger) Named(name string) hclog.Logger { return h.ResetNamed(h.name + "." + name) }
func (h *hclogger) ResetNamed(name string) hclog.Logger {
	return &hclogger{l: h.l, name: name, args: h.args, said: h.said}
}
func (h *hclogger) SetLevel(hclog.Level) {}

func (h *hclogger) GetLevel() hclog.Level {
	switch {
	case h.IsDebug():
		return hclog.Debug
	case h.IsWarn():
		return hclog.Warn
	}
	return hclog.Error
}

func (h *hclogger) StandardLogger(*hclog.StandardLoggerOptions) *log.Logger {
	return slog.NewLogLogger(h.l.Handler(), slog.LevelDebug)
}

func (h *hclogger) StandardWriter(*hclog.StandardLoggerOptions) io.Writer {
	return h.StandardLogger(nil).Writer()
}

// ioTimeout is the deadline of one Raft message on a connection.
const ioTimeout = time.Second
