package attach

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fakeDriver is a kernel with one device a slot: it keeps copies of the sockets
// that it is given, and says in a fake sysfs what the real one would.
type fakeDriver struct {
	t   *testing.T
	sys string

	mu      sync.Mutex
	backend map[int]string
	socks   map[int][]net.Conn
	sizes   map[int]uint64
	stays   bool     // Disconnect leaves the device there, as while it is open
	taken   chan int // an index for each Connect and each accepted Reconfigure with a socket
}

func newFakeDriver(t *testing.T) *fakeDriver {
	return &fakeDriver{t: t, sys: t.TempDir(), backend: map[int]string{}, socks: map[int][]net.Conn{}, sizes: map[int]uint64{}, taken: make(chan int, 64)}
}

func (f *fakeDriver) keep(index int, files []*os.File) {
	for _, file := range files {
		fd, err := unix.Dup(int(file.Fd()))
		if err != nil {
			f.t.Error(err)
			return
		}
		g := os.NewFile(uintptr(fd), "kernel's")
		c, err := net.FileConn(g)
		g.Close()
		if err != nil {
			f.t.Error(err)
			return
		}
		f.socks[index] = append(f.socks[index], c)
	}
}

func (f *fakeDriver) Connect(index int, o Options) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if index < 0 {
		for index = 0; f.backend[index] != ""; index++ {
		}
	}
	if f.backend[index] != "" {
		return 0, ErrBusy
	}
	f.backend[index] = o.Backend
	f.keep(index, o.Sockets)
	dir := filepath.Join(f.sys, deviceName(index))
	if err := os.MkdirAll(filepath.Join(dir, "queue"), 0o700); err != nil {
		f.t.Error(err)
	}
	for name, text := range map[string]string{"pid": "1", "backend": o.Backend + "\n", "uevent": "", "queue/io_timeout": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			f.t.Error(err)
		}
	}
	f.setSize(index, o.Size)
	f.taken <- index
	return index, nil
}

func (f *fakeDriver) setSize(index int, size uint64) {
	f.sizes[index] = size
	if err := os.WriteFile(filepath.Join(f.sys, deviceName(index), "size"), fmt.Appendln(nil, size/512), 0o600); err != nil {
		f.t.Error(err)
	}
}

func (f *fakeDriver) Reconfigure(index int, o Options) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.backend[index] == "" || f.backend[index] != o.Backend {
		return ErrNotConnected
	}
	if o.Size != 0 {
		f.setSize(index, o.Size)
	}
	if len(o.Sockets) > 0 {
		f.keep(index, o.Sockets)
		f.taken <- index
	}
	return nil
}

func (f *fakeDriver) Disconnect(index int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.backend[index] == "" {
		return ErrNotConnected
	}
	for _, c := range f.socks[index] {
		c.Close()
	}
	delete(f.backend, index)
	delete(f.socks, index)
	if f.stays {
		return nil
	}
	return os.RemoveAll(filepath.Join(f.sys, deviceName(index)))
}

func (f *fakeDriver) Status() ([]Device, error) { return nil, nil }
func (f *fakeDriver) Close() error              { return nil }

func (f *fakeDriver) last(index int) net.Conn {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.socks[index]
	return s[len(s)-1]
}

// fakeServer answers the handshake for every name and then echoes bytes, so
// that a test sees which of its ends serves which socket.
type fakeServer struct {
	mu    sync.Mutex
	conns []net.Conn
	size  uint64 // 0: 1 MiB
	end   error  // what a connection's end is reported as
}

func (s *fakeServer) serve(c net.Conn, _ bool) error {
	s.mu.Lock()
	s.conns = append(s.conns, c)
	size := max(s.size, 1<<20)
	s.mu.Unlock()
	defer c.Close()
	b := binary.BigEndian.AppendUint64(nil, magicInit)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	if _, err := c.Write(b); err != nil {
		return err
	}
	var head [20]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return err
	}
	if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(head[16:]))); err != nil {
		return err
	}
	b = optReply(nil, repInfo, append(binary.BigEndian.AppendUint64([]byte{0, 0}, size), 0x01, 0x6d))
	if _, err := c.Write(optReply(b, repAck, nil)); err != nil {
		return err
	}
	if _, err := io.Copy(c, c); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end
}

