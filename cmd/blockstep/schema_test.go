package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/spf13/cobra"

	"github.com/blockstep/blockstep/internal/control"
)

// schemaDir is where the promises to scripts lie.
var schemaDir = func() string {
	dir, err := filepath.Abs("../../docs/schema")
	if err != nil {
		panic(err)
	}
	return dir
}()

// strictSchemas compiles the schemas with one rule more: what they do not name
// must not be there. Users may meet newer fields; our own must be written down.
func strictSchemas() (map[string]*jsonschema.Schema, error) {
	files, err := filepath.Glob(filepath.Join(schemaDir, "*.json"))
	if err != nil || len(files) == 0 {
		return nil, fmt.Errorf("no schemas in %s: %w", schemaDir, err)
	}
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		closeObjects(doc)
		if err := c.AddResource("mem:///"+filepath.Base(f), doc); err != nil {
			return nil, err
		}
	}
	out := map[string]*jsonschema.Schema{}
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".json")
		if out[name], err = c.Compile("mem:///" + name + ".json"); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func closeObjects(doc any) {
	switch d := doc.(type) {
	case map[string]any:
		if _, ok := d["properties"]; ok && d["type"] == "object" {
			d["additionalProperties"] = false
		}
		for _, v := range d {
			closeObjects(v)
		}
	case []any:
		for _, v := range d {
			closeObjects(v)
		}
	}
}

// schemaCmd is `schema NAME`: the last stdout is one or more JSON values, each
// as the schema says.
func schemaCmd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: schema NAME")
	}
	all, err := strictSchemas()
	ts.Check(err)
	s := all[args[0]]
	if s == nil {
		ts.Fatalf("there is no docs/schema/%s.json", args[0])
	}
	text := ts.ReadFile("stdout")
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	n := 0
	for ; ; n++ {
		var v any
		if err := d.Decode(&v); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			ts.Fatalf("stdout is no JSON: %v\n%s", err, text)
		}
		if err := s.Validate(v); err != nil {
			ts.Fatalf("%v\n%s", err, text)
		}
	}
	if n == 0 {
		ts.Fatalf("stdout is empty")
	}
}

// TestSchemasFitTheTypes: each field of what is printed is in the schema, and
// the other way round; what may be left out is not required.
func TestSchemasFitTheTypes(t *testing.T) {
	if _, err := strictSchemas(); err != nil {
		t.Fatal(err)
	}
	for name, typ := range map[string]any{
		"cluster": control.ClusterStatus{}, "volume": control.VolumeStatus{}, "node": control.NodeStatus{}, "event": control.Event{},
		"failover": control.FailoverResult{}, "fence": control.FenceResult{}, "verify": control.VerifyProgress{}, "attachment": control.Attachment{},
		"findings": control.Finding{}, "reloaded": control.Reloaded{}, "recovery": control.Recovery{}, "node-added": control.AddedNode{}, "node-changed": nodeChanged{},
	} {
		raw, err := os.ReadFile(filepath.Join(schemaDir, name+".json"))
		if err != nil {
			t.Fatal(err)
		}
		var doc map[string]any
		if err := json.Unmarshal(raw, &doc); err != nil {
			t.Fatal(err)
		}
		if items, ok := doc["items"].(map[string]any); ok {
			doc = items
		}
		fits(t, name, doc, reflect.TypeOf(typ))
	}
}

// notPrinted are fields of the API that end before a verb prints.
var notPrinted = map[string]bool{"verify.error": true, "verify.waits": true}

func fits(t *testing.T, where string, doc map[string]any, typ reflect.Type) {
	t.Helper()
	props, _ := doc["properties"].(map[string]any)
	if props == nil {
		if doc["$ref"] == nil {
			t.Errorf("%s has no properties", where)
		}
		return
	}
	var required []string
	for _, r := range doc["required"].([]any) {
		required = append(required, r.(string))
	}
	for i := range typ.NumField() {
		f := typ.Field(i)
		field, opts, _ := strings.Cut(f.Tag.Get("json"), ",")
		at := where + "." + field
		if notPrinted[at] {
			continue
		}
		p, ok := props[field].(map[string]any)
		if !ok {
			t.Errorf("%s is not in the schema", at)
			continue
		}
		delete(props, field)
		if must := !strings.Contains(opts, "omitempty"); must != slices.Contains(required, field) {
			t.Errorf("%s: always there: %v, required: %v", at, must, !must)
		}
		if p["description"] == nil && p["$ref"] == nil && p["const"] == nil {
			t.Errorf("%s is not described", at)
		}
		inner := f.Type
		if items, ok := p["items"].(map[string]any); ok {
			p, inner = items, inner.Elem()
		}
		if either, ok := p["anyOf"].([]any); ok {
			p, inner = either[1].(map[string]any), inner.Elem()
		}
		if inner.Kind() == reflect.Struct && inner.PkgPath() != "time" {
			fits(t, at, p, inner)
		}
	}
	for left := range props {
		t.Errorf("%s.%s is in the schema and nowhere else", where, left)
	}
}

// TestSchemasAreUsed: each schema stands in the table of docs/schema, each verb
// too, and each schema is held against real output by a script.
func TestSchemasAreUsed(t *testing.T) {
	table, err := os.ReadFile(filepath.Join(schemaDir, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	var scripts []byte
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		scripts = append(scripts, raw...)
	}
	all, err := strictSchemas()
	if err != nil {
		t.Fatal(err)
	}
	// A kernel device needs the nbd module: TestAttachVerbs.
	elsewhere := []string{"attachment", "detached", "node"}
	for name := range all {
		if !bytes.Contains(table, []byte("("+name+".json)")) {
			t.Errorf("%s is not in the table of docs/schema/README.md", name)
		}
		if !slices.Contains(elsewhere, name) && !regexp.MustCompile(`(?m)^schema `+name+`$`).Match(scripts) {
			t.Errorf("no script holds %s against real output", name)
		}
	}
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "completion" || c.Name() == "help" {
			return
		}
		verb := strings.TrimPrefix(c.CommandPath(), "blockstep ")
		if !c.HasSubCommands() && !regexp.MustCompile("`"+regexp.QuoteMeta(verb)+"[ `]").Match(table) {
			t.Errorf("%s is not in docs/schema/README.md", verb)
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk((&app{terminal: isTerminal}).root())
}
