package wire

import (
	"fmt"
	"io"

	"github.com/blockstep/blockstep/internal/ident"
)

// Refusal says why an acceptor does not take a link.
type Refusal uint8

// The refusals of a Hello.
const (
	Accepted       Refusal = iota
	RefusedCluster         // another cluster, by name or id
	RefusedTarget          // it was meant for another node
	RefusedUnknown         // the dialer is no peer of the acceptor (yet)
	RefusedVersion         // no version of the frame that both know
	RefusedBusy            // too many handshakes at a time
	RefusedOlder           // a newer connection of the same process is there already
)

// String says the refusal in words, for logs.
func (r Refusal) String() string {
	switch r {
	case Accepted:
		return "accepted"
	case RefusedCluster:
		return "another cluster"
	case RefusedTarget:
		return "meant for another node"
	case RefusedUnknown:
		return "the dialing node is no peer"
	case RefusedVersion:
		return "no version in common"
	case RefusedBusy:
		return "too many handshakes at a time"
	case RefusedOlder:
		return "a newer connection is there already"
	}
	return fmt.Sprintf("refusal %d", uint8(r))
}

// Hello opens a link, once in each direction: the dialer's, then the
// acceptor's answer. Its layout is the same in every version; what a later one
// adds at its end is skipped by an earlier one.
type Hello struct {
	Min, Max uint8 // versions of the frame that the sender knows
	// Version is the one that the link uses; in the answer only, else 0.
	Version   uint8
	Refusal   Refusal // in the answer only, else 0
	Instance  uint64  // random, made when the sender's process starts
	Attempt   uint64  // the dialer's: rises with each connection that the process opens to this peer
	Cluster   string
	ClusterID string // "" when the sender does not know it
	From      ident.Node
	To        ident.Node
}

const (
	helloMagic = "BSHELLO\n"
	// helloHead is the magic, the length and the CRC-32C of what follows.
	helloHead = 16
	helloBody = 20
)

// EncodeHello appends the bytes of h to dst. It returns an error that wraps
// ErrLimit for a name that is too long.
func EncodeHello(dst []byte, h Hello) ([]byte, error) {
	for _, s := range []string{h.Cluster, h.ClusterID, string(h.From), string(h.To)} {
		if len(s) > NameMax {
			return dst, fmt.Errorf("%w: name of %d bytes in a hello", ErrLimit, len(s))
		}
	}
	start := len(dst)
	dst = append(dst, helloMagic...)
	dst = append(dst, 0, 0, 0, 0, 0, 0, 0, 0)
	dst = append(dst, h.Min, h.Max, h.Version, byte(h.Refusal))
	dst = le.AppendUint64(dst, h.Instance)
	dst = le.AppendUint64(dst, h.Attempt)
	for _, s := range []string{h.Cluster, h.ClusterID, string(h.From), string(h.To)} {
		dst = append(dst, byte(len(s)))
		dst = append(dst, s...)
	}
	head, body := dst[start:], dst[start+helloHead:]
	le.PutUint32(head[8:], uint32(len(body)))
	le.PutUint32(head[12:], Checksum(body))
	return dst, nil
}

// ReadHello reads a hello and not one byte more. It returns an error that wraps
// ErrMalformed, ErrChecksum or ErrLimit for bytes that are none, and src's own.
func ReadHello(src io.Reader) (Hello, error) {
	var head [helloHead]byte
	if _, err := io.ReadFull(src, head[:]); err != nil {
		return Hello{}, err
	}
	if string(head[:8]) != helloMagic {
		return Hello{}, fmt.Errorf("%w: no hello begins with %q", ErrMalformed, head[:8])
	}
	n := le.Uint32(head[8:])
	if n > HelloMax || n < helloBody {
		return Hello{}, fmt.Errorf("%w: hello of %d bytes", ErrLimit, n)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(src, body); err != nil {
		return Hello{}, unexpected(err)
	}
	if Checksum(body) != le.Uint32(head[12:]) {
		return Hello{}, fmt.Errorf("%w: hello", ErrChecksum)
	}
	h := Hello{Min: body[0], Max: body[1], Version: body[2], Refusal: Refusal(body[3]), Instance: le.Uint64(body[4:]), Attempt: le.Uint64(body[12:])}
	c := cursor{b: body[helloBody:]}
	h.Cluster, h.ClusterID = c.name(), c.name()
	h.From, h.To = ident.Node(c.name()), ident.Node(c.name())
	if c.short || h.Min > h.Max {
		return Hello{}, fmt.Errorf("%w: hello", ErrMalformed)
	}
	return h, nil
}

func (c *cursor) name() string {
	n := int(c.u8())
	if n > len(c.b) {
		c.short = true
		return ""
	}
	s := string(c.b[:n])
	c.b = c.b[n:]
	return s
}

// Pick returns the newest version that is one of v and that the sender of h
// knows; ok is false if there is none.
func (v Versions) Pick(h Hello) (version uint8, ok bool) {
	version = min(h.Max, v.Max)
	return version, version >= max(h.Min, v.Min)
}
