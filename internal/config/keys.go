package config

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// kind is how a key's value is parsed and what is said when it is wrong.
type kind uint8

const (
	kindString    kind = iota
	kindSize           // bytes
	kindDuration       // Go duration
	kindInt            // min..max
	kindBool           // true, false
	kindEnum           // one of allowed
	kindListeners      // list of NBD addresses
	kindNodes          // the map of nodes
)

// key is one configuration key: the table from which unknown keys are found,
// defaults are set, environment variables are bound and errors are worded.
type key struct {
	name     string // dotted
	kind     kind
	def      string
	allowed  []string // kindEnum
	min, max int64    // kindInt, kindSize: as they are; kindDuration: milliseconds
	flag     string   // blockstepd's flag, without dashes; "" has none
	help     string
}

const unbounded = math.MaxInt64

var keys = []key{
	{name: "cluster", flag: "cluster", help: "name of the cluster, the same on each node"},
	{name: "node", flag: "node", help: "this node's name, one of nodes (default: the host name)"},
	{name: "data_dir", def: "/var/lib/blockstep", flag: "data-dir", help: "where this node keeps its state"},
	{name: "nodes", kind: kindNodes},
	{name: "on_removed", kind: kindEnum, def: "exit", allowed: []string{OnRemovedExit, OnRemovedWait}},
	{name: "boot_id_file", def: "/proc/sys/kernel/random/boot_id", flag: "boot-id-file", help: "file whose content changes with each boot"},

	{name: "nbd.listen", kind: kindListeners, def: "unix:///run/blockstep/nbd.sock", flag: "nbd-listen", help: "NBD addresses, unix:///PATH, tcp://HOST:PORT or fd://NAME, separated by commas"},
	{name: "nbd.max_connections", kind: kindInt, def: "1024", min: 1, max: 65536},
	{name: "nbd.max_requests", kind: kindInt, def: "256", min: 1, max: 65536},
	{name: "nbd.handshake_timeout", kind: kindDuration, def: "10s", min: 100, max: 600_000},
	{name: "nbd.idle_timeout", kind: kindDuration, def: "0s", min: 0, max: 7 * 24 * 3600_000},
	{name: "nbd.stall_timeout", kind: kindDuration, def: "1m", min: 1000, max: 24 * 3600_000},
	{name: "nbd.tls.cert"},
	{name: "nbd.tls.key"},
	{name: "nbd.tls.ca"},
	{name: "nbd.tls.require", kind: kindBool, def: "false"},

	{name: "admin.listen", def: "unix:///run/blockstep/admin.sock", flag: "admin-listen", help: "admin socket, unix:///PATH"},
	{name: "admin.mode", def: "0660"},
	{name: "admin.group"},
	{name: "metrics.listen", flag: "metrics-listen", help: "HOST:PORT for /metrics, /healthz and /readyz (default: off)"},

	{name: "log.level", kind: kindEnum, def: "info", allowed: []string{"debug", "info", "warn", "error"}, flag: "log-level", help: "debug, info, warn or error"},
	{name: "log.format", kind: kindEnum, def: "text", allowed: []string{"text", "json"}, flag: "log-format", help: "text or json"},

	{name: "volume.log_retention", kind: kindSize, def: "256MiB", min: 1 << 20, max: 1 << 44},
	{name: "volume.heartbeat", kind: kindDuration, def: "300ms", min: 10, max: 60_000},
	{name: "volume.lease", kind: kindDuration, def: "1500ms", min: 50, max: 300_000},
	{name: "volume.stall_timeout", kind: kindDuration, def: "5s", min: 100, max: 600_000},
	{name: "volume.power_loss_grace", kind: kindDuration, def: "60s", min: 0, max: 24 * 3600_000},
	{name: "volume.after_power_loss", kind: kindEnum, def: "auto", allowed: []string{"auto", "wait"}},
	{name: "volume.on_no_quorum", kind: kindEnum, def: "hold", allowed: []string{"hold", "error"}},
	{name: "volume.no_quorum_timeout", kind: kindDuration, def: "30s", min: 100, max: 24 * 3600_000},
	{name: "volume.ack", kind: kindEnum, def: "quorum", allowed: []string{"quorum", "durable", "local"}},

	{name: "resync.rate_max", kind: kindSize, def: "0", min: 0, max: unbounded},
	{name: "resync.rate_min", kind: kindSize, def: "4MiB", min: 0, max: unbounded},
	{name: "memory.volume", kind: kindSize, def: "64MiB", min: 8 << 20, max: 1 << 40},
	{name: "memory.nbd", kind: kindSize, def: "32MiB", min: 32 << 20, max: 1 << 40},
	{name: "memory.nbd_connection", kind: kindSize, def: "32MiB", min: 32 << 20, max: 1 << 40},
	{name: "raft.heartbeat", kind: kindDuration, def: "700ms", min: 20, max: 60_000},
	{name: "raft.election", kind: kindDuration, def: "700ms", min: 20, max: 60_000},
	{name: "attach.dead_timeout", kind: kindDuration, def: "10m", min: 1000, max: 24 * 3600_000},
	{name: "join.token"},
	{name: "join.token_file"},
	{name: "failover.auto", kind: kindBool, def: "true"},
}

// nodeKeys and listenerKeys are the keys within an entry of nodes and of
// nbd.listen.
var (
	nodeKeys     = []string{"address", "witness"}
	listenerKeys = []string{"address", "allow", "group", "max_connections", "mode", "read_only", "tls"}
)

func lookup(name string) (key, bool) {
	i := slices.IndexFunc(keys, func(k key) bool { return k.name == name })
	if i < 0 {
		return key{}, false
	}
	return keys[i], true
}

// children lists what may stand directly under a dotted prefix; "" is the top.
func children(prefix string) []string {
	var out []string
	for _, k := range keys {
		rest := k.name
		if prefix != "" {
			var ok bool
			if rest, ok = strings.CutPrefix(k.name, prefix+"."); !ok {
				continue
			}
		}
		first, _, _ := strings.Cut(rest, ".")
		if !slices.Contains(out, first) {
			out = append(out, first)
		}
	}
	slices.Sort(out)
	return out
}

// envName is the environment variable of a key.
func envName(name string) string {
	return EnvPrefix + "_" + strings.ToUpper(strings.ReplaceAll(name, ".", "_"))
}

// unknown words the error for a key that is not in the table, and guesses what
// was meant.
func unknown(where string, line int, full, last string, allowed []string) *Error {
	next := fmt.Sprintf("allowed here: %s", strings.Join(allowed, ", "))
	if guess := nearest(last, allowed); guess != "" {
		next = fmt.Sprintf("did you mean %q? %s", guess, next)
	}
	return &Error{Where: where, Line: line, Key: full, Problem: "unknown key", Next: next}
}

// nearest returns the candidate within an edit distance of two, or "".
func nearest(s string, candidates []string) string {
	best, bestDist := "", 3
	for _, c := range candidates {
		if d := distance(strings.ToLower(s), c); d < bestDist && d < len(c) {
			best, bestDist = c, d
		}
	}
	return best
}

func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diag, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diag+cost)
		}
	}
	return row[len(b)]
}
