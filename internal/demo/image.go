package demo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

const (
	// treeBytesMax bounds the default tree, so that the story takes a minute.
	treeBytesMax = 200 << 20
	// treeBytesHard bounds a tree that was named.
	treeBytesHard = 16 << 30
)

// findTool looks for a program in PATH and where Debian keeps system programs.
func findTool(name, pkg string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed, and the story needs it; install the package %s (apt-get install %s)", name, pkg, pkg)
}

// chooseTree finds the files for the image.
func chooseTree(ctx context.Context, from string) (dir string, bytes, files int64, err error) {
	if from != "" {
		bytes, files, err = treeSize(from, treeBytesHard)
		if err != nil {
			return "", 0, 0, fmt.Errorf("--from %s: %w", from, err)
		}
		return from, bytes, files, nil
	}
	for _, dir := range defaultTrees(ctx) {
		bytes, files, err := treeSize(dir, treeBytesMax)
		if err == nil && files > 0 {
			return dir, bytes, files, nil
		}
	}
	return "", 0, 0, errors.New("no Go tree was found to fill the image with; name a directory with --from DIR")
}

// defaultTrees lists the Go sources of this machine, then the tree we are in.
func defaultTrees(ctx context.Context) []string {
	var out []string
	if raw, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output(); err == nil {
		out = append(out, filepath.Join(strings.TrimSpace(string(raw)), "src"))
	}
	out = append(out, "/usr/local/go/src", "/usr/lib/go/src")
	if wd, err := os.Getwd(); err == nil {
		if _, err := os.Stat(filepath.Join(wd, "go.mod")); err == nil {
			out = append(out, wd)
		}
	}
	return append(out, filepath.Join("/usr/share/doc", "base-files"), "/usr/share/"+runtime.GOARCH)
}

var errTreeTooLarge = errors.New("the tree is too large")

// treeSize adds up a tree's regular files.
func treeSize(dir string, limit int64) (bytes, files int64, err error) {
	info, err := os.Stat(dir)
	if err != nil {
		return 0, 0, err
	}
	if !info.IsDir() {
		return 0, 0, errors.New("is not a directory")
	}
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		bytes += (info.Size() + 4095) / 4096 * 4096
		files++
		if bytes > limit {
			return fmt.Errorf("%w: more than %d MiB", errTreeTooLarge, limit>>20)
		}
		return nil
	})
	return bytes, files, err
}

// makeImage makes an ext4 filesystem of size bytes with the files of dir.
func makeImage(ctx context.Context, path, dir string, size int64) error {
	mkfs, err := findTool("mkfs.ext4", "e2fsprogs")
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err == nil {
		err = f.Truncate(size)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("making the image: %w", err)
	}
	out, err := exec.CommandContext(ctx, mkfs, "-q", "-F", "-m", "0", "-d", dir, path).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mkfs.ext4 -d %s: %w: %s", dir, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// imageSize is the volume for a tree: the demo's, or a larger one with room for
// the filesystem's own blocks.
func imageSize(bytes, files int64) int64 {
	need := bytes + bytes/4 + files*512 + 128<<20
	return max(volumeSize, (need+(64<<20)-1)/(64<<20)*(64<<20))
}
