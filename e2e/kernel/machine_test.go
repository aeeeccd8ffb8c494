//go:build kernel

package kernel

import (
	"bufio"
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

//go:embed guest
var guest embed.FS

const (
	// bootTime bounds one boot with its scenario, and only ends what hangs: it
	// takes one to three minutes on two busy cores, and as many times that as the
	// host has more to do.
	bootTime = 30 * time.Minute
	// diskBytes is the size of the guest's disk; it is sparse.
	diskBytes = 3 << 30
)

// The guest's clock counts its instructions, two nanoseconds each, and real time
// only while it is idle. So a host under heavy load makes the guest slow, and the
// guest does not notice: no lease lapses and no election begins in it for that
// reason. It takes one processor, and less of the host's than two in step with
// real time.
const clockByInstructions = "shift=1,sleep=on"

// cpu is what is emulated. The instructions that move strings are left out: the
// emulator does them byte by byte, and kernel and Go use them for each copy.
const cpu = "max,-erms,-fsrm"

// Modules that the first file system loads, and those that scenarios load.
var (
	bootModules  = []string{"virtio_pci", "virtio_blk"}
	guestModules = []string{"xfs", "nbd"}
)

// programs of the host that go onto the guest's disk with their libraries, and
// the Debian packages that have them.
var programs = map[string]string{
	"mke2fs": "e2fsprogs", "e2fsck": "e2fsprogs", "mkfs.xfs": "xfsprogs", "xfs_repair": "xfsprogs",
	"resize2fs": "e2fsprogs", "blkdiscard": "util-linux", "fstrim": "util-linux",
}

// needed are the programs of the host that build and run the guest.
var needed = map[string]string{
	"qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "busybox": "busybox-static", "cpio": "cpio", "depmod": "kmod",
}

// work is a directory for all tests of this process.
var work string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "blockstep-kernel")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	work = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// image is what every virtual machine boots from.
type image struct{ kernel, initrd, disk string }

var (
	imageOnce sync.Once
	theImage  *image
)

// newImage builds the image, once for all tests.
func newImage(t *testing.T) *image {
	t.Helper()
	imageOnce.Do(func() { theImage = buildImage(t) })
	if theImage == nil {
		t.Fatal("the guest's image was not built: see the first test's error")
	}
	return theImage
}

func buildImage(t *testing.T) *image {
	t.Helper()
	checkPrograms(t, needed)
	checkPrograms(t, programs)
	root := kernelRoot(t)
	images, _ := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if len(images) != 1 {
		t.Fatalf("%s holds %d kernels", root, len(images))
	}
	i := &image{kernel: images[0], initrd: filepath.Join(work, "initrd"), disk: filepath.Join(work, "disk")}
	buildInitrd(t, filepath.Join(work, "first"), root, i.initrd)
	buildDisk(t, filepath.Join(work, "root"), root, i.disk)
	return i
}

func checkPrograms(t *testing.T, list map[string]string) {
	t.Helper()
	for name, pkg := range list {
		if _, err := find(name); err != nil {
			t.Fatalf("%s is missing: apt-get install --no-install-recommends %s", name, pkg)
		}
	}
}

// kernelRoot fetches and unpacks the newest cloud kernel, once a cache.
func kernelRoot(t *testing.T) string {
	t.Helper()
	cache := os.Getenv("BLOCKSTEP_KERNEL_CACHE")
	if cache == "" {
		cache = filepath.Join(work, "kernel")
	}
	pkg, err := newestKernel()
	if err != nil {
		refreshLists(t)
		if pkg, err = newestKernel(); err != nil {
			if have := cachedKernel(cache); have != "" {
				t.Logf("%v; taking %s", err, have)
				return have
			}
			t.Fatalf("%v\nThe kernel tests boot Debian's cloud kernel: they need apt's lists of a Debian mirror (apt-get update).", err)
		}
	}
	root := filepath.Join(cache, pkg)
	if _, err := os.Stat(root); err == nil {
		return root
	}
	dir := filepath.Join(work, "deb")
	download := func() error {
		_ = os.MkdirAll(dir, 0o755) // what is wrong with it is seen below
		cmd := exec.Command("apt-get", "-q", "download", pkg)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get download %s: %w\n%s", pkg, err, out)
		}
		return nil
	}
	if err := download(); err != nil {
		refreshLists(t) // the mirror has a newer one than the lists say
		if err := download(); err != nil {
			t.Fatalf("%v\nThe package %s is missing: fetch it by hand and unpack it (dpkg -x, depmod -b) to $BLOCKSTEP_KERNEL_CACHE/%s.", err, pkg, pkg)
		}
	}
	debs, _ := filepath.Glob(filepath.Join(dir, "*.deb"))
	if len(debs) != 1 {
		t.Fatalf("apt-get download %s left %d packages", pkg, len(debs))
	}
	fresh := root + ".new" // renamed at the end, so that what is there is whole
	if err := errors.Join(os.RemoveAll(fresh), os.MkdirAll(fresh, 0o755)); err != nil {
		t.Fatal(err)
	}
	run(t, "", "dpkg", "-x", debs[0], fresh)
	run(t, "", "depmod", "-b", fresh, strings.TrimPrefix(pkg, "linux-image-"))
	if err := os.Rename(fresh, root); err != nil {
		t.Fatal(err)
	}
	return root
}

