package attach

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// What the handshake of a client needs of the protocol; package nbd has the
// server's half.
const (
	magicInit     = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption   = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply = 0x3e889045565a9

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	optGo      = 7
	repAck     = 1
	repInfo    = 3
	repError   = 1 << 31
	infoExport = 0

	// replyMax bounds an option reply, bytes: a message for a human.
	replyMax = 64 << 10
)

// export is what a handshake learned.
type export struct {
	size  uint64
	flags uint16 // transmission flags
}

// socketPair makes a connected pair: a connection for our server, and a file
// for the kernel.
func socketPair() (ours net.Conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a socket pair: %w", err)
	}
	for _, fd := range fds {
		// The larger buffer is only faster. Above net.core.wmem_max it needs
		// CAP_NET_ADMIN.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBytes) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, socketBytes)
		}
	}
	f := os.NewFile(uintptr(fds[0]), "nbd server")
	theirs = os.NewFile(uintptr(fds[1]), "nbd kernel")
	defer f.Close() // FileConn has a copy of its own
	if ours, err = net.FileConn(f); err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("making a socket pair: %w", err)
	}
	return ours, theirs, nil
}

// negotiate does the client's handshake on the kernel's end of a pair, up to the
// first byte of the transmission phase.
func negotiate(theirs *os.File, name string) (export, error) {
	c, err := net.FileConn(theirs)
	if err != nil {
		return export{}, fmt.Errorf("handshake: %w", err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		return export{}, fmt.Errorf("handshake: %w", err)
	}
	e, err := shake(c, name)
	if err != nil {
		return export{}, fmt.Errorf("handshake for %s: %w", name, err)
	}
	return e, nil
}

// shake reads exactly what belongs to the handshake.
func shake(c io.ReadWriter, name string) (export, error) {
	var e export
	var head [20]byte
	if _, err := io.ReadFull(c, head[:18]); err != nil {
		return e, err
	}
	if binary.BigEndian.Uint64(head[0:]) != magicInit || binary.BigEndian.Uint64(head[8:]) != magicOption {
		return e, errors.New("the server does not speak the newstyle protocol")
	}
	b := binary.BigEndian.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint32(b, optGo)
	b = binary.BigEndian.AppendUint32(b, uint32(4+len(name)+2))
	b = binary.BigEndian.AppendUint32(b, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, 0) // no further information is asked for
	if _, err := c.Write(b); err != nil {
		return e, err
	}
	for known := false; ; {
		if _, err := io.ReadFull(c, head[:20]); err != nil {
			return e, err
		}
		typ, n := binary.BigEndian.Uint32(head[12:]), binary.BigEndian.Uint32(head[16:])
		if binary.BigEndian.Uint64(head[0:]) != magicOptReply || binary.BigEndian.Uint32(head[8:]) != optGo || n > replyMax {
			return e, errors.New("the server's answer is no option reply")
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(c, data); err != nil {
			return e, err
		}
		switch {
		case typ&repError != 0:
			return e, fmt.Errorf("the server refused: %s", data)
		case typ == repAck && !known:
			return e, errors.New("the server named no size")
		case typ == repAck:
			return e, nil
		case typ == repInfo && n == 12 && binary.BigEndian.Uint16(data) == infoExport:
			e.size, e.flags, known = binary.BigEndian.Uint64(data[2:]), binary.BigEndian.Uint16(data[10:]), true
		}
	}
}
