package attach

import (
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

var fakeFamily = genetlink.Family{ID: 26, Version: 1, Name: "nbd"}

func fakeKernel(t *testing.T, f genltest.Func) *Kernel {
	t.Helper()
	k, err := newKernel(genltest.Dial(genltest.ServeFamily(fakeFamily, f)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

// attrs is what a message says, flattened.
type attrs struct {
	Cmd     uint8
	Numbers map[uint16]uint64
	Backend string
	FDs     []uint32
}

func decode(t *testing.T, m genetlink.Message) attrs {
	t.Helper()
	a := attrs{Cmd: m.Header.Command, Numbers: map[uint16]uint64{}}
	ad, err := netlink.NewAttributeDecoder(m.Data)
	if err != nil {
		t.Fatal(err)
	}
	for ad.Next() {
		switch ad.Type() {
		case attrIndex:
			a.Numbers[attrIndex] = uint64(ad.Uint32())
		case attrBackend:
			a.Backend = ad.String()
		case attrSockets:
			ad.Nested(func(list *netlink.AttributeDecoder) error {
				for list.Next() {
					list.Nested(func(item *netlink.AttributeDecoder) error {
						for item.Next() {
							a.FDs = append(a.FDs, item.Uint32())
						}
						return nil
					})
				}
				return nil
			})
		default:
			a.Numbers[ad.Type()] = ad.Uint64()
		}
	}
	if err := ad.Err(); err != nil {
		t.Fatal(err)
	}
	return a
}

func TestConnect(t *testing.T) {
	var got attrs
	k := fakeKernel(t, func(m genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
		if n.Header.Flags&netlink.Acknowledge != 0 {
			t.Error("CONNECT is answered by a message: an acknowledgement would be left over for the next request")
		}
		got = decode(t, m)
		ae := netlink.NewAttributeEncoder()
		ae.Uint32(attrIndex, 7)
		b, err := ae.Encode()
		return []genetlink.Message{{Header: genetlink.Header{Command: cmdConnect, Version: 1}, Data: b}}, err
	})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	index, err := k.Connect(3, Options{Size: 1 << 30, ServerFlags: 0x0d6d, DeadTimeout: 1500 * time.Millisecond, Backend: "blockstep:db:1:X", Sockets: []*os.File{r, w}})
	if err != nil || index != 7 {
		t.Fatalf("Connect = %d, %v", index, err)
	}
	want := attrs{
		Cmd: cmdConnect, Backend: "blockstep:db:1:X", FDs: []uint32{uint32(r.Fd()), uint32(w.Fd())},
		Numbers: map[uint16]uint64{
			attrIndex: 3, attrSizeBytes: 1 << 30, attrBlockBytes: 512, attrTimeout: 0, attrClientFlags: 0,
			attrServerFlags: 0x16d, // without CACHE, FAST_ZERO
			attrDeadTimeout: 2,     // rounded up: 0 would be none
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, err := k.Connect(-1, Options{}); err != nil {
		t.Fatal(err)
	}
	if _, named := got.Numbers[attrIndex]; named {
		t.Error("the kernel was not left the choice of the device")
	}
}

func TestReconfigureAndDisconnect(t *testing.T) {
	var got attrs
	k := fakeKernel(t, func(m genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
		if n.Header.Flags&netlink.Acknowledge == 0 {
			t.Error("without an acknowledgement nobody answers")
		}
		got = decode(t, m)
		return []genetlink.Message{{}}, nil
	})
	if err := k.Reconfigure(2, Options{Backend: "b", Size: 4096}); err != nil {
		t.Fatal(err)
	}
	want := attrs{Cmd: cmdReconfigure, Backend: "b", Numbers: map[uint16]uint64{attrIndex: 2, attrSizeBytes: 4096, attrBlockBytes: 512}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if err := k.Disconnect(2); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(attrs{Cmd: cmdDisconnect, Numbers: map[uint16]uint64{attrIndex: 2}}, got); diff != "" {
		t.Error(diff)
	}
}

func TestStatus(t *testing.T) {
	k := fakeKernel(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		ae := netlink.NewAttributeEncoder()
		ae.Nested(attrDeviceList, func(list *netlink.AttributeEncoder) error {
			for i := range uint32(2) {
				list.Nested(deviceItem, func(item *netlink.AttributeEncoder) error {
					item.Uint32(deviceIndex, i)
					item.Uint8(deviceConnected, uint8(i))
					return nil
				})
			}
			return nil
		})
		b, err := ae.Encode()
		return []genetlink.Message{{Data: b}}, err
	})
	got, err := k.Status()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Device{{Index: 0}, {Index: 1, Connected: true}}, got); diff != "" {
		t.Error(diff)
	}
}

func TestRefusals(t *testing.T) {
	for no, want := range map[syscall.Errno]error{syscall.EPERM: ErrNotPermitted, syscall.EBUSY: ErrBusy, syscall.EINVAL: ErrNotConnected} {
		k := fakeKernel(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
			return nil, genltest.Error(int(no))
		})
		if err := k.Reconfigure(0, Options{Backend: "b"}); !errors.Is(err, want) {
			t.Errorf("%v: %v, want %v", no, err, want)
		}
	}
}

func TestNoModule(t *testing.T) {
	conn := genltest.Dial(func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return nil, genltest.Error(int(syscall.ENOENT))
	})
	defer conn.Close()
	if _, err := newKernel(conn); !errors.Is(err, ErrNoModule) {
		t.Errorf("got %v, want ErrNoModule", err)
	}
}

// TestModuleLoadedAgain: the driver has another number after rmmod and modprobe, and
// none in between.
func TestModuleLoadedAgain(t *testing.T) {
	now := fakeFamily // ID 0: not loaded
	k, err := newKernel(genltest.Dial(func(m genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
		asksForFamily := n.Header.Type == unix.GENL_ID_CTRL
		if now.ID == 0 || !asksForFamily && uint16(n.Header.Type) != now.ID {
			return nil, genltest.Error(int(syscall.ENOENT))
		}
		return genltest.ServeFamily(now, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
			return []genetlink.Message{{}}, nil
		})(m, n)
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	now.ID = 0
	if err := k.Disconnect(0); !errors.Is(err, ErrNoModule) {
		t.Errorf("without the module: %v, want ErrNoModule", err)
	}
	now.ID = fakeFamily.ID + 1
	if err := k.Disconnect(0); err != nil {
		t.Errorf("with the module loaded again: %v", err)
	}
}