func optReply(b []byte, typ uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOptReply)
	b = binary.BigEndian.AppendUint32(b, optGo)
	b = binary.BigEndian.AppendUint32(b, typ)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func (s *fakeServer) resize(size uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size = size
}

func (s *fakeServer) crash() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		c.Close()
	}
	s.conns = nil
}

type scene struct {
	*Manager
	driver *fakeDriver
	server *fakeServer
	claim  error
	check  func(Record) error
}

func newScene(t *testing.T, path string, driver *fakeDriver) *scene {
	t.Helper()
	s := &scene{driver: driver, server: &fakeServer{end: io.EOF}, check: func(Record) error { return nil }}
	s.Manager = NewManager(Config{
		Path: path, DeadTimeout: time.Minute, Logger: slog.New(slog.DiscardHandler),
		Serve: s.server.serve, Check: func(r Record) error { return s.check(r) },
	})
	s.open = func() (driverOf, error) { return driver, nil }
	s.host.sys, s.host.dev, s.host.mountinfo = driver.sys, filepath.Join(driver.sys, "dev"), filepath.Join(driver.sys, "mountinfo")
	s.host.exclusives = func(string) (*os.File, error) {
		if s.claim != nil {
			return nil, s.claim
		}
		return os.Open(os.DevNull)
	}
	return s
}

type driverOf = driver

func (s *scene) stop() {
	s.Stopping()
	s.server.crash()
	s.Stop()
}

// echo checks that the newest socket of a device is served.
func (f *fakeDriver) echo(index int) error {
	c := f.last(index)
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	var b [5]byte
	_, err := io.ReadFull(c, b[:])
	return err
}

func wait(t *testing.T, ch <-chan int) int {
	t.Helper()
	select {
	case i := <-ch:
		return i
	case <-time.After(10 * time.Second):
		t.Fatal("the kernel was given no socket")
		return 0
	}
}

