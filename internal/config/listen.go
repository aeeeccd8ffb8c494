package config

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// What a listener does about TLS.
const (
	TLSOff      = "off"      // refused even if the client asks
	TLSOffered  = "offered"  // the client chooses
	TLSRequired = "required" // on a unix socket too
)

// listenerMaxConnections bounds max_connections of one listener, as that of all
// is bounded.
const listenerMaxConnections = 65536

// ParseListener reads unix:///PATH, tcp://HOST:PORT or fd://NAME. The latter is
// a socket that systemd passes, by its FileDescriptorName or its number, from 3
// on.
func ParseListener(s string) (Listener, error) {
	const forms = "allowed are unix:///PATH and tcp://HOST:PORT"
	network, rest, ok := strings.Cut(s, "://")
	if !ok {
		return Listener{}, fmt.Errorf("%q is not an address; %s", s, forms)
	}
	l := Listener{Network: network, Address: rest, Mode: 0o660}
	switch network {
	case "unix":
		if !filepath.IsAbs(rest) {
			return Listener{}, fmt.Errorf("%q has no absolute path; %s", s, forms)
		}
		if len(rest) > unixPathMax {
			return Listener{}, fmt.Errorf("%q is longer than the %d bytes that a socket's path may have", s, unixPathMax)
		}
	case "tcp":
		if _, _, err := SplitAddress(rest, true); err != nil {
			return Listener{}, fmt.Errorf("%w; %s", err, forms)
		}
	case "fd":
		if rest == "" {
			return Listener{}, fmt.Errorf("%q names no socket; write fd://NAME with the FileDescriptorName= of systemd's socket unit", s)
		}
	default:
		return Listener{}, fmt.Errorf("%q has an unknown scheme %q; %s", s, network, forms)
	}
	return l, nil
}

// listeners reads nbd.listen: an address, several by commas, or a list of
// addresses and of maps with an address and its options.
func (l *loader) listeners() []Listener {
	const name = "nbd.listen"
	fromFile := l.find(name)
	if l.overridden(name) || fromFile == nil || fromFile.Kind == yaml.ScalarNode {
		var out []Listener
		for s := range strings.SplitSeq(l.str(name), ",") {
			if s = strings.TrimSpace(s); s == "" {
				continue
			}
			n, err := ParseListener(s)
			if err != nil {
				l.fail(name, err.Error(), "")
				continue
			}
			out = append(out, n)
		}
		return out
	}
	if fromFile.Kind != yaml.SequenceNode {
		l.failAt(fromFile, name, "is not a list of addresses", `write it like ["unix:///run/blockstep/nbd.sock", "tcp://127.0.0.1:10809"]`)
		return nil
	}
	var out []Listener
	for i, n := range fromFile.Content {
		if n.Kind == yaml.AliasNode {
			n = n.Alias
		}
		out = append(out, l.listener(fmt.Sprintf("%s[%d]", name, i), n))
	}
	return out
}

func (l *loader) listener(full string, n *yaml.Node) Listener {
	if n.Kind == yaml.ScalarNode {
		out, err := ParseListener(n.Value)
		if err != nil {
			l.failAt(n, full, err.Error(), "")
		}
		return out
	}
	address := mapValue(n, "address")
	if address == nil {
		l.failAt(n, full, "has no address", "write it as {address: \"unix:///run/blockstep/nbd.sock\", mode: \"0660\"}; allowed here: "+strings.Join(listenerKeys, ", "))
		return Listener{}
	}
	out, err := ParseListener(address.Value)
	if err != nil {
		l.failAt(address, full+".address", err.Error(), "")
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		l.listenerOption(&out, full, n.Content[i], n.Content[i+1])
	}
	return out
}

func (l *loader) listenerOption(out *Listener, full string, k, v *yaml.Node) {
	if v.Kind == yaml.AliasNode {
		v = v.Alias
	}
	name := full + "." + k.Value
	if (k.Value == "group" || k.Value == "mode") && out.Network != "unix" && out.Network != "" {
		l.failAt(k, name, "is for unix sockets, and this listener is none", "remove it; tcp has tls and the firewall, and a socket of systemd's has SocketMode= and SocketGroup= in its unit")
		return
	}
	switch k.Value {
	case "address":
	case "group":
		out.Group = v.Value
	case "mode":
		m, err := strconv.ParseUint(v.Value, 8, 32)
		if err != nil || m > 0o777 {
			l.failAt(v, name, fmt.Sprintf("%q is not a file mode", v.Value), "allowed are octal modes, for example 0660")
		}
		out.Mode = os.FileMode(m)
	case "read_only":
		b, err := strconv.ParseBool(v.Value)
		if err != nil {
			l.failAt(v, name, fmt.Sprintf("%q is neither true nor false", v.Value), "allowed are true and false")
		}
		out.ReadOnly = b
	case "allow":
		out.Allow = l.allowList(name, v)
	case "max_connections":
		n, err := strconv.Atoi(v.Value)
		if err != nil || n < 1 || n > listenerMaxConnections {
			l.failAt(v, name, fmt.Sprintf("%q is not a number in range", v.Value), fmt.Sprintf("allowed are 1 to %d", listenerMaxConnections))
		}
		out.MaxConnections = n
	case "tls":
		if modes := []string{TLSOff, TLSOffered, TLSRequired}; !slices.Contains(modes, v.Value) {
			l.failAt(v, name, fmt.Sprintf("%q is not known", v.Value), "allowed are "+strings.Join(modes, ", "))
		}
		out.TLS = v.Value
	default:
		l.errs = append(l.errs, unknown(l.file, k.Line, name, k.Value, listenerKeys))
	}
}

// allowList reads the exports of a listener: one, or a list. Each is a name or a
// pattern with * and ?.
func (l *loader) allowList(name string, v *yaml.Node) []string {
	var list []string
	if v.Kind == yaml.ScalarNode {
		list = []string{v.Value}
	} else if err := v.Decode(&list); err != nil || len(list) == 0 {
		l.failAt(v, name, "is not a list of export names", "write it like [db, \"db@*\", web]; leave it out to allow all")
		return nil
	}
	for _, pattern := range list {
		if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
			l.failAt(v, name, fmt.Sprintf("%q is neither an export's name nor a pattern", pattern), "write it like [db, \"db@*\", web]; * stands for any characters, ? for one")
		}
	}
	return list
}

// checkListeners finds listeners whose TLS has no certificate.
func (l *loader) checkListeners(c *Config) {
	for i, n := range c.NBD.Listen {
		if (n.TLS == TLSOffered || n.TLS == TLSRequired) && !c.NBD.TLS.Enabled() {
			l.fail("nbd.listen", fmt.Sprintf("entry %d, %s, has tls: %s, and there is no certificate", i, n, n.TLS), "set nbd.tls.cert and nbd.tls.key to PEM files, or remove it")
		}
	}
}
