package config

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"github.com/spf13/viper"
	"go.yaml.in/yaml/v3"
)

// fileBytesMax bounds what is read as a configuration file.
const fileBytesMax = 1 << 20

// Flags adds blockstepd's flags to fs, one for each key that makes sense as one.
func Flags(fs *pflag.FlagSet) {
	for _, k := range keys {
		if k.flag != "" {
			fs.String(k.flag, "", k.help)
		}
	}
}

// Load reads the file (DefaultFile when it is ""), the environment and the
// flags that were set (fs may be nil), each overriding the one before, and
// validates the whole. The error joins one *Error for each thing that is wrong.
func Load(file string, fs *pflag.FlagSet) (*Config, error) {
	l, err := open(file, fs)
	if err != nil {
		return nil, err
	}
	c := l.build()
	l.checkEnv(os.Environ())
	if len(l.errs) > 0 {
		return nil, errors.Join(l.errs...)
	}
	return c, nil
}

// AdminAddress reads only the admin address, so that the CLI works with the
// file of a cluster on a machine that is not one of its nodes.
func AdminAddress(file string) (string, error) {
	l, err := open(file, nil)
	if err != nil {
		return "", err
	}
	admin := l.admin()
	for _, e := range l.errs {
		var ce *Error
		if errors.As(e, &ce) && strings.HasPrefix(ce.Key, "admin.") {
			return "", e
		}
	}
	return admin.Listen.String(), nil
}

// AdminDefault is the admin address where there is no file: the environment's,
// else the default one.
func AdminDefault() string {
	k, _ := lookup("admin.listen")
	if s := os.Getenv(envName(k.name)); s != "" {
		return s
	}
	return k.def
}

// tabbed is the first line that is indented with a tab, from 1 on; 0: none. YAML
// itself tells of some character that cannot start a token, in a line nearby.
func tabbed(raw []byte) int {
	for i, line := range strings.Split(string(raw), "\n") {
		text := strings.TrimLeft(line, " \t")
		if text != "" && text[0] != '#' && strings.Contains(line[:len(line)-len(text)], "\t") {
			return i + 1
		}
	}
	return 0
}

// loader carries what the parts of a load share.
type loader struct {
	file string // as named in errors
	v    *viper.Viper
	root *yaml.Node // the file's top mapping; nil when it is empty
	fs   *pflag.FlagSet
	errs []error
}

func open(file string, fs *pflag.FlagSet) (*loader, error) {
	file = FileOr(file)
	raw, err := readFile(file)
	if err != nil {
		return nil, err
	}
	l := &loader{file: file, v: viper.New(), fs: fs}
	var doc yaml.Node
	if err := yaml.Unmarshal(raw, &doc); err != nil {
		if n := tabbed(raw); n > 0 {
			return nil, &Error{Where: fmt.Sprintf("%s:%d", file, n), Problem: "not valid YAML: the line is indented with a tab", Next: "indent it with spaces, as many as its neighbours have"}
		}
		return nil, &Error{Where: file, Problem: "not valid YAML: " + strings.TrimPrefix(err.Error(), "yaml: "), Next: "correct the line; see the example in blockstep's documentation"}
	}
	if len(doc.Content) > 0 {
		l.root = doc.Content[0]
		if l.root.Kind != yaml.MappingNode {
			return nil, &Error{Where: file, Problem: "the file is not a list of KEY: VALUE lines", Next: "allowed here: " + strings.Join(children(""), ", ")}
		}
		if l.checkKeys(l.root, ""); len(l.errs) > 0 {
			return nil, errors.Join(l.errs...) // the values of a misshapen file would only add noise
		}
	}
	l.v.SetConfigType("yaml")
	if err := l.v.ReadConfig(bytes.NewReader(raw)); err != nil {
		return nil, &Error{Where: file, Problem: err.Error(), Next: "correct the line"}
	}
	for _, k := range keys {
		if k.kind == kindNodes {
			continue // a map, and viper would lower the case of its names
		}
		l.v.SetDefault(k.name, k.def)
		if err := l.v.BindEnv(k.name, envName(k.name)); err != nil {
			return nil, fmt.Errorf("binding %s: %w", envName(k.name), err)
		}
		if fs == nil || k.flag == "" || fs.Lookup(k.flag) == nil {
			continue
		}
		if err := l.v.BindPFlag(k.name, fs.Lookup(k.flag)); err != nil {
			return nil, fmt.Errorf("binding --%s: %w", k.flag, err)
		}
	}
	return l, nil
}

