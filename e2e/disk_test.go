package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"
	"time"
)

// disk is the plainest NBD client there is: one connection, one request at a
// time, simple replies. It shares no code with the server that it judges.
type disk struct {
	conn   net.Conn
	size   uint64
	flags  uint16
	handle uint64
}

// The protocol's numbers that a plain client needs.
const (
	nbdMagic      = 0x4e42444d41474943 // NBDMAGIC
	optMagic      = 0x49484156454f5054 // IHAVEOPT
	optReplyMagic = 0x3e889045565a9
	requestMagic  = 0x25609513
	replyMagic    = 0x67446698

	optGo      = 7
	repAck     = 1
	repInfo    = 3
	infoExport = 0

	cmdRead, cmdWrite, cmdDisc, cmdFlush, cmdTrim, cmdZero = 0, 1, 2, 3, 4, 6

	flagFUA = 1

	sendFlush, sendFUA, readOnly, multiConn = 1 << 2, 1 << 3, 1 << 1, 1 << 8
)

// nbdError is an error that the server answered with.
type nbdError syscall.Errno

func (e nbdError) Error() string { return "the server answered: " + syscall.Errno(e).Error() }

// dial opens an export at a node: over TCP, or, where the node has a network of
// its own, over its unix socket.
func dial(n *node, export string) (*disk, error) {
	if n.c != nil && n.c.net != nil {
		return dialAddr("unix", n.nbdSock, export)
	}
	return dialAddr("tcp", n.nbdTCP, export)
}

func dialAddr(network, addr, export string) (*disk, error) {
	conn, err := net.DialTimeout(network, addr, 5*time.Second)
	if err != nil {
		return nil, err
	}
	d := &disk{conn: conn}
	d.deadline(time.Now().Add(time.Minute))
	if err := d.negotiate(export); err != nil {
		conn.Close()
		return nil, fmt.Errorf("negotiate export %q: %w", export, err)
	}
	return d, nil
}

func mustDial(t testing.TB, n *node, export string) *disk {
	t.Helper()
	var d *disk
	var err error
	// A node that has just started may not listen yet.
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if d, err = dial(n, export); err == nil {
			d.deadline(time.Now().Add(60 * time.Second))
			return d
		}
	}
	t.Fatalf("open %s at %s: %v", export, n.name, err)
	return nil
}

// negotiate is fixed newstyle with NBD_OPT_GO.
func (d *disk) negotiate(export string) error {
	var hello [18]byte
	if _, err := io.ReadFull(d.conn, hello[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(hello[:]) != nbdMagic || binary.BigEndian.Uint64(hello[8:]) != optMagic {
		return errors.New("not an NBD server")
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(binary.BigEndian.Uint16(hello[16:])&3))
	b = binary.BigEndian.AppendUint64(b, optMagic)
	b = binary.BigEndian.AppendUint32(b, optGo)
	b = binary.BigEndian.AppendUint32(b, uint32(4+len(export)+2))
	b = binary.BigEndian.AppendUint32(b, uint32(len(export)))
	b = append(b, export...)
	b = binary.BigEndian.AppendUint16(b, 0)
	if _, err := d.conn.Write(b); err != nil {
		return err
	}
	for {
		var head [20]byte
		if _, err := io.ReadFull(d.conn, head[:]); err != nil {
			return err
		}
		if binary.BigEndian.Uint64(head[:]) != optReplyMagic {
			return errors.New("bad magic in an option reply")
		}
		typ, n := binary.BigEndian.Uint32(head[12:]), binary.BigEndian.Uint32(head[16:])
		if n > 1<<16 {
			return fmt.Errorf("option reply of %d bytes", n)
		}
		body := make([]byte, n)
		if _, err := io.ReadFull(d.conn, body); err != nil {
			return err
		}
		switch {
		case typ == repAck:
			return nil
		case typ == repInfo && len(body) >= 12 && binary.BigEndian.Uint16(body) == infoExport:
			d.size, d.flags = binary.BigEndian.Uint64(body[2:]), binary.BigEndian.Uint16(body[10:])
		case typ&(1<<31) != 0:
			return fmt.Errorf("option reply %#x: %s", typ, body)
		}
	}
}

// deadline bounds what follows; a request that takes longer fails, and the
// connection is of no further use.
func (d *disk) deadline(at time.Time) { _ = d.conn.SetDeadline(at) }

func (d *disk) send(cmd, flags uint16, off uint64, n int, payload []byte) error {
	d.handle++
	b := make([]byte, 0, 28+len(payload))
	b = binary.BigEndian.AppendUint32(b, requestMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, d.handle)
	b = binary.BigEndian.AppendUint64(b, off)
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	_, err := d.conn.Write(append(b, payload...))
	return err
}

func (d *disk) answer(into []byte) error {
	var head [16]byte
	if _, err := io.ReadFull(d.conn, head[:]); err != nil {
		return err
	}
	if magic := binary.BigEndian.Uint32(head[:]); magic != replyMagic {
		return fmt.Errorf("reply magic %#x", magic)
	}
	if handle := binary.BigEndian.Uint64(head[8:]); handle != d.handle {
		return fmt.Errorf("reply to request %d, want %d", handle, d.handle)
	}
	if errno := binary.BigEndian.Uint32(head[4:]); errno != 0 {
		return nbdError(errno)
	}
	_, err := io.ReadFull(d.conn, into)
	return err
}

func (d *disk) do(cmd, flags uint16, off uint64, n int, payload, into []byte) error {
	if err := d.send(cmd, flags, off, n, payload); err != nil {
		return err
	}
	return d.answer(into)
}

func (d *disk) read(b []byte, off uint64) error {
	return d.do(cmdRead, 0, off, len(b), nil, b)
}

func (d *disk) write(b []byte, off uint64, fua bool) error {
	var flags uint16
	if fua {
		flags = flagFUA
	}
	return d.do(cmdWrite, flags, off, len(b), b, nil)
}

func (d *disk) flush() error { return d.do(cmdFlush, 0, 0, 0, nil, nil) }

func (d *disk) trim(off uint64, n int) error { return d.do(cmdTrim, 0, off, n, nil, nil) }

func (d *disk) zero(off uint64, n int) error { return d.do(cmdZero, 0, off, n, nil, nil) }

// close says goodbye and closes.
func (d *disk) close() {
	d.deadline(time.Now().Add(time.Second))
	_ = d.send(cmdDisc, 0, 0, 0, nil) // the server may be gone
	d.conn.Close()
}