func TestAttachDetach(t *testing.T) {
	d := newFakeDriver(t)
	path := filepath.Join(t.TempDir(), "attachments.json")
	s := newScene(t, path, d)
	defer s.stop()
	ctx := t.Context()
	if err := s.Detach(ctx, "db"); !errors.Is(err, ErrNotAttached) {
		t.Errorf("detach of nothing: %v", err)
	}
	for _, bad := range []string{"/dev/sda", "nbd", "/dev/nbd-1", "nbd99999", "/dev/nbd0p1"} {
		if _, err := s.Attach(ctx, Record{Volume: "db"}, bad); !errors.Is(err, ErrUsage) {
			t.Errorf("device %q: %v", bad, err)
		}
	}
	r, err := s.Attach(ctx, Record{Volume: "db", ID: "1", Connections: 2}, "/dev/nbd4")
	if err != nil || r.Device() != "/dev/nbd4" {
		t.Fatalf("Attach = %+v, %v", r, err)
	}
	if !strings.HasPrefix(r.Backend, "blockstep:db:1:") {
		t.Errorf("identifier %q: the udev rule reads the volume's name after the first colon", r.Backend)
	}
	if err := d.echo(4); err != nil {
		t.Errorf("the socket is not served: %v", err)
	}
	if _, err := s.Attach(ctx, Record{Volume: "db", ID: "1"}, ""); !errors.Is(err, ErrAttached) || !strings.Contains(err.Error(), "/dev/nbd4") {
		t.Errorf("attached twice: %v", err)
	}
	if _, err := s.Attach(ctx, Record{Volume: "other", ID: "2"}, "nbd4"); !errors.Is(err, ErrBusy) {
		t.Errorf("a device in use: %v", err)
	}
	if l := s.List(); len(l) != 1 {
		t.Errorf("after a refusal the list is %+v", l)
	}
	s.claim = syscall.EBUSY
	if err := os.WriteFile(s.host.mountinfo, []byte("36 35 43:0 / /srv/db rw shared:1 - ext4 "+s.host.path(4)+" rw\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Detach(ctx, "db"); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "umount /srv/db") {
		t.Errorf("detach while mounted: %v", err)
	}
	if err := d.echo(4); err != nil {
		t.Errorf("after a refused detach the device is not served: %v", err)
	}
	s.claim = nil
	if err := s.Detach(ctx, "db"); err != nil {
		t.Errorf("detach: %v", err)
	}
	if list, err := s.file.load(); err != nil || len(list) != 0 {
		t.Errorf("the file still holds %+v, %v", list, err)
	}
}

// TestTakeBack kills one daemon and starts another on the same files: the device
// goes on, and only with the identifier of the first.
func TestTakeBack(t *testing.T) {
	d := newFakeDriver(t)
	path := filepath.Join(t.TempDir(), "attachments.json")
	first := newScene(t, path, d)
	r, err := first.Attach(t.Context(), Record{Volume: "db", ID: "1", Generation: 7, Connections: 2}, "")
	if err != nil {
		t.Fatal(err)
	}
	wait(t, d.taken)
	first.stop()

	second := newScene(t, path, d)
	defer second.stop()
	asked := make(chan Record, 64)
	notYet := fmt.Errorf("the cluster is not known yet")
	second.check = func(r Record) error {
		asked <- r
		if len(asked) < 3 {
			return notYet
		}
		return nil
	}
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	wait(t, d.taken)
	wait(t, d.taken)
	if err := d.echo(0); err != nil {
		t.Errorf("the device is not served again: %v", err)
	}
	if got := <-asked; got != r {
		t.Errorf("asked about %+v, attached as %+v", got, r)
	}
	// One connection breaks: it is replaced too.
	second.server.crash()
	wait(t, d.taken)
	wait(t, d.taken)
	if err := d.echo(0); err != nil {
		t.Errorf("after a broken connection: %v", err)
	}
}

// TestLost attaches, loses writes, and wants the device to fail, also after a
// restart, until it is detached.
func TestLost(t *testing.T) {
	d := newFakeDriver(t)
	path := filepath.Join(t.TempDir(), "attachments.json")
	first := newScene(t, path, d)
	if _, err := first.Attach(t.Context(), Record{Volume: "db", ID: "1"}, ""); err != nil {
		t.Fatal(err)
	}
	first.stop()
	second := newScene(t, path, d)
	defer second.stop()
	second.check = func(Record) error { return fmt.Errorf("%w: in a test", ErrLost) }
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		d.mu.Lock()
		gone := d.backend[0] == ""
		d.mu.Unlock()
		if l := second.List(); gone && len(l) == 1 && l[0].Lost != "" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the device is not lost: %+v", second.List())
		}
	}
	if _, err := second.Attach(t.Context(), Record{Volume: "db", ID: "1"}, ""); !errors.Is(err, ErrAttached) {
		t.Errorf("attach over a lost device: %v", err)
	}
	if err := second.Detach(t.Context(), "db"); err != nil {
		t.Error(err)
	}
}

// TestDisconnectedByOthers: nbd-client -d is no reason to reconnect.
func TestDisconnectedByOthers(t *testing.T) {
	d := newFakeDriver(t)
	s := newScene(t, filepath.Join(t.TempDir(), "attachments.json"), d)
	defer s.stop()
	s.server.end = nil
	if _, err := s.Attach(context.Background(), Record{Volume: "db", ID: "1"}, ""); err != nil {
		t.Fatal(err)
	}
	if err := d.Disconnect(0); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for s.List()[0].Lost == "" {
		if time.Now().After(deadline) {
			t.Fatal("nobody noticed")
		}
	}
}

func TestDamagedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "attachments.json")
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newScene(t, path, newFakeDriver(t))
	defer s.stop()
	if err := s.Start(); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("got %v", err)
	}
}

