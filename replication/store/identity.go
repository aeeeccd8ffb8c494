package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/blockstep/blockstep/internal/vfs"
)

// identityMax bounds the file of an identity, and each word of it.
const identityMax = 4096

// Identity is what tells a disk from another one that has its path, in the kernel's
// words: lines of KEY=VALUE, sorted. A backing device holds a volume's bytes and
// nothing else, so it has no label of ours. A file has none, nor has a disk of which
// the kernel knows nothing (a virtual one without a serial).
type Identity []string

// ForeignError says that another disk stands at the path of a backing device.
type ForeignError struct {
	Is, Was string // what differs
	File    string // that remembers the disk
}

// Error implements error.
func (e *ForeignError) Error() string {
	return fmt.Sprintf("another disk stands there (%s; the replica's has %s): nothing was written to it; if it is the same after all, remove %s", e.Is, e.Was, e.File)
}

// IdentityOf asks the kernel about the block device at path.
func IdentityOf(path string) Identity {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return nil
	}
	return identityOf("/sys", fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
}

// identityOf reads the attributes of a device (MAJOR:MINOR) below sys. Those of a
// partition are its disk's, and its number.
func identityOf(sys, dev string) Identity {
	dir, err := filepath.EvalSymlinks(filepath.Join(sys, "dev/block", dev))
	if err != nil {
		return nil
	}
	read := func(file string) string {
		b, err := os.ReadFile(filepath.Join(dir, file)) //nolint:forbidigo // the kernel's word, no file of a replica
		if err != nil || len(b) > identityMax {
			return ""
		}
		return strings.Join(strings.Fields(strings.ToValidUTF8(string(b), "?")), " ")
	}
	part := ""
	if n := read("partition"); n != "" {
		part, dir = "/partition "+n, filepath.Dir(dir)
	}
	var id Identity
	for _, a := range []struct{ key, file string }{
		{"dm", "dm/uuid"},
		{"loop", "loop/backing_file"},
		{"md", "md/uuid"},
		{"serial", "serial"},
		{"serial", "device/serial"},
		{"wwid", "wwid"},
		{"wwid", "device/wwid"},
	} {
		if v := read(a.file); v != "" {
			id = append(id, a.key+"="+v+part)
		}
	}
	slices.Sort(id)
	return slices.Compact(id)
}

// differs reports whether two identities are surely of two disks, and by what: they
// have a word of one kind, and none in common.
func (id Identity) differs(was Identity) (is, had string, yes bool) {
	for _, a := range id {
		if slices.Contains(was, a) {
			return "", "", false
		}
		key, _, _ := strings.Cut(a, "=")
		for _, b := range was {
			if had == "" && strings.HasPrefix(b, key+"=") {
				is, had = a, b
			}
		}
	}
	return is, had, had != ""
}

// CheckIdentity says, by a *ForeignError, that the device at path is not the one that
// the file remembers. Where the two cannot be compared (the file is not there, or a
// virtual machine has moved to other hardware) it remembers the one that is there.
func CheckIdentity(fsys vfs.FS, file, path string) error {
	is := IdentityOf(path)
	was, err := readIdentity(fsys, file)
	switch {
	case err != nil:
		return fmt.Errorf("store: which disk the replica was made on: %w", err)
	case slices.Equal(is, was):
		return nil
	}
	if a, b, yes := is.differs(was); yes {
		return &ForeignError{Is: a, Was: b, File: file}
	}
	if len(is) == 0 {
		return nil // nothing is known now: remember what was
	}
	_ = writeIdentity(fsys, file, is) // where there is no room for it, the next start tries again
	return nil
}

// NoteIdentity remembers, durably, which disk a new replica is made on.
func NoteIdentity(fsys vfs.FS, file, path string) error {
	return writeIdentity(fsys, file, IdentityOf(path))
}

func readIdentity(fsys vfs.FS, file string) (Identity, error) {
	f, err := fsys.Open(file, vfs.ReadOnly)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	b, err := readSlot(f, 0, 8*identityMax)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	var id Identity
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); strings.Contains(line, "=") {
			id = append(id, line)
		}
	}
	return id, nil
}

func writeIdentity(fsys vfs.FS, file string, id Identity) error {
	text := ""
	for _, line := range id {
		text += line + "\n"
	}
	return vfs.ReplaceFile(fsys, file, []byte(text))
}
