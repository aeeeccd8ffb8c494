package e2e

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// clusterStatus is the part of `status --json` that the tests lean on.
type clusterStatus struct {
	Leader  string         `json:"raft_leader"`
	Volumes []volumeStatus `json:"volumes"`
	Nodes   []struct {
		Name    string `json:"name"`
		Up      bool   `json:"up"`
		Witness bool   `json:"witness"`
		Leader  bool   `json:"leader"`
	} `json:"nodes"`
}

// replicaBytes reads one replica's whole committed content through its own
// node.
func (c *cluster) replicaBytes(volume string, n *node) []byte {
	c.t.Helper()
	d := mustDial(c.t, n, volume+"@"+n.name)
	defer d.close()
	if d.flags&readOnly == 0 {
		c.t.Errorf("%s@%s is not announced read-only", volume, n.name)
	}
	b := make([]byte, d.size)
	const step = 1 << 20
	for off := 0; off < len(b); off += step {
		if err := d.read(b[off:min(off+step, len(b))], uint64(off)); err != nil {
			c.t.Fatalf("read %s@%s at %d: %v", volume, n.name, off, err)
		}
	}
	return b
}

// replicasEqual compares every replica byte by byte. Nobody may be writing:
// what was answered is at every replica that is in sync, at once.
func (c *cluster) replicasEqual(volume string) {
	c.t.Helper()
	c.waitHealthy(volume)
	if diff := c.compareReplicas(volume); diff != "" {
		c.t.Errorf("broke I6, replicas reach the same bytes: %s", diff)
	}
}

func (c *cluster) compareReplicas(volume string) string {
	c.t.Helper()
	var first []byte
	var firstNode string
	for _, r := range c.live().status(volume).Replicas {
		b := c.replicaBytes(volume, c.node(r.Node))
		if first == nil {
			first, firstNode = b, r.Node
			continue
		}
		if at := firstDifference(first, b); at >= 0 {
			return fmt.Sprintf("%s@%s and %s@%s differ first at byte %d", volume, firstNode, volume, r.Node, at)
		}
	}
	return ""
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// TestThreeProcesses is point 2: three configurations form a cluster with no
// other step, and the verbs work, with --json.
func TestThreeProcesses(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	alpha, beta := c.node("alpha"), c.node("beta")
	alpha.waitReady()

	alpha.cli("volume", "create", "db", "--size", "64MiB")
	c.waitHealthy("db")
	st := beta.status("db")
	if st.Volume != "db" || st.Size != 64<<20 || st.Primary == "" || st.Epoch == 0 || st.Health != "healthy" {
		t.Errorf("status of db: %+v", st)
	}
	slices.Sort(st.InSync)
	if !slices.Equal(st.InSync, []string{"alpha", "beta", "gamma"}) {
		t.Errorf("in_sync is %v, want all three", st.InSync)
	}
	for _, name := range []string{"alpha", "beta", "gamma"} {
		if r := st.replica(name); r.State != "InSync" || r.LagBytes != 0 || r.DirtyBytes != 0 {
			t.Errorf("replica at %s: %+v", name, r)
		}
	}

	var whole clusterStatus
	beta.jsonOf(&whole, "status")
	if whole.Leader == "" || len(whole.Nodes) != 3 || len(whole.Volumes) != 1 {
		t.Errorf("status --json: %+v", whole)
	}
	var list []volumeStatus
	beta.jsonOf(&list, "volume", "list")
	if len(list) != 1 || list[0].Volume != "db" {
		t.Errorf("volume list --json: %+v", list)
	}
	var nodes []map[string]any
	beta.jsonOf(&nodes, "node", "list")
	if len(nodes) != 3 {
		t.Errorf("node list --json: %v", nodes)
	}
	for verb, want := range map[string][]string{
		"status":      {"alpha", "beta", "gamma", "db"},
		"volume list": {"db", "64"},
		"node list":   {"alpha", "beta", "gamma"},
		"events":      {"db"},
	} {
		out := beta.cli(strings.Fields(verb)...)
		for _, word := range want {
			if !strings.Contains(out, word) {
				t.Errorf("`blockstep %s` does not show %q:\n%s", verb, word, out)
			}
		}
	}

	epoch := st.Epoch
	target := c.others(st.Primary)[0]
	beta.cli("switchover", "db", "--to", target.name)
	st = beta.status("db")
	if st.Primary != target.name || st.Epoch <= epoch {
		t.Errorf("after the switchover to %s: primary %s, epoch %d (was %d)", target.name, st.Primary, st.Epoch, epoch)
	}
	if out := beta.cli("events"); !strings.Contains(out, target.name) {
		t.Errorf("events do not tell of the switchover to %s:\n%s", target.name, out)
	}

	beta.cli("volume", "delete", "db", "--yes")
	beta.cliFails(exitRefused, []string{"db"}, "status", "db")
	for _, n := range c.nodes {
		n.stop()
	}
}

// TestExitCodes: 0 done, 1 refused, 2 usage, 3 no daemon, 4 timed out.
func TestExitCodes(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "16MiB")
	alpha := c.node("alpha")

	alpha.cli("wait", "db", "--for", "primary", "--timeout", "10s")
	alpha.cli("wait", "db", "--for", "quorum", "--timeout", "10s")
	alpha.cliFails(exitRefused, []string{"nosuch"}, "status", "nosuch")
	alpha.cliFails(exitRefused, []string{"db"}, "volume", "create", "db", "--size", "16MiB")
	alpha.cliFails(exitRefused, []string{"nosuch"}, "switchover", "db", "--to", "nosuch")
	alpha.cliFails(exitUsage, nil, "frobnicate")
	alpha.cliFails(exitUsage, nil, "status", "--nosuchflag")
	alpha.cliFails(exitUsage, []string{"lunch"}, "wait", "db", "--for", "lunch")
	alpha.cliFails(exitUsage, []string{"lots"}, "volume", "create", "v2", "--size", "lots")

	out, code := blockstep(20*time.Second, "--admin", "unix://"+c.dir+"/nobody.sock", "status")
	if code != exitNoDaemon || !strings.Contains(out, "nobody.sock") {
		t.Errorf("status with no daemon: exit code %d, want %d:\n%s", code, exitNoDaemon, out)
	}

	c.node("gamma").kill()
	began := time.Now()
	alpha.cliFails(exitTimeout, nil, "wait", "db", "--for", "healthy", "--timeout", "2s")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("wait --timeout 2s took %v", took)
	}
	alpha.cli("wait", "db", "--for", "primary", "--timeout", "20s")
	c.node("gamma").start()
	c.waitHealthy("db")
}