// TestResize: the kernel is told that a volume grew, and a reconnect whose
// handshake is older than that does not make the device smaller again.
func TestResize(t *testing.T) {
	d := newFakeDriver(t)
	s := newScene(t, filepath.Join(t.TempDir(), "attachments.json"), d)
	defer s.stop()
	if _, err := s.Attach(t.Context(), Record{Volume: "db", ID: "1"}, ""); err != nil {
		t.Fatal(err)
	}
	wait(t, d.taken)
	is := func(when string, want uint64) {
		t.Helper()
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.sizes[0] != want {
			t.Errorf("%s the device has %d bytes, want %d", when, d.sizes[0], want)
		}
	}
	is("attached,", 1<<20)
	s.Resize("db", 3<<20)
	is("grown,", 3<<20)
	s.Resize("db", 2<<20) // older news
	is("told older news,", 3<<20)
	s.server.resize(3 << 20)
	s.server.crash()
	wait(t, d.taken)
	is("reconnected,", 3<<20)
	s.Resize("nosuch", 4<<20)
	is("another volume grown,", 3<<20)
}

// TestRestartBeforeTheNews: the daemon restarts, and its cluster state is for a
// moment of before a volume grew, as from an older snapshot. The device does not
// shrink, and is not served before the daemon takes requests for all of it.
func TestRestartBeforeTheNews(t *testing.T) {
	d := newFakeDriver(t)
	path := filepath.Join(t.TempDir(), "attachments.json")
	first := newScene(t, path, d)
	if _, err := first.Attach(t.Context(), Record{Volume: "db", ID: "1"}, ""); err != nil {
		t.Fatal(err)
	}
	wait(t, d.taken)
	first.Resize("db", 3<<20)
	first.stop()
	second := newScene(t, path, d)
	defer second.stop()
	opened := make(chan struct{}, 64)
	second.check = func(Record) error {
		opened <- struct{}{}
		return nil
	}
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	for range 3 { // the third is of another attempt
		select {
		case <-opened:
		case <-d.taken:
			t.Fatal("it is served by a daemon that knows less of it")
		}
	}
	second.server.resize(4 << 20)
	wait(t, d.taken)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.sizes[0] != 4<<20 {
		t.Errorf("the device has %d bytes", d.sizes[0])
	}
}

// TestDetachStillOpen: a device that is open when it is detached fails all I/O
// from then on, and is shown so until it is closed and detached.
func TestDetachStillOpen(t *testing.T) {
	d := newFakeDriver(t)
	d.stays = true
	s := newScene(t, filepath.Join(t.TempDir(), "attachments.json"), d)
	defer s.stop()
	if _, err := s.Attach(t.Context(), Record{Volume: "db", ID: "1"}, ""); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := s.Detach(ctx, "db"); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "still open") {
		t.Errorf("detach: %v", err)
	}
	if l := s.List(); len(l) != 1 || l[0].Lost == "" {
		t.Errorf("it is listed as %+v", l)
	}
	if err := os.RemoveAll(filepath.Join(d.sys, deviceName(0))); err != nil { // it is closed
		t.Fatal(err)
	}
	if err := s.Detach(t.Context(), "db"); err != nil {
		t.Errorf("detach after it was closed: %v", err)
	}
	if l := s.List(); len(l) != 0 {
		t.Errorf("it is listed as %+v", l)
	}
}

// TestClaimGivenUp: an open that returns after nobody waits for it any more does
// not keep the device claimed.
func TestClaimGivenUp(t *testing.T) {
	for range 32 {
		answer, opened := make(chan struct{}), make(chan *os.File, 1)
		h := host{dev: "/dev", exclusives: func(string) (*os.File, error) {
			<-answer
			f, err := os.Open(os.DevNull)
			opened <- f
			return f, err
		}}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := h.claim(ctx, 0, false); err == nil || !strings.Contains(err.Error(), "held") {
			t.Fatalf("claim: %v", err)
		}
		close(answer)
		f := <-opened
		deadline := time.Now().Add(10 * time.Second)
		for {
			if _, err := f.Stat(); errors.Is(err, os.ErrClosed) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the device stays claimed")
			}
		}
	}
}
