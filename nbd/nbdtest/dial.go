package nbdtest

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// Options are what a Client negotiates. The zero value is a modern client:
// structured replies, no TLS.
type Options struct {
	Simple       bool // no structured replies
	Extended     bool // extended headers: an error where the server has none
	ExportName   bool // enter with EXPORT_NAME in the place of GO
	TLS          *tls.Config
	MetaContexts []string
	// Timeout bounds each request whose context has no deadline. 0 is none.
	Timeout time.Duration
}

// Handshake is a connection in negotiation, for tests that look at single
// options. Dial is built on it.
type Handshake struct {
	Conn net.Conn
	// Flags are the server's handshake flags.
	Flags uint16
}

// Reply is one reply to an option.
type Reply struct {
	Option, Type uint32
	Data         []byte
}

// Err returns the reply as an error if it is one.
func (r Reply) Err() error {
	if r.Type&(1<<31) == 0 {
		return nil
	}
	return &OptionError{Option: r.Option, Type: r.Type, Text: string(r.Data)}
}

// DialConn connects to unix:///PATH or tcp://HOST:PORT.
func DialConn(ctx context.Context, addr string) (net.Conn, error) {
	network, rest, ok := strings.Cut(addr, "://")
	if !ok || network != "tcp" && network != "unix" {
		return nil, fmt.Errorf("nbdtest: address %q: write tcp://HOST:PORT or unix:///PATH", addr)
	}
	var d net.Dialer
	return d.DialContext(ctx, network, rest)
}

// Begin exchanges the first flags on a fresh connection.
func Begin(c net.Conn) (*Handshake, error) {
	var b [18]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return nil, fmt.Errorf("nbdtest: greeting: %w", err)
	}
	if binary.BigEndian.Uint64(b[:]) != magicInit || binary.BigEndian.Uint64(b[8:]) != magicOption {
		return nil, errors.New("nbdtest: not an NBD server")
	}
	h := &Handshake{Conn: c, Flags: binary.BigEndian.Uint16(b[16:])}
	_, err := c.Write([]byte{0, 0, 0, byte(h.Flags & 3)})
	return h, err
}

// Send sends an option.
func (h *Handshake) Send(opt uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := h.Conn.Write(append(b, data...))
	return err
}

// Receive reads one option reply.
func (h *Handshake) Receive() (Reply, error) {
	var b [20]byte
	if _, err := io.ReadFull(h.Conn, b[:]); err != nil {
		return Reply{}, fmt.Errorf("nbdtest: option reply: %w", err)
	}
	if binary.BigEndian.Uint64(b[:]) != magicOptReply {
		return Reply{}, errors.New("nbdtest: no option reply")
	}
	r := Reply{Option: binary.BigEndian.Uint32(b[8:]), Type: binary.BigEndian.Uint32(b[12:])}
	n := binary.BigEndian.Uint32(b[16:])
	if n > 1<<20 {
		return r, fmt.Errorf("nbdtest: option reply of %d bytes", n)
	}
	r.Data = make([]byte, n)
	_, err := io.ReadFull(h.Conn, r.Data)
	return r, err
}

// Ask sends an option and returns its replies up to the final one, which is an
// error if the server refused.
func (h *Handshake) Ask(opt uint32, data []byte) ([]Reply, error) {
	if err := h.Send(opt, data); err != nil {
		return nil, err
	}
	var all []Reply
	for {
		r, err := h.Receive()
		if err != nil {
			return all, err
		}
		all = append(all, r)
		if r.Option != opt {
			return all, fmt.Errorf("nbdtest: reply to option %d, asked %d", r.Option, opt)
		}
		if err := r.Err(); err != nil || r.Type == RepAck {
			return all, err
		}
	}
}

// StartTLS upgrades the connection.
func (h *Handshake) StartTLS(ctx context.Context, cfg *tls.Config) error {
	if _, err := h.Ask(OptStartTLS, nil); err != nil {
		return err
	}
	t := tls.Client(h.Conn, cfg)
	if err := t.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("nbdtest: TLS handshake: %w", err)
	}
	h.Conn = t
	return nil
}