// cachedKernel finds a kernel that an earlier run has unpacked, for a machine
// without apt's lists; "" when there is none.
func cachedKernel(cache string) string {
	have, _ := filepath.Glob(filepath.Join(cache, "linux-image-*-amd64"))
	if len(have) == 0 {
		return ""
	}
	return have[len(have)-1]
}

// newestKernel asks apt which package linux-image-cloud-amd64 depends on.
func newestKernel() (string, error) {
	const meta = "linux-image-cloud-amd64"
	out, err := exec.Command("apt-cache", "depends", meta).Output()
	if err != nil {
		return "", fmt.Errorf("apt-cache depends %s: %w", meta, err)
	}
	for _, w := range strings.Fields(string(out)) {
		if strings.HasPrefix(w, "linux-image-") && w != meta {
			return w, nil
		}
	}
	return "", fmt.Errorf("apt knows no package %s", meta)
}

// refreshLists brings apt's lists up to date, where this user may.
func refreshLists(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		return
	}
	if out, err := exec.Command("apt-get", "-q", "update").CombinedOutput(); err != nil {
		t.Logf("apt-get update: %v\n%s", err, out)
	}
}

// buildInitrd makes the first file system: what mounts the disk and goes on there.
func buildInitrd(t *testing.T, root, kernel, initrd string) {
	t.Helper()
	makeDirs(t, root, "bin", "sbin", "proc", "sys", "dev", "sysroot")
	installBusybox(t, root)
	copyModules(t, kernel, root, bootModules)
	copyGuest(t, "guest/initrd", filepath.Join(root, "init"))
	run(t, root, "sh", "-c", `find . | cpio -o -H newc --quiet >"$1"`, "sh", initrd)
}

// buildDisk makes the guest's disk: our binaries, the programs, the scenarios.
func buildDisk(t *testing.T, root, kernel, disk string) {
	t.Helper()
	makeDirs(t, root, "bin", "sbin", "proc", "sys", "dev", "etc", "run", "tmp", "mnt", "data")
	installBusybox(t, root)
	for name := range programs {
		path, _ := find(name)
		copyFile(t, path, filepath.Join(root, "bin", name), 0o755)
		for _, w := range strings.Fields(string(run(t, "", "ldd", path))) {
			if strings.HasPrefix(w, "/") {
				copyFile(t, w, filepath.Join(root, w), 0o755)
			}
		}
	}
	copyModules(t, kernel, root, guestModules)
	module, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(root, "bin")+"/", "./cmd/...", "./e2e/kernel/nbdsame")
	build.Dir = module
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	scenarios, err := fs.Glob(guest, "guest/*.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range append(scenarios, "guest/init") {
		copyGuest(t, s, filepath.Join(root, s))
	}
	f, err := os.Create(disk)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(f.Truncate(diskBytes), f.Close())
	if err != nil {
		t.Fatal(err)
	}
	run(t, "", "mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0", "-d", root, disk)
}

