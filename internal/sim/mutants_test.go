//go:build mutants

package sim

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// mutant is one rule of the design broken on purpose. Each is named as in
// design section 10.
type mutant struct {
	name    string
	tests   [2]string // a package, and which of its tests; empty: the simulator
	changes []change
}

type change struct{ file, old, new string }

// readMutants parses testdata/mutants.txt: "# name", then one or more of
// "file PATH", "<<<<", old text, "====", new text, ">>>>"; before them perhaps
// "test PACKAGE REGEXP".
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
		case part == 0 && strings.HasPrefix(word, "test "):
			ms[len(ms)-1].tests = [2]string(strings.Fields(word)[1:])
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

// mutantSeeds is how many random histories may pass before a mutant that no
// scenario finds is said to survive; chanceSeeds, how many show how soon one
// that a scenario finds is found by chance.
const (
	mutantSeeds = 4000
	chanceSeeds = 100
)

// TestMutants breaks one rule after the other and demands that a scenario or a
// random history finds it out: a checker that finds nothing is no checker. At
// the end it prints the table that stands in docs/simulator.md.
func TestMutants(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	ms := readMutants(t)
	rows := make([]string, len(ms))
	t.Cleanup(func() {
		fmt.Println("| mutant | scenario | history | found as |\n|---|---|---|---|")
		for _, r := range rows {
			fmt.Print(r)
		}
	})
	for i := range ms {
		t.Run(ms[i].name, func(t *testing.T) {
			t.Parallel()
			rows[i] = ms[i].hunt(t, root)
		})
	}
}

var (
	failedStory   = regexp.MustCompile(`--- FAIL: TestScenario/(\S+)`)
	failedTest    = regexp.MustCompile(`--- FAIL: (\S+)`)
	failedHistory = regexp.MustCompile(`seed (\d+): ([^\n]*)`)
	virtualTime   = regexp.MustCompile(` at +[0-9.]+ms`)
)

// hunt builds the mutant, lets it be found, and returns its row of the table.
func (m *mutant) hunt(t *testing.T, root string) string {
	dir := t.TempDir()
	overlay := m.overlay(t, root, dir)
	if m.tests[0] != "" {
		out, err := output(nil, "go", "test", "-count", "1", "-overlay", overlay, "-run", m.tests[1], "../../"+m.tests[0])
		hit := failedTest.FindStringSubmatch(out)
		if err == nil || hit == nil {
			t.Fatalf("survives, or fails for another reason:\n%s", out)
		}
		return fmt.Sprintf("| `%s` | | | `%s` of `%s` |\n", m.name, hit[1], strings.TrimPrefix(m.tests[0], "./"))
	}
	bin := filepath.Join(dir, "sim.test")
	if out, err := output(nil, "go", "test", "-c", "-tags", "invariants", "-ldflags", "-s -w", "-overlay", overlay, "-o", bin, "."); err != nil {
		t.Fatalf("does not build: %v\n%s", err, out)
	}
	stories := "TestScenario"
	if slices.ContainsFunc(slices.Concat(scenarios, fieldScenarios), func(sc scenario) bool { return sc.name == m.name }) {
		stories += "/^" + m.name + "$"
	}
	out, err := output(nil, bin, "-test.run", stories, "-test.failfast")
	if err == nil && stories != "TestScenario" {
		out, err = output(nil, bin, "-test.run", "TestScenario", "-test.failfast")
	}
	story, n, as := failedStory.FindStringSubmatch(out), mutantSeeds, ""
	if err != nil && story == nil {
		t.Fatalf("fails for another reason:\n%s", out)
	}
	row := "| `" + m.name + "` | "
	if story != nil {
		row, n = row+"`"+story[1]+"`", chanceSeeds
		if hit := failedHistory.FindStringSubmatch(out); hit != nil {
			as = hit[2]
		}
	}
	env := []string{"BLOCKSTEP_SIM_FAILURES=1", fmt.Sprintf("BLOCKSTEP_SIM_SEEDS=%d", n), "GOMAXPROCS=1"}
	out, err = output(env, bin, "-test.run", "TestHistories", "-test.timeout", "0")
	history := failedHistory.FindStringSubmatch(out)
	switch {
	case err != nil && history == nil:
		t.Fatalf("fails for another reason:\n%s", out)
	case history == nil && story == nil:
		t.Fatalf("survives all scenarios and %d histories", n)
	case history == nil:
		row += fmt.Sprintf(" | none of %d", n)
	default:
		row += " | " + history[1]
		as = history[2]
	}
	if as = virtualTime.ReplaceAllString(as, ""); len(as) > 100 {
		as = as[:100] + "…"
	}
	row += " | " + as + " |\n"
	t.Log(row)
	return row
}

// output runs a command with more environment and returns all that it prints.
func output(env []string, name string, args ...string) (string, error) {
	c := exec.Command(name, args...)
	c.Env = append(os.Environ(), env...)
	out, err := c.CombinedOutput()
	return string(out), err
}
