package attach

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// host is what is asked of sysfs and of the device nodes. The paths are fields
// for the tests.
type host struct {
	sys        string // /sys/block
	dev        string // /dev
	mountinfo  string // /proc/self/mountinfo
	exclusives func(path string) (*os.File, error)
}

func theHost() host {
	return host{
		sys: "/sys/block", dev: "/dev", mountinfo: "/proc/self/mountinfo",
		exclusives: func(path string) (*os.File, error) { return os.OpenFile(path, os.O_RDONLY|syscall.O_EXCL, 0) },
	}
}

func deviceName(index int) string { return "nbd" + strconv.Itoa(index) }

func (h host) path(index int) string { return filepath.Join(h.dev, deviceName(index)) }

// parseDevice reads /dev/nbdN or nbdN; "" is any, -1.
func parseDevice(s string) (int, error) {
	if s == "" {
		return -1, nil
	}
	digits, ok := strings.CutPrefix(strings.TrimPrefix(s, "/dev/"), "nbd")
	n, err := strconv.ParseUint(digits, 10, 16)
	if !ok || err != nil || n >= devicesMax {
		return 0, fmt.Errorf("%q is no NBD device: write /dev/nbd0, or leave it out for a free one", s)
	}
	return int(n), nil
}

// backend returns the identifier that a connected device was given; "" when it
// has none (not connected, another program's, or a kernel before 5.14).
func (h host) backend(index int) string {
	raw, err := os.ReadFile(filepath.Join(h.sys, deviceName(index), "backend"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}

// inUse reports whether the device is connected to anything.
func (h host) inUse(index int) bool {
	_, err := os.Stat(filepath.Join(h.sys, deviceName(index), "pid"))
	return err == nil
}

// size returns how many bytes the kernel says that a device has; 0 when it does not
// say.
func (h host) size(index int) uint64 {
	raw, err := os.ReadFile(filepath.Join(h.sys, deviceName(index), "size"))
	if err != nil {
		return 0
	}
	sectors, err := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 54)
	if err != nil {
		return 0
	}
	return sectors * sectorBytes
}

// find looks for the device with that identifier.
func (h host) find(backend string) (int, bool) {
	entries, err := os.ReadDir(h.sys)
	if err != nil {
		return 0, false
	}
	for _, e := range entries {
		if n, err := parseDevice(e.Name()); err == nil && n >= 0 && h.backend(n) == backend {
			return n, true
		}
	}
	return 0, false
}

// setIOTimeout is best effort: without it the kernel's 30 s hold.
func (h host) setIOTimeout(index int, d time.Duration) error {
	path := filepath.Join(h.sys, deviceName(index), "queue", "io_timeout")
	if err := os.WriteFile(path, []byte(strconv.FormatInt(d.Milliseconds(), 10)), 0); err != nil {
		return fmt.Errorf("setting the device's io_timeout: %w", err)
	}
	return nil
}

// announce has udev look at the device again, so that /dev/blockstep/VOLUME
// comes and goes: the kernel's own event is sent before the identifier is there.
func (h host) announce(index int) error {
	if err := os.WriteFile(filepath.Join(h.sys, deviceName(index), "uevent"), []byte("change"), 0); err != nil {
		return fmt.Errorf("telling udev: %w", err)
	}
	return nil
}

// claim opens the device exclusively, which the kernel refuses while it is
// mounted, swapped on, or part of another device; what is in the page cache is
// written back first. The caller closes the file.
func (h host) claim(ctx context.Context, index int, flush bool) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	// Without room: what is not taken by the caller is closed, and never left in
	// the channel, where it would keep the device claimed.
	done := make(chan result)
	// On a device that holds its I/O these calls do not return before it goes
	// on. Then the goroutine outlives the caller and closes what it opened.
	go func() {
		f, err := h.exclusives(h.path(index))
		if err == nil && flush {
			if err = f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) { // no file of a test can be
				f.Close()
				f, err = nil, fmt.Errorf("writing back what is cached for %s: %w", h.path(index), err)
			} else {
				err = nil
			}
		}
		select {
		case done <- result{f, err}:
		case <-ctx.Done():
			if f != nil {
				f.Close()
			}
		}
	}()
	select {
	case r := <-done:
		if errors.Is(r.err, syscall.EBUSY) {
			return nil, fmt.Errorf("%s: %w: %s", h.path(index), ErrBusy, h.whoUses(index))
		}
		return r.f, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%s does not answer, so what is cached for it cannot be written: its I/O is held; see blockstep status", h.path(index))
	}
}

// whoUses says what to do before the device can be freed.
func (h host) whoUses(index int) string {
	if at := h.mounts(index); len(at) > 0 {
		return "it is mounted; run umount " + strings.Join(at, " ")
	}
	holders, _ := filepath.Glob(filepath.Join(h.sys, deviceName(index), "holders", "*"))
	parts, _ := filepath.Glob(filepath.Join(h.sys, deviceName(index), deviceName(index)+"p*", "holders", "*"))
	for i, p := range append(holders, parts...) {
		if i == 0 {
			return "it is part of " + filepath.Base(p) + "; stop that first (vgchange -an, dmsetup remove, mdadm --stop)"
		}
	}
	return "it is mounted in another mount namespace, or used as swap; fuser -vm " + h.path(index) + " shows by whom"
}

// mounts lists where the device or a partition of it is mounted.
func (h host) mounts(index int) []string {
	f, err := os.Open(h.mountinfo)
	if err != nil {
		return nil
	}
	defer f.Close()
	var out []string
	s := bufio.NewScanner(f)
	for s.Scan() {
		fields := strings.Fields(s.Text())
		dash := -1
		for i, w := range fields {
			if w == "-" {
				dash = i
				break
			}
		}
		if dash < 0 || dash+2 >= len(fields) || len(fields) < 5 {
			continue
		}
		if src := fields[dash+2]; src == h.path(index) || strings.HasPrefix(src, h.path(index)+"p") {
			out = append(out, fields[4])
		}
	}
	return out
}

// waitGone waits until the device is connected to nothing any more.
func (h host) waitGone(ctx context.Context, index int) bool {
	ctx, cancel := context.WithTimeout(ctx, goneTime)
	defer cancel()
	tick := time.NewTicker(gonePoll)
	defer tick.Stop()
	for h.inUse(index) {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
	return true
}

// checkNode says what is wrong with a device that was asked for by name.
func (h host) checkNode(index int) error {
	var st unix.Stat_t
	err := unix.Stat(h.path(index), &st)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the kernel makes it
	}
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return fmt.Errorf("%s is no block device: remove it, and run modprobe nbd", h.path(index))
	}
	return nil
}
