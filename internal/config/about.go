package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
)

// about says what a key is for, and whether a running daemon can take another
// value (`blockstep reload`). TestEachKeyIsDescribed keeps it complete.
type about struct {
	help string
	live bool
}

var abouts = map[string]about{
	"cluster":      {help: "name of the cluster, the same on each node"},
	"node":         {help: "this node's name, one of nodes (default: the host name)"},
	"data_dir":     {help: "directory of this node's state: cluster state, logs, and backing files of volumes without a device"},
	"nodes":        {help: "the founding members: NAME: {address: HOST:PORT, witness: true|false}. A witness votes and stores nothing"},
	"on_removed":   {help: "when this node is no member any more: exit with code 3, or wait to be stopped, for a supervisor that starts again whatever ends"},
	"boot_id_file": {help: "file whose content changes with each boot: by it a replica knows that its machine crashed"},

	"nbd.listen":            {help: "NBD addresses, unix:///PATH or tcp://HOST:PORT; a list, of which an entry may also be a map with address, mode, group, read_only and allow"},
	"nbd.max_connections":   {help: "NBD connections of all listeners together"},
	"nbd.handshake_timeout": {help: "how long a client may take until it has chosen an export"},
	"nbd.max_requests":      {help: "requests that one connection may have in flight"},
	"nbd.stall_timeout":     {help: "a client that takes no answer for so long is disconnected"},
	"memory.nbd_connection": {help: "bytes of payloads that one NBD connection may have in flight"},
	"nbd.idle_timeout":      {help: "a connection without a request for so long is closed; 0s: never"},
	"nbd.tls.cert":          {help: "PEM file with this node's certificate; TLS is off without it"},
	"nbd.tls.key":           {help: "PEM file with the certificate's key"},
	"nbd.tls.ca":            {help: "PEM file: clients must show a certificate that it signed"},
	"nbd.tls.require":       {help: "refuse clients that do not use TLS"},

	"admin.listen":   {help: "admin socket, unix:///PATH, for blockstep"},
	"admin.mode":     {help: "its file mode, octal"},
	"admin.group":    {help: "its group; empty leaves the daemon's own"},
	"metrics.listen": {help: "HOST:PORT for /metrics, /healthz and /readyz; empty: off"},

	"log.level":  {help: "debug, info, warn or error", live: true},
	"log.format": {help: "text or json"},

	"volume.log_retention":     {help: "log kept for replicas that are away for a short time"},
	"volume.heartbeat":         {help: "pause between two signs of life of a primary"},
	"volume.lease":             {help: "how long a primary may answer reads without asking; a failover waits for it. At least three heartbeats"},
	"volume.stall_timeout":     {help: "a primary whose own disk does not answer for so long hands over"},
	"volume.power_loss_grace":  {help: "after a power cut everywhere: how long a better copy is waited for"},
	"volume.after_power_loss":  {help: "auto promotes the best copy after the grace, wait leaves it to an operator; of volumes created from now on", live: true},
	"volume.on_no_quorum":      {help: "hold keeps I/O waiting, error fails it after no_quorum_timeout; of volumes created from now on", live: true},
	"volume.no_quorum_timeout": {help: "for on_no_quorum error; of volumes created from now on", live: true},
	"volume.ack":               {help: "ack mode of volumes created from now on without --ack", live: true},

	"resync.rate_max":     {help: "ceiling of a resync, bytes a second; 0: none", live: true},
	"resync.rate_min":     {help: "what a resync gets beside client I/O, bytes a second", live: true},
	"memory.volume":       {help: "bytes that one busy volume may hold in memory, over 64 MiB a node; beyond it writes wait for the disks"},
	"memory.nbd":          {help: "bytes of payloads of all NBD connections"},
	"raft.heartbeat":      {help: "silence after which a node looks for another Raft leader"},
	"raft.election":       {help: "how long a candidate waits for votes"},
	"attach.dead_timeout": {help: "how long the kernel holds the I/O of a device that no daemon serves; then it fails"},
	"join.token":          {help: "token of blockstep node add --token, with which this node joins a running cluster; better in the environment or in a file"},
	"join.token_file":     {help: "file with the token; it may be missing once the node is a member"},
	"failover.auto":       {help: "replace a dead primary without an operator", live: true},
}

// KeyInfo describes a key for the manual and docs/configuration.md.
type KeyInfo struct {
	Name, Help, Allowed, Default, Env, Live string

	Range       string // unit and bounds, or the words that are allowed; "" where Help says it
	ChangesLive bool
}

