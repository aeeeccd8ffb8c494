package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication"
	"github.com/blockstep/blockstep/replication/store"
)

// devicePrefix begins the problem of a replica that waits for its backing device.
const devicePrefix = "backing device "

// deviceError is why a backing device will not do as yet. The replica is not
// lost by it: it is tried again by itself until somebody has seen to the device.
type deviceError struct {
	path string
	err  error
}

func (e *deviceError) Error() string { return devicePrefix + e.path + ": " + e.err.Error() }
func (e *deviceError) Unwrap() error { return e.err }

var (
	errInUse    = errors.New("it is in use: mounted, part of another device, or of another volume")
	errNoDevice = errors.New("there is no such device")
	errFileHere = errors.New("a regular file stands there, and no block device: it lies in memory and is gone with the boot; remove it")
)

// waitsFor words why the backing device at path cannot be had as yet; nil for an
// error of another kind. A file in the data_dir has no path here: nobody else has
// business there, and nothing brings it back.
func waitsFor(path string, err error) error {
	var dev *deviceError
	var foreign *store.ForeignError
	switch {
	case path == "":
		return nil
	case errors.As(err, &dev):
		return dev
	case errors.Is(err, store.ErrBusy):
		return &deviceError{path, errInUse}
	case errors.As(err, &foreign):
		return &deviceError{path, foreign}
	case !errors.Is(err, replication.ErrDevice):
		return nil
	case gone(err):
		return &deviceError{path, errNoDevice}
	}
	return &deviceError{path, err}
}

// gone reports whether an error of opening a path says that nothing is there: no
// entry, or one with no device behind it.
func gone(err error) bool {
	for _, e := range []error{fs.ErrNotExist, syscall.ENXIO, syscall.ENODEV, syscall.ENOTDIR, syscall.ENOMEDIUM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// deviceHere says whether what a replica was made on, of size bytes, is at its
// path still. It claims nothing.
func deviceHere(path string, size uint64) error {
	st, err := os.Stat(path)
	switch {
	case err != nil && gone(err):
		return errNoDevice
	case err != nil:
		return err
	case st.Mode().IsRegular() && inMemory(path):
		return errFileHere
	case st.Mode().IsRegular() && uint64(st.Size()) < size:
		return tooSmall(st.Size(), size)
	}
	return nil
}

// inMemory reports whether a path leads into /dev.
func inMemory(path string) bool {
	real, err := filepath.EvalSymlinks(path)
	return inDev(path) || err == nil && inDev(real)
}

func tooSmall(have int64, size uint64) error {
	return fmt.Errorf("it has %s, and the volume needs %s", config.FormatSize(have), config.FormatSize(int64(size)))
}

// checkDevice says whether a path will do as the backing store of a new replica
// of size bytes: a block device with room, or a file, that nobody else has.
func (d *Daemon) checkDevice(path string, size uint64) error {
	if !filepath.IsAbs(path) {
		return errors.New("not an absolute path")
	}
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return checkNewFile(path)
	}
	if err != nil {
		return err
	}
	grows := st.Mode().IsRegular()
	if !grows && st.Mode()&fs.ModeType != fs.ModeDevice {
		return errors.New("neither a block device nor a file")
	}
	if grows && inMemory(path) {
		return errFileHere
	}
	f, err := d.fs.Open(path, vfs.Claim)
	if errors.Is(err, vfs.ErrLocked) {
		return errInUse
	}
	if err != nil {
		return err
	}
	have, err := f.Size()
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if !grows && uint64(have) < size {
		return tooSmall(have, size)
	}
	return nil
}

// checkNewFile says whether a file may be made at path, where nothing is. In
// /dev it would lie in memory, and be gone with the boot.
func checkNewFile(path string) error {
	if inDev(path) {
		return errNoDevice
	}
	if _, err := os.Lstat(path); err == nil {
		return errors.New("it is a link to what is not there")
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return errors.New("neither the file nor its directory is there")
	}
	if inDev(filepath.Join(dir, filepath.Base(path))) {
		return errNoDevice
	}
	return nil
}

func inDev(path string) bool { return strings.HasPrefix(filepath.Clean(path), "/dev/") }

// deviceCall asks a node whether a path of its will do as a backing store.
type deviceCall struct {
	Path string `json:"path"`
	Size uint64 `json:"size"` // bytes that the volume needs
}

func (d *Daemon) serveDevice(_ context.Context, _ ident.Node, c deviceCall) (struct{}, error) {
	if err := d.checkDevice(c.Path, c.Size); err != nil {
		return struct{}{}, control.Errorf(control.CodeRefused, "", "%s on %s: %v", c.Path, d.self, err)
	}
	return struct{}{}, nil
}

// checkDevices asks the nodes whether the backing devices of a new volume will
// do, before anything is made. A node that does not answer is not waited for: it
// looks by itself when it makes its replica.
func (d *Daemon) checkDevices(ctx context.Context, cmd *state.CreateVolume) error {
	if !slices.ContainsFunc(cmd.Replicas, func(r state.Replica) bool { return r.Device != "" }) {
		return nil
	}
	if _, res := d.state().Apply(state.Command{CreateVolume: cmd}); !res.OK {
		return d.refusal(res.Err()) // it knows whose device it is; a node sees only that it is in use
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	var bad []string
	for _, r := range cmd.Replicas {
		if r.Device == "" {
			continue
		}
		wg.Go(func() {
			err := d.askDevice(ctx, r.Node, deviceCall{r.Device, cmd.Size})
			var e *control.Error
			if errors.As(err, &e) && e.Code == control.CodeRefused {
				mu.Lock()
				defer mu.Unlock()
				bad = append(bad, e.Message)
			} else if err != nil {
				d.log.Info("a node is not asked about its device: it looks when it makes its replica", "volume", cmd.Name, "node", r.Node, "err", err)
			}
		})
	}
	wg.Wait()
	if len(bad) == 0 {
		return nil
	}
	slices.Sort(bad)
	return control.Errorf(control.CodeRefused, "nothing was made: name a block device that is there, large enough, and used by nobody", "%s", strings.Join(bad, "; "))
}

func (d *Daemon) askDevice(ctx context.Context, n ident.Node, c deviceCall) error {
	if n == d.self {
		_, err := d.serveDevice(ctx, n, c)
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, askNode)
	defer cancel()
	return d.rpc.call(ctx, n, "/node/v1/device", c, nil)
}
