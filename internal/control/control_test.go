package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fakeBackend answers what a test needs; the embedded nil Backend panics for
// anything else.
type fakeBackend struct {
	Backend
	created CreateVolume
}

var aVolume = VolumeStatus{
	Volume: "db", Size: 1 << 30, Primary: "alpha", Epoch: 3, Health: Degraded, Reason: "beta is Absent", InSync: []string{"alpha", "gamma"},
	Replicas: []ReplicaStatus{{Node: "alpha", State: InSync, Position: "3:17"}, {Node: "beta", State: Resyncing, Resync: &Resync{DoneBytes: 1, TotalBytes: 2}}},
}

func (f *fakeBackend) VolumeStatus(_ context.Context, name string) (VolumeStatus, error) {
	if name != "db" {
		return VolumeStatus{}, fmt.Errorf("looking up: %w", Errorf(CodeNotFound, "see blockstep volume list", "no volume %q", name))
	}
	return aVolume, nil
}

func (f *fakeBackend) CreateVolume(_ context.Context, r CreateVolume) (VolumeStatus, error) {
	f.created = r
	return VolumeStatus{Volume: r.Name, Size: r.Size}, nil
}

func (f *fakeBackend) DeleteVolume(context.Context, string) error { return errors.New("disk on fire") }

func (f *fakeBackend) DrainNode(context.Context, string) error { return context.DeadlineExceeded }

func (f *fakeBackend) Events(ctx context.Context, since string, follow bool, emit func(Event) error) error {
	for i := range 3 {
		if err := emit(Event{Cursor: fmt.Sprint(i), Kind: since, Time: time.Unix(int64(i), 0).UTC()}); err != nil {
			return err
		}
	}
	if follow {
		<-ctx.Done()
	}
	return nil
}

func (f *fakeBackend) Verify(_ context.Context, _ string, _ Verify, progress func(VerifyProgress) error) error {
	if err := progress(VerifyProgress{DoneBytes: 5, TotalBytes: 10}); err != nil {
		return err
	}
	return Errorf(CodeFailed, "look at it", "gamma went away")
}

