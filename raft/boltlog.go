package raft

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"

	hraft "github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
)

// openBolt opens the Raft log of a data_dir, which one process at a time can.
// bbolt has no checksums over its pages, and panics where they make no sense, in
// a goroutine of its own too; so does hashicorp/raft over an entry that it cannot
// read, later. Therefore all of it is read here first, where damage is an error.
func openBolt(dataDir string) (bolt *raftboltdb.BoltStore, err error) {
	path := filepath.Join(dataDir, raftDir, boltFile)
	// A page number that leads out of the file is a fault rather than a panic.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			bolt, err = nil, damagedBolt(path, p)
		}
	}()
	if err := checkPages(path); err != nil {
		return nil, damagedBolt(path, err)
	}
	bolt, err = raftboltdb.New(raftboltdb.Options{
		Path: path,
		// Without the free list each commit writes less; opening rebuilds it.
		BoltOptions: &bbolt.Options{Timeout: lockWait, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType},
	})
	if err != nil {
		return nil, openBoltError(dataDir, path, err)
	}
	if err := readBolt(bolt); err != nil {
		return nil, errors.Join(damagedBolt(path, err), bolt.Close())
	}
	return bolt, nil
}

const (
	// boltReserve is the room that the Raft log has on its disk whatever else fills
	// that: replicas lie there too, and where all of them are thin and full, deleting
	// a volume is what makes room, which is a command in this log. It is some
	// thousand commands; with a snapshot each snapshotEvery, a log takes less.
	boltReserve = 4 << 20
	// fallocKeepSize is FALLOC_FL_KEEP_SIZE: the file does not become longer.
	fallocKeepSize = 1
)

// reserveBolt sets the Raft log's room aside, behind the end of its file.
func reserveBolt(dataDir string) error {
	path := filepath.Join(dataDir, raftDir, boltFile)
	f, err := os.OpenFile(path, os.O_RDWR, 0) //nolint:forbidigo // the Raft log is bbolt's, on the real file system
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // nothing was written
	for {
		err := syscall.Fallocate(int(f.Fd()), fallocKeepSize, 0, boltReserve)
		switch {
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EOPNOTSUPP), errors.Is(err, syscall.ENOSYS):
			return nil // it is not to be had here
		default:
			return err
		}
	}
}

func openBoltError(dataDir, path string, err error) error {
	for _, damage := range []error{bbolterrors.ErrInvalid, bbolterrors.ErrChecksum, bbolterrors.ErrVersionMismatch} {
		if errors.Is(err, damage) {
			return damagedBolt(path, err)
		}
	}
	if errors.Is(err, bbolterrors.ErrTimeout) {
		return fmt.Errorf("data_dir %s is in use by another blockstepd: stop it first", dataDir)
	}
	return fileError(dataDir, fmt.Errorf("open %s: %w", path, err))
}

func damagedBolt(path string, why any) error {
	return fmt.Errorf("%s is damaged (%v): empty the data_dir, start again, and run 'blockstep node replace' for this node on another one", path, why)
}

// readBolt reads every entry once. Some may be missing, between those that a
// snapshot covers and those behind it.
func readBolt(bolt *raftboltdb.BoltStore) error {
	first, err := bolt.FirstIndex()
	if err != nil {
		return err
	}
	last, err := bolt.LastIndex()
	if err != nil || last == 0 {
		return err
	}
	for i := first; i <= last; i++ {
		var l hraft.Log
		switch err := bolt.GetLog(i, &l); {
		case errors.Is(err, hraft.ErrLogNotFound):
		case err != nil:
			return fmt.Errorf("entry %d of %d to %d: %w", i, first, last, err)
		case l.Index != i:
			return fmt.Errorf("entry %d says that it is %d", i, l.Index)
		}
	}
	return nil
}
