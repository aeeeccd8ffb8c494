//go:build kernel

package kernel

import (
	"slices"
	"strings"
	"testing"
)

// TestOperator: four connections, zeroes and trim, a volume that grows, a minute
// without a quorum, deleting, lost writes, and a daemon that does not come back.
// It begins first: it waits most.
func TestOperator(t *testing.T) {
	t.Parallel()
	newMachine(t).boot(t, "operator", 1024, nil)
}

// TestAttach: what is refused and why; ext4 and xfs on two volumes go on without
// an error while the primary is killed, the daemon that serves the devices is
// killed, and upgraded; then detach, fsck, and three equal replicas.
func TestAttach(t *testing.T) {
	t.Parallel()
	newMachine(t).boot(t, "attach", 1024, nil)
}

// TestPowerCut: what fsync returned for is there after the power of the whole
// machine went away in the middle of writing, on ext4 and on xfs.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	const files = 24
	m := newMachine(t)
	sums := 0
	first := m.boot(t, "powercut", 1024, func(line string) bool {
		if strings.HasPrefix(line, "BLOCKSTEP SUM: ") {
			sums++
		}
		return sums == files
	})
	second := m.boot(t, "powercut", 1024, nil)
	want, got := tagged(first, "SUM"), tagged(second, "FOUND")
	if len(want) < files {
		t.Errorf("the power was cut after %d files: want %d", len(want), files)
	}
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("fsync had returned for %q; after the power cut there was\n%s", w, strings.Join(got, "\n"))
		}
	}
}

// TestLittleMemory: a machine writes more than it has memory through the daemon
// that it runs itself.
func TestLittleMemory(t *testing.T) {
	t.Parallel()
	newMachine(t).boot(t, "memory", 224, nil)
}

// tagged returns what follows the tag, in the lines that have it.
func tagged(lines []string, tag string) []string {
	var out []string
	for _, l := range lines {
		if rest, ok := strings.CutPrefix(l, "BLOCKSTEP "+tag+": "); ok {
			out = append(out, strings.TrimSpace(rest))
		}
	}
	return out
}
