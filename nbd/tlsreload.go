package nbd

import (
	"crypto/tls"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// TLSFiles serves the certificates as the PEM files hold them now.
type TLSFiles struct {
	cert, key, ca string
	log           *slog.Logger

	mu      sync.Mutex
	current *tls.Config
	stamp   [3]fileStamp // of what current was read from
	broken  error        // why what the files hold now is not current; nil when it is
	told    [3]fileStamp // of the files that it was logged of
}

// fileStamp tells versions of a file apart.
type fileStamp struct {
	ino   uint64
	size  int64
	mtime time.Duration
}

func stampOf(paths ...string) (stamps [3]fileStamp) {
	for i, p := range paths {
		var st unix.Stat_t
		if p != "" && unix.Stat(p, &st) == nil {
			stamps[i] = fileStamp{st.Ino, st.Size, time.Duration(st.Mtim.Nano())}
		}
	}
	return stamps
}

// OpenTLS reads a server's certificate from PEM files. With ca, clients must
// show a certificate that it signed. The files are read again for each handshake
// after they changed, so that renewing them needs no restart; while the new ones
// do not load the old ones stay, and log, which may be nil, is told so once for
// each change.
func OpenTLS(cert, key, ca string, log *slog.Logger) (*TLSFiles, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	r := &TLSFiles{cert: cert, key: key, ca: ca, log: log, stamp: stampOf(cert, key, ca)}
	var err error
	r.current, err = readTLS(cert, key, ca)
	if err != nil {
		return nil, err
	}
	return r, nil
}

// LoadTLS is the configuration of OpenTLS, for who wants no more.
func LoadTLS(cert, key, ca string) (*tls.Config, error) {
	r, err := OpenTLS(cert, key, ca, nil)
	if err != nil {
		return nil, err
	}
	return r.Config(), nil
}

// Config is what a Server takes.
func (r *TLSFiles) Config() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.renewLocked()
		return r.current, nil
	}}
}

// State looks at the files, and says until when the certificate that is in use is
// valid, and why it is not the one that the files hold now; nil when it is.
func (r *TLSFiles) State() (until time.Time, broken error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.renewLocked()
	return r.untilLocked(), r.broken
}

func (r *TLSFiles) untilLocked() time.Time { return r.current.Certificates[0].Leaf.NotAfter }

// renewLocked takes what the files hold now. What does not load is tried again
// each time: it may be that the key is renewed after the certificate, or that the
// file could not be read for a while.
func (r *TLSFiles) renewLocked() {
	now := stampOf(r.cert, r.key, r.ca)
	if now == r.stamp {
		r.broken = nil
		return
	}
	cfg, err := readTLS(r.cert, r.key, r.ca)
	if r.broken = err; err == nil {
		r.current, r.stamp = cfg, now
		r.log.Info("the renewed TLS certificate is in use", "cert", r.cert, "valid_until", r.untilLocked())
		return
	}
	if now != r.told {
		r.told = now
		r.log.Warn("the TLS files have changed and do not load: the certificate of before stays in use", "valid_until", r.untilLocked(), "err", err)
	}
}
