//go:build kernel && systemd

package kernel

import (
	"bytes"
	_ "embed"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// stopTime bounds a shutdown, from the command to the power going off, by the
// guest's clock. systemd gives a unit 90 s before it kills it: longer than this,
// something hung.
const stopTime = 80 * time.Second

// debianPackages are what the guest has besides debootstrap's minimal set.
const debianPackages = "systemd,systemd-sysv,udev,dbus,kmod,e2fsprogs"

// TestSystemd installs the Debian package in a Debian file system and boots it
// three times: the volume is made and entered into fstab; after reboot it is
// mounted by its units in their order, the daemon is restarted, killed and
// upgraded below it, and the target follows the primary; after poweroff the
// file system is clean.
func TestSystemd(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("run as root: debootstrap and chroot need it")
	}
	m := machineOf(t, systemdImage(t))
	for _, stage := range []string{"install", "use", "after"} {
		lines := m.boot(t, stage, 1024, nil)
		raw, err := os.ReadFile(m.console)
		if err != nil {
			t.Fatal(err)
		}
		if took := shutdownTime(t, lines, raw); took > stopTime {
			t.Errorf("stage %s: from the command to the end %v passed; allowed are %v", stage, took, stopTime)
		} else {
			t.Logf("stage %s: the shutdown took %v", stage, took)
		}
		for _, bad := range []string{"Failed unmounting", "A stop job is running", "I/O error", "Failed to unmount", "dependency cycle", "Timed out"} {
			if i := strings.Index(string(raw), bad); i >= 0 {
				t.Errorf("stage %s: the console has %q:\n%s", stage, bad, raw[max(0, i-500):min(len(raw), i+500)])
			}
		}
	}
}

// lastWords are the kernel's, with the time since the boot.
var lastWords = regexp.MustCompile(`\[ *([0-9.]+)\] reboot: `)

// shutdownTime is from the stage's command to the kernel's last words, by the
// guest's clock: the host's says how busy the host is.
func shutdownTime(t *testing.T, lines []string, console []byte) time.Duration {
	t.Helper()
	asked, ended := tagged(lines, "STOPPING"), lastWords.FindAllSubmatch(console, -1)
	if len(asked) != 1 || len(ended) == 0 {
		t.Fatalf("the guest said %d times that it stops, the kernel %d times that it ends", len(asked), len(ended))
	}
	from, err := strconv.ParseFloat(asked[0], 64)
	if err != nil {
		t.Fatal(err)
	}
	to, err := strconv.ParseFloat(string(ended[len(ended)-1][1]), 64)
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration((to - from) * float64(time.Second)).Round(100 * time.Millisecond)
}

// systemdImage makes a disk with Debian, our package and the stages' script.
func systemdImage(t *testing.T) *image {
	t.Helper()
	checkPrograms(t, needed)
	checkPrograms(t, map[string]string{"debootstrap": "debootstrap", "mke2fs": "e2fsprogs", "dpkg-deb": "dpkg", "tar": "tar"})
	kernel := kernelRoot(t)
	images, _ := filepath.Glob(filepath.Join(kernel, "boot", "vmlinuz-*"))
	if len(images) != 1 {
		t.Fatalf("%s holds %d kernels", kernel, len(images))
	}
	root := filepath.Join(work, "debian")
	debianRoot(t, root)
	bin := os.Getenv("BLOCKSTEP_BIN")
	if bin == "" {
		t.Fatal("BLOCKSTEP_BIN is not set: run make test-systemd")
	}
	for _, version := range []string{"0.0.1", "0.0.2"} {
		cmd := exec.Command("../../deploy/deb/build.sh", bin, filepath.Join(root, "srv"))
		cmd.Env = append(os.Environ(), "VERSION="+version, "COMPRESS=none")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("building the package: %v\n%s", err, out)
		}
	}
	run(t, "", "chroot", root, "sh", "-c", "dpkg -i /srv/blockstep_0.0.1_*.deb && rm -f /etc/machine-id && touch /etc/machine-id && echo alpha >/etc/hostname && passwd -d root >/dev/null")
	copyModules(t, kernel, root, []string{"nbd", "autofs4"})
	makeDirs(t, root, "etc/blockstep", "guest", "srv/data")
	for from, to := range map[string]string{
		"guest/systemd/stages.sh": "guest/stages.sh", "guest/systemd/blockstep.yaml": "etc/blockstep/blockstep.yaml",
		"guest/systemd/test.service": "etc/systemd/system/test.service", "guest/systemd/bound.service": "etc/systemd/system/bound.service",
		"guest/systemd/beta.service": "etc/systemd/system/beta.service",
	} {
		raw, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o644)
		if strings.HasSuffix(to, ".sh") {
			mode = 0o755
		}
		writeFile(t, bytes.NewReader(raw), filepath.Join(root, to), mode)
	}
	run(t, "", "chroot", root, "systemctl", "-q", "enable", "blockstepd.service", "blockstep.socket", "beta.service", "test.service")
	run(t, "", "chroot", root, "systemctl", "-q", "mask", "serial-getty@ttyS1.service", "getty@tty1.service", "apt-daily.timer", "apt-daily-upgrade.timer", "systemd-timesyncd.service")
	i := &image{kernel: images[0], initrd: filepath.Join(work, "systemd-initrd"), disk: filepath.Join(work, "debian-disk")}
	first := filepath.Join(work, "systemd-first")
	makeDirs(t, first, "bin", "sbin", "proc", "sys", "dev", "sysroot")
	installBusybox(t, first)
	copyModules(t, kernel, first, bootModules)
	raw, err := guest.ReadFile("guest/initrd")
	if err != nil {
		t.Fatal(err)
	}
	text, _, ok := strings.Cut(string(raw), "exec switch_root")
	if !ok {
		t.Fatal("guest/initrd has no switch_root")
	}
	writeFile(t, strings.NewReader(text+"exec switch_root /sysroot /sbin/init\n"), filepath.Join(first, "init"), 0o755)
	run(t, first, "sh", "-c", `find . | cpio -o -H newc --quiet >"$1"`, "sh", i.initrd)
	f, err := os.Create(i.disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(diskBytes), f.Close()); err != nil {
		t.Fatal(err)
	}
	run(t, "", "mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1", "-d", root, i.disk)
	return i
}

// debianRoot unpacks a minimal Debian, which is fetched once a cache.
func debianRoot(t *testing.T, root string) {
	t.Helper()
	cache := os.Getenv("BLOCKSTEP_KERNEL_CACHE")
	if cache == "" {
		cache = work
	}
	tar := filepath.Join(cache, "debian-bookworm.tar")
	if _, err := os.Stat(tar); err != nil {
		fresh := filepath.Join(work, "debootstrap")
		run(t, "", "debootstrap", "--variant=minbase", "--include="+debianPackages, "bookworm", fresh)
		run(t, "", "tar", "-C", fresh, "-cf", tar+".new", ".")
		if err := os.Rename(tar+".new", tar); err != nil {
			t.Fatal(err)
		}
	}
	makeDirs(t, root, ".")
	run(t, "", "tar", "-C", root, "-xf", tar)
}
