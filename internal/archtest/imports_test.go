package archtest

import (
	"slices"
	"strings"
	"testing"
)

// layer says which packages of this module a folder may import. The most
// specific folder counts.
type layer struct {
	dir string
	may []string // folders of this module, what is below them included
	why string
}

var layers = []layer{
	{
		dir: "nbd", may: []string{"nbd", "internal/buf", "internal/invariant", "internal/sock"},
		why: "nbd knows blocks, never replicas: it serves any Device, and could leave this repository",
	},
	{
		dir: "raft", may: []string{"raft", "internal/ident", "internal/invariant", "internal/vfs"},
		why: "raft holds cluster state; what it says to the data layer goes through internal/daemon",
	},
	{
		dir: "raft/state", may: []string{"internal/ident", "internal/invariant"},
		why: "the cluster state is a pure value: State.Apply(Command)",
	},
	{
		dir: "replication", may: []string{"replication", "internal/boottime", "internal/buf", "internal/eventfd", "internal/ident", "internal/invariant", "internal/sock", "internal/vfs", "internal/yield"},
		why: "replication declares the Cluster interface that it needs; who fulfils it is internal/daemon's to say",
	},
	{
		dir: "replication/core",
		may: []string{"replication/wire", "replication/bitmap", "replication/resync", "internal/buf", "internal/ident", "internal/invariant"},
		why: "the state machine is driven by tests, simulator and daemon alike, so it knows none of them",
	},
	{
		dir: "replication/wire", may: []string{"internal/buf", "internal/ident", "internal/invariant"},
		why: "wire is what two versions of the daemon share: types and bytes, nothing that acts",
	},
	{
		dir: "replication/resync", may: []string{"replication/bitmap", "replication/wire", "internal/ident", "internal/invariant"},
		why: "resync plans; others copy",
	},
	{
		dir: "replication/peer", may: []string{"replication/wire", "internal/boottime", "internal/buf", "internal/ident", "internal/invariant", "internal/sock"},
		why: "a link carries messages and knows nothing of logs and volumes",
	},
	{
		dir: "replication/wal", may: []string{"replication/wire", "internal/buf", "internal/ident", "internal/invariant", "internal/vfs"},
		why: "the log stores entries; what they mean is core's to know",
	},
	{
		dir: "replication/store", may: []string{"replication/wire", "internal/buf", "internal/ident", "internal/invariant", "internal/vfs"},
		why: "the store writes extents; what they mean is core's to know",
	},
	{
		dir: "replication/bitmap", may: []string{"replication/wire", "internal/ident", "internal/invariant", "internal/vfs"},
		why: "the bitmap counts blocks; what they mean is core's to know",
	},
	{
		dir: "internal/ident", may: nil,
		why: "the names that both layers share depend on nothing",
	},
	{
		dir: "internal/invariant", may: nil,
		why: "an assertion must be usable everywhere",
	},
	{
		dir: "internal/buf", may: []string{"internal/invariant"},
		why: "a buffer must be usable everywhere",
	},
	{
		dir: "internal/yield", may: nil,
		why: "a turn of the scheduler belongs to nobody",
	},
	{
		dir: "internal/boottime", may: nil,
		why: "a clock must be usable everywhere",
	},
	{
		dir: "internal/sock", may: []string{"internal/yield"},
		why: "a socket knows nothing of who reads it",
	},
	{
		dir: "internal/vfs", may: []string{"internal/invariant"},
		why: "the file system is below everything that has files",
	},
	{
		dir: "internal/control", may: []string{"internal/ident", "internal/invariant"},
		why: "the admin API is a contract with operators: its types change when it does, not when the daemon does",
	},
	{
		dir: "internal/config", may: []string{"internal/ident", "internal/invariant"},
		why: "configuration becomes one validated value; whoever needs it converts it",
	},
	{
		dir: "internal/sim",
		may: []string{"replication", "raft/state", "internal/buf", "internal/ident", "internal/invariant", "internal/vfs", "internal/sim"},
		why: "the simulator runs the real parts that have no socket and no clock",
	},
	{
		dir: "cmd/blockstepd", may: []string{"internal/daemon", "internal/config", "internal/version"},
		why: "main turns flags and signals into configuration and makes one call",
	},
	{
		dir: "cmd/blockstep", may: []string{"cmd/blockstep", "internal/control", "internal/config", "internal/daemon", "internal/demo", "internal/version"},
		why: "the verbs speak to the control socket only (demo runs whole nodes, and so has the daemon)",
	},
}

