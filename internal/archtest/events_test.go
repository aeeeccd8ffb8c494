package archtest

import (
	"go/ast"
	"slices"
	"strconv"
	"testing"

	"github.com/blockstep/blockstep/internal/control"
)

// TestEventKinds: the list of the kinds of events is what the source makes, no
// more and no less. `blockstep events` takes the width of its column from it.
func TestEventKinds(t *testing.T) {
	made := map[string]string{}
	named := stringConstants(loadTree(t))
	for _, f := range loadTree(t) {
		if f.test || !underAny(f.dir, []string{"raft", "replication", "internal/daemon"}) {
			continue
		}
		ast.Inspect(f.tree, func(n ast.Node) bool {
			lit, ok := n.(*ast.CompositeLit)
			if ok && typeName(lit.Type) == "Event" {
				if kind := kindOf(lit, named); kind != "" {
					made[kind] = f.at(lit)
				}
			}
			return true
		})
	}
	for kind, at := range made {
		if !slices.Contains(control.EventKinds, kind) {
			t.Errorf("%s makes an event %q: add it to control.EventKinds", at, kind)
		}
	}
	for _, kind := range control.EventKinds {
		if made[kind] == "" {
			t.Errorf("control.EventKinds has %q, which nothing makes", kind)
		}
	}
}

// typeName is the last word of a type: Event of core.Event.
func typeName(e ast.Expr) string {
	switch x := e.(type) {
	case *ast.Ident:
		return x.Name
	case *ast.SelectorExpr:
		return x.Sel.Name
	}
	return ""
}

// stringConstants are the constants of the tree that are a string, by name.
func stringConstants(files []*file) map[string]string {
	out := map[string]string{}
	for _, f := range files {
		ast.Inspect(f.tree, func(n ast.Node) bool {
			spec, ok := n.(*ast.ValueSpec)
			if !ok || len(spec.Names) != 1 || len(spec.Values) != 1 {
				return true
			}
			if lit, ok := spec.Values[0].(*ast.BasicLit); ok {
				if s, err := strconv.Unquote(lit.Value); err == nil {
					out[spec.Names[0].Name] = s
				}
			}
			return true
		})
	}
	return out
}

// kindOf is the kind that an event is made with, "" when it is no constant.
func kindOf(lit *ast.CompositeLit, named map[string]string) string {
	for _, e := range lit.Elts {
		kv, ok := e.(*ast.KeyValueExpr)
		if !ok {
			continue
		}
		if key, _ := kv.Key.(*ast.Ident); key == nil || (key.Name != "Name" && key.Name != "Kind") {
			continue
		}
		switch value := kv.Value.(type) {
		case *ast.BasicLit:
			if s, err := strconv.Unquote(value.Value); err == nil {
				return s
			}
		case *ast.Ident:
			return named[value.Name]
		}
	}
	return ""
}
