package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// binDir has blockstep and blockstepd.
var binDir string

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	binDir = os.Getenv("BLOCKSTEP_BIN")
	if binDir == "" {
		dir, err := os.MkdirTemp("", "blockstep-bin-")
		if err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			return 1
		}
		defer os.RemoveAll(dir)
		build := exec.Command("go", "build", "-o", dir+string(filepath.Separator), "../cmd/...")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "e2e: build the binaries: %v\n%s", err, out)
			return 1
		}
		binDir = dir
	}
	// mkfs and fsck are not in every user's path.
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	return m.Run()
}

// needTool fails the test when a program is missing, and says what to install.
func needTool(t testing.TB, names ...string) {
	t.Helper()
	packages := map[string]string{
		"qemu-img": "qemu-utils", "qemu-io": "qemu-utils",
		"nbdinfo": "libnbd-bin", "nbdcopy": "libnbd-bin", "nbdfuse": "libnbd-bin", "nbdsh": "python3-libnbd",
		"fusermount3": "fuse3", "fio": "fio", "ip": "iproute2",
		"mkfs.ext4": "e2fsprogs", "fsck.ext4": "e2fsprogs",
	}
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%s is not installed: apt-get install %s (or: make deps)", name, packages[name])
		}
	}
}
