package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// SocketOptions are the mode and group of a unix socket's file. The zero value
// leaves both to the umask.
type SocketOptions struct {
	Mode  fs.FileMode
	Group string // name or number
}

// Listen opens a listener on unix:///path or tcp://host:port. A socket file
// that nobody serves any more is replaced; one that is served is an error.
func Listen(addr string, opts SocketOptions) (net.Listener, error) {
	if hostPort, ok := strings.CutPrefix(addr, "tcp://"); ok {
		if _, _, err := net.SplitHostPort(hostPort); err != nil {
			return nil, fmt.Errorf("nbd: listen address %q: %w", addr, err)
		}
		return net.Listen("tcp", hostPort)
	}
	p, ok := strings.CutPrefix(addr, "unix://")
	if !ok || p == "" {
		return nil, fmt.Errorf("nbd: listen address %q: write tcp://HOST:PORT or unix:///PATH", addr)
	}
	if err := removeStale(p); err != nil {
		return nil, err
	}
	ln, err := net.Listen("unix", p)
	if err != nil {
		return nil, fmt.Errorf("nbd: %w", err)
	}
	if err := ownSocket(p, opts); err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// removeStale removes a socket file that refuses connections.
func removeStale(p string) error {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return nil //nolint:nilerr // not there, or net.Listen will say what is wrong
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("nbd: %s is there and is no socket: remove it or choose another path", p)
	}
	c, err := net.DialTimeout("unix", p, time.Second)
	if err == nil {
		c.Close()
		return fmt.Errorf("nbd: %s is served by another process: stop it or choose another path", p)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("nbd: %s: %w", p, err)
	}
	if err := unix.Unlink(p); err != nil {
		return fmt.Errorf("nbd: remove stale socket %s: %w", p, err)
	}
	return nil
}

func ownSocket(p string, opts SocketOptions) error {
	if opts.Group != "" {
		gid, err := strconv.Atoi(opts.Group)
		if err != nil {
			g, err := user.LookupGroup(opts.Group)
			if err != nil {
				return fmt.Errorf("nbd: group of socket %s: %w", p, err)
			}
			if gid, err = strconv.Atoi(g.Gid); err != nil {
				return fmt.Errorf("nbd: group of socket %s: %w", p, err)
			}
		}
		if err := unix.Chown(p, -1, gid); err != nil {
			return fmt.Errorf("nbd: group of socket %s: %w", p, err)
		}
	}
	if opts.Mode != 0 {
		if err := unix.Chmod(p, uint32(opts.Mode.Perm())); err != nil {
			return fmt.Errorf("nbd: mode of socket %s: %w", p, err)
		}
	}
	return nil
}

func readTLS(cert, key, ca string) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("nbd: TLS certificate: %w", err)
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}
	if ca == "" {
		return cfg, nil
	}
	pem, err := os.ReadFile(ca) //nolint:forbidigo // a certificate, no file of a replica
	if err != nil {
		return nil, fmt.Errorf("nbd: TLS authority: %w", err)
	}
	cfg.ClientCAs = x509.NewCertPool()
	if !cfg.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("nbd: TLS authority %s holds no PEM certificate", ca)
	}
	cfg.ClientAuth = tls.RequireAndVerifyClientCert
	// Under TLS 1.3 crypto/tls asks for certificates without naming RSA in the way
	// that GnuTLS 3.7 looks for: qemu and libnbd then send none that has an RSA key.
	cfg.MaxVersion = tls.VersionTLS12
	return cfg, nil
}

// remoteName names a client for logs. A unix client has no address of its own;
// its process is known instead.
func remoteName(c net.Conn) string {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return c.RemoteAddr().String()
	}
	name := "unix"
	if rc, err := u.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) { //nolint:errcheck // only a nicer name
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
				name = fmt.Sprintf("unix:pid=%d,uid=%d", cred.Pid, cred.Uid)
			}
		})
	}
	return name
}

// isLocal reports whether the client is on this host.
func isLocal(c net.Conn) bool {
	switch a := c.RemoteAddr().(type) {
	case *net.UnixAddr:
		return true
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	}
	return false
}

// peerGone asks the kernel whether the peer has closed its end, which it knows
// even while bytes that were sent before are unread.
func peerGone(rc syscall.RawConn) bool {
	if rc == nil {
		return false
	}
	gone := false
	err := rc.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		for {
			n, err := unix.Poll(p, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			gone = n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
			return
		}
	})
	return gone || err != nil
}

// unsent returns how many bytes the peer's kernel has not acknowledged yet.
func unsent(rc syscall.RawConn) (n int) {
	if rc == nil {
		return 0
	}
	rc.Control(func(fd uintptr) { //nolint:errcheck // a closed socket sends nothing
		if v, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ); err == nil {
			n = v
		}
	})
	return n
}
