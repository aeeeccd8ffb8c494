package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// nameRule is what nodes, volumes and clusters may be called: it must be safe in
// a path, in an export name next to '@', and on a command line.
var nameRule = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

const nameRuleText = "allowed are letters, digits, dot, dash and underscore, 1 to 63 of them, the first a letter or digit"

// unixPathMax is the longest path that fits in sockaddr_un with its final zero.
const unixPathMax = 107

// CheckName says what is wrong with a node's, volume's or cluster's name; thing
// is the word for it.
func CheckName(thing, name string) error {
	if !nameRule.MatchString(name) {
		return fmt.Errorf("%s name %q is not valid; %s", thing, name, nameRuleText)
	}
	return nil
}

// build makes the Config; what is wrong is collected in l.errs.
func (l *loader) build() *Config {
	c := &Config{
		File:       l.file,
		Cluster:    l.str("cluster"),
		DataDir:    l.path("data_dir"),
		OnRemoved:  l.enum("on_removed"),
		BootIDFile: l.path("boot_id_file"),
		Nodes:      l.nodes(),
		Admin:      l.admin(),
		NBD: NBD{
			Listen:           l.listeners(),
			TLS:              l.tls(),
			MaxConnections:   l.integer("nbd.max_connections"),
			MaxRequests:      l.integer("nbd.max_requests"),
			HandshakeTimeout: l.duration("nbd.handshake_timeout"),
			IdleTimeout:      l.duration("nbd.idle_timeout"),
			StallTimeout:     l.duration("nbd.stall_timeout"),
		},
		Metrics: Metrics{Listen: l.str("metrics.listen")},
		Log:     Log{Level: l.enum("log.level"), Format: l.enum("log.format")},
		Volume: Volume{
			LogRetention:    l.size("volume.log_retention"),
			Heartbeat:       l.duration("volume.heartbeat"),
			Lease:           l.duration("volume.lease"),
			StallTimeout:    l.duration("volume.stall_timeout"),
			PowerLossGrace:  l.duration("volume.power_loss_grace"),
			AfterPowerLoss:  l.enum("volume.after_power_loss"),
			OnNoQuorum:      l.enum("volume.on_no_quorum"),
			NoQuorumTimeout: l.duration("volume.no_quorum_timeout"),
			Ack:             l.enum("volume.ack"),
		},
		Resync:       Resync{RateMax: l.size("resync.rate_max"), RateMin: l.size("resync.rate_min")},
		Memory:       Memory{Volume: l.size("memory.volume"), NBD: l.size("memory.nbd"), NBDConnection: l.size("memory.nbd_connection")},
		Raft:         Raft{Heartbeat: l.duration("raft.heartbeat"), Election: l.duration("raft.election")},
		Attach:       Attach{DeadTimeout: l.duration("attach.dead_timeout")},
		Join:         Join{Token: l.token()},
		FailoverAuto: l.boolean("failover.auto"),
	}
	c.Node = l.nodeName(c.Nodes)
	l.checkWhole(c)
	if len(l.errs) == 0 {
		c.fill(l)
	}
	return c
}

// checkWhole judges what concerns more than one key.
func (l *loader) checkWhole(c *Config) {
	if c.Cluster == "" {
		l.fail("cluster", "is missing", "give the cluster a name, the same on each node: cluster: prod")
	} else if err := CheckName("cluster", c.Cluster); err != nil {
		l.fail("cluster", err.Error(), "")
	}
	if c.DataDir == "" {
		l.fail("data_dir", "is empty", "name the directory for this node's state, for example /var/lib/blockstep")
	}
	if c.BootIDFile == "" {
		l.fail("boot_id_file", "is empty", "leave it out to use the kernel's, /proc/sys/kernel/random/boot_id")
	}
	// 0 is what is no duration, and was said.
	if c.Volume.Lease > 0 && c.Volume.Lease < 3*c.Volume.Heartbeat {
		l.fail("volume.lease", fmt.Sprintf("%v is less than three heartbeats of %v", c.Volume.Lease, c.Volume.Heartbeat), "a lease that one lost heartbeat ends would stop I/O; raise volume.lease or lower volume.heartbeat")
	}
	if c.Raft.Election > 0 && c.Raft.Election < c.Raft.Heartbeat {
		l.fail("raft.election", fmt.Sprintf("%v is less than raft.heartbeat, %v", c.Raft.Election, c.Raft.Heartbeat), "raise raft.election, or lower raft.heartbeat")
	}
	if r := c.Resync; r.RateMax != 0 && r.RateMin > r.RateMax {
		l.fail("resync.rate_min", fmt.Sprintf("%s is more than resync.rate_max, %s", FormatSize(r.RateMin), FormatSize(r.RateMax)), "lower it, or raise resync.rate_max")
	}
	if c.Metrics.Listen != "" {
		if _, _, err := SplitAddress(c.Metrics.Listen, true); err != nil {
			l.fail("metrics.listen", err.Error(), "write it like 127.0.0.1:9720, or leave it out to have none")
		}
	}
	if m := c.Memory; m.NBDConnection > m.NBD {
		l.fail("memory.nbd_connection", fmt.Sprintf("%s is more than memory.nbd, %s", FormatSize(m.NBDConnection), FormatSize(m.NBD)), "lower it, or raise memory.nbd")
	}
	l.checkListeners(c)
	l.checkPorts(c)
}

