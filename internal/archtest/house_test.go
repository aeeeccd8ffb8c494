package archtest

import (
	"go/ast"
	"path"
	"regexp"
	"strings"
	"testing"
)

// ban is a call that has no place in some folders.
type ban struct {
	pkg, name string   // as written: pkg.name; name "" bans the builtin pkg
	in        []string // where; nil: everywhere
	except    []string // save there
	tests     bool     // in tests too
	instead   string
}

var bans = []ban{
	{pkg: "time", name: "Sleep", except: []string{"e2e"}, instead: "wait for the event; for a pause use a timer and the context, for tests testing/synctest"},
	{pkg: "time", name: "Tick", instead: "use time.NewTicker and stop it"},
	{pkg: "os", name: "Exit", except: []string{"cmd", "e2e"}, tests: false, instead: "return an error: deferred calls must run"},
	{pkg: "log", name: "Fatal", instead: "return an error: deferred calls must run"},
	{pkg: "log", name: "Fatalf", instead: "return an error: deferred calls must run"},
	{pkg: "slog", name: "Default", instead: "take the logger as a parameter: it carries volume, peer and epoch"},
	{pkg: "rand", name: "Seed", instead: "make a source of your own from the seed"},
	{
		pkg: "panic", in: []string{"replication/wire", "replication/wal", "nbd"}, except: []string{"nbd/nbdtest"},
		instead: "this package reads bytes from outside: return an error, or invariant.Assert what no bytes can cause",
	},
	{
		pkg: "os", name: "Rename", in: []string{"replication", "raft"},
		instead: "a replica's files go through internal/vfs, which fsyncs the directory",
	},
	{
		pkg: "os", name: "WriteFile", in: []string{"replication", "raft"},
		instead: "a replica's files go through internal/vfs, which fsyncs",
	},
}

// TestBannedCalls looks for calls that the house has a better way for.
func TestBannedCalls(t *testing.T) {
	for _, f := range loadTree(t) {
		ast.Inspect(f.tree, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			pkg, name := calleeOf(call)
			for _, b := range bans {
				if b.pkg != pkg || b.name != name || (f.test && !b.tests) {
					continue
				}
				if (b.in != nil && !underAny(f.dir, b.in)) || underAny(f.dir, b.except) {
					continue
				}
				t.Errorf("%s calls %s: %s", f.at(call), strings.TrimSuffix(pkg+"."+name, "."), b.instead)
			}
			return true
		})
	}
}

// calleeOf names a call as written: package (or builtin) and function.
func calleeOf(call *ast.CallExpr) (pkg, name string) {
	switch fun := call.Fun.(type) {
	case *ast.Ident:
		return fun.Name, ""
	case *ast.SelectorExpr:
		if id, ok := fun.X.(*ast.Ident); ok {
			return id.Name, fun.Sel.Name
		}
	}
	return "", ""
}

// TestPackageComments checks that each package has exactly one comment, and
// that it begins as godoc wants it.
func TestPackageComments(t *testing.T) {
	type found struct {
		name  string
		where []string
		files int
	}
	packages := map[string]*found{}
	for _, f := range loadTree(t) {
		if f.test {
			continue
		}
		p := packages[f.dir]
		if p == nil {
			p = &found{name: f.tree.Name.Name}
			packages[f.dir] = p
		}
		p.files++
		if f.tree.Doc == nil || strings.HasPrefix(f.tree.Doc.Text(), "Code generated") {
			continue
		}
		p.where = append(p.where, f.path)
		text := f.tree.Doc.Text()
		want := "Package " + p.name + " "
		if p.name == "main" {
			want = "Command " + path.Base(f.dir) + " "
		}
		if !strings.HasPrefix(text, want) {
			t.Errorf("%s: the package comment begins %q, and godoc wants %q", f.path, firstLine(text), want+"…")
		}
	}
	for dir, p := range packages {
		switch {
		case len(p.where) == 0:
			t.Errorf("%s has no package comment: say what it is for, and what it must not know", dir)
		case len(p.where) > 1:
			t.Errorf("%s has %d package comments (%v): keep one", dir, len(p.where), p.where)
		}
	}
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

const (
	linesHabit = 600 // above it a file is named in the test's log
	linesMax   = 900 // above it a room wants a wall
)

// TestFileLength names long files, and refuses those that are several files.
func TestFileLength(t *testing.T) {
	for _, f := range loadTree(t) {
		lines := strings.Count(f.text, "\n")
		switch {
		case lines > linesMax:
			t.Errorf("%s has %d lines, the limit is %d: which two things does it do?", f.path, lines, linesMax)
		case lines > linesHabit && !f.test:
			t.Logf("%s has %d lines; the habit is %d", f.path, lines, linesHabit)
		}
	}
}

// leftUndone matches the marks of unfinished work. The words are split so that
// this file does not match itself.
var leftUndone = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|X` + `XX)\b|not impl` + `emented|unimpl` + `emented`)

// TestNothingLeftUndone looks for marks of unfinished work: open work belongs
// into an issue, where somebody sees it.
func TestNothingLeftUndone(t *testing.T) {
	for _, f := range loadTree(t) {
		for i, line := range strings.Split(f.text, "\n") {
			if leftUndone.MatchString(line) {
				t.Errorf("%s:%d: %s", f.path, i+1, strings.TrimSpace(line))
			}
		}
	}
}

// TestSkipsSayWhy checks that a skipped test names what is missing.
func TestSkipsSayWhy(t *testing.T) {
	for _, f := range loadTree(t) {
		ast.Inspect(f.tree, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			_, name := calleeOf(call)
			if name == "SkipNow" || (name == "Skip" || name == "Skipf") && len(call.Args) == 0 {
				t.Errorf("%s skips without a word: name what is missing", f.at(call))
			}
			return true
		})
	}
}