func unixClient(t *testing.T, b Backend) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: Handler(b, slog.New(slog.DiscardHandler), false)}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	c, err := Dial("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestVolumeStatusTravelsWhole(t *testing.T) {
	c := unixClient(t, &fakeBackend{})
	got, err := c.VolumeStatus(t.Context(), "db")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(aVolume, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestCreateTravelsWhole(t *testing.T) {
	f := &fakeBackend{}
	c := unixClient(t, f)
	want := CreateVolume{Name: "a b/c", Size: 5, Replicas: []string{"x"}, Devices: map[string]string{"x": "/dev/y"}, Ack: "durable"}
	if _, err := c.CreateVolume(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, f.created); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestErrorsKeepTheirClass(t *testing.T) {
	c := unixClient(t, &fakeBackend{})
	_, err := c.VolumeStatus(t.Context(), "a/b")
	var e *Error
	if !errors.As(err, &e) || e.Code != CodeNotFound || e.Error() != `no volume "a/b"; see blockstep volume list` {
		t.Errorf("got %v", err)
	}
	if err := c.DeleteVolume(t.Context(), "db"); !errors.As(err, &e) || e.Code != CodeFailed || !strings.Contains(e.Message, "on fire") {
		t.Errorf("got %v", err)
	}
	if _, err := c.ChangeNode(t.Context(), "alpha", "drain"); !errors.As(err, &e) || e.Code != CodeTimeout {
		t.Errorf("got %v", err)
	}
	if err := c.do(t.Context(), "POST", "/v1/volumes", map[string]int{"sise": 1}, nil); !errors.As(err, &e) || e.Code != CodeUsage {
		t.Errorf("an unknown field: %v", err)
	}
	if err := c.do(t.Context(), "GET", "/v2/x", nil, nil); !errors.As(err, &e) || e.Code != CodeUsage {
		t.Errorf("an unknown path: %v", err)
	}
}

func TestStreams(t *testing.T) {
	c := unixClient(t, &fakeBackend{})
	var got []string
	if err := c.Events(t.Context(), "s x", false, func(e Event) error { got = append(got, e.Cursor+e.Kind); return nil }); err != nil {
		t.Fatal(err)
	}
	if strings.Join(got, ",") != "0s x,1s x,2s x" {
		t.Errorf("got %q", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	err := c.Events(ctx, "", true, func(Event) error {
		if n++; n == 3 {
			cancel()
		}
		return nil
	})
	if n != 3 || !errors.Is(err, context.Canceled) {
		t.Errorf("follow: %d events, %v", n, err)
	}
	var e *Error
	n = 0
	err = c.Verify(t.Context(), "db", Verify{}, func(VerifyProgress) error { n++; return nil })
	if n != 1 || !errors.As(err, &e) || e.Message != "gamma went away" {
		t.Errorf("verify: %d lines, %v", n, err)
	}
}

func TestUnreachable(t *testing.T) {
	for _, addr := range []string{"unix:///nonexistent/a.sock", "tcp://127.0.0.1:1"} {
		c, err := Dial(addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Status(t.Context()); !errors.Is(err, ErrUnreachable) {
			t.Errorf("%s: %v", addr, err)
		}
	}
	for _, addr := range []string{"", "x", "http://a", "unix://"} {
		var e *Error
		if _, err := Dial(addr); !errors.As(err, &e) || e.Code != CodeUsage {
			t.Errorf("%q: %v", addr, err)
		}
	}
}

// TestNotAllowed: a socket that this user may not use is no daemon that does not
// run.
func TestNotAllowed(t *testing.T) {
	c, err := Dial("unix:///run/blockstep/admin.sock")
	if err != nil {
		t.Fatal(err)
	}
	denied := &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", syscall.EACCES)}
	err = c.classify(t.Context(), denied)
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "this user may not use") || strings.Contains(err.Error(), "start blockstepd") {
		t.Errorf("got %v", err)
	}
}

func TestOverTCPOnlyReading(t *testing.T) {
	srv := httptest.NewServer(Handler(&fakeBackend{}, slog.New(slog.DiscardHandler), true))
	defer srv.Close()
	c, err := Dial("tcp://" + srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.VolumeStatus(t.Context(), "db"); err != nil {
		t.Errorf("reading: %v", err)
	}
	var e *Error
	lines := 0
	none := func(VerifyProgress) error { lines++; return nil }
	if err := c.Verify(t.Context(), "db", Verify{}, none); lines != 1 || !errors.As(err, &e) || e.Message != "gamma went away" {
		t.Errorf("a comparison reads: %d lines, %v", lines, err)
	}
	lines = 0
	for name, ask := range map[string]func() error{
		"delete":            func() error { return c.DeleteVolume(t.Context(), "db") },
		"drain":             func() error { _, err := c.ChangeNode(t.Context(), "alpha", "drain"); return err },
		"detach":            func() error { return c.Detach(t.Context(), "db") },
		"invalidate":        func() error { return c.Invalidate(t.Context(), "db", Invalidate{Node: "alpha"}) },
		"repair":            func() error { return c.Verify(t.Context(), "db", Verify{Repair: true}, none) },
		"repair, disguised": func() error { return c.Verify(t.Context(), "db/../db", Verify{Repair: true}, none) },
		"unknown":           func() error { return c.do(t.Context(), http.MethodPost, "/v1/verify", nil, nil) },
	} {
		var e *Error
		if err := ask(); !errors.As(err, &e) || e.Code != CodeReadOnly {
			t.Errorf("%s: %v", name, err)
		}
	}
	if lines != 0 {
		t.Errorf("a repair began: %d lines", lines)
	}
	resp, err := http.Get(srv.URL + "/debug/pprof/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode == http.StatusOK {
		t.Errorf("profiles over TCP: %.80s", body)
	}
}

func TestNotADaemon(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "teapot", http.StatusTeapot) }))
	defer srv.Close()
	c, err := Dial("tcp://" + srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "does not look like blockstepd") {
		t.Errorf("got %v", err)
	}
}