// checkEnv reports variables that look like a mistyped key. Others under the
// prefix are not ours to judge: the command has some, supervisors make some.
func (l *loader) checkEnv(environ []string) {
	known := []string{EnvFile, EnvPrefix + "_ADMIN"}
	for _, k := range keys {
		known = append(known, envName(k.name))
	}
	for _, pair := range environ {
		name, _, _ := strings.Cut(pair, "=")
		if !strings.HasPrefix(name, EnvPrefix+"_") || slices.Contains(known, name) {
			continue
		}
		best, bestDist := "", 3
		for _, k := range known {
			if d := distance(name, k); d < bestDist {
				best, bestDist = k, d
			}
		}
		if best != "" {
			l.errs = append(l.errs, &Error{Where: "environment variable " + name, Problem: "no key is called so", Next: "did you mean " + best + "? Else unset it, or rename it"})
		}
	}
}

func readFile(file string) ([]byte, error) {
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, &Error{Where: file, Problem: "no such file", Next: "write the configuration there, or name another file with --config FILE"}
	case err != nil:
		return nil, &Error{Where: file, Problem: err.Error(), Next: "make it readable for this user, or name another file with --config FILE"}
	case info.IsDir():
		return nil, &Error{Where: file, Problem: "is a directory", Next: "name the file with --config FILE"}
	case info.Size() > fileBytesMax:
		return nil, &Error{Where: file, Problem: fmt.Sprintf("%d bytes is too long for a configuration", info.Size()), Next: "allowed are up to 1 MiB"}
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, &Error{Where: file, Problem: err.Error(), Next: "make it readable for this user"}
	}
	return raw, nil
}

// checkKeys reports every key that the table does not have. viper itself
// ignores them, and a misspelled key must not silently be a default.
func (l *loader) checkKeys(m *yaml.Node, prefix string) {
	for i := 0; i+1 < len(m.Content); i += 2 {
		k, val := m.Content[i], m.Content[i+1]
		full := k.Value
		if prefix != "" {
			full = prefix + "." + k.Value
		}
		if known, ok := lookup(full); ok {
			scalar := known.kind != kindNodes && known.kind != kindListeners
			if scalar && val.Kind != yaml.ScalarNode {
				l.fail(full, "is a single value, not a list or a map", "write it as "+lastPart(full)+": VALUE")
			}
			continue
		}
		if len(children(full)) == 0 {
			l.errs = append(l.errs, unknown(l.file, k.Line, full, k.Value, children(prefix)))
			continue
		}
		if val.Kind != yaml.MappingNode {
			if val.Tag != "!!null" {
				l.errs = append(l.errs, &Error{Where: l.file, Line: k.Line, Key: full, Problem: "is a section, not a value", Next: "allowed under it: " + strings.Join(children(full), ", ")})
			}
			continue
		}
		l.checkKeys(val, full)
	}
}

func lastPart(name string) string { return name[strings.LastIndexByte(name, '.')+1:] }

// fail records an error about a key, with the place that its value came from.
func (l *loader) fail(name, problem, next string) {
	e := &Error{Where: l.file, Key: name, Problem: problem, Next: next}
	k, _ := lookup(name)
	switch {
	case l.fs != nil && k.flag != "" && l.fs.Lookup(k.flag) != nil && l.fs.Changed(k.flag):
		e.Where = "--" + k.flag
	case os.Getenv(envName(name)) != "" && k.kind != kindNodes:
		e.Where = "environment variable " + envName(name)
	default:
		if n := l.find(name); n != nil {
			e.Line = n.Line
		}
	}
	l.errs = append(l.errs, e)
}

