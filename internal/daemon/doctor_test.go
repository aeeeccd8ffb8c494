package daemon

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/nbd/nbdtest"
)

// TestDoctorOfACertificate: what is about to end, has ended, or does not load is
// said before clients notice.
func TestDoctorOfACertificate(t *testing.T) {
	until := time.Date(2026, 3, 20, 12, 0, 0, 0, time.UTC)
	day := 24 * time.Hour
	for _, c := range []struct {
		left   time.Duration
		broken error
		state  string
		says   string
	}{
		{15 * day, nil, control.FindingOK, "valid until 2026-03-20 12:00:00 UTC"},
		{13 * day, nil, control.FindingWarn, "valid until 2026-03-20 12:00:00 UTC"},
		{0, nil, control.FindingBad, "it has ended, at 2026-03-20 12:00:00 UTC"},
		{-day, nil, control.FindingBad, "it has ended"},
		{90 * day, errors.New("half a file"), control.FindingBad, "the certificate of before stays in use: half a file; valid until 2026-03-20"},
	} {
		e := &exam{node: "alpha"}
		e.certificate(until, c.broken, until.Add(-c.left))
		if f := e.list[0]; len(e.list) != 1 || f.State != c.state || !strings.Contains(f.Text, c.says) || (f.Next == "") != (c.state == control.FindingOK) {
			t.Errorf("%v before its end, %v: %+v", c.left, c.broken, e.list)
		}
	}
}

// TestDoctorOfAFullDisk: nobody is sent to look for a broken disk where one is full.
func TestDoctorOfAFullDisk(t *testing.T) {
	dir := t.TempDir()
	for fault, next := range map[error]string{unix.ENOSPC: "make room in " + dir, unix.EIO: "mend the disk or the file system"} {
		e := &exam{node: "alpha"}
		e.disk(vfs.Inject(vfs.OS(), func(c vfs.Call) error {
			if c.Op == vfs.OpWrite {
				return fault
			}
			return nil
		}), dir)
		if f := e.list[len(e.list)-1]; f.Check != "fsync" || f.State != control.FindingBad || f.Next != next {
			t.Errorf("%v: %+v", fault, f)
		}
	}
}

// TestDoctorOfABrokenRenewal asks a running daemon, and the host without one.
func TestDoctorOfABrokenRenewal(t *testing.T) {
	dir := t.TempDir()
	if err := nbdtest.WriteCertificates(dir); err != nil {
		t.Fatal(err)
	}
	t.Setenv("BLOCKSTEP_NBD_TLS_CERT", dir+"/server-cert.pem")
	t.Setenv("BLOCKSTEP_NBD_TLS_KEY", dir+"/server-key.pem")
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	is := func(state, says string) {
		t.Helper()
		list, err := alpha.client.Doctor(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		seen := 0
		for _, f := range list {
			if f.Check == "NBD certificate" && f.State == state && strings.Contains(f.Text, says) {
				seen++
			}
		}
		if seen != len(nodes) {
			t.Errorf("%d nodes say %s, %q: %+v", seen, state, says, list)
		}
	}
	is(control.FindingWarn, "valid until")
	if err := os.WriteFile(dir+"/server-cert.pem", []byte("half a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	is(control.FindingBad, "the certificate of before stays in use: nbd: TLS certificate: ")
	for _, f := range ExamineHost(t.Context(), alpha.file, errors.New("down")) {
		if f.Check == "NBD certificate" && f.State == control.FindingBad && strings.Contains(f.Text, "check the files") {
			return
		}
	}
	t.Error("the doctor without a daemon finds nothing wrong with the files")
}
