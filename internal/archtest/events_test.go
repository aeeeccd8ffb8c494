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
	for _, f := range loadTree(t) {
		if f.test || !underAny(f.dir, []string{"raft", "replication", "internal/daemon"}) {
			continue
		}
		ast.Inspect(f.tree, func(n ast.Node) bool {
			lit, ok := n.(*ast.CompositeLit)
			if ok && typeName(lit.Type) == "Event" {
				if kind := kindOf(lit); kind != "" {
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

// kindOf is the kind that an event is made with, "" when it is no constant.
func kindOf(lit *ast.CompositeLit) string {
	for _, e := range lit.Elts {
		kv, ok := e.(*ast.KeyValueExpr)
		if !ok {
			continue
		}
		key, _ := kv.Key.(*ast.Ident)
		value, _ := kv.Value.(*ast.BasicLit)
		if key == nil || value == nil || (key.Name != "Name" && key.Name != "Kind") {
			continue
		}
		if s, err := strconv.Unquote(value.Value); err == nil {
			return s
		}
	}
	return ""
}
