package e2e

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// junkFile makes a file of n bytes that are no zeroes.
func junkFile(t *testing.T, n int) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "junk")
	if err := os.WriteFile(name, bytes.Repeat([]byte("old content"), n/11+1)[:n], 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// loopDevice makes a block device of n bytes with old content.
func loopDevice(t *testing.T, n int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: a loop device cannot be made")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("no /dev/loop-control: the kernel has no loop devices here")
	}
	out, err := exec.Command("losetup", "--find", "--show", junkFile(t, n)).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

const deviceSize = 8 << 20 // of the volume; each device has twice as much

// TestDevices is --device: what was on a device is no part of the volume, at no
// time; a device that will not do is refused before anything is made; and a
// replica whose device somebody else has waits for it.
func TestDevices(t *testing.T) {
	t.Run("block", func(t *testing.T) {
		t.Parallel()
		dev := loopDevice(t, 2*deviceSize)
		c := newCluster(t, options{})
		beta := c.node("beta")
		beta.waitReady()
		c.devicesRefused(dev)
		beta.cliFails(exitRefused, []string{dev + " on alpha", "it has 16MiB, and the volume needs 1GiB"}, "volume", "create", "db", "--size", "1GiB", "--device", "alpha="+dev)
		c.deviceIsEmpty(dev)
		if out, err := exec.Command("mkfs.ext4", "-q", dev).CombinedOutput(); err == nil {
			t.Errorf("mkfs.ext4 took the device from under the daemon: %s", out)
		}
		beta.cliFails(exitRefused, []string{"alpha has no room"}, "volume", "resize", "db", "32MiB")
		c.deviceGrows()
		c.deviceIsBusy(dev, func() *os.File {
			f, err := os.OpenFile(dev, os.O_RDONLY|syscall.O_EXCL, 0)
			if err != nil {
				t.Fatal(err)
			}
			return f
		})
		c.deviceIsFree(dev)
	})
	t.Run("file", func(t *testing.T) {
		t.Parallel()
		file := junkFile(t, 2*deviceSize)
		c := newCluster(t, options{})
		c.node("beta").waitReady()
		c.devicesRefused(file)
		c.deviceIsEmpty(file)
		c.deviceGrows()
		c.deviceIsBusy(file, func() *os.File {
			f, err := os.Open(file)
			if err == nil {
				err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
			}
			if err != nil {
				t.Fatal(err)
			}
			return f
		})
		c.deviceIsFree(file)
	})
	t.Run("late block", func(t *testing.T) {
		t.Parallel()
		dev := loopDevice(t, 2*deviceSize)
		link := "/dev/bs-e2e-" + strings.TrimPrefix(dev, "/dev/")
		relink := func() {
			if err := os.Symlink(dev, link); err != nil {
				t.Fatal(err)
			}
		}
		relink()
		t.Cleanup(func() { _ = os.Remove(link) })
		c := newCluster(t, options{})
		c.volume("db", "8MiB", "--device", "alpha="+link)
		c.deviceIsLate(link, func() {
			if err := os.Remove(link); err != nil {
				t.Fatal(err)
			}
		}, relink)
		c.fileInDev(link, dev)
		c.foreignDevice(link, dev, loopDevice(t, 2*deviceSize))
	})
	t.Run("late file", func(t *testing.T) {
		t.Parallel()
		file := junkFile(t, deviceSize)
		c := newCluster(t, options{})
		c.volume("db", "8MiB", "--device", "alpha="+file)
		move := func(from, to string) func() {
			return func() {
				if err := os.Rename(from, to); err != nil {
					t.Fatal(err)
				}
			}
		}
		c.deviceIsLate(file, move(file, file+".away"), move(file+".away", file))
	})
}

// deviceIsLate starts a node before its device is there, in a new boot: the
// replica waits, has forgotten nothing by that, and comes back with the device.
func (c *cluster) deviceIsLate(path string, away, back func()) {
	c.t.Helper()
	alpha, beta := c.node("alpha"), c.node("beta")
	c.makePrimary("db", beta)
	alpha.stop()
	metas, err := filepath.Glob(filepath.Join(alpha.dataDir, "volumes", "*", "meta"))
	if err != nil || len(metas) != 1 {
		c.t.Fatalf("metas of alpha: %v, %v", metas, err)
	}
	meta := func() string {
		b, err := os.ReadFile(metas[0])
		if err != nil {
			c.t.Fatal(err)
		}
		return string(b)
	}
	was := meta()
	away()
	alpha.newBoot()
	alpha.start()
	c.deviceWaits(path + ": there is no such device")
	if _, err := os.Lstat(path); err == nil {
		c.t.Errorf("it made something at %s", path)
	}
	if meta() != was {
		c.t.Error("a replica that waits for its device has noted a start")
	}
	back()
	c.waitHealthy("db")
	c.replicasEqual("db")
	if strings.Contains(alpha.log(), "amnesiac=true") {
		c.t.Error("a replica that was stopped cleanly is amnesiac for having waited")
	}
}

// deviceWaits waits until the status says so of alpha's device, and what to do.
func (c *cluster) deviceWaits(reason string) {
	c.t.Helper()
	beta := c.node("beta")
	eventually(c.t, 20*time.Second, "the status says that the replica waits: "+reason, func() bool {
		out, code := beta.cliRaw(20*time.Second, "status", "db")
		return code == exitOK && strings.Contains(out, reason) && strings.Contains(out, "see to the device on alpha") &&
			strings.Contains(out, "if its content is lost: blockstep invalidate db --node alpha") && !strings.Contains(out, "Failed")
	})
}

// foreignDevice: another disk has the path, as when disks are found in another order
// at boot. Nothing is written to it until the operator says that it is the new one.
func (c *cluster) foreignDevice(link, dev, other string) {
	c.t.Helper()
	alpha, beta := c.node("alpha"), c.node("beta")
	content := func() []byte {
		b, err := os.ReadFile(other)
		if err != nil {
			c.t.Fatal(err)
		}
		return b
	}
	relink := func(to string) {
		if err := errors.Join(os.Remove(link), os.Symlink(to, link)); err != nil {
			c.t.Fatal(err)
		}
	}
	was := content()
	alpha.stop()
	relink(other)
	alpha.start()
	c.deviceWaits(link + ": another disk stands there (loop=")
	if !bytes.Equal(content(), was) {
		c.t.Error("something was written to a disk that is not the replica's")
	}
	relink(dev)
	c.waitHealthy("db")
	c.replicasEqual("db")

	alpha.stop()
	relink(other)
	alpha.start()
	c.deviceWaits(link + ": another disk stands there (loop=")
	beta.cli("invalidate", "db", "--node", "alpha")
	c.waitHealthy("db")
	c.replicasEqual("db")
	alpha.stop()
	alpha.start() // it is the replica's own now
	c.waitHealthy("db")
}

// fileInDev: a regular file where the device should be, as a dd to a device that
// was not there leaves one, is no backing store, neither of a new replica nor of
// one that there is.
func (c *cluster) fileInDev(link, dev string) {
	c.t.Helper()
	alpha, beta := c.node("alpha"), c.node("beta")
	alpha.stop()
	if err := errors.Join(os.Remove(link), os.WriteFile(link, make([]byte, 2*deviceSize), 0o600)); err != nil {
		c.t.Fatal(err)
	}
	alpha.start()
	c.deviceWaits(link + ": a regular file stands there, and no block device")
	beta.cliFails(exitRefused, []string{link + " on gamma", "a regular file stands there", "nothing was made"}, createOn("other", "gamma="+link)...)
	outside := filepath.Join(c.t.TempDir(), "outside")
	if err := os.Symlink(link, outside); err != nil {
		c.t.Fatal(err)
	}
	beta.cliFails(exitRefused, []string{outside + " on gamma", "a regular file stands there", "nothing was made"}, createOn("other", "gamma="+outside)...)
	if err := errors.Join(os.Remove(link), os.Symlink(dev, link)); err != nil {
		c.t.Fatal(err)
	}
	c.waitHealthy("db")
}

// createOn is a volume of deviceSize with these devices.
func createOn(name string, devices ...string) []string {
	args := []string{"volume", "create", name, "--size", "8MiB"}
	for _, d := range devices {
		args = append(args, "--device", d)
	}
	return args
}

// devicesRefused tries what can be no device. Nothing is made of it, nor of the
// volume.
func (c *cluster) devicesRefused(dev string) {
	c.t.Helper()
	beta := c.node("beta")
	dir := c.t.TempDir()
	for link, to := range map[string]string{"link": "/dev/nosuch", "dev": "/dev"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			c.t.Fatal(err)
		}
	}
	for path, word := range map[string]string{
		"/dev/nosuch":                    "no such device",
		"/dev/no/such":                   "no such device",
		filepath.Join(dir, "dev/nosuch"): "no such device",
		filepath.Join(dir, "link"):       "a link to what is not there",
		filepath.Join(dir, "no/such"):    "neither the file nor its directory is there",
		"/dev/null":                      "neither a block device nor a file",
		dir:                              "neither a block device nor a file",
	} {
		beta.cliFails(exitRefused, []string{path + " on alpha", word, "nothing was made"}, createOn("db", "beta="+dev, "alpha="+path)...)
	}
	beta.cliFails(exitRefused, []string{"here on alpha", "not an absolute path"}, createOn("db", "alpha=here")...)
	if _, err := os.Lstat("/dev/nosuch"); err == nil {
		c.t.Error("it made a file of the device that is not there")
	}
	beta.cliFails(exitRefused, []string{"there is no volume"}, "status", "db")
}