// find returns the file's node of a dotted key, or nil.
func (l *loader) find(name string) *yaml.Node {
	at := l.root
	for part := range strings.SplitSeq(name, ".") {
		if at = mapValue(at, part); at == nil {
			return nil
		}
	}
	return at
}

func mapValue(m *yaml.Node, name string) *yaml.Node {
	if m == nil || m.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value != name {
			continue
		}
		if v := m.Content[i+1]; v.Kind != yaml.AliasNode {
			return v
		}
		return m.Content[i+1].Alias
	}
	return nil
}

// str reads a value; text as it is spelled: to YAML, 01 is the number 1, 1.10 is
// 1.1, and 0660 is 432.
func (l *loader) str(name string) string {
	if k, _ := lookup(name); k.kind == kindString && !l.overridden(name) {
		if n := l.find(name); n != nil && n.Kind == yaml.ScalarNode && n.Tag != "!!null" {
			return strings.TrimSpace(n.Value)
		}
	}
	return strings.TrimSpace(l.v.GetString(name))
}

// overridden reports whether the environment or a flag sets the key.
func (l *loader) overridden(name string) bool {
	k, _ := lookup(name)
	flag := l.fs != nil && k.flag != "" && l.fs.Lookup(k.flag) != nil && l.fs.Changed(k.flag)
	return flag || os.Getenv(envName(name)) != ""
}

func (l *loader) size(name string) int64 {
	k, _ := lookup(name)
	n, err := ParseSize(l.str(name))
	beyond := errors.Is(err, ErrSizeRange)
	if err != nil && !beyond {
		l.fail(name, err.Error(), "")
		return 0
	}
	if beyond || n < k.min || n > k.max {
		next := "allowed are " + FormatSize(k.min) + " and more"
		if beyond {
			next = "allowed are " + FormatSize(k.min) + " to less than 8EiB"
		}
		if k.max != unbounded {
			next = fmt.Sprintf("allowed are %s to %s", FormatSize(k.min), FormatSize(k.max))
		}
		l.fail(name, fmt.Sprintf("%s is out of range", l.str(name)), next)
	}
	return n
}

func (l *loader) duration(name string) time.Duration {
	k, _ := lookup(name)
	low, high := time.Duration(k.min)*time.Millisecond, time.Duration(k.max)*time.Millisecond
	next := fmt.Sprintf("allowed are %v to %v, written like 300ms, 2s or 1m30s", low, high)
	d, err := time.ParseDuration(l.str(name))
	switch {
	case err != nil:
		l.fail(name, fmt.Sprintf("%q is not a duration", l.str(name)), next)
	case d < low || d > high:
		l.fail(name, fmt.Sprintf("%v is out of range", d), next)
	}
	return d
}

func (l *loader) integer(name string) int {
	k, _ := lookup(name)
	n, err := strconv.ParseInt(l.str(name), 10, 64)
	if err != nil || n < k.min || n > k.max {
		l.fail(name, fmt.Sprintf("%q is not a number in range", l.str(name)), fmt.Sprintf("allowed are %d to %d", k.min, k.max))
	}
	return int(n)
}

func (l *loader) boolean(name string) bool {
	b, err := strconv.ParseBool(l.str(name))
	if err != nil {
		l.fail(name, fmt.Sprintf("%q is neither true nor false", l.str(name)), "allowed are true and false")
	}
	return b
}

func (l *loader) enum(name string) string {
	k, _ := lookup(name)
	s := l.str(name)
	if !slices.Contains(k.allowed, s) {
		l.fail(name, fmt.Sprintf("%q is not known", s), "allowed are "+strings.Join(k.allowed, ", "))
	}
	return s
}

// path returns an absolute path; a relative one counts from the directory in
// which the process was started.
func (l *loader) path(name string) string {
	s := l.str(name)
	if s == "" {
		return ""
	}
	abs, err := filepath.Abs(s)
	if err != nil {
		l.fail(name, err.Error(), "write an absolute path")
	}
	return abs
}
