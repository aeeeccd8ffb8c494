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
	"slices"
	"strings"
	"testing"
	"time"
)

//go:embed guest
var guest embed.FS

// bootTime bounds one boot with its scenario. Emulated processors are slow, and
// CI's are shared.
const bootTime = 10 * time.Minute

// modules that the guest loads, with what they depend on.
var modules = []string{"virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "xfs", "nbd"}

// programs of the host that go into the guest with their libraries.
var programs = []string{"mke2fs", "e2fsck"}

func TestAttach(t *testing.T) {
	vm := newVM(t)
	vm.boot(t, "attach", 1024, nil)
}

func TestPowerCut(t *testing.T) {
	vm := newVM(t)
	first := vm.boot(t, "powercut", 1024, func(line string) bool { return strings.Contains(line, "BLOCKSTEP CUT NOW") })
	second := vm.boot(t, "powercut", 1024, nil)
	want, got := tagged(first, "SUM"), tagged(second, "FOUND")
	if len(want) != 20 || !slices.Equal(want, got) {
		t.Errorf("before the cut fsync returned for\n%s\nafter it there was\n%s", strings.Join(want, "\n"), strings.Join(got, "\n"))
	}
}

func TestLittleMemory(t *testing.T) {
	vm := newVM(t)
	vm.boot(t, "memory", 320, nil)
}

func tagged(lines []string, tag string) []string {
	var out []string
	for _, l := range lines {
		if _, rest, ok := strings.Cut(l, "BLOCKSTEP "+tag+": "); ok {
			out = append(out, strings.TrimSpace(rest))
		}
	}
	return out
}

// vm is a virtual machine: its kernel, its first file system, its one disk.
type vm struct{ kernel, initrd, disk string }

func newVM(t *testing.T) *vm {
	t.Helper()
	for _, p := range append([]string{"qemu-system-x86_64:qemu-system-x86", "busybox:busybox-static", "cpio:cpio", "depmod:kmod", "apt-get:apt", "dpkg:dpkg"}, "mke2fs:e2fsprogs", "e2fsck:e2fsprogs") {
		name, pkg, _ := strings.Cut(p, ":")
		if _, err := find(name); err != nil {
			t.Fatalf("%s is missing: apt-get install --no-install-recommends %s", name, pkg)
		}
	}
	dir := t.TempDir()
	root := kernelRoot(t)
	v := &vm{initrd: filepath.Join(dir, "initrd.gz"), disk: filepath.Join(dir, "disk")}
	images, _ := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if len(images) != 1 {
		t.Fatalf("%s holds %d kernels", root, len(images))
	}
	v.kernel = images[0]
	buildInitrd(t, filepath.Join(dir, "root"), root, v.initrd)
	f, err := os.Create(v.disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(3 << 30); err != nil {
		t.Fatal(err)
	}
	f.Close()
	run(t, "", "mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1", v.disk)
	return v
}

// boot runs a scenario. It ends when the guest says that it passed, or cut says
// that its power goes now. It returns what the console said.
func (v *vm) boot(t *testing.T, scenario string, memMiB int, cut func(string) bool) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", fmt.Sprint(memMiB),
		"-nographic", "-no-reboot", "-nic", "none", "-kernel", v.kernel, "-initrd", v.initrd,
		"-drive", "file="+v.disk+",format=raw,if=virtio,cache=writeback",
		"-append", "console=ttyS0 panic=-1 quiet loglevel=4 mitigations=off tsc=unstable no_timer_check scenario="+scenario)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	var lines []string
	passed := false
	for s := bufio.NewScanner(out); s.Scan(); {
		line := strings.TrimRight(s.Text(), "\r ")
		lines = append(lines, line)
		fmt.Printf("%6.1fs %s\n", time.Since(began).Seconds(), line) // at once: t.Log waits for the end
		passed = passed || strings.HasPrefix(line, "BLOCKSTEP PASS")
		if cut != nil && cut(line) {
			passed = true
			cmd.Process.Kill()
		}
	}
	cmd.Wait() // killed, or powered off: the console has said what matters
	switch {
	case ctx.Err() != nil:
		t.Fatalf("scenario %s did not end within %v", scenario, bootTime)
	case !passed:
		t.Fatalf("scenario %s failed: see the console above", scenario)
	}
	return lines
}