// String encodes a string with its length.
func String(s string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
}

// GoData encodes the data of INFO and GO.
func GoData(export string, infos ...uint16) []byte {
	b := binary.BigEndian.AppendUint16(String(export), uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, i)
	}
	return b
}

// MetaData encodes the data of the meta context options.
func MetaData(export string, queries ...string) []byte {
	b := binary.BigEndian.AppendUint32(String(export), uint32(len(queries)))
	for _, q := range queries {
		b = append(b, String(q)...)
	}
	return b
}

// Dial connects and negotiates. ctx bounds both.
func Dial(ctx context.Context, addr, export string, opts Options) (*Client, error) {
	conn, err := DialConn(ctx, addr)
	if err != nil {
		return nil, err
	}
	c, err := NewClient(ctx, conn, export, opts)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s, export %q: %w", addr, export, err)
	}
	return c, nil
}

// NewClient negotiates on a connection, which it owns if there is no error.
func NewClient(ctx context.Context, conn net.Conn, export string, opts Options) (*Client, error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) }) //nolint:errcheck // a closed one needs none
	h, err := Begin(conn)
	if err != nil {
		return nil, err
	}
	c := newClient(opts)
	if err := c.negotiate(ctx, h, export); err != nil {
		return nil, err
	}
	if !stop() {
		return nil, ctx.Err()
	}
	c.conn = h.Conn
	c.start()
	return c, nil
}

func (c *Client) negotiate(ctx context.Context, h *Handshake, export string) error {
	o := c.opts
	if o.TLS != nil {
		if err := h.StartTLS(ctx, o.TLS); err != nil {
			return err
		}
	}
	if o.Extended {
		if _, err := h.Ask(OptExtendedHeaders, nil); err != nil {
			return err
		}
		c.structured = true
	} else if !o.Simple {
		_, err := h.Ask(OptStructuredReply, nil)
		var refused *OptionError
		if err != nil && !errors.As(err, &refused) {
			return err
		}
		c.structured = err == nil
	}
	if len(o.MetaContexts) > 0 {
		replies, err := h.Ask(OptSetMetaContext, MetaData(export, o.MetaContexts...))
		if err != nil {
			return err
		}
		for _, r := range replies {
			if r.Type == RepMetaContext && len(r.Data) > 4 {
				c.contexts[binary.BigEndian.Uint32(r.Data)] = string(r.Data[4:])
			}
		}
	}
	if o.ExportName {
		return c.enterOld(h, export)
	}
	replies, err := h.Ask(OptGo, GoData(export, 1, 2, 3))
	if err != nil {
		return err
	}
	return c.takeInfo(replies)
}

// enterOld enters transmission by EXPORT_NAME.
func (c *Client) enterOld(h *Handshake, export string) error {
	if err := h.Send(OptExportName, []byte(export)); err != nil {
		return err
	}
	n := 10
	if h.Flags&2 == 0 {
		n += 124
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(h.Conn, b); err != nil {
		return fmt.Errorf("nbdtest: EXPORT_NAME: %w", err)
	}
	c.size, c.flags = binary.BigEndian.Uint64(b), binary.BigEndian.Uint16(b[8:])
	return nil
}

func (c *Client) takeInfo(replies []Reply) error {
	found := false
	for _, r := range replies {
		if r.Type != RepInfo || len(r.Data) < 2 {
			continue
		}
		d := r.Data[2:]
		switch typ := binary.BigEndian.Uint16(r.Data); {
		case typ == 0 && len(d) == 10:
			c.size, c.flags = binary.BigEndian.Uint64(d), binary.BigEndian.Uint16(d[8:])
			found = true
		case typ == 1:
			c.name = string(d)
		case typ == 2:
			c.description = string(d)
		case typ == 3 && len(d) == 12:
			for i := range c.blocks {
				c.blocks[i] = binary.BigEndian.Uint32(d[4*i:])
			}
		}
	}
	if !found {
		return errors.New("nbdtest: GO without NBD_INFO_EXPORT")
	}
	return nil
}
