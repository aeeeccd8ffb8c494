//go:build mutants

package sim

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// mutant is one rule of the design broken on purpose. Each is named as in
// design section 10.
type mutant struct {
	name    string
	changes []change
}

type change struct{ file, old, new string }

// readMutants parses testdata/mutants.txt: "# name", then one or more of
// "file PATH", "<<<<", old text, "====", new text, ">>>>".
func readMutants(t *testing.T) []mutant {
	t.Helper()
	b, err := os.ReadFile("testdata/mutants.txt")
	if err != nil {
		t.Fatal(err)
	}
	var ms []mutant
	file, part := "", 0
	var text [2]string
	for _, line := range strings.SplitAfter(string(b), "\n") {
		word := strings.TrimSpace(line)
		switch {
		case part == 0 && strings.HasPrefix(word, "# "):
			ms = append(ms, mutant{name: word[2:]})
		case part == 0 && strings.HasPrefix(word, "file "):
			file = word[5:]
		case part == 0 && word == "<<<<":
			part, text = 1, [2]string{}
		case part == 1 && word == "====":
			part = 2
		case part == 2 && word == ">>>>":
			m := &ms[len(ms)-1]
			m.changes = append(m.changes, change{file, text[0], text[1]})
			part = 0
		case part > 0:
			text[part-1] += line
		}
	}
	return ms
}

// overlay writes the changed files and the map that tells the compiler of them.
func (m *mutant) overlay(t *testing.T, root, dir string) string {
	t.Helper()
	replace := map[string]string{}
	for _, c := range m.changes {
		path := filepath.Join(root, c.file)
		from := path
		if to, ok := replace[path]; ok {
			from = to
		}
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(b), c.old); n != 1 {
			t.Fatalf("%s: the text to change stands %d times in %s:\n%s", m.name, n, c.file, c.old)
		}
		to := filepath.Join(dir, strings.ReplaceAll(c.file, "/", "_"))
		if err := os.WriteFile(to, []byte(strings.Replace(string(b), c.old, c.new, 1)), 0o644); err != nil {
			t.Fatal(err)
		}
		replace[path] = to
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestMutants breaks one rule after the other and demands that a history finds
// it out: a checker that finds nothing is no checker.
func TestMutants(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	failing := regexp.MustCompile(`seed \d+: [^\n]*`)
	for _, m := range readMutants(t) {
		t.Run(m.name, func(t *testing.T) {
			dir := t.TempDir()
			bin := filepath.Join(dir, "sim.test")
			build := exec.Command("go", "test", "-c", "-overlay", m.overlay(t, root, dir), "-o", bin, ".")
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("does not build: %v\n%s", err, out)
			}
			run := exec.Command(bin, "-test.run", "TestHistories|TestScenario")
			run.Env = append(os.Environ(), "BLOCKSTEP_SIM_FAILURES=1")
			out, err := run.CombinedOutput()
			if err == nil {
				t.Fatalf("survives:\n%s", out)
			}
			hit := failing.FindString(string(out))
			if hit == "" {
				t.Fatalf("fails for another reason:\n%s", out)
			}
			t.Logf("found by %s", hit)
		})
	}
}
