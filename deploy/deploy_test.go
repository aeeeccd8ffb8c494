package deploy

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/nbd/attach"
)

// load checks a configuration as blockstepd --check-config does.
func load(t *testing.T, text, node string) *config.Config {
	t.Helper()
	t.Setenv("BLOCKSTEP_NODE", node)
	file := filepath.Join(t.TempDir(), "blockstep.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(file, nil)
	if err != nil {
		t.Fatalf("%v\nof\n%s", err, text)
	}
	return c
}

func read(t *testing.T, file string) string {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// TestExampleConfig: the example that the packages install is valid as it is,
// and with everything that it shows in comments.
func TestExampleConfig(t *testing.T) {
	text := read(t, "../systemd/blockstep.yaml")
	load(t, text, "beta")
	comment := regexp.MustCompile(`(?m)^#((?:  )?[a-z_]+:.*)$`)
	if n := len(comment.FindAllString(text, -1)); n < 5 {
		t.Fatalf("the example shows %d keys in comments: does this test still find them?", n)
	}
	load(t, comment.ReplaceAllString(text, "$1"), "alpha")
}

// TestUdevRule: the program of the rule finds the volume's name in the identifier
// that the kernel keeps. The first one printed nothing, and udev made a link
// /dev/blockstep to the device itself.
func TestUdevRule(t *testing.T) {
	found := regexp.MustCompile(`PROGRAM!="/bin/sh -c '(.*)' - \$attr\{backend\}"`).FindStringSubmatch(read(t, "../systemd/60-blockstep.rules"))
	if found == nil {
		t.Fatal("the rule's program has another form than this test knows")
	}
	script := strings.ReplaceAll(found[1], "$$", "$")
	for backend, want := range map[string]string{
		attach.BackendPrefix + "db:b8042a70a3ad3480:4ZCOUATCZOKWUCHAPC73": "db",
		attach.BackendPrefix + "vm-7.root_a:0000000000000001:X":           "vm-7.root_a",
	} {
		out, err := exec.CommandContext(t.Context(), "/bin/sh", "-c", script, "-", backend).Output()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("of %s the rule makes %q, %v: want %q", backend, got, err, want)
		}
	}
}

// TestRemovalDisablesAllUnits: what a package has installed and an operator enabled is
// stopped and disabled when it goes. A socket that stays would start a daemon that is
// not there any more.
func TestRemovalDisablesAllUnits(t *testing.T) {
	units, err := filepath.Glob("../systemd/*.s*")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, u := range units {
		name := filepath.Base(u)
		if strings.Contains(name, "@") || !strings.Contains(read(t, u), "[Install]") {
			continue
		}
		seen++
		for _, script := range []string{"deb/prerm", "rpm/blockstep.spec"} {
			if !regexp.MustCompile(`systemctl disable --now [^|]*\b` + regexp.QuoteMeta(name) + ` `).MatchString(read(t, script)) {
				t.Errorf("%s does not disable %s", script, name)
			}
		}
	}
	if seen < 2 {
		t.Errorf("%d units: does this test still find them?", seen)
	}
}

// TestCompose: each node of the example for containers has a valid configuration
// that names the address its container has.
func TestCompose(t *testing.T) {
	var c struct {
		Services map[string]struct {
			Hostname    string
			Restart     string
			Healthcheck struct{ Test []string }
			Networks    map[string]struct {
				Address string `yaml:"ipv4_address"`
			}
			Volumes []string
		}
		Volumes map[string]any
		Configs map[string]struct{ Content string }
	}
	if err := yaml.Unmarshal([]byte(read(t, "container/compose.yaml")), &c); err != nil {
		t.Fatal(err)
	}
	if len(c.Services) != 3 {
		t.Fatalf("%d services: want 3", len(c.Services))
	}
	for name, s := range c.Services {
		got := load(t, c.Configs["blockstep"].Content, s.Hostname)
		if want := s.Networks["blockstep"].Address + ":7700"; name != s.Hostname || got.Self().Address != want {
			t.Errorf("service %s, host name %s: its address in the configuration is %s and its container has %s", name, s.Hostname, got.Self().Address, want)
		}
		// This policy starts again what ended with any code, also a removed node.
		if s.Restart != "unless-stopped" || got.OnRemoved != config.OnRemovedWait {
			t.Errorf("service %s: restart %s and on_removed %s do not go together", name, s.Restart, got.OnRemoved)
		}
		if len(s.Healthcheck.Test) < 3 || s.Healthcheck.Test[0] != "CMD" || s.Healthcheck.Test[1] != "/bin/blockstep" {
			t.Errorf("service %s: its check %q needs a shell, which the image does not have", name, s.Healthcheck.Test)
		}
		for _, v := range s.Volumes {
			if from, _, _ := strings.Cut(v, ":"); len(c.Volumes) != 3 || !has(c.Volumes, from) {
				t.Errorf("service %s uses the volume %s, which is not declared", name, from)
			}
		}
	}
}

func has(m map[string]any, key string) bool {
	_, ok := m[key]
	return ok
}

// TestAnsible: every file of the role is YAML, and the template makes a valid
// configuration of three hosts. Only the template's loop and its variables are
// understood here; make ansible asks Ansible itself.
func TestAnsible(t *testing.T) {
	files, err := filepath.Glob("ansible/roles/blockstep/*/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	files = append(files, "ansible/blockstep.yaml", "ansible/inventory.yaml")
	if len(files) < 6 {
		t.Fatalf("found only %v", files)
	}
	for _, f := range files {
		var v any
		if err := yaml.Unmarshal([]byte(read(t, f)), &v); err != nil || v == nil {
			t.Errorf("%s: %v", f, err)
		}
	}
	var inventory struct {
		Blockstep struct {
			Hosts map[string]struct {
				Address string `yaml:"blockstep_address"`
				Witness bool   `yaml:"blockstep_witness"`
			}
		}
	}
	if err := yaml.Unmarshal([]byte(read(t, "ansible/inventory.yaml")), &inventory); err != nil {
		t.Fatal(err)
	}
	var nodes strings.Builder
	for name, h := range inventory.Blockstep.Hosts {
		fmt.Fprintf(&nodes, "  %s: {address: %q, witness: %t}\n", name, h.Address, h.Witness)
	}
	text := read(t, "ansible/roles/blockstep/templates/blockstep.yaml.j2")
	text = regexp.MustCompile(`(?s)\{% for .*?\{% endfor %\}\n`).ReplaceAllLiteralString(text, nodes.String())
	for from, to := range map[string]string{
		"{{ blockstep_cluster }}": "prod", "{{ inventory_hostname }}": "gamma", "{{ blockstep_data_dir }}": "/var/lib/blockstep",
		"{{ blockstep_nbd_listen | to_json }}": `["unix:///run/blockstep/nbd.sock"]`, "{{ blockstep_metrics_listen }}": "127.0.0.1:9720",
	} {
		text = strings.ReplaceAll(text, from, to)
	}
	if strings.Contains(text, "{{") || strings.Contains(text, "{%") {
		t.Fatalf("the template has what this test does not know:\n%s", text)
	}
	if c := load(t, text, "gamma"); len(c.Nodes) != 3 || !c.Self().Witness {
		t.Errorf("the inventory's three nodes, gamma a witness, became %+v", c.Nodes)
	}
}

// TestNames: alerts and dashboard ask for metrics that the daemon exports, and
// send people to pages that are there.
func TestNames(t *testing.T) {
	sources, err := filepath.Glob("../internal/daemon/metrics*.go")
	if err != nil {
		t.Fatal(err)
	}
	var exported strings.Builder
	for _, f := range sources {
		exported.WriteString(read(t, f))
	}
	name := regexp.MustCompile(`\bblockstep_[a-z_]+`)
	for _, f := range []string{"prometheus/blockstep.rules.yaml", "grafana/blockstep.json"} {
		text := read(t, f)
		found := name.FindAllString(text, -1)
		if len(found) < 5 {
			t.Errorf("%s names %d metrics: does this test still find them?", f, len(found))
		}
		for _, m := range found {
			base := strings.TrimPrefix(m, "blockstep_")
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				base = strings.TrimSuffix(base, suffix)
			}
			if !strings.Contains(exported.String(), `"`+base+`"`) && !strings.Contains(exported.String(), `"blockstep_`+base+`"`) {
				t.Errorf("%s asks for %s, which the daemon does not export", f, m)
			}
		}
		for _, page := range regexp.MustCompile(`docs/runbooks/[a-z-]+\.md`).FindAllString(text, -1) {
			if _, err := os.Stat(filepath.Join("..", page)); err != nil {
				t.Errorf("%s: %v", f, err)
			}
		}
	}
}

// TestAlerts: each alert has a test for promtool, and names what is there; one of
// them fires when no daemon exports anything.
func TestAlerts(t *testing.T) {
	var rules struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr string
				Annotations map[string]string
			}
		}
	}
	if err := yaml.Unmarshal([]byte(read(t, "prometheus/blockstep.rules.yaml")), &rules); err != nil {
		t.Fatal(err)
	}
	tests := read(t, "prometheus/blockstep.test.yaml")
	alerts, pages, silence := 0, 0, false
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			alerts++
			silence = silence || strings.HasPrefix(r.Expr, "absent(")
			if !strings.Contains(tests, "alertname: "+r.Alert+"\n") || r.Annotations["summary"] == "" || r.Annotations["next"] == "" {
				t.Errorf("%s has no test in blockstep.test.yaml, or does not say what is wrong and what to do: %q", r.Alert, r.Annotations)
			}
			for _, page := range regexp.MustCompile(`docs/\S+\.md`).FindAllString(r.Annotations["next"], -1) {
				pages++
				if _, err := os.Stat("../" + page); err != nil {
					t.Errorf("%s names a page: %v", r.Alert, err)
				}
			}
		}
	}
	if alerts < 10 || pages < 5 || !silence {
		t.Errorf("%d alerts with %d pages; one for when all is silent: %v", alerts, pages, silence)
	}
}

