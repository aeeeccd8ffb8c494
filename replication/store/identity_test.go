package store

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/blockstep/blockstep/internal/vfs"
)

// sysTree makes files below a directory like /sys, and the links of devices.
func sysTree(t *testing.T, files, devices map[string]string) string {
	t.Helper()
	sys := t.TempDir()
	for name, content := range files {
		name = filepath.Join(sys, "devices", name)
		must(t, os.MkdirAll(filepath.Dir(name), 0o700))
		must(t, os.WriteFile(name, []byte(content), 0o600))
	}
	must(t, os.MkdirAll(filepath.Join(sys, "dev/block"), 0o700))
	for dev, dir := range devices {
		must(t, os.MkdirAll(filepath.Join(sys, "devices", dir), 0o700))
		must(t, os.Symlink(filepath.Join("../../devices", dir), filepath.Join(sys, "dev/block", dev)))
	}
	return sys
}

func TestIdentityOf(t *testing.T) {
	sys := sysTree(t, map[string]string{
		"pci/block/sda/device/wwid":             "t10.ATA     QEMU HARDDISK   QM00001 \n",
		"pci/block/sda/sda2/partition":          "2\n",
		"pci/nvme0n1/wwid":                      "eui.0025388b710116a1\n",
		"pci/nvme0n1/device/serial":             "S4EWNX0R      \n",
		"pci/vda/serial":                        "vol-0abc",
		"virtual/block/dm-3/dm/uuid":            "LVM-aaaabbbb\n",
		"virtual/block/dm-3/dm/name":            "vg-db\n",
		"virtual/block/loop7/loop/backing_file": "/var/img\n",
		"virtual/block/dm-4/dm/uuid":            "\n",
	}, map[string]string{
		"8:0": "pci/block/sda", "8:2": "pci/block/sda/sda2", "259:0": "pci/nvme0n1", "254:0": "pci/vda",
		"253:3": "virtual/block/dm-3", "253:4": "virtual/block/dm-4", "7:7": "virtual/block/loop7", "254:16": "pci/vdb",
	})
	for dev, want := range map[string]Identity{
		"8:0":    {"wwid=t10.ATA QEMU HARDDISK QM00001"},
		"8:2":    {"wwid=t10.ATA QEMU HARDDISK QM00001/partition 2"},
		"259:0":  {"serial=S4EWNX0R", "wwid=eui.0025388b710116a1"},
		"254:0":  {"serial=vol-0abc"},
		"253:3":  {"dm=LVM-aaaabbbb"},
		"253:4":  nil,
		"7:7":    {"loop=/var/img"},
		"254:16": nil, // a virtual disk without a serial
		"1:1":    nil, // not there
	} {
		if got := identityOf(sys, dev); !slices.Equal(got, want) {
			t.Errorf("%s: %q, not %q", dev, got, want)
		}
	}
	if id := IdentityOf(t.TempDir()); id != nil {
		t.Errorf("a directory has the identity %q", id)
	}
}

func TestIdentityDiffers(t *testing.T) {
	for _, c := range []struct {
		is, was Identity
		differs bool
	}{
		{nil, nil, false},
		{Identity{"wwid=a"}, nil, false},                                        // remembered by no release before
		{nil, Identity{"wwid=a"}, false},                                        // the kernel does not say
		{Identity{"wwid=a"}, Identity{"wwid=a"}, false},                         //
		{Identity{"wwid=b"}, Identity{"wwid=a"}, true},                          //
		{Identity{"serial=1", "wwid=b"}, Identity{"serial=1", "wwid=a"}, false}, // another kernel words it differently
		{Identity{"serial=2", "wwid=b"}, Identity{"serial=1", "wwid=a"}, true},
		{Identity{"serial=1"}, Identity{"wwid=a"}, false}, // another hypervisor
		{Identity{"wwid=a/partition 2"}, Identity{"wwid=a/partition 1"}, true},
		{Identity{"dm=LVM-b"}, Identity{"dm=LVM-a"}, true},
	} {
		if is, was, got := c.is.differs(c.was); got != c.differs || got && (is == "" || was == "") {
			t.Errorf("%q, before %q: differs %v (%q, %q), not %v", c.is, c.was, got, is, was, c.differs)
		}
	}
}

// A disk is remembered, another one at its path is told apart, and what cannot be
// compared passes.
func TestCheckIdentity(t *testing.T) {
	dev, other := loopDevice(t, 1<<20), loopDevice(t, 1<<20)
	file := filepath.Join(t.TempDir(), "device")
	check := func(path string, foreign bool) {
		t.Helper()
		var e *ForeignError
		err := CheckIdentity(vfs.OS(), file, path)
		if errors.As(err, &e) != foreign || !foreign && err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if foreign && (!strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "loop=")) {
			t.Errorf("the error does not help: %v", err)
		}
	}
	check(dev, false) // of a release that did not remember
	check(other, true)
	check(other, true) // it was not taken for the right one by having been seen
	check(dev, false)
	check(filepath.Dir(file), false)
	check(other, true)
	must(t, os.Remove(file)) // an operator says that it is the one
	check(other, false)
	check(dev, true)
	must(t, NoteIdentity(vfs.OS(), file, dev)) // a new replica is made on it
	check(dev, false)
	must(t, os.WriteFile(file, []byte("\x00garbage\n\n===\n"), 0o600))
	check(dev, false)
	check(other, true)
}
