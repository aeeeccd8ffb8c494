package nbd

import (
	"crypto/tls"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// tlsReloader serves the certificates as the files hold them now.
type tlsReloader struct {
	cert, key, ca string

	mu      sync.Mutex
	current *tls.Config
	stamp   [3]fileStamp
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

func (r *tlsReloader) get(*tls.ClientHelloInfo) (*tls.Config, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := stampOf(r.cert, r.key, r.ca); now != r.stamp {
		if cfg, err := readTLS(r.cert, r.key, r.ca); err == nil {
			r.current, r.stamp = cfg, now
		}
	}
	return r.current, nil
}