// checkPorts finds two listeners of this node on one address before the kernel
// does, since its "address already in use" does not say who the other is.
func (l *loader) checkPorts(c *Config) {
	used := map[string]string{}
	take := func(name, addr string) {
		if other, ok := used[addr]; ok && addr != "" {
			l.fail(name, fmt.Sprintf("%s is used by %s already", addr, other), "give each its own address")
		}
		used[addr] = name
	}
	take("nodes", c.Self().Address)
	take("admin.listen", c.Admin.Listen.Address)
	take("metrics.listen", c.Metrics.Listen)
	for _, n := range c.NBD.Listen {
		take("nbd.listen", n.Address)
	}
}

// nodeName is the configured name, or the host name: whole, or up to its first
// dot when only that is in nodes.
func (l *loader) nodeName(nodes []Node) string {
	has := func(name string) bool {
		return slices.ContainsFunc(nodes, func(n Node) bool { return n.Name == name })
	}
	names := make([]string, 0, len(nodes))
	for _, n := range nodes {
		names = append(names, n.Name)
	}
	list := "allowed are the names under nodes: " + strings.Join(names, ", ")
	if len(nodes) == 0 {
		list = "add it under nodes"
	}
	if name := l.str("node"); name != "" {
		if !has(name) {
			l.fail("node", fmt.Sprintf("%q is not one of the nodes", name), list)
		}
		return name
	}
	host, err := os.Hostname()
	if err != nil {
		l.fail("node", "is missing and the host name cannot be read: "+err.Error(), "set node: NAME; "+list)
		return ""
	}
	short, _, _ := strings.Cut(host, ".")
	for _, name := range []string{host, short} {
		if has(name) {
			return name
		}
	}
	l.fail("node", fmt.Sprintf("is missing, and the host name %q is not one of the nodes", host), "set node: NAME; "+list)
	return host
}

const nodesExample = `{alpha: {address: "10.1.0.1:7700"}, beta: {address: "10.1.0.2:7700"}, gamma: {address: "10.1.0.3:7700"}}`

// nodes reads the map from the YAML itself: viper lowers the case of keys, and
// Alpha and alpha are different nodes.
func (l *loader) nodes() []Node {
	m := l.find("nodes")
	if env := os.Getenv(envName("nodes")); env != "" {
		file := l.file
		l.file = "environment variable " + envName("nodes")
		defer func() { l.file = file }()
		var doc yaml.Node
		if err := yaml.Unmarshal([]byte(env), &doc); err != nil || len(doc.Content) == 0 {
			l.errs = append(l.errs, &Error{Where: l.file, Problem: fmt.Sprintf("not valid YAML: %v", err), Next: nodesExample})
			return nil
		}
		m = doc.Content[0]
	}
	if m == nil || m.Kind != yaml.MappingNode || len(m.Content) == 0 {
		l.fail("nodes", "is missing or empty", "list the founding members: nodes: "+nodesExample)
		return nil
	}
	var out []Node
	byAddress, byName := map[string]string{}, map[string]bool{}
	for i := 0; i+1 < len(m.Content); i += 2 {
		name, val := m.Content[i].Value, m.Content[i+1]
		full := "nodes." + name
		if err := CheckName("node", name); err != nil {
			l.failAt(m.Content[i], full, err.Error(), "")
			continue
		}
		if byName[name] {
			l.failAt(m.Content[i], full, "stands there twice", "remove one of them")
			continue
		}
		byName[name] = true
		n := l.nodeEntry(full, name, m.Content[i], val)
		if other, dup := byAddress[n.Address]; dup && n.Address != "" {
			l.failAt(val, full+".address", fmt.Sprintf("%s is %s's address already", n.Address, other), "give each node its own address")
		}
		byAddress[n.Address] = name
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b Node) int { return strings.Compare(a.Name, b.Name) })
	if len(out) > 0 && !slices.ContainsFunc(out, func(n Node) bool { return !n.Witness }) {
		l.fail("nodes", "every node is a witness, so nothing could be stored", "remove witness: true from at least one node")
	}
	return out
}