// deviceIsEmpty makes a volume of devices with old content.
func (c *cluster) deviceIsEmpty(dev string) {
	c.t.Helper()
	beta := c.node("beta")
	c.volume("db", "8MiB", "--device", "alpha="+dev, "--device", "beta="+junkFile(c.t, deviceSize))
	c.replicasEqual("db")
	for _, n := range c.nodes {
		if b := c.replicaBytes("db", n); !bytes.Equal(b, make([]byte, deviceSize)) {
			c.t.Errorf("%s: a new volume does not read as zeroes", n.name)
		}
	}
	beta.cliFails(exitRefused, []string{dev, `has the replica of volume "db"`}, createOn("other", "alpha="+dev)...)
	beta.cliFails(exitRefused, []string{dev, `has the replica of volume "db"`}, createOn("other", "alpha=/"+dev)...)
	beta.cliFails(exitRefused, []string{dev + " on gamma", "in use"}, createOn("other", "gamma="+dev)...)
}

// deviceGrows: what lies beyond the end is no part of the volume when it grows.
func (c *cluster) deviceGrows() {
	c.t.Helper()
	c.node("beta").cli("volume", "resize", "db", "16MiB")
	c.replicasEqual("db")
	if b := c.replicaBytes("db", c.node("alpha")); !bytes.Equal(b, make([]byte, 2*deviceSize)) {
		c.t.Error("what the volume grew by does not read as zeroes")
	}
}