func makeDirs(t *testing.T, root string, dirs ...string) {
	t.Helper()
	for _, d := range dirs {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func installBusybox(t *testing.T, root string) {
	t.Helper()
	busybox, _ := find("busybox")
	copyFile(t, busybox, filepath.Join(root, "bin/busybox"), 0o755)
	for _, applet := range strings.Fields(string(run(t, "", "busybox", "--list"))) {
		_ = os.Symlink("busybox", filepath.Join(root, "bin", applet)) // busybox itself is there
	}
	_ = os.Symlink("../bin/busybox", filepath.Join(root, "sbin/modprobe")) // where the kernel looks for it
}

func copyGuest(t *testing.T, name, to string) {
	t.Helper()
	raw, err := guest.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, bytes.NewReader(raw), to, 0o755)
}

// copyModules copies the modules and what they depend on, and depmod's files.
func copyModules(t *testing.T, kernel, root string, names []string) {
	t.Helper()
	dirs, _ := filepath.Glob(filepath.Join(kernel, "lib/modules/*"))
	if len(dirs) != 1 {
		t.Fatalf("%s has modules of %d kernels", kernel, len(dirs))
	}
	from, to := dirs[0], filepath.Join(root, "lib/modules", filepath.Base(dirs[0]))
	raw, err := os.ReadFile(filepath.Join(from, "modules.dep"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.SplitSeq(string(raw), "\n") {
		path, deps, _ := strings.Cut(line, ":")
		name, _, _ := strings.Cut(filepath.Base(path), ".")
		if !slices.Contains(names, strings.ReplaceAll(name, "-", "_")) {
			continue
		}
		for _, m := range append(strings.Fields(deps), path) {
			copyFile(t, filepath.Join(from, m), filepath.Join(to, m), 0o644)
		}
	}
	meta, _ := filepath.Glob(filepath.Join(from, "modules.*"))
	for _, m := range meta {
		copyFile(t, m, filepath.Join(to, filepath.Base(m)), 0o644)
	}
}

func copyFile(t *testing.T, from, to string, mode os.FileMode) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	writeFile(t, in, to, mode)
}

// writeFile makes a file anew. What is there may be a symlink, of which the
// target is not meant: it goes first, and O_EXCL makes sure that nothing is ever
// written through one.
func writeFile(t *testing.T, in io.Reader, to string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

// machine is a virtual machine. Its disk is an overlay over the image's, and
// behaves like a disk with a volatile cache: where something was written for the
// first time, it is lost with the power unless it was flushed.
type machine struct {
	*image
	overlay string
	console string // the kernel's messages
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	return machineOf(t, newImage(t))
}

func machineOf(t *testing.T, i *image) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{image: i, overlay: filepath.Join(dir, "overlay"), console: filepath.Join(dir, "console")}
	run(t, "", "qemu-img", "create", "-q", "-f", "qcow2", "-b", i.disk, "-F", "raw", m.overlay)
	return m
}

// boot runs a scenario. It ends when the guest says that it passed, or cut says
// that its power goes now. It returns what the guest said.
func (m *machine) boot(t *testing.T, scenario string, memMiB int, cut func(string) bool) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootTime)
	defer cancel()
	// The kernel has a serial line of its own, so that it never speaks in the
	// middle of a line of ours. cache=unsafe does not wait for the host's disk:
	// only the emulated power is ever cut.
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", append(processors(t), "-cpu", cpu, "-m", fmt.Sprint(memMiB),
		"-display", "none", "-monitor", "none", "-no-reboot", "-nic", "none", "-kernel", m.kernel, "-initrd", m.initrd,
		"-serial", "stdio", "-serial", "file:"+m.console,
		"-drive", "file="+m.overlay+",format=qcow2,if=virtio,cache=unsafe",
		"-append", "console=ttyS1 panic=-1 quiet loglevel=5 mitigations=off tsc=unstable no_timer_check scenario="+scenario)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	// It dies with this process, however that ends. The signal is sent when the
	// thread that started it ends: that one stays here.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	var lines []string
	passed := false
	for s := bufio.NewScanner(out); s.Scan(); {
		line := strings.TrimRight(s.Text(), "\r ")
		lines = append(lines, line)
		fmt.Printf("%s %6.1fs %s\n", scenario, time.Since(began).Seconds(), line) // at once: t.Log waits for the end
		passed = passed || strings.HasPrefix(line, "BLOCKSTEP PASS")
		if !passed && cut != nil && cut(line) {
			passed = true
			if err := cmd.Process.Kill(); err != nil {
				t.Errorf("cutting the power: %v", err)
			}
		}
	}
	_ = cmd.Wait() // killed, or powered off: the guest has said what matters
	if passed && ctx.Err() == nil {
		return lines
	}
	kernel, _ := os.ReadFile(m.console)
	t.Logf("the kernel said:\n%s", kernel)
	if ctx.Err() != nil {
		t.Fatalf("scenario %s did not end within %v", scenario, bootTime)
	}
	t.Fatalf("scenario %s failed: see what the guest said above", scenario)
	return nil
}

// processors are qemu's arguments for one processor by its own clock, or for as
// many as $BLOCKSTEP_KERNEL_CPUS says, in step with the host's.
func processors(t *testing.T) []string {
	t.Helper()
	switch n := os.Getenv("BLOCKSTEP_KERNEL_CPUS"); n {
	case "", "1":
		return []string{"-accel", "tcg,thread=single", "-icount", clockByInstructions, "-smp", "1"}
	case "2", "3", "4":
		return []string{"-accel", "tcg,thread=multi", "-smp", n}
	default:
		t.Fatalf("BLOCKSTEP_KERNEL_CPUS is %q: allowed are 1 to 4", n)
		return nil
	}
}

// find looks in sbin too, which is not in every user's PATH.
func find(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", exec.ErrNotFound
}

func run(t *testing.T, dir, name string, args ...string) []byte {
	t.Helper()
	path, err := find(name)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = dir
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, errOut.Bytes())
	}
	return out
}
