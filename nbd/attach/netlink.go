package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// Commands and attributes of linux/nbd-netlink.h.
const (
	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdStatus      = 5

	attrIndex       = 1  // u32
	attrSizeBytes   = 2  // u64
	attrBlockBytes  = 3  // u64
	attrTimeout     = 4  // u64, seconds
	attrServerFlags = 5  // u64, transmission flags
	attrClientFlags = 6  // u64
	attrSockets     = 7  // nested: items
	attrDeadTimeout = 8  // u64, seconds
	attrDeviceList  = 9  // nested: items
	attrBackend     = 10 // string, since 5.14

	sockItem        = 1 // nested
	sockFD          = 1 // u32
	deviceItem      = 1 // nested
	deviceIndex     = 1 // u32
	deviceConnected = 2 // u8

	family        = "nbd"
	familyVersion = 1
)

// Transmission flags that a kernel may know; the others stay here.
const kernelFlags = 1<<0 | // has flags
	1<<1 | // read-only
	1<<2 | // flush
	1<<3 | // FUA
	1<<4 | // rotational
	1<<5 | // trim
	1<<6 | // write zeroes
	1<<8 // multi-conn

// What a caller can do about a refusal of the kernel's.
var (
	// ErrNoModule is returned when the kernel has no nbd driver, or one so old
	// that it has no netlink interface.
	ErrNoModule = errors.New("the kernel has no NBD driver with netlink: run modprobe nbd (and put nbd into /etc/modules-load.d/nbd.conf); kernels before 4.12 have no netlink for it and cannot be used")
	// ErrNotPermitted is returned when this process may not configure devices.
	ErrNotPermitted = errors.New("configuring a kernel device needs CAP_SYS_ADMIN: run blockstepd as root, or by the unit blockstepd.service")
	// ErrBusy is returned when the device is in use, or all are.
	ErrBusy = errors.New("the device is in use")
	// ErrNotConnected is returned when the device is not configured, or is
	// another backend's.
	ErrNotConnected = errors.New("the device is not connected, or not to this volume")
)

// Options configure a device.
type Options struct {
	Size        uint64 // bytes
	ServerFlags uint16 // transmission flags, as negotiated
	DeadTimeout time.Duration
	Backend     string // identifier
	Sockets     []*os.File
}

// Device is what the kernel says about one device.
type Device struct {
	Index     int
	Connected bool
}

// Kernel speaks to the kernel's nbd driver. Its methods may be called from
// several goroutines.
type Kernel struct {
	conn   *genetlink.Conn
	family atomic.Uint32 // its number, another one each time that the module is loaded
}

// OpenKernel finds the driver. It returns ErrNoModule when there is none.
func OpenKernel() (*Kernel, error) {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("generic netlink: %w", err)
	}
	k, err := newKernel(conn)
	if err != nil {
		_ = conn.Close() // newKernel's error is the one that tells
	}
	return k, err
}

func newKernel(conn *genetlink.Conn) (*Kernel, error) {
	k := &Kernel{conn: conn}
	if err := k.find(); err != nil {
		return nil, err
	}
	return k, nil
}

// find asks the kernel for the driver's number.
func (k *Kernel) find() error {
	f, err := k.conn.GetFamily(family)
	if errors.Is(err, fs.ErrNotExist) {
		return ErrNoModule
	}
	if err != nil {
		return fmt.Errorf("looking for the kernel's nbd driver: %w", err)
	}
	k.family.Store(uint32(f.ID))
	return nil
}

// Close ends the netlink connection; devices stay.
func (k *Kernel) Close() error { return k.conn.Close() }

// Connect configures a device and returns its index. A negative index lets the
// kernel choose a free one. The kernel keeps references to the sockets of its
// own.
func (k *Kernel) Connect(index int, o Options) (int, error) {
	// The answer is a message of its own: no acknowledgement is asked for.
	msgs, err := k.do(cmdConnect, netlink.Request, func(ae *netlink.AttributeEncoder) {
		if index >= 0 {
			ae.Uint32(attrIndex, uint32(index))
		}
		ae.Uint64(attrSizeBytes, o.Size)
		ae.Uint64(attrBlockBytes, logicalBlock)
		ae.Uint64(attrTimeout, 0)
		ae.Uint64(attrServerFlags, uint64(o.ServerFlags)&kernelFlags)
		ae.Uint64(attrClientFlags, 0)
		ae.Uint64(attrDeadTimeout, seconds(o.DeadTimeout))
		ae.String(attrBackend, o.Backend)
		sockets(ae, o.Sockets)
	})
	if err != nil {
		return 0, err
	}
	for _, m := range msgs {
		ad, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return 0, fmt.Errorf("the kernel's answer: %w", err)
		}
		for ad.Next() {
			if ad.Type() == attrIndex {
				return int(ad.Uint32()), ad.Err()
			}
		}
	}
	return 0, errors.New("the kernel's answer names no device")
}