// deviceIsBusy starts a node while somebody else has its device, which was
// swapped for one with other content meanwhile: the replica waits for it, and
// says so; invalidate mends it.
func (c *cluster) deviceIsBusy(dev string, hold func() *os.File) {
	c.t.Helper()
	alpha, beta := c.node("alpha"), c.node("beta")
	c.makePrimary("db", beta)
	alpha.kill()
	if out, err := exec.Command("dd", "if="+junkFile(c.t, 2*deviceSize), "of="+dev, "bs=1M", "conv=notrunc,fsync", "status=none").CombinedOutput(); err != nil {
		c.t.Fatalf("dd: %v: %s", err, out)
	}
	held := hold()
	defer func() { held.Close() }()
	alpha.start()
	waits := func(out string) bool {
		return strings.Contains(out, dev+": it is in use") && strings.Contains(out, "see to the device on alpha") &&
			!strings.Contains(out, "invalidate") && !strings.Contains(out, "Failed")
	}
	eventually(c.t, 20*time.Second, "the status says that the replica waits for its device", func() bool {
		out, code := beta.cliRaw(20*time.Second, "status", "db")
		return code == exitOK && waits(out)
	})
	held.Close()
	c.waitHealthy("db")

	// The same when it is to be made anew.
	alpha.kill()
	held = hold()
	alpha.start()
	eventually(c.t, 20*time.Second, "the replica is waited for", func() bool {
		out, code := beta.cliRaw(20*time.Second, "status", "db")
		return code == exitOK && waits(out)
	})
	beta.cli("invalidate", "db", "--node", "alpha")
	eventually(c.t, 20*time.Second, "the old replica is gone, and the new one waits", func() bool {
		out, code := beta.cliRaw(20*time.Second, "status", "db")
		metas, err := filepath.Glob(filepath.Join(alpha.dataDir, "volumes", "*", "meta"))
		return code == exitOK && err == nil && len(metas) == 0 && waits(out)
	})
	held.Close()
	c.waitHealthy("db")
	c.replicasEqual("db")
}

// deviceIsFree: the device of a volume that is deleted can be used at once.
func (c *cluster) deviceIsFree(dev string) {
	c.t.Helper()
	c.node("beta").cli("volume", "delete", "db")
	c.volume("db", "8MiB", "--device", "gamma="+dev)
	c.replicasEqual("db")
}