// TestLayers checks imports inside this module. Tests may import more: they
// set scenes.
func TestLayers(t *testing.T) {
	for _, f := range loadTree(t) {
		if f.test {
			continue
		}
		rule, ok := ruleFor(f.dir)
		if !ok {
			continue
		}
		for _, imp := range f.imports() {
			dir, ours := strings.CutPrefix(imp, module+"/")
			if !ours || underAny(dir, rule.may) || dir == f.dir {
				continue
			}
			t.Errorf("%s imports %s: %s. It may import %v", f.path, dir, rule.why, rule.may)
		}
	}
}

func ruleFor(dir string) (layer, bool) {
	var best layer
	found := false
	for _, rule := range layers {
		if under(dir, rule.dir) && (!found || len(rule.dir) > len(best.dir)) {
			best, found = rule, true
		}
	}
	return best, found
}

// TestPure checks that the pure packages stay so.
func TestPure(t *testing.T) {
	pure := []string{"replication/core", "replication/resync", "replication/wire", "raft/state"}
	banned := map[string]string{
		"net":          "it does no I/O: messages come in as inputs and leave as effects",
		"os":           "it does no I/O: what must be on disk is an effect, its completion an input",
		"time":         "it reads no clock: each input carries the time",
		"sync":         "it has one caller at a time",
		"log/slog":     "it logs nothing: an effect names the rule",
		"math/rand":    "randomness comes in seeded",
		"math/rand/v2": "randomness comes in seeded",
		"crypto/rand":  "randomness comes in seeded",
	}
	for _, f := range loadTree(t) {
		if f.test || !underAny(f.dir, pure) {
			continue
		}
		for _, imp := range f.imports() {
			if why, bad := banned[imp]; bad {
				t.Errorf("%s imports %s, and %s is pure: %s", f.path, imp, f.dir, why)
			}
		}
	}
}

// thirdParty says where another module may be imported from, and why only
// there. A module that is not named is free for all.
var thirdParty = []struct {
	module string
	only   []string
	why    string
}{
	{"github.com/hashicorp", []string{"raft", "internal/daemon"}, "consensus stays behind package raft"},
	{"go.etcd.io/bbolt", []string{"raft"}, "consensus stays behind package raft"},
	{"github.com/pojntfx/go-nbd", []string{"nbd"}, "only its protocol definitions are used, by the server and its client"},
	{"github.com/RoaringBitmap/roaring", []string{"replication/bitmap"}, "the bitmap's form is its own business"},
	{"github.com/mdlayher", []string{"nbd/attach"}, "netlink is spoken in one place"},
	{"github.com/spf13/viper", []string{"internal/config"}, "configuration is read in one place and is a value from there on"},
	{"github.com/spf13/cobra", []string{"cmd"}, "verbs and flags belong to main packages"},
}

// TestThirdParty checks that each dependency stays in its place.
func TestThirdParty(t *testing.T) {
	for _, f := range loadTree(t) {
		for _, imp := range f.imports() {
			for _, rule := range thirdParty {
				if under(imp, rule.module) && !underAny(f.dir, rule.only) {
					t.Errorf("%s imports %s: %s. It may be imported in %v", f.path, imp, rule.why, rule.only)
				}
			}
			if imp == "github.com/pojntfx/go-nbd/pkg/server" && !f.test {
				t.Errorf("%s imports go-nbd's server: it has no FLUSH and answers before it has read; take its protocol definitions only", f.path)
			}
		}
	}
}

// TestTestOnly checks that instruments of tests stay out of the binaries.
func TestTestOnly(t *testing.T) {
	instruments := []string{"internal/sim", "nbd/nbdtest"}
	drivers := slices.Concat(instruments, []string{"e2e", "internal/daemon", "internal/demo"})
	for _, f := range loadTree(t) {
		if f.test || underAny(f.dir, drivers) {
			continue
		}
		for _, imp := range f.imports() {
			dir, _ := strings.CutPrefix(imp, module+"/")
			if underAny(dir, instruments) {
				t.Errorf("%s imports %s, which is an instrument of tests", f.path, dir)
			}
		}
	}
}
