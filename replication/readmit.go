package replication

import (
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"path/filepath"

	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/store"
)

// readmitFile is where a file of a replica that is taken back is written anew.
const readmitFile = "readmit.new"

// Readmit opens a replica that has failed again, at an operator's word, with what
// its disk holds still. It is for a volume of which no other copy is left: the
// replica may have lost what it had acknowledged, and is amnesiac. It changes
// nothing in the backing store; a replica whose files do not verify is refused.
func (v *Volume) Readmit(ro ReplicaOptions) error {
	if err := v.StopReplica(); err != nil {
		v.logger.Warn("the replica that failed did not stop cleanly", "error", err)
	}
	ro.setDefaults()
	if err := v.readmitFiles(&ro); err != nil {
		return fmt.Errorf("take back the replica of volume %s: %w", v.opts.Name, err)
	}
	return v.SetReplica(ro)
}

// readmitFiles makes true again what the log and the checkpoint say of
// themselves, and takes the mark of the failure away. After an fsync that failed,
// the page cache shows bytes that the disk does not have, and that no later fsync
// of these files would write: so they are written anew, and their copies fsynced.
// What was applied from the log since the last checkpoint is applied again when
// the replica opens, which makes those pages of the backing store dirty, too.
func (v *Volume) readmitFiles(ro *ReplicaOptions) (err error) {
	lock, err := ro.FS.Lock(filepath.Join(ro.Dir, lockFile))
	if err != nil {
		return fmt.Errorf("lock %s: %w", ro.Dir, err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	metas, err := store.OpenMeta(ro.FS, filepath.Join(ro.Dir, metaFile))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, metas.Close()) }()
	m := metas.Load()
	if m.Volume != v.opts.Volume || m.Node != v.opts.Node {
		return fmt.Errorf("%s holds a replica of volume %x of node %s: check data_dir", ro.Dir, uint64(m.Volume), m.Node)
	}
	logs := filepath.Join(ro.Dir, logDir)
	names, err := ro.FS.List(logs)
	if err != nil {
		return err
	}
	for i := range names {
		names[i] = filepath.Join(logs, names[i])
	}
	for i := range 2 {
		names = append(names, filepath.Join(ro.Dir, fmt.Sprintf("%s.%d", checkpointFile, i)))
	}
	for _, name := range names {
		if err := rewrite(ro.FS, name, filepath.Join(ro.Dir, readmitFile)); err != nil {
			return fmt.Errorf("write %s anew: %w", name, err)
		}
	}
	if err := errors.Join(ro.FS.SyncDir(logs), ro.FS.SyncDir(ro.Dir)); err != nil {
		return err
	}
	m.Failed, m.Amnesiac, m.Clean = "", true, false
	return metas.Write(m)
}

// rewrite puts a copy that is durable in the place of a file, by way of temp.
func rewrite(fs vfs.FS, path, temp string) error {
	from, err := fs.Open(path, vfs.ReadOnly)
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }() // it was only read
	if err := fs.Remove(temp); err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return err
	}
	to, err := fs.Open(temp, vfs.Create|vfs.Exclusive)
	if err != nil {
		return err
	}
	size, err := from.Size()
	chunk := make([]byte, 1<<20)
	for at := int64(0); err == nil && at < size; {
		var n int
		if n, err = from.ReadAt(chunk[:min(size-at, int64(len(chunk)))], at); errors.Is(err, io.EOF) && n > 0 {
			err = nil
		}
		if err == nil {
			_, err = to.WriteAt(chunk[:n], at)
		}
		at += int64(n)
	}
	if err == nil {
		err = to.Sync()
	}
	if err := errors.Join(err, to.Close()); err != nil {
		return err
	}
	return fs.Rename(temp, path)
}