func (l *loader) nodeEntry(full, name string, at, val *yaml.Node) Node {
	n := Node{Name: name}
	const example = `write it as {address: "10.1.0.1:7700"}`
	if val.Kind != yaml.MappingNode {
		l.failAt(at, full, "has no address", example)
		return n
	}
	for i := 0; i+1 < len(val.Content); i += 2 {
		k, v := val.Content[i], val.Content[i+1]
		switch k.Value {
		case "address":
			n.Address = v.Value
			if _, _, err := SplitAddress(v.Value, false); err != nil {
				l.failAt(v, full+".address", err.Error(), "write HOST:PORT, for example 10.1.0.1:7700")
			} else if host, port, _ := net.SplitHostPort(v.Value); net.ParseIP(host) != nil && net.ParseIP(host).IsUnspecified() {
				l.failAt(v, full+".address", v.Value+" is no address that other nodes can reach", "write the node's own address, for example 10.1.0.1:"+port)
			}
		case "witness":
			b, err := strconv.ParseBool(v.Value)
			if err != nil {
				l.failAt(v, full+".witness", fmt.Sprintf("%q is neither true nor false", v.Value), "allowed are true and false")
			}
			n.Witness = b
		default:
			l.errs = append(l.errs, unknown(l.file, k.Line, full+"."+k.Value, k.Value, nodeKeys))
		}
	}
	if n.Address == "" && mapValue(val, "address") == nil {
		l.failAt(at, full, "has no address", example)
	}
	return n
}

func (l *loader) failAt(n *yaml.Node, name, problem, next string) {
	l.errs = append(l.errs, &Error{Where: l.file, Line: n.Line, Key: name, Problem: problem, Next: next})
}

func (l *loader) admin() Admin {
	s := l.str("admin.listen")
	a, err := ParseListener(s)
	switch {
	case err != nil:
		l.fail("admin.listen", err.Error(), "write it like unix:///run/blockstep/admin.sock")
	case a.Network != "unix":
		l.fail("admin.listen", s+" is not a unix socket", "read-only verbs are served on the node's own address already; write it like unix:///run/blockstep/admin.sock")
	}
	a.Mode = l.mode("admin.mode")
	a.Group = l.str("admin.group")
	return Admin{Listen: a}
}

// mode reads a file mode.
func (l *loader) mode(name string) os.FileMode {
	s := l.str(name)
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 {
		l.fail(name, fmt.Sprintf("%q is not a file mode", s), "allowed are octal modes, for example 0660")
	}
	return os.FileMode(n)
}

// token is the join token, from wherever it is. A file that is gone is none: it
// was used.
func (l *loader) token() string {
	token, file := l.str("join.token"), l.path("join.token_file")
	if file == "" {
		return token
	}
	if token != "" {
		l.fail("join.token_file", "join.token is set too", "keep one of them")
		return ""
	}
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	raw, err := readFile(file)
	if err != nil {
		l.fail("join.token_file", err.Error(), "")
		return ""
	}
	return strings.TrimSpace(string(raw))
}

func (l *loader) tls() TLS {
	t := TLS{Cert: l.path("nbd.tls.cert"), Key: l.path("nbd.tls.key"), CA: l.path("nbd.tls.ca"), Require: l.boolean("nbd.tls.require")}
	if (t.Cert == "") != (t.Key == "") {
		l.fail("nbd.tls", "cert and key go together, and one is missing", "set both nbd.tls.cert and nbd.tls.key to PEM files, or none")
	}
	if t.Cert == "" && (t.Require || t.CA != "") {
		l.fail("nbd.tls", "ca and require need a certificate", "set nbd.tls.cert and nbd.tls.key to PEM files")
	}
	return t
}
