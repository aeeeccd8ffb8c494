package nbd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/pojntfx/go-nbd/pkg/client"
	"github.com/pojntfx/go-nbd/pkg/server"

	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/nbd/nbdtest"
)

// debianPackages says where each client comes from.
var debianPackages = map[string]string{
	"nbdinfo": "libnbd-bin", "nbdcopy": "libnbd-bin", "nbdfuse": "libnbd-bin", "/usr/bin/python3": "python3-libnbd",
	"qemu-img": "qemu-utils", "qemu-io": "qemu-utils", "fio": "fio", "mkfs.ext4": "e2fsprogs", "fsck.ext4": "e2fsprogs",
	"fusermount3": "fuse3",
}

// tool runs a real client and returns its output. It fails the test when the
// client fails, or is not installed.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := tryTool(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func tryTool(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/" + name); err != nil {
			t.Fatalf("%s is not installed: apt-get install %s", name, debianPackages[name])
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// random fills a device with noise, leaving every fourth MiB a hole.
func random(t *testing.T, size uint64) *nbdtest.MemDevice {
	t.Helper()
	d := nbdtest.NewMemDevice(size)
	rnd := rand.NewChaCha8([32]byte{1})
	p := make([]byte, 1<<20)
	for off := uint64(0); off < size; off += uint64(len(p)) {
		if off>>20%4 == 3 {
			continue
		}
		rnd.Read(p)
		if _, err := d.WriteAt(p[:min(size-off, 1<<20)], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func content(t *testing.T, d *nbdtest.MemDevice) []byte {
	t.Helper()
	p := make([]byte, d.Info().Size)
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// uri turns an address of serve into the URI that libnbd and qemu take.
func uri(addr, export string) string {
	if p, ok := strings.CutPrefix(addr, "unix://"); ok {
		return "nbd+unix:///" + export + "?socket=" + p
	}
	return "nbd" + strings.TrimPrefix(addr, "tcp") + "/" + export
}

func TestNbdinfo(t *testing.T) {
	dev := random(t, 8<<20)
	addr := serve(t, nbdtest.Exports{"disk": dev, "other": nbdtest.NewMemDevice(4096)})
	var list struct {
		Protocol string
		TLS      bool
		Exports  []map[string]any
	}
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", "--list", uri(addr, ""))), &list); err != nil {
		t.Fatal(err)
	}
	if list.Protocol != "newstyle-fixed" || len(list.Exports) != 2 {
		t.Fatalf("%+v", list)
	}
	e := list.Exports[0]
	for key, want := range map[string]any{
		"export-name": "disk", "description": "memory", "export-size": float64(8 << 20), "is_read_only": false,
		"can_flush": true, "can_fua": true, "can_trim": true, "can_zero": true, "can_fast_zero": true, "can_df": true,
		"can_cache": true, "can_multi_conn": true, "block_size_minimum": 1.0, "block_size_preferred": 4096.0, "block_size_maximum": float64(nbd.PayloadMax),
	} {
		if e[key] != want {
			t.Errorf("%s: %v, want %v", key, e[key], want)
		}
	}
	if got, want := fmt.Sprint(e["contexts"]), "[base:allocation blockstep:dirty-since:]"; got != want {
		t.Errorf("contexts %s, want %s", got, want)
	}
	if got := strings.TrimSpace(tool(t, "nbdinfo", "--size", uri(addr, "disk"))); got != "8388608" {
		t.Errorf("size %s", got)
	}
	m := tool(t, "nbdinfo", "--map", uri(addr, "disk"))
	if got, want := strings.Join(strings.Fields(m), " "), "0 3145728 0 data 3145728 1048576 3 hole,zero 4194304 3145728 0 data 7340032 1048576 3 hole,zero"; got != want {
		t.Errorf("map\n%s\nwant\n%s", got, want)
	}
	if out, err := tryTool(t, "nbdinfo", uri(addr, "nothing")); err == nil || !strings.Contains(out, "No such file") {
		t.Errorf("an unknown export: %v %s", err, out)
	}
}

func TestNbdinfoDirty(t *testing.T) {
	dev := random(t, 4<<20)
	addr := serve(t, nbdtest.Exports{"disk": dev})
	since := dev.Seq()
	if _, err := dev.WriteAt([]byte("changed"), 1<<20+5000); err != nil {
		t.Fatal(err)
	}
	m := tool(t, "nbdinfo", fmt.Sprintf("--map=blockstep:dirty-since:1:%d", since), uri(addr, "disk"))
	if got, want := strings.Join(strings.Fields(m), " "), "0 1052672 0 1052672 4096 1 1056768 3137536 0"; !strings.HasPrefix(stripWords(got), want) {
		t.Errorf("dirty map\n%s\nwant\n%s", stripWords(got), want)
	}
	dev.Forget(since)
	if out, err := tryTool(t, "nbdinfo", "--map=blockstep:dirty-since:1:1", uri(addr, "disk")); err == nil {
		t.Errorf("a position that is forgotten was mapped:\n%s", out)
	}
}

// stripWords drops the descriptions that nbdinfo adds to contexts it knows.
func stripWords(s string) string {
	var nums []string
	for _, f := range strings.Fields(s) {
		if strings.Trim(f, "0123456789") == "" {
			nums = append(nums, f)
		}
	}
	return strings.Join(nums, " ")
}

func TestNbdcopy(t *testing.T) {
	src, dst := random(t, 64<<20), nbdtest.NewMemDevice(64<<20)
	_, addr := serveOn(t, "tcp://127.0.0.1:0", nbdtest.Exports{"src": src, "dst": dst})
	tool(t, "nbdcopy", "--connections=4", "--requests=64", "--flush", uri(addr, "src"), uri(addr, "dst"))
	if !bytes.Equal(content(t, src), content(t, dst)) {
		t.Error("the copy differs")
	}
	if dst.Flushed() == 0 {
		t.Error("--flush sent no FLUSH")
	}
}

const nbdshScript = `
h.add_meta_context("base:allocation")
h.set_export_name("disk")
h.connect_uri("%s")
size = h.get_size()
assert h.can_df() and h.can_fua() and h.can_fast_zero() and h.get_structured_replies_negotiated()
h.pwrite(b"x" * 10000, 5000, nbd.CMD_FLAG_FUA)
assert h.pread(10000, 5000) == b"x" * 10000
h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, 8192) == bytearray(4096)
try:
    h.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
    assert False
except nbd.Error as e:
    assert e.errno == "ENOTSUP", e.errno
h.trim(65536, 0)
h.cache(65536, 0)
h.flush()
chunks = []
h.pread_structured(65536, 0, lambda b, o, s, e: chunks.append((len(b), o, s)), nbd.CMD_FLAG_DF)
assert len(chunks) == 1, chunks
seen = []
h.block_status(size, 0, lambda ctx, off, ext, err: seen.append((ctx, off, ext)))
assert seen[0][0] == "base:allocation" and sum(seen[0][2][0::2]) == size, seen
seen = []
h.block_status(size, 0, lambda ctx, off, ext, err: seen.append(ext), nbd.CMD_FLAG_REQ_ONE)
assert len(seen[0]) == 2, seen
h.set_strict_mode(0)
for f, want in ((lambda: h.pread(4096, size), "EINVAL"), (lambda: h.pwrite(b"x" * 512, size), "ENOSPC"),
                (lambda: h.trim(512, size), "EINVAL"), (lambda: h.zero(512, size), "ENOSPC"), (lambda: h.pread(0, 0), "EINVAL")):
    try:
        f()
        assert False
    except nbd.Error as e:
        assert e.errno == want, (e, want)
assert h.pread(512, 65536) == bytearray(512) # the connection lives
cookies = [h.aio_pread(nbd.Buffer(4096), i * 4096) for i in range(64)]
while h.aio_in_flight() > 0:
    h.poll(-1)
h.shutdown()
print("all well")
`

func TestNbdsh(t *testing.T) {
	addr := serve(t, nbdtest.Exports{"disk": nbdtest.NewMemDevice(1 << 20)})
	// nbdsh would take the first python3 of the path, which need not be the
	// one that has Debian's module.
	out := tool(t, "/usr/bin/python3", "-m", "nbd", "-c", fmt.Sprintf(nbdshScript, uri(addr, "disk")))
	if !strings.Contains(out, "all well") {
		t.Error(out)
	}
}

func TestQemu(t *testing.T) {
	src, dst := random(t, 64<<20), nbdtest.NewMemDevice(64<<20)
	_, addr := serveOn(t, "tcp://127.0.0.1:0", nbdtest.Exports{"src": src, "dst": dst})
	from, to := uri(addr, "src"), uri(addr, "dst")
	tool(t, "qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", from, to)
	if out := tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", from, to); !strings.Contains(out, "identical") {
		t.Error(out)
	}
	if !bytes.Equal(content(t, src), content(t, dst)) {
		t.Error("the copy differs")
	}
	var m []struct {
		Start, Length int64
		Data          bool
	}
	if err := json.Unmarshal([]byte(tool(t, "qemu-img", "map", "--output=json", "-f", "raw", from)), &m); err != nil {
		t.Fatal(err)
	}
	if len(m) != 32 || !m[0].Data || m[1].Data || m[1].Start != 3<<20 || m[1].Length != 1<<20 {
		t.Errorf("%d extents: %+v", len(m), m[:min(len(m), 3)])
	}
	tool(t, "qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", "-w", "--flush-interval=100", to)
	out := tool(t, "qemu-io", "-f", "raw", "-c", "write -P 0xab 1M 64k", "-c", "write -f -P 0xcd 2M 4k", "-c", "write -z -u 3M 1M", "-c", "discard 8M 1M",
		"-c", "flush", "-c", "read -P 0xab 1M 64k", "-c", "read -P 0xcd 2M 4k", "-c", "read -P 0 3M 1M", "-c", "aio_write -P 1 16M 32M", "-c", "aio_flush", "-c", "read -P 1 16M 32M", to)
	if strings.Contains(out, "fail") || strings.Contains(out, "error") {
		t.Error(out)
	}
}

func TestFio(t *testing.T) {
	_, addr := serveOn(t, "tcp://127.0.0.1:0", nbdtest.Exports{"disk": nbdtest.NewMemDevice(64 << 20)})
	tool(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+uri(addr, "disk"), "--rw=randrw", "--bsrange=512-128k", "--bsrange=512-128k",
		"--blockalign=512", "--iodepth=32", "--size=48m", "--verify=crc32c", "--verify_fatal=1", "--trim_percentage=10", "--verify_backlog=64", "--verify_state_save=0")
}

func TestNbdfuse(t *testing.T) {
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Fatalf("nbdfuse needs /dev/fuse: modprobe fuse, or give the container the device: %v", err)
	}
	addr := serve(t, nbdtest.Exports{"disk": nbdtest.NewMemDevice(64 << 20)})
	dir := t.TempDir()
	pid := filepath.Join(dir, "pid")
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	path, err := exec.LookPath("nbdfuse")
	if err != nil {
		t.Fatalf("nbdfuse is not installed: apt-get install %s", debianPackages["nbdfuse"])
	}
	cmd := exec.CommandContext(ctx, path, "-P", pid, mnt, uri(addr, "disk"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		tool(t, "fusermount3", "-u", mnt)
		cancel()
		cmd.Wait() //nolint:errcheck // it was unmounted, or is killed
	}()
	image := filepath.Join(mnt, "nbd")
	for deadline := time.Now().Add(20 * time.Second); ; {
		if _, err := os.Stat(pid); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nbdfuse does not start")
		}
		<-time.After(20 * time.Millisecond)
	}
	tool(t, "mkfs.ext4", "-q", "-F", "-d", "testdata", image)
	tool(t, "fsck.ext4", "-f", "-n", image)
}

// TestGoNBD runs go-nbd's client and server against ours, as far as they go
// without a kernel device: its Connect begins with an ioctl, and what it says on
// the wire is in TestNotFixed.
func TestGoNBD(t *testing.T) {
	addr := serve(t, nbdtest.Exports{"disk": nbdtest.NewMemDevice(1 << 20), "other": nbdtest.NewMemDevice(4096)})
	got, err := client.List(rawDial(t, addr))
	if err != nil || !slices.Equal(got, []string{"disk"}) { // it reads one reply
		t.Errorf("go-nbd's List: %q, %v", got, err)
	}

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	served := make(chan error, 1)
	go func() {
		there, err := ln.Accept()
		if err != nil {
			served <- err
			return
		}
		defer there.Close()
		served <- server.Handle(there, []*server.Export{{Name: "disk", Backend: backend.NewMemoryBackend(make([]byte, 1<<20))}}, nil)
	}()
	c, err := nbdtest.Dial(t.Context(), "tcp://"+ln.Addr().String(), "disk", nbdtest.Options{Simple: true, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("go-nbd"), 1000)
	back := make([]byte, len(data))
	if err := c.WriteAt(t.Context(), data, 4096); err != nil {
		t.Error(err)
	}
	if err := c.ReadAt(t.Context(), back, 4096); err != nil || !bytes.Equal(back, data) {
		t.Errorf("what was written to go-nbd's server reads otherwise: %v", err)
	}
	if c.Flags()&(nbdtest.FlagSendFlush|nbdtest.FlagSendFUA|nbdtest.FlagSendTrim|nbdtest.FlagSendWriteZeroes|nbdtest.FlagSendDF) != 0 {
		t.Errorf("go-nbd's server has learned something, flags %#x: bring docs/interop.md up to date", c.Flags())
	}
	if err := c.Disconnect(); err != nil {
		t.Error(err)
	}
	c.Close()
	if err := <-served; err != nil {
		t.Errorf("go-nbd's server: %v", err)
	}
}

// certificates makes an authority and certificates of a server and a client in
// the files that qemu and libnbd look for.
func certificates(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := nbdtest.WriteCertificates(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestToolsWithTLS(t *testing.T) {
	dir := certificates(t)
	cfg, err := nbd.LoadTLS(filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"), filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	src, dst := random(t, 16<<20), nbdtest.NewMemDevice(16<<20)
	_, addr := serveOn(t, "tcp://127.0.0.1:0", nbdtest.Exports{"src": src, "dst": dst}, nbd.Config{TLS: cfg, TLSRequire: true})
	host, port, _ := net.SplitHostPort(strings.TrimPrefix(addr, "tcp://"))
	opts := func(export string) string {
		return fmt.Sprintf("driver=nbd,host=%s,port=%s,export=%s,tls-creds=t", host, port, export)
	}
	creds := "tls-creds-x509,id=t,endpoint=client,dir=" + dir
	tool(t, "qemu-img", "convert", "--object", creds, "-n", "--image-opts", "--target-image-opts", opts("src"), opts("dst"))
	if !bytes.Equal(content(t, src), content(t, dst)) {
		t.Error("qemu's copy differs")
	}
	secure := fmt.Sprintf("nbds://%s:%s/src?tls-certificates=%s", host, port, dir)
	if out := tool(t, "nbdinfo", secure); !strings.Contains(out, "with TLS") {
		t.Error(out)
	}
	tool(t, "nbdcopy", "--connections=2", secure, filepath.Join(t.TempDir(), "copy"))
	if out, err := tryTool(t, "nbdinfo", uri(addr, "src")); err == nil {
		t.Errorf("a client without TLS was served:\n%s", out)
	}
	if out, err := tryTool(t, "qemu-img", "info", uri(addr, "src")); err == nil {
		t.Errorf("a client without TLS was served:\n%s", out)
	}
	// A certificate is needed, not only TLS.
	os.Remove(filepath.Join(dir, "client-cert.pem"))
	if out, err := tryTool(t, "nbdinfo", secure); err == nil {
		t.Errorf("a client without a certificate was served:\n%s", out)
	}
}

// TestBackup runs the script of docs/backup.md: full, changes, incremental,
// restore, and full again of another volume of the same name.
func TestBackup(t *testing.T) {
	dev, restored := random(t, 32<<20), nbdtest.NewMemDevice(32<<20)
	addr := serve(t, nbdtest.Exports{"db": dev, "restored": restored})
	image := filepath.Join(t.TempDir(), "image")
	id := "00c0ffee00c0ffee"
	backup := func() (string, error) {
		return tryTool(t, "/usr/bin/python3", "../docs/examples/blockstep-backup", uri(addr, "db"), image, "--id", id, "--position", fmt.Sprintf("1:%d", dev.Seq()))
	}
	equal := func() {
		t.Helper()
		got, err := os.ReadFile(image)
		if err != nil || !bytes.Equal(got, content(t, dev)) {
			t.Errorf("the image differs, %v", err)
		}
	}
	if out, err := backup(); err != nil || !strings.HasPrefix(out, "full: 25165824 of 33554432") {
		t.Fatalf("%s %v", out, err)
	}
	equal()
	c := dial(t, addr, "db", nbdtest.Options{})
	for _, err := range []error{
		c.WriteAt(t.Context(), bytes.Repeat([]byte{7}, 10000), 5<<20+100),
		c.WriteAt(t.Context(), []byte("in a hole"), 3<<20+5),
		c.WriteZeroes(t.Context(), 9<<20, 1<<20),
		c.Trim(t.Context(), 16<<20, 2<<20),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if out, err := backup(); err != nil || !strings.Contains(out, "since 1:24: 3162112 of") {
		t.Errorf("%s %v", out, err)
	}
	equal()
	if out, err := backup(); err != nil || !strings.Contains(out, ": 0 of") {
		t.Errorf("%s %v", out, err)
	}
	tool(t, "nbdcopy", image, uri(addr, "restored"))
	if !bytes.Equal(content(t, dev), content(t, restored)) {
		t.Error("what was restored differs")
	}
	dev.Forget(dev.Seq() + 1)
	if out, err := backup(); err == nil || !strings.Contains(out, "full backup") {
		t.Errorf("a position that is forgotten: %s %v", out, err)
	}

	// What the image has of another volume, deleted since, or of one that nobody
	// knows, is not gone on with, though the server would know the position.
	spoil := func() {
		t.Helper()
		if err := os.WriteFile(image, bytes.Repeat([]byte{0xee}, 40<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	dev.Forget(0)
	spoil()
	id = "0ddba11"
	if out, err := backup(); err != nil || !strings.HasPrefix(out, "full, since ") || !strings.Contains(out, "of another volume, 00c0ffee00c0ffee: ") {
		t.Errorf("another volume of the same name: %s %v", out, err)
	}
	equal()
	spoil()
	if err := os.WriteFile(image+".position", []byte(fmt.Sprintf("1:%d\n", dev.Seq())), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := backup(); err != nil || !strings.HasPrefix(out, "full, since ") || !strings.Contains(out, "does not tell which volume") {
		t.Errorf("a position without an id: %s %v", out, err)
	}
	equal()
	if out, err := backup(); err != nil || !strings.HasPrefix(out, fmt.Sprintf("since 1:%d: 0 of", dev.Seq())) {
		t.Errorf("once is enough: %s %v", out, err)
	}
	if out, err := tryTool(t, "/usr/bin/python3", "../docs/examples/blockstep-backup", uri(addr, "db"), image, "--id", id, "--position", ""); err == nil || !strings.Contains(out, "no primary") {
		t.Errorf("no position: %s %v", out, err)
	}
}
