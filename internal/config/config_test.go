package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

const good = `cluster: prod
node: Alpha
data_dir: /var/lib/blockstep
nodes:
  Alpha: {address: "10.1.0.1:7700"}
  beta:  {address: "10.1.0.2:7700"}
  gamma: {address: "10.1.0.3:7700", witness: true}
nbd:   {listen: ["unix:///run/blockstep/nbd.sock", "tcp://127.0.0.1:10809"]}
admin: {listen: "unix:///run/blockstep/admin.sock"}
metrics: {listen: "127.0.0.1:9720"}
boot_id_file: /proc/sys/kernel/random/boot_id
`

func write(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "blockstep.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestNodesOfTheEnvironment: a map has no other spelling than YAML.
func TestNodesOfTheEnvironment(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, []byte("cluster: c\nnode: beta\nnodes: {alpha: {address: \"127.0.0.1:1\"}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("BLOCKSTEP_CONFIG", file)
	t.Setenv("BLOCKSTEP_NODES", `{alpha: {address: "10.1.0.1:7700"}, beta: {address: "10.1.0.2:7700", witness: true}}`)
	c, err := Load("", nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Nodes) != 2 || c.Self().Address != "10.1.0.2:7700" || !c.Self().Witness {
		t.Errorf("nodes %+v", c.Nodes)
	}
	for env, want := range map[string]string{
		"alpha=10.1.0.1:7700":  "environment variable BLOCKSTEP_NODES",
		"{alpha: {adress: 1}}": `environment variable BLOCKSTEP_NODES:1: nodes.alpha.adress: unknown key; did you mean "address"`,
		"{":                    "environment variable BLOCKSTEP_NODES: not valid YAML",
	} {
		t.Setenv("BLOCKSTEP_NODES", env)
		if _, err := Load("", nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("BLOCKSTEP_NODES=%s: %v, want %q", env, err, want)
		}
	}
}

func TestLoadTheDesignsExample(t *testing.T) {
	c, err := Load(write(t, good), nil)
	if err != nil {
		t.Fatal(err)
	}
	wantNodes := []Node{
		{Name: "Alpha", Address: "10.1.0.1:7700"},
		{Name: "beta", Address: "10.1.0.2:7700"},
		{Name: "gamma", Address: "10.1.0.3:7700", Witness: true},
	}
	if diff := cmp.Diff(wantNodes, c.Nodes); diff != "" {
		t.Errorf("nodes (-want +got):\n%s", diff)
	}
	wantListen := []Listener{
		{Network: "unix", Address: "/run/blockstep/nbd.sock", Mode: 0o660},
		{Network: "tcp", Address: "127.0.0.1:10809", Mode: 0o660},
	}
	if diff := cmp.Diff(wantListen, c.NBD.Listen); diff != "" {
		t.Errorf("nbd.listen (-want +got):\n%s", diff)
	}
	if c.Self().Address != "10.1.0.1:7700" || c.Admin.Listen.String() != "unix:///run/blockstep/admin.sock" {
		t.Errorf("self %v, admin %v", c.Self(), c.Admin)
	}
	if c.Volume.Lease != 1500*time.Millisecond || c.Volume.LogRetention != 256<<20 || !c.FailoverAuto {
		t.Errorf("defaults: %+v, failover.auto %v", c.Volume, c.FailoverAuto)
	}
}

func TestListenerOptions(t *testing.T) {
	text := strings.Replace(good, `"tcp://127.0.0.1:10809"`, `{address: "unix:///tmp/b.sock", mode: 0600, group: disk, read_only: true, allow: [db, web]}`, 1)
	text = strings.Replace(text, `admin.sock"}`, `admin.sock", mode: 0600}`, 1)
	c, err := Load(write(t, text), nil)
	if err != nil {
		t.Fatal(err)
	}
	want := Listener{Network: "unix", Address: "/tmp/b.sock", Mode: 0o600, Group: "disk", ReadOnly: true, Allow: []string{"db", "web"}}
	if diff := cmp.Diff(want, c.NBD.Listen[1]); diff != "" {
		t.Errorf("listener (-want +got):\n%s", diff)
	}
	if c.Admin.Listen.Mode != 0o600 {
		t.Errorf("admin.mode is %o", c.Admin.Listen.Mode)
	}
}

func TestEnvironmentAndFlagsOverride(t *testing.T) {
	t.Setenv("BLOCKSTEP_DATA_DIR", "/srv/a")
	t.Setenv("BLOCKSTEP_NODE", "gamma")
	t.Setenv("BLOCKSTEP_NBD_LISTEN", "tcp://127.0.0.1:1, unix:///tmp/c.sock")
	t.Setenv("BLOCKSTEP_VOLUME_LEASE", "3s")
	fs := pflag.NewFlagSet("t", pflag.ContinueOnError)
	Flags(fs)
	if err := fs.Parse([]string{"--node", "beta", "--log-level=debug"}); err != nil {
		t.Fatal(err)
	}
	c, err := Load(write(t, good), fs)
	if err != nil {
		t.Fatal(err)
	}
	if c.DataDir != "/srv/a" || c.Node != "beta" || c.Volume.Lease != 3*time.Second || c.Log.Level != "debug" {
		t.Errorf("got data_dir %s, node %s, lease %v, level %s", c.DataDir, c.Node, c.Volume.Lease, c.Log.Level)
	}
	if len(c.NBD.Listen) != 2 || c.NBD.Listen[1].Address != "/tmp/c.sock" {
		t.Errorf("nbd.listen is %v", c.NBD.Listen)
	}
}

// TestErrors pins the texts: an operator reads them at 3 a.m., and each must
// name the place, the key and the next step.
func TestErrors(t *testing.T) {
	replace := func(old, new string) string { return strings.Replace(good, old, new, 1) }
	for _, tc := range []struct{ name, text, want string }{
		{"unknown key", good + "data-dir: /x\n", `FILE:12: data-dir: unknown key; did you mean "data_dir"? allowed here: admin, attach, boot_id_file, cluster, data_dir, failover, join, log, memory, metrics, nbd, node, nodes, on_removed, raft, resync, volume`},
		{"unknown key in a section", replace("nbd:   {listen", "nbd:   {lisen"), `FILE:8: nbd.lisen: unknown key; did you mean "listen"? allowed here: handshake_timeout, idle_timeout, listen, max_connections, max_requests, stall_timeout, tls`},
		{"unknown key of a node", replace(", witness", ", witnes"), `FILE:7: nodes.gamma.witnes: unknown key; did you mean "witness"? allowed here: address, witness`},
		{"key in the wrong case", replace("cluster:", "Cluster:"), "FILE:1: Cluster: unknown key; did you mean \"cluster\"? allowed here: admin, attach, boot_id_file, cluster, data_dir, failover, join, log, memory, metrics, nbd, node, nodes, on_removed, raft, resync, volume"},
		{"section as a value", good + "volume: 3\n", `FILE:12: volume: is a section, not a value; allowed under it: ack, after_power_loss, heartbeat, lease, log_retention, no_quorum_timeout, on_no_quorum, power_loss_grace, stall_timeout`},
		{"value as a list", replace("node: Alpha", "node: [Alpha]"), "FILE:2: node: is a single value, not a list or a map; write it as node: VALUE"},
		{"node not in nodes", replace("node: Alpha", "node: delta"), `FILE:2: node: "delta" is not one of the nodes; allowed are the names under nodes: Alpha, beta, gamma`},
		{"node in another case", replace("node: Alpha", "node: alpha"), `FILE:2: node: "alpha" is not one of the nodes; allowed are the names under nodes: Alpha, beta, gamma`},
		{"host name not in nodes", replace("node: Alpha\n", ""), `FILE: node: is missing, and the host name "HOST" is not one of the nodes; set node: NAME; allowed are the names under nodes: Alpha, beta, gamma`},
		{"node address without port", replace("10.1.0.2:7700", "10.1.0.2"), `FILE:6: nodes.beta.address: "10.1.0.2" is not HOST:PORT; write HOST:PORT, for example 10.1.0.1:7700`},
		{"node address with bad port", replace("10.1.0.2:7700", "10.1.0.2:77000"), `FILE:6: nodes.beta.address: "10.1.0.2:77000" has no port from 1 to 65535; write HOST:PORT, for example 10.1.0.1:7700`},
		{"wildcard node address", replace("10.1.0.2:7700", "0.0.0.0:7700"), `FILE:6: nodes.beta.address: 0.0.0.0:7700 is no address that other nodes can reach; write the node's own address, for example 10.1.0.1:7700`},
		{"duplicate address", replace("10.1.0.2:7700", "10.1.0.1:7700"), `FILE:6: nodes.beta.address: 10.1.0.1:7700 is Alpha's address already; give each node its own address`},
		{"node without address", replace(`{address: "10.1.0.2:7700"}`, ""), `FILE:6: nodes.beta: has no address; write it as {address: "10.1.0.1:7700"}`},
		{"bad node name", replace("beta:", "be@ta:"), `FILE:6: nodes.be@ta: node name "be@ta" is not valid; allowed are letters, digits, dot, dash and underscore, 1 to 63 of them, the first a letter or digit`},
		{"bad witness", replace("witness: true", "witness: maybe"), `FILE:7: nodes.gamma.witness: "maybe" is neither true nor false; allowed are true and false`},
		{"bad size", good + "volume: {log_retention: 12 parsecs}\n", `FILE:12: volume.log_retention: size "12 parsecs" is not a number of bytes; write it like 1073741824, 512MiB, 10GiB or 2TiB`},
		{"size beyond all", good + "volume: {log_retention: 8EiB}\n", `FILE:12: volume.log_retention: 8EiB is out of range; allowed are 1MiB to 16TiB`},
		{"size with a sign", good + "volume: {log_retention: +1GiB}\n", `FILE:12: volume.log_retention: size "+1GiB" has a sign, and sizes are absolute: write the whole size, like 10GiB`},
		{"size out of range", good + "volume: {log_retention: 4KiB}\n", `FILE:12: volume.log_retention: 4KiB is out of range; allowed are 1MiB to 16TiB`},
		{"bad duration", good + "volume: {power_loss_grace: soon}\n", `FILE:12: volume.power_loss_grace: "soon" is not a duration; allowed are 0s to 24h0m0s, written like 300ms, 2s or 1m30s`},
		{"short election", good + "raft: {heartbeat: 5s, election: 20ms}\n", `FILE:12: raft.election: 20ms is less than raft.heartbeat, 5s; raise raft.election, or lower raft.heartbeat`},
		{"short lease", good + "volume: {lease: 500ms}\n", `FILE:12: volume.lease: 500ms is less than three heartbeats of 300ms; a lease that one lost heartbeat ends would stop I/O; raise volume.lease or lower volume.heartbeat`},
		{"bad enum", good + "volume: {ack: always}\n", `FILE:12: volume.ack: "always" is not known; allowed are quorum, durable, local`},
		{"bad nbd scheme", replace("tcp://127.0.0.1:10809", "udp://127.0.0.1:10809"), `FILE:8: nbd.listen[1]: "udp://127.0.0.1:10809" has an unknown scheme "udp"; allowed are unix:///PATH and tcp://HOST:PORT`},
		{"admin on tcp", replace("unix:///run/blockstep/admin.sock", "tcp://127.0.0.1:1"), `FILE:9: admin.listen: tcp://127.0.0.1:1 is not a unix socket; read-only verbs are served on the node's own address already; write it like unix:///run/blockstep/admin.sock`},
		{"node address of no IP", replace("10.1.0.2:7700", "10.1.0.300:7700"), `FILE:6: nodes.beta.address: "10.1.0.300" in "10.1.0.300:7700" is no IP address; write HOST:PORT, for example 10.1.0.1:7700`},
		{"node address of a number", replace("10.1.0.2:7700", "10:7700"), `FILE:6: nodes.beta.address: "10" in "10:7700" is no IP address; write HOST:PORT, for example 10.1.0.1:7700`},
		{"node address of no IPv6", replace("10.1.0.2:7700", "[fd00::g]:7700"), `FILE:6: nodes.beta.address: "fd00::g" in "[fd00::g]:7700" is no IP address; write HOST:PORT, for example 10.1.0.1:7700`},
		{"node address of no name", replace("10.1.0.2:7700", "a b:7700"), `FILE:6: nodes.beta.address: "a b" in "a b:7700" is no host name; write HOST:PORT, for example 10.1.0.1:7700`},
		{"bad metrics address", replace("127.0.0.1:9720", "9720"), `FILE:10: metrics.listen: "9720" is not HOST:PORT; write it like 127.0.0.1:9720, or leave it out to have none`},
		{"two listeners on one address", replace("127.0.0.1:9720", "127.0.0.1:10809"), `FILE:8: nbd.listen: 127.0.0.1:10809 is used by metrics.listen already; give each its own address`},
		{"tls half set", replace("nbd:   {", "nbd:   {tls: {cert: /a.pem}, "), `FILE:8: nbd.tls: cert and key go together, and one is missing; set both nbd.tls.cert and nbd.tls.key to PEM files, or none`},
		{"a tab", "cluster: test\n\t# fine\nnodes:\n\talpha: {address: \"10.1.0.1:7700\"}\n", `FILE:4: not valid YAML: the line is indented with a tab; indent it with spaces, as many as its neighbours have`},
		{"a tab after spaces", "volume:\n  lease: 2s\n  \tack: durable\n", `FILE:3: not valid YAML: the line is indented with a tab; indent it with spaces, as many as its neighbours have`},
		{"not YAML", "cluster: [", `FILE: not valid YAML: line 1: did not find expected node content; correct the line; see the example in blockstep's documentation`},
		{"not a map", "- a\n", `FILE: the file is not a list of KEY: VALUE lines; allowed here: admin, attach, boot_id_file, cluster, data_dir, failover, join, log, memory, metrics, nbd, node, nodes, on_removed, raft, resync, volume`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			file := write(t, tc.text)
			_, err := Load(file, nil)
			if err == nil {
				t.Fatal("no error")
			}
			host, _ := os.Hostname()
			got := strings.ReplaceAll(err.Error(), file, "FILE")
			got = strings.ReplaceAll(got, `"`+host+`"`, `"HOST"`)
			if got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

// TestMistypedVariable: one that looks like a key is one that was meant; others
// are left alone.
func TestMistypedVariable(t *testing.T) {
	for name, want := range map[string]string{
		"BLOCKSTEP_VOLUME_LEASES": "environment variable BLOCKSTEP_VOLUME_LEASES: no key is called so; did you mean BLOCKSTEP_VOLUME_LEASE? Else unset it, or rename it",
		"BLOCKSTEP_DATADIR":       "environment variable BLOCKSTEP_DATADIR: no key is called so; did you mean BLOCKSTEP_DATA_DIR? Else unset it, or rename it",
		"BLOCKSTEP_ADMIN":         "", // the command's
		"BLOCKSTEP_BIN":           "", // of the tests, and in the environment of their daemons
		"BLOCKSTEP_SIM_SEEDS":     "",
		"BLOCKSTEP_PORT_7700_TCP": "", // as supervisors make them
		"BLOCKSTEP_SERVICE_HOST":  "",
		"BLOCKSTEPS":              "",
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(name, "x")
			_, err := Load(write(t, good), nil)
			if got := fmt.Sprint(err); got != want && (want != "" || err != nil) {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
}

func TestErrorNamesEnvironmentAndFlag(t *testing.T) {
	t.Setenv("BLOCKSTEP_LOG_FORMAT", "xml")
	fs := pflag.NewFlagSet("t", pflag.ContinueOnError)
	Flags(fs)
	if err := fs.Parse([]string{"--log-level=loud"}); err != nil {
		t.Fatal(err)
	}
	_, err := Load(write(t, good), fs)
	want := `--log-level: log.level: "loud" is not known; allowed are debug, info, warn, error
environment variable BLOCKSTEP_LOG_FORMAT: log.format: "xml" is not known; allowed are text, json`
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestMissingFile(t *testing.T) {
	_, err := Load("/nonexistent/b.yaml", nil)
	want := `/nonexistent/b.yaml: no such file; write the configuration there, or name another file with --config FILE`
	if err == nil || err.Error() != want {
		t.Errorf("got %v", err)
	}
}

func TestAdminAddressNeedsNoNode(t *testing.T) {
	got, err := AdminAddress(write(t, "admin: {listen: \"unix:///tmp/a.sock\"}\n"))
	if err != nil || got != "unix:///tmp/a.sock" {
		t.Errorf("got %q, %v", got, err)
	}
}

// TestJoinToken: from the environment or a file, never shown, and a file that is
// gone is none.
func TestJoinToken(t *testing.T) {
	dir := t.TempDir()
	tokenFile := filepath.Join(dir, "token")
	if err := os.WriteFile(tokenFile, []byte(" bsj1.ABC\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	load := func(more string) *Config {
		t.Helper()
		c, err := Load(write(t, good+more), nil)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if c := load("join: {token_file: " + tokenFile + "}\n"); c.Join.Token != "bsj1.ABC" {
		t.Errorf("from a file: %q", c.Join.Token)
	}
	if c := load("join: {token_file: " + tokenFile + ".gone}\n"); c.Join.Token != "" {
		t.Errorf("from no file: %q", c.Join.Token)
	}
	if _, err := Load(write(t, good+"join: {token: a, token_file: "+tokenFile+"}\n"), nil); err == nil || !strings.Contains(err.Error(), "join.token is set too; keep one of them") {
		t.Errorf("two: %v", err)
	}
	t.Setenv("BLOCKSTEP_JOIN_TOKEN", "bsj1.DEF")
	if c := load(""); c.Join.Token != "bsj1.DEF" || c.Value("join.token") != "(secret)" {
		t.Errorf("from the environment: %q, shown as %q", c.Join.Token, c.Value("join.token"))
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "512": 512, "4096B": 4096, "512MiB": 512 << 20, "10GiB": 10 << 30, "10G": 10 << 30,
		"1.5GiB": 3 << 29, "2 TiB": 2 << 40, "64k": 64 << 10, "7eib": 7 << 60, "": -1, "GiB": -1, "-1": -1,
		"1e3": -1, "0x10": -1, "inf": -1, "NaN": -1, "9999999TiB": -1, "1.0000001B": -1, "10GB": -1,
		"+1GiB": -1, "+512": -1, " -1GiB": -1, "-0": -1, "1.5e3": -1, "8EiB": -1, "8.5EiB": -1, "+1.5GiB": -1,
	} {
		got, err := ParseSize(s)
		if (err != nil) != (want < 0) || (err == nil && got != want) {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte("nodes: &a {x: *a}\n"))
	f.Add([]byte("nbd: {listen: [{address: [1]}]}\n"))
	f.Add([]byte("nodes: {a: {address: }}\nadmin: {mode: 0x}\n"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, raw []byte) {
		file := filepath.Join(dir, "f.yaml")
		if err := os.WriteFile(file, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		if c, err := Load(file, nil); err == nil && c.Self().Name == "" {
			t.Error("a valid configuration whose node is not one of its nodes")
		}
	})
}

// TestAddressesThatAreFine are written in each way that there is.
func TestAddressesThatAreFine(t *testing.T) {
	for _, s := range []string{"10.1.0.1:7700", "[fd00::1]:7700", "[fe80::1%eth0]:7700", "alpha:7700", "db_1.example.org:7700", "4u-7.lab:1"} {
		if _, _, err := SplitAddress(s, false); err != nil {
			t.Error(err)
		}
	}
}

// TestTextIsTakenAsItIsSpelled: what looks like a number to YAML is a name all the same.
func TestTextIsTakenAsItIsSpelled(t *testing.T) {
	text := strings.NewReplacer("cluster: prod", "cluster: 1.10", "node: Alpha", "node: 01", "  Alpha:", "  01:", "data_dir: /var/lib/blockstep", "data_dir: 0x10").Replace(good)
	c, err := Load(write(t, text), nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.Cluster != "1.10" || c.Node != "01" || filepath.Base(c.DataDir) != "0x10" || c.Value("cluster") != "1.10" {
		t.Errorf("cluster %q, node %q, data_dir %q", c.Cluster, c.Node, c.DataDir)
	}
	t.Setenv("BLOCKSTEP_CLUSTER", "007")
	if c, err = Load(write(t, text), nil); err != nil || c.Cluster != "007" {
		t.Errorf("of the environment: %+v, %v", c, err)
	}
}
