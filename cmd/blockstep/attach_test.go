package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/blockstep/blockstep/internal/control"
)

// kernel is a daemon on a host with NBD devices, as far as the verbs ask for it.
type kernel struct {
	control.Backend
	list     []control.Attachment
	warnings []control.Warning // of the next attach
}

func (k *kernel) Attachments(context.Context) ([]control.Attachment, error) { return k.list, nil }

func (k *kernel) Attach(_ context.Context, volume string, r control.Attach) (control.Attachment, error) {
	for _, a := range k.list {
		if a.Volume == volume {
			return a, control.Errorf(control.CodeRefused, "see blockstep attachments", "attaching %s: it is %s already", volume, a.Device)
		}
	}
	a := control.Attachment{Volume: volume, Device: r.Device, Connections: max(r.Connections, 1), ReadOnly: r.ReadOnly}
	if a.Device == "" {
		a.Device = "/dev/nbd0"
	}
	k.list = append(k.list, a)
	a.Warnings = k.warnings
	return a, nil
}

func (k *kernel) Detach(_ context.Context, volume string) error {
	for i, a := range k.list {
		if a.Volume == volume {
			k.list = append(k.list[:i:i], k.list[i+1:]...)
			return nil
		}
	}
	return control.Errorf(control.CodeRefused, "see blockstep attachments", "detaching %s: the volume is attached to no device of this host", volume)
}

// serveBackend serves the admin API and returns its address.
func serveBackend(t *testing.T, b control.Backend) string {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "a")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: control.Handler(b, slog.New(slog.DiscardHandler), false)} //nolint:gosec // of a test
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
	return "unix://" + sock
}

// TestAttachVerbs: what the verbs for kernel devices print and how they end,
// where the kernel has such devices. The devices themselves: e2e/kernel.
func TestAttachVerbs(t *testing.T) {
	k := &kernel{}
	admin := serveBackend(t, k)
	schemas, err := strictSchemas()
	if err != nil {
		t.Fatal(err)
	}
	lost := func() { k.list[0].Lost = "the volume was deleted" }
	twice := func() {
		k.warnings = []control.Warning{{Volume: "db", Text: "db is on beta too", Next: "detach it there"}}
	}
	for _, tc := range []struct {
		args   string
		code   int
		out    string // the whole of stdout, or
		schema string // what it fits, with --json
		err    string // part of stderr
		before func()
	}{
		{args: "attach db", out: "db is attached as /dev/nbd0\n"},
		{args: "attach db", code: 1, err: "attaching db: it is /dev/nbd0 already; see blockstep attachments"},
		{args: "attach db --if-needed", out: "db is attached as /dev/nbd0\n"},
		{args: "attach web /dev/nbd7 --connections 4 --read-only --json", schema: "attachment"},
		{args: "attachments --json", schema: "attachments"},
		{args: "detach web --json", schema: "detached"},
		{args: "detach web", code: 1, err: "detaching web: the volume is attached to no device of this host"},
		{args: "attachments", out: "VOLUME  DEVICE     CONNECTIONS  READ-ONLY  STATE\ndb      /dev/nbd0  1            no         serves\n"},
		{
			args: "attachments", before: lost,
			out: "VOLUME  DEVICE     CONNECTIONS  READ-ONLY  STATE\n" +
				"db      /dev/nbd0  1            no         lost: the volume was deleted; unmount it, then run blockstep detach db\n",
		},
		{args: "attachments --json", schema: "attachments"},
		{args: "attach db --if-needed", code: 1, err: "it is /dev/nbd0 already"},
		{args: "detach db", out: "db is detached\n"},
		{args: "attach db", before: twice, out: "db is attached as /dev/nbd0\n", err: "warning: db is on beta too\n  next: detach it there\n"},
		{args: "attach web --json", schema: "attachment"},
	} {
		if tc.before != nil {
			tc.before()
		}
		var out, errOut strings.Builder
		code := run(t.Context(), append([]string{"--admin", admin}, strings.Fields(tc.args)...), strings.NewReader(""), &out, &errOut)
		if code != tc.code || tc.schema == "" && out.String() != tc.out || !strings.Contains(errOut.String(), tc.err) {
			t.Errorf("blockstep %s: exit code %d\n%s%s", tc.args, code, out.String(), errOut.String())
		}
		if tc.schema == "" {
			continue
		}
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader([]byte(out.String())))
		if err == nil {
			err = schemas[tc.schema].Validate(v)
		}
		if err != nil {
			t.Errorf("blockstep %s: %v\n%s", tc.args, err, out.String())
		}
	}
}