// TestEveryNodeSeesOneDevice: what one node's client wrote, the others' read;
// zeroes, trims, FUA, and the end of the volume; all replicas equal.
func TestEveryNodeSeesOneDevice(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	c.volume("db", "32MiB")
	var disks []*disk
	for _, n := range c.nodes {
		d := mustDial(t, n, "db")
		defer d.close()
		if d.size != 32<<20 {
			t.Errorf("size at %s is %d, want %d", n.name, d.size, 32<<20)
		}
		if want := uint16(sendFlush | sendFUA | multiConn); d.flags&want != want {
			t.Errorf("flags at %s are %#x: FLUSH, FUA and multi-conn must be there", n.name, d.flags)
		}
		disks = append(disks, d)
	}

	want := make([]byte, 32<<20)
	value := uint64(0)
	check := func(off uint64, n int) {
		t.Helper()
		for i, d := range disks {
			got := make([]byte, n)
			if err := d.read(got, off); err != nil {
				t.Fatalf("read through %s: %v", c.nodes[i].name, err)
			}
			if at := firstDifference(got, want[off:off+uint64(n)]); at >= 0 {
				t.Fatalf("read through %s at %d+%d differs from what was written", c.nodes[i].name, off, at)
			}
		}
	}
	for round := range 30 {
		d := disks[round%3]
		for _, n := range []int{4096, 512 * 9, 1 << 20} {
			value++
			off := (value * 1237 * 4096) % (30 << 20)
			b := fill(value, n)
			if err := d.write(b, off, round%2 == 0); err != nil {
				t.Fatalf("write through %s: %v", c.nodes[round%3].name, err)
			}
			copy(want[off:], b)
			check(off, n)
		}
	}
	for i, clearRange := range []func(uint64, int) error{disks[0].zero, disks[1].trim} {
		off, n := uint64(i*(8<<20)+4096), 1<<20
		if err := clearRange(off, n); err != nil {
			t.Fatalf("zero or trim: %v", err)
		}
		clear(want[off : off+uint64(n)])
		check(off, n)
	}
	if err := disks[2].flush(); err != nil {
		t.Fatalf("flush: %v", err)
	}
	check(0, 4<<20)

	end := disks[0].size
	if err := disks[0].read(make([]byte, 8192), end-4096); err == nil {
		t.Error("a read beyond the end was answered without an error")
	}
	if err := disks[1].write(make([]byte, 8192), end-4096, false); err == nil {
		t.Error("a write beyond the end was answered without an error")
	}
	check(end-4096, 4096) // the connections go on

	c.replicasEqual("db")
	if got := c.replicaBytes("db", c.nodes[1]); !bytes.Equal(got, want) {
		t.Errorf("db@%s is not what was written; it differs first at byte %d", c.nodes[1].name, firstDifference(got, want))
	}
	ro := mustDial(t, c.nodes[0], "db@"+c.nodes[0].name)
	defer ro.close()
	if err := ro.write(make([]byte, 4096), 0, false); err == nil {
		t.Error("a write to db@alpha was answered without an error")
	}
}
