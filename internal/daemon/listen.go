package daemon

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/nbd"
)

// Socket is a listening socket that systemd passes to the daemon.
type Socket struct {
	Name     string // FileDescriptorName= of its unit
	FD       int    // from 3 on
	Listener net.Listener
}

// Inherited returns the sockets that the process was started with (systemd's
// LISTEN_FDS), none without them. It takes them out of the environment, so that
// a second call, or a child, does not take them again. What is passed and is no
// listening stream socket is an error.
func Inherited() ([]Socket, error) {
	var out []Socket
	for i, f := range activation.Files(true) {
		fd := 3 + i // systemd's SD_LISTEN_FDS_START; FileListener makes a copy
		ln, err := net.FileListener(f)
		f.Close() //nolint:errcheck // the copy is what is used
		if err != nil {
			return nil, fmt.Errorf("the socket %s (file descriptor %d) that systemd passes is no listening stream socket: %w; use ListenStream= in its unit", f.Name(), fd, err)
		}
		out = append(out, Socket{Name: f.Name(), FD: fd, Listener: ln})
	}
	return out, nil
}

// openTLS reads the certificate that NBD clients are shown; nil when there is to
// be none.
func openTLS(cfg *config.Config, log *slog.Logger) (*nbd.TLSFiles, error) {
	t := cfg.NBD.TLS
	if !t.Enabled() {
		return nil, nil
	}
	files, err := nbd.OpenTLS(t.Cert, t.Key, t.CA, log)
	if err != nil {
		return nil, fmt.Errorf("nbd.tls: %w; check the files that %s names", err, cfg.File)
	}
	return files, nil
}

// CheckFiles looks at the files that a configuration names and that have to be
// right before the daemon starts.
func CheckFiles(cfg *config.Config) error {
	_, err := openTLS(cfg, nil)
	return err
}

// openNBD serves the exports on the configured addresses, and on the sockets
// that systemd passes.
func (d *Daemon) openNBD() error {
	c := nbd.Config{
		Exports: d.exports(), Logger: d.log, TLSRequire: d.cfg.NBD.TLS.Require,
		Limits: nbd.Limits{
			Requests: d.cfg.NBD.MaxRequests, BytesPerConn: d.cfg.Memory.NBDConnection,
			BytesTotal: d.cfg.Memory.NBD, Connections: d.cfg.NBD.MaxConnections,
			Handshake: d.cfg.NBD.HandshakeTimeout, Idle: d.cfg.NBD.IdleTimeout, Stall: d.cfg.NBD.StallTimeout,
		},
	}
	files, err := openTLS(d.cfg, d.log)
	if err != nil {
		return err
	}
	if d.tls = files; files != nil {
		c.TLS = files.Config()
	}
	if d.nbd, err = nbd.NewServer(c); err != nil {
		return err
	}
	left := slices.Clone(d.sockets)
	for _, l := range d.cfg.NBD.Listen {
		// One unit may have several sockets of one name: its options are for all.
		named := slices.DeleteFunc(slices.Clone(left), func(s Socket) bool { return !s.is(l) })
		left = slices.DeleteFunc(left, func(s Socket) bool { return s.is(l) })
		for _, s := range named {
			d.serveNBD(s.Listener, l)
		}
		if len(named) > 0 {
			continue
		}
		if l.Network == "fd" {
			return fmt.Errorf("nbd.listen: %s: systemd passes no such socket%s; set FileDescriptorName=%s in the socket unit, and start the daemon by it", l, passed(d.sockets), l.Address)
		}
		ln, err := listenOn(l)
		if err != nil {
			return listenError("nbd.listen", l.String(), err)
		}
		d.serveNBD(ln, l)
	}
	return d.serveLeft(left)
}

// serveNBD serves a listener with the options of an entry of nbd.listen.
func (d *Daemon) serveNBD(ln net.Listener, l config.Listener) {
	opts := nbd.ListenerOptions{ReadOnly: l.ReadOnly, Allow: l.Allow, Connections: l.MaxConnections}
	switch l.TLS {
	case config.TLSOff:
		opts.TLS = nbd.TLSOff
	case config.TLSOffered:
		opts.TLS = nbd.TLSOffered
	case config.TLSRequired:
		opts.TLS = nbd.TLSRequired
	}
	d.wg.Go(func() {
		if err := d.nbd.Serve(d.ctx, ln, opts); err != nil {
			d.fail(err)
		}
	})
}

// serveLeft serves the sockets that no entry of nbd.listen names, since they are
// in the unit to be served. Sockets for other purposes are not taken.
func (d *Daemon) serveLeft(left []Socket) error {
	for _, s := range left {
		for key, l := range map[string]config.Listener{
			"admin.listen":        d.cfg.Admin.Listen,
			"nodes." + d.cfg.Node: {Network: "tcp", Address: d.cfg.Self().Address},
			"metrics.listen":      {Network: "tcp", Address: d.cfg.Metrics.Listen},
		} {
			if s.is(l) {
				return fmt.Errorf("systemd passes the socket of %s, %s; it takes NBD sockets only: remove it from the socket unit", key, l.Address)
			}
		}
		d.serveNBD(s.Listener, config.Listener{})
	}
	return nil
}

// is reports whether a passed socket is the one that an entry names: by systemd's
// name or number for it, or by its address.
func (s Socket) is(l config.Listener) bool {
	switch l.Network {
	case "fd":
		return l.Address == s.Name || l.Address == strconv.Itoa(s.FD)
	case "unix":
		a, ok := s.Listener.Addr().(*net.UnixAddr)
		return ok && a.Name == l.Address
	case "tcp":
		a, ok := s.Listener.Addr().(*net.TCPAddr)
		want, err := net.ResolveTCPAddr("tcp", l.Address)
		if !ok || err != nil || a.Port != want.Port {
			return false
		}
		return a.IP.Equal(want.IP) || unspecified(a.IP) && unspecified(want.IP)
	}
	return false
}

func unspecified(ip net.IP) bool { return len(ip) == 0 || ip.IsUnspecified() }

// passed lists sockets for an error.
func passed(sockets []Socket) string {
	if len(sockets) == 0 {
		return ", and no other either"
	}
	names := make([]string, 0, len(sockets))
	for _, s := range sockets {
		names = append(names, s.Name)
	}
	return ", only " + strings.Join(names, ", ")
}

// listenOn listens on an address of this host. The directory of a unix socket is
// made when only it is missing: /run/blockstep is, where no systemd has made it.
func listenOn(l config.Listener) (net.Listener, error) {
	if l.Network == "unix" {
		_ = os.Mkdir(filepath.Dir(l.Address), 0o755) // where it fails, listening says why
	}
	return nbd.Listen(l.String(), nbd.SocketOptions{Mode: l.Mode, Group: l.Group})
}