// Keys lists all keys in the order of the table.
func Keys() []KeyInfo {
	var out []KeyInfo
	for _, k := range keys {
		i := KeyInfo{Name: k.name, Help: abouts[k.name].help, Env: "environment: " + envName(k.name), Live: "needs a restart", Range: k.bounds(), ChangesLive: abouts[k.name].live}
		if k.kind == kindNodes {
			i.Env += ", as YAML"
		}
		if abouts[k.name].live {
			i.Live = "changes live, with blockstep reload or SIGHUP"
		}
		if k.kind == kindNodes {
			i.Live = "for the founding alone; later blockstep node add, remove and replace change the members, and a node keeps its address"
		}
		if k.def != "" {
			i.Default = "default: " + k.def
		}
		if k.flag != "" {
			i.Env += ", flag: --" + k.flag
		}
		switch k.kind {
		case kindSize:
			i.Allowed = "a size, for example 64MiB; " + i.Range
		case kindDuration:
			i.Allowed = "a duration, for example 1500ms or 2m; " + i.Range
		case kindInt:
			i.Allowed = fmt.Sprintf("%d to %d", k.min, k.max)
		case kindBool:
			i.Allowed = "true or false"
		case kindEnum:
			i.Allowed = "one of " + strings.Join(k.allowed, ", ")
		case kindString, kindListeners, kindNodes:
		}
		out = append(out, i)
	}
	return out
}

// bounds words what a key may be.
func (k key) bounds() string {
	switch k.kind {
	case kindSize:
		if k.max == unbounded {
			return fmt.Sprintf("bytes, %d or more", k.min)
		}
		return "bytes, " + FormatSize(k.min) + " to " + FormatSize(k.max)
	case kindDuration:
		ms := func(n int64) string {
			d := (time.Duration(n) * time.Millisecond).String()
			if strings.HasSuffix(d, "m0s") {
				d = strings.TrimSuffix(d, "0s")
			}
			if strings.HasSuffix(d, "h0m") {
				d = strings.TrimSuffix(d, "0m")
			}
			return d
		}
		return "time, " + ms(k.min) + " to " + ms(k.max)
	case kindInt:
		return fmt.Sprintf("%d to %d", k.min, k.max)
	case kindBool:
		return "`true`, `false`"
	case kindEnum:
		return "`" + strings.Join(k.allowed, "`, `") + "`"
	case kindString, kindListeners, kindNodes:
	}
	return ""
}

// DaemonFlags adds all flags of blockstepd to fs: what it does, and Flags.
func DaemonFlags(fs *pflag.FlagSet) {
	fs.String("config", "", "configuration file (default: "+EnvFile+", else "+DefaultFile+")")
	fs.Bool("check-config", false, "check the configuration and the TLS files that it names, and end")
	fs.Bool("version", false, "print the version and end")
	Flags(fs)
}

// Change is a key whose value differs between two configurations.
type Change struct {
	Key, Old, New string
	Live          bool // a running daemon can take it
}

// Diff lists the keys that differ, in the order of the table.
func Diff(from, to *Config) []Change {
	var out []Change
	for _, k := range keys {
		a, b := from.Value(k.name), to.Value(k.name)
		if a != b {
			out = append(out, Change{Key: k.name, Old: a, New: b, Live: abouts[k.name].live})
		}
	}
	return out
}

// Value is a key's effective value as text: two are equal when they mean the
// same.
func (c *Config) Value(name string) string { return c.values[name] }

// agreeing are the keys that must, or had better, be equal on all nodes.
var agreeing = []string{
	"cluster", "nodes", "volume.log_retention", "volume.heartbeat", "volume.lease", "volume.stall_timeout",
	"volume.power_loss_grace", "volume.after_power_loss", "volume.on_no_quorum", "volume.no_quorum_timeout", "volume.ack",
	"raft.heartbeat", "raft.election", "failover.auto",
}

// Shared is what should be equal on all nodes: key to value.
func (c *Config) Shared() map[string]string {
	out := map[string]string{}
	for _, k := range agreeing {
		out[k] = c.Value(k)
	}
	return out
}

// fill makes the values from the validated fields, so that 64MiB and 67108864
// are the same.
func (c *Config) fill(l *loader) {
	c.values = map[string]string{}
	for _, k := range keys {
		switch k.kind {
		case kindSize:
			n, err := ParseSize(l.str(k.name))
			c.values[k.name] = FormatSize(n)
			if err != nil {
				c.values[k.name] = l.str(k.name)
			}
		case kindDuration:
			c.values[k.name] = l.duration(k.name).String()
		case kindBool:
			c.values[k.name] = fmt.Sprint(l.boolean(k.name))
		case kindNodes:
			var parts []string
			for _, n := range c.Nodes {
				s := n.Name + "=" + n.Address
				if n.Witness {
					s += " (witness)"
				}
				parts = append(parts, s)
			}
			slices.Sort(parts)
			c.values[k.name] = strings.Join(parts, ", ")
		case kindListeners:
			var parts []string
			for _, n := range c.NBD.Listen {
				s := n.String()
				if plain, _ := ParseListener(s); !reflect.DeepEqual(plain, n) {
					s += fmt.Sprintf(" with %+v", n) // its options
				}
				parts = append(parts, s)
			}
			c.values[k.name] = strings.Join(parts, ", ")
		case kindString, kindInt, kindEnum:
			c.values[k.name] = l.str(k.name)
		}
	}
	c.values["node"] = c.Node
	if c.values["join.token"] != "" {
		c.values["join.token"] = "(secret)"
	}
}