// Reconfigure gives a connected device new sockets in the place of dead ones,
// and its size. Backend must be what Connect was given.
func (k *Kernel) Reconfigure(index int, o Options) error {
	_, err := k.do(cmdReconfigure, netlink.Request|netlink.Acknowledge, func(ae *netlink.AttributeEncoder) {
		ae.Uint32(attrIndex, uint32(index))
		if o.Size != 0 {
			ae.Uint64(attrSizeBytes, o.Size)
			ae.Uint64(attrBlockBytes, logicalBlock)
		}
		if o.DeadTimeout != 0 {
			ae.Uint64(attrDeadTimeout, seconds(o.DeadTimeout))
		}
		ae.String(attrBackend, o.Backend)
		sockets(ae, o.Sockets)
	})
	if errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("%w (%w)", ErrNotConnected, err)
	}
	return err
}

// Disconnect fails what is in flight and frees the device. One that is still
// open stays until it is closed, and fails all I/O.
func (k *Kernel) Disconnect(index int) error {
	_, err := k.do(cmdDisconnect, netlink.Request|netlink.Acknowledge, func(ae *netlink.AttributeEncoder) {
		ae.Uint32(attrIndex, uint32(index))
	})
	if errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("%w (%w)", ErrNotConnected, err)
	}
	return err
}

// Status lists the kernel's devices.
func (k *Kernel) Status() ([]Device, error) {
	msgs, err := k.do(cmdStatus, netlink.Request, func(*netlink.AttributeEncoder) {})
	if err != nil {
		return nil, err
	}
	var out []Device
	for _, m := range msgs {
		ad, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return nil, fmt.Errorf("the kernel's answer: %w", err)
		}
		for ad.Next() {
			if ad.Type() == attrDeviceList {
				ad.Nested(func(list *netlink.AttributeDecoder) error { return deviceList(list, &out) })
			}
		}
		if err := ad.Err(); err != nil {
			return nil, fmt.Errorf("the kernel's answer: %w", err)
		}
	}
	return out, nil
}

func deviceList(list *netlink.AttributeDecoder, out *[]Device) error {
	for list.Next() {
		if list.Type() != deviceItem {
			continue
		}
		list.Nested(func(item *netlink.AttributeDecoder) error {
			var d Device
			for item.Next() {
				switch item.Type() {
				case deviceIndex:
					d.Index = int(item.Uint32())
				case deviceConnected:
					d.Connected = item.Uint8() != 0
				}
			}
			*out = append(*out, d)
			return nil
		})
	}
	return nil
}

func sockets(ae *netlink.AttributeEncoder, files []*os.File) {
	if len(files) == 0 {
		return
	}
	ae.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
		for _, f := range files {
			list.Nested(sockItem, func(item *netlink.AttributeEncoder) error {
				item.Uint32(sockFD, uint32(f.Fd()))
				return nil
			})
		}
		return nil
	})
}

// seconds rounds up: 0 would mean none.
func seconds(d time.Duration) uint64 { return uint64((d + time.Second - 1) / time.Second) }

// do sends one command and translates the kernel's refusals.
func (k *Kernel) do(cmd uint8, flags netlink.HeaderFlags, fill func(*netlink.AttributeEncoder)) ([]genetlink.Message, error) {
	ae := netlink.NewAttributeEncoder()
	fill(ae)
	data, err := ae.Encode()
	if err != nil {
		return nil, fmt.Errorf("encoding a netlink message: %w", err)
	}
	req := genetlink.Message{Header: genetlink.Header{Command: cmd, Version: familyVersion}, Data: data}
	was := k.family.Load()
	msgs, err := k.conn.Execute(req, uint16(was), flags)
	if errors.Is(err, fs.ErrNotExist) { // the module was unloaded, and perhaps loaded again
		if err := k.find(); err != nil {
			return nil, err
		}
		if now := k.family.Load(); now != was {
			msgs, err = k.conn.Execute(req, uint16(now), flags)
		}
	}
	switch {
	case err == nil:
		return msgs, nil
	case errors.Is(err, syscall.EPERM):
		return nil, fmt.Errorf("%w (%w)", ErrNotPermitted, err)
	case errors.Is(err, syscall.EBUSY):
		return nil, fmt.Errorf("%w (%w)", ErrBusy, err)
	}
	return nil, fmt.Errorf("the kernel's nbd driver: %w", err)
}