// fakeBinaries makes programs that answer as blockstep does to who makes packages.
func fakeBinaries(t *testing.T, version string) string {
	t.Helper()
	dir := t.TempDir()
	script := "#!/bin/sh\ncase $1 in\nversion) echo 'blockstep " + version + "' ;;\ncompletion) echo complete ;;\nman) mkdir -p \"$3\" && echo page >\"$3/blockstep.1\" ;;\nesac\n"
	for _, name := range []string{"blockstep", "blockstepd"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func run(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_COMMITTER_DATE=2026-02-03T04:05:06+0200",
		"GIT_COMMITTER_NAME=x", "GIT_COMMITTER_EMAIL=x@example.org", "GIT_AUTHOR_NAME=x", "GIT_AUTHOR_EMAIL=x@example.org")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestPackagedDocs: on a host that has the package, what its pages, the alerts and the
// dashboard name is there.
func TestPackagedDocs(t *testing.T) {
	root := t.TempDir()
	run(t, ".", "./stage.sh", fakeBinaries(t, "v1.0.0"), root, "lib")
	doc := filepath.Join(root, "usr/share/doc/blockstep")
	if info, err := os.Stat(filepath.Join(doc, "docs/examples/blockstep-backup")); err != nil || info.Mode()&0o100 == 0 {
		t.Errorf("the example of a backup: %v, %v", info, err)
	}
	link := regexp.MustCompile(`\]\(([^)#:]+)(?:#[^)]*)?\)`)
	path := regexp.MustCompile(`\b(?:docs|deploy)/[A-Za-z0-9_./-]*[A-Za-z0-9_]`)
	links := 0
	err := filepath.WalkDir(doc, func(file string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text := read(t, file)
		if filepath.Ext(file) == ".md" {
			for _, l := range link.FindAllStringSubmatch(text, -1) {
				links++
				if _, err := os.Stat(filepath.Join(filepath.Dir(file), l[1])); err != nil {
					t.Errorf("%s has a link to %s: %v", file, l[1], err)
				}
			}
		}
		for _, p := range path.FindAllString(text, -1) {
			// CONTRIBUTING.md and the decisions are about the sources.
			if _, err := os.Stat(filepath.Join(doc, p)); err != nil && strings.HasPrefix(p, "docs/") {
				t.Errorf("%s names %s: %v", file, p, err)
			}
		}
		return nil
	})
	if err != nil || links < 50 {
		t.Errorf("%d links, %v: does this test still find them?", links, err)
	}
}

// TestPackageVersion: the version of a package rises with each commit, whatever its
// hash is, and is below that of any release.
func TestPackageVersion(t *testing.T) {
	repo := t.TempDir()
	if err := os.WriteFile(filepath.Join(repo, "version.sh"), []byte(read(t, "version.sh")), 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, repo, "git", "init", "-q", ".")
	run(t, repo, "git", "commit", "-q", "--allow-empty", "-m", "x")
	hash := run(t, repo, "git", "rev-parse", "--short=9", "HEAD")
	for said, want := range map[string]string{
		"v1.2.0":                   "1.2.0",
		"v1.2.0-rc1":               "1.2.0~rc1",
		"v1.2.0-17-g0123abcd":      "1.2.0+17.g0123abcd",
		"v1.2.0-rc1-17-g0123abcd":  "1.2.0~rc1+17.g0123abcd",
		"v1.2.0-1-g0123abc-dirty":  "1.2.0+1.g0123abc+dirty",
		hash:                       "0~git20260203020506." + hash,
		hash + "-dirty":            "0~git20260203020506." + hash + "+dirty",
		"devel-" + hash:            "0~git20260203020506." + hash,
		"12345678 (of something)":  "0~git[0-9]{14}.12345678",
		"devel":                    "0~git[0-9]{14}",
		"devel-ffffffffffff-dirty": "0~git[0-9]{14}.ffffffffffff+dirty",
	} {
		got := run(t, repo, "./version.sh", fakeBinaries(t, said))
		pattern := regexp.QuoteMeta(want)
		pattern = strings.ReplaceAll(pattern, regexp.QuoteMeta("[0-9]{14}"), "[0-9]{14}")
		if !regexp.MustCompile("^" + pattern + "$").MatchString(got) {
			t.Errorf("%s: %s, want %s", said, got, want)
		}
	}
}
