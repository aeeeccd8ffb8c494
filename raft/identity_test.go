package raft

import (
	"errors"
	"io/fs"
	"log/slog"
	"strings"
	"syscall"
	"testing"

	"github.com/blockstep/blockstep/internal/vfs"
)

// TestIdentityErrorsSayWhatToDo: a data_dir that cannot be used names itself, the file
// and the way out.
func TestIdentityErrorsSayWhatToDo(t *testing.T) {
	for _, tc := range []struct {
		op   vfs.Op
		err  error
		says string
	}{
		{vfs.OpWrite, syscall.ENOSPC, "no space left on device: make room in /data"},
		{vfs.OpWrite, syscall.EDQUOT, "disk quota exceeded: make room in /data"},
		{vfs.OpOpen, fs.ErrPermission, "permission denied: let the user that runs blockstepd read and write /data and all that is in it"},
		{vfs.OpOpen, syscall.EACCES, "permission denied: let the user that runs blockstepd read and write /data"},
		{vfs.OpWrite, syscall.EROFS, "read-only file system: let the user that runs blockstepd read and write /data"},
	} {
		mem := vfs.NewMem(1)
		if err := vfs.MakeDir(mem, "/data"); err != nil {
			t.Fatal(err)
		}
		disk := vfs.Inject(mem, func(c vfs.Call) error {
			if c.Op == tc.op && strings.HasPrefix(c.Path, "/data/"+identityFile) {
				return &fs.PathError{Op: string(c.Op), Path: c.Path, Err: tc.err}
			}
			return nil
		})
		_, err := loadIdentity(disk, "/data", "prod", "alpha", slog.New(slog.DiscardHandler))
		if !errors.Is(err, tc.err) || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), "/data/"+identityFile) {
			t.Errorf("%s, %v: %v", tc.op, tc.err, err)
		}
	}
}