// kernelRoot fetches and unpacks the newest cloud kernel, once a cache.
func kernelRoot(t *testing.T) string {
	t.Helper()
	cache := os.Getenv("BLOCKSTEP_KERNEL_CACHE")
	if cache == "" {
		cache = t.TempDir()
	}
	dep := string(run(t, "", "apt-cache", "depends", "linux-image-cloud-amd64"))
	i := strings.Index(dep, "linux-image-6")
	if i < 0 {
		i = strings.LastIndex(dep, "Depends: linux-image-") + len("Depends: ")
	}
	pkg, _, _ := strings.Cut(dep[i:], "\n")
	pkg = strings.TrimSpace(pkg)
	root := filepath.Join(cache, pkg)
	if _, err := os.Stat(filepath.Join(root, "ready")); err == nil {
		return root
	}
	dir := t.TempDir()
	run(t, dir, "apt-get", "-q", "download", pkg)
	debs, _ := filepath.Glob(filepath.Join(dir, "*.deb"))
	if len(debs) != 1 {
		t.Fatalf("apt-get download %s left %d packages", pkg, len(debs))
	}
	run(t, "", "dpkg", "-x", debs[0], root)
	run(t, "", "depmod", "-b", root, strings.TrimSuffix(strings.TrimPrefix(pkg, "linux-image-"), "-unsigned"))
	if err := os.WriteFile(filepath.Join(root, "ready"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return root
}

// buildInitrd makes the guest's file system: busybox, modules, our binaries.
func buildInitrd(t *testing.T, root, kernel, initrd string) {
	t.Helper()
	for _, d := range []string{"bin", "sbin", "proc", "sys", "dev", "etc"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox, _ := find("busybox")
	copyFile(t, busybox, filepath.Join(root, "bin/busybox"), 0o755)
	for _, applet := range strings.Fields(string(run(t, "", "busybox", "--list"))) {
		_ = os.Symlink("busybox", filepath.Join(root, "bin", applet)) // busybox itself is there
	}
	_ = os.Symlink("../bin/busybox", filepath.Join(root, "sbin/modprobe")) // where the kernel looks for it
	for _, p := range programs {
		path, _ := find(p)
		copyFile(t, path, filepath.Join(root, "bin", p), 0o755)
		for _, w := range strings.Fields(string(run(t, "", "ldd", path))) {
			if strings.HasPrefix(w, "/") {
				copyFile(t, w, filepath.Join(root, w), 0o755)
			}
		}
	}
	copyModules(t, kernel, root)
	module, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-s -w", "-o", filepath.Join(root, "bin")+"/", "./cmd/...", "./e2e/kernel/nbdsum")
	build.Dir = module
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	err = fs.WalkDir(guest, "guest", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := guest.ReadFile(path)
		if err != nil {
			return err
		}
		to := filepath.Join(root, path)
		if d.Name() == "init" {
			to = filepath.Join(root, "init")
		}
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		_ = os.Remove(to) // never through a symlink
		return os.WriteFile(to, raw, 0o755)
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, root, "sh", "-c", "find . | cpio -o -H newc --quiet | gzip -1 >"+initrd)
}

// copyModules copies the modules that the guest needs and depmod's files.
func copyModules(t *testing.T, kernel, root string) {
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
	for _, line := range strings.Split(string(raw), "\n") {
		path, deps, _ := strings.Cut(line, ":")
		name, _, _ := strings.Cut(filepath.Base(path), ".")
		if !slices.Contains(modules, strings.ReplaceAll(name, "-", "_")) {
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
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	// What is there may be a symlink, of which the target is not meant: it goes
	// first, and O_EXCL makes sure that nothing is ever written through one.
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
