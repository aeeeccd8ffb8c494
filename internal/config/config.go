// Package config turns the configuration file, the environment and the flags
// into one validated value. Whoever holds a *Config may use it without a check:
// every address parses, every size and duration is in range, the node is one of
// the nodes. Errors name the file, the line, the key, the allowed values and
// what to do next, and all of them are reported at once.
package config

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"time"
)

// DefaultFile is read when no file is named.
const DefaultFile = "/etc/blockstep/blockstep.yaml"

// EnvFile is the environment variable that names another file than DefaultFile.
const EnvFile = EnvPrefix + "_CONFIG"

// FileOr returns file, or what is read when it is "".
func FileOr(file string) string {
	if file == "" {
		file = os.Getenv(EnvFile)
	}
	if file == "" {
		file = DefaultFile
	}
	return file
}

// EnvPrefix begins the environment variable of each key: data_dir is
// BLOCKSTEP_DATA_DIR, nbd.listen is BLOCKSTEP_NBD_LISTEN.
const EnvPrefix = "BLOCKSTEP"

// Config is one node's validated configuration.
type Config struct {
	File    string // where it was read; "" when there was no file
	Cluster string
	Node    string // one of Nodes
	DataDir string // absolute
	Nodes   []Node // the founding members, sorted by name

	NBD     NBD
	Admin   Admin
	Metrics Metrics
	Log     Log
	Volume  Volume
	Resync  Resync
	Memory  Memory
	Raft    Raft
	Attach  Attach
	Join    Join

	FailoverAuto bool   // replace a dead primary without an operator
	OnRemoved    string // exit or wait, when this node is no member any more
	BootIDFile   string // its content changes with each boot of the machine

	values map[string]string // each key's effective value, for Diff
}

// The values of Config.OnRemoved.
const (
	OnRemovedExit = "exit"
	OnRemovedWait = "wait"
)

// Node is one founding member.
type Node struct {
	Name    string
	Address string // host:port, which carries everything between nodes
	Witness bool   // votes, stores nothing
}

// Listener is one address with its options.
type Listener struct {
	Network        string      // "tcp", "unix", or "fd": a socket that systemd passes
	Address        string      // host:port, the socket's path, or the name or number that systemd gives it
	Mode           os.FileMode // of a unix socket
	Group          string      // of a unix socket; "" leaves the daemon's own
	ReadOnly       bool
	Allow          []string // exports that may be used here, names or patterns; empty: all
	MaxConnections int      // of this listener; 0: nbd.max_connections alone counts
	TLS            string   // off, offered, required; "": as nbd.tls says
}

// String is the form in which the configuration spells the address.
func (l Listener) String() string { return l.Network + "://" + l.Address }

// NBD configures the NBD server.
type NBD struct {
	Listen           []Listener
	TLS              TLS
	MaxConnections   int // of all listeners together
	MaxRequests      int // in flight on one connection
	HandshakeTimeout time.Duration
	IdleTimeout      time.Duration // 0: never
	StallTimeout     time.Duration // of a client within a request, or that takes no replies
}

// TLS configures STARTTLS of the NBD server.
type TLS struct {
	Cert, Key string // PEM files; both or none
	CA        string // PEM file: clients must show a certificate that it signed
	Require   bool   // refuse clients on TCP that do not use TLS
}

// Enabled reports whether TLS is configured at all.
func (t TLS) Enabled() bool { return t.Cert != "" }

// Admin configures the admin socket.
type Admin struct{ Listen Listener }

// Metrics configures the metrics listener.
type Metrics struct{ Listen string } // host:port; "" is off

// Log configures what goes to stderr.
type Log struct {
	Level  string // debug, info, warn, error
	Format string // text, json
}

// Volume holds the settings of every volume's replication.
type Volume struct {
	LogRetention    int64 // bytes of log kept for peers that are away for a short time
	Heartbeat       time.Duration
	Lease           time.Duration
	StallTimeout    time.Duration
	PowerLossGrace  time.Duration
	AfterPowerLoss  string        // auto, wait
	OnNoQuorum      string        // hold, error
	NoQuorumTimeout time.Duration // for error
	Ack             string        // of volumes created without --ack
}

// Resync bounds the copying of blocks.
type Resync struct {
	RateMax int64 // bytes a second; 0: no ceiling
	RateMin int64 // bytes a second that a resync gets beside client I/O
}

// Memory bounds what a daemon holds.
type Memory struct {
	Volume int64 // bytes for one busy volume
	NBD    int64 // bytes of payloads of all NBD connections
	// NBDConnection is the part of NBD that one connection may hold.
	NBDConnection int64
}

// Attach configures kernel devices.
type Attach struct {
	// DeadTimeout is how long the kernel holds the I/O of a device while no
	// daemon serves it; then the I/O fails.
	DeadTimeout time.Duration
}

// Join is for a node that joins a running cluster.
type Join struct{ Token string } // "" has none

// Raft sets the pace of the cluster state's own heartbeat.
type Raft struct {
	Heartbeat time.Duration // silence after which a follower looks for a leader
	Election  time.Duration
}

// Self returns the founding member that is this node.
func (c *Config) Self() Node {
	n, _ := c.Find(c.Node)
	return n
}

// Find returns the founding member of that name.
func (c *Config) Find(name string) (Node, bool) {
	for _, n := range c.Nodes {
		if n.Name == name {
			return n, true
		}
	}
	return Node{}, false
}

// Error is one thing that is wrong with the configuration.
type Error struct {
	Where   string // file, environment variable or flag
	Line    int    // 0: not known
	Key     string
	Problem string
	Next    string // what is allowed, and what to do
}

// Error puts it in one line.
func (e *Error) Error() string {
	where := e.Where
	if e.Line > 0 {
		where = fmt.Sprintf("%s:%d", where, e.Line)
	}
	s := where + ": "
	if e.Key != "" {
		s += e.Key + ": "
	}
	s += e.Problem
	if e.Next != "" {
		s += "; " + e.Next
	}
	return s
}

// hostRule is what the name or address of a host is made of.
var hostRule = regexp.MustCompile(`^[A-Za-z0-9._-]*$`)

// checkHost says what is wrong with the host of an address. That it resolves is not
// asked: names may be known on other hosts only.
func checkHost(host string) string {
	_, err := netip.ParseAddr(host)
	switch {
	case err == nil:
	case strings.Contains(host, ":"), strings.Trim(host, "0123456789.") == "" && host != "":
		return "is no IP address"
	case !hostRule.MatchString(host):
		return "is no host name"
	}
	return ""
}

// SplitAddress parses host:port with a port from 1 to 65535. Host may be empty
// only where any says so.
func SplitAddress(s string, any bool) (host, port string, err error) {
	host, port, err = net.SplitHostPort(s)
	if err != nil {
		return "", "", fmt.Errorf("%q is not HOST:PORT", s)
	}
	if host == "" && !any {
		return "", "", fmt.Errorf("%q has no host", s)
	}
	if why := checkHost(host); why != "" {
		return "", "", fmt.Errorf("%q in %q %s", host, s, why)
	}
	n, err := net.LookupPort("tcp", port)
	if err != nil || n < 1 || n > 65535 || !digits(port) {
		return "", "", fmt.Errorf("%q has no port from 1 to 65535", s)
	}
	return host, port, nil
}

func digits(s string) bool {
	for _, r := range s {
		if r < '0' || r > '9' {
			return false
		}
	}
	return s != ""
}
