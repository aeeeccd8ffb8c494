package archtest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/blockstep/blockstep"

// file is one parsed Go file of the tree.
type file struct {
	path string // from the top, with slashes
	dir  string
	test bool
	tree *ast.File
	fset *token.FileSet
	text string
}

// at names a place in the file for a message.
func (f *file) at(n ast.Node) string {
	return f.fset.Position(n.Pos()).String()
}

// imports lists the paths that the file imports.
func (f *file) imports() []string {
	var out []string
	for _, spec := range f.tree.Imports {
		out = append(out, strings.Trim(spec.Path.Value, `"`))
	}
	return out
}

// parsed is the tree, read once for all tests.
var parsed = sync.OnceValues(parseTree)

// loadTree returns every Go file of this module, the tests too.
func loadTree(t *testing.T) []*file {
	t.Helper()
	files, err := parsed()
	if err != nil {
		t.Fatalf("read the tree: %v", err)
	}
	if len(files) == 0 {
		t.Fatal("no Go files found: is the test run from its own directory?")
	}
	return files
}

func parseTree() ([]*file, error) {
	top := filepath.Join("..", "..")
	var files []*file
	err := filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(top, p)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if d.IsDir() {
			name := d.Name()
			hidden := strings.HasPrefix(name, ".") && rel != "."
			if hidden || name == "testdata" || rel == "bin" || rel == "build" || rel == "internal/tools" {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(rel, ".go") {
			return nil
		}
		f, err := parseFile(p, rel)
		if err != nil {
			return err
		}
		files = append(files, f)
		return nil
	})
	return files, err
}

func parseFile(name, rel string) (*file, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	fset := token.NewFileSet()
	tree, err := parser.ParseFile(fset, rel, text, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	return &file{
		path: rel,
		dir:  path.Dir(rel),
		test: strings.HasSuffix(rel, "_test.go"),
		tree: tree,
		fset: fset,
		text: string(text),
	}, nil
}

// under reports whether dir is tree or lies below it.
func under(dir, tree string) bool {
	return dir == tree || strings.HasPrefix(dir, tree+"/")
}

// underAny reports whether dir is one of the trees or lies below one.
func underAny(dir string, trees []string) bool {
	for _, tree := range trees {
		if under(dir, tree) {
			return true
		}
	}
	return false
}
