package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"go.yaml.in/yaml/v3"

	"github.com/blockstep/blockstep/internal/control"
)

// scrape gets a path of the node's metrics port.
func (n *testNode) scrape(path string) (int, string) {
	n.t.Helper()
	resp, err := http.Get("http://" + n.config().Metrics.Listen + path)
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// series is one line of /metrics.
type series struct {
	name   string
	labels map[string]string
	value  string
}

var (
	sampleLine = regexp.MustCompile(`(?m)^([a-z_]+)(?:\{(.*)\})? (\S+)$`)
	labelPair  = regexp.MustCompile(`([a-z_]+)(=~|!=|!~|=)"([^"]*)"`)
)

// parse reads the text format.
func parse(text string) []series {
	var out []series
	for _, m := range sampleLine.FindAllStringSubmatch(text, -1) {
		s := series{name: m[1], labels: map[string]string{}, value: m[3]}
		for _, l := range labelPair.FindAllStringSubmatch(m[2], -1) {
			s.labels[l[1]] = l[3]
		}
		out = append(out, s)
	}
	return out
}

// value returns the value of the series with that name and those labels.
func value(t *testing.T, list []series, name string, labels map[string]string) string {
	t.Helper()
	for _, s := range list {
		if s.name == name && maps.Equal(s.labels, labels) {
			return s.value
		}
	}
	t.Errorf("there is no %s with %v", name, labels)
	return ""
}

// TestMetrics: under load on a primary's node and on another, what a node
// exports keeps to Prometheus' conventions, says where the time goes, and is
// what dashboard and alerts ask for.
func TestMetrics(t *testing.T) {
	nodes := newCluster(t, "")
	alpha, beta := nodes["alpha"], nodes["beta"]
	alpha.create("db", 16<<20)
	alpha.healthy("db")
	if _, err := alpha.client.Switchover(t.Context(), "db", control.Switchover{To: "alpha"}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*testNode{alpha, beta} {
		c := n.open("db")
		for i := range uint64(32) {
			if err := c.WriteAt(t.Context(), make([]byte, 4096), i<<12); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := c.ReadAt(t.Context(), make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
	}
	alpha.eventually(10*time.Second, "an apply", func(context.Context) error {
		_, text := alpha.scrape("/metrics") // it lets entries gather
		if value(t, parse(text), "blockstep_stage_seconds_count", map[string]string{"volume": "db", "stage": "apply"}) == "0" {
			return errors.New("none was measured")
		}
		return nil
	})
	d := alpha.daemon.Load()
	if err := d.volume(d.state().Volume("db").ID).driver.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	var all []series
	for _, n := range nodes {
		_, text := n.scrape("/metrics")
		problems, err := promlint.New(strings.NewReader(text)).Lint()
		if err != nil || len(problems) > 0 {
			t.Errorf("%s: %+v, %v", n.name, problems, err)
		}
		list := parse(text)
		all = append(all, list...)
		stages := []string{}
		if n == alpha {
			stages = []string{"log_write", "log_sync", "commit", "apply", "store_sync"}
		} else if n == beta {
			stages = []string{"log_write", "forward"}
		}
		for _, stage := range stages {
			if got := value(t, list, "blockstep_stage_seconds_count", map[string]string{"volume": "db", "stage": stage}); got == "0" {
				t.Errorf("%s has measured no %s", n.name, stage)
			}
		}
	}
	for want, labels := range map[string]map[string]string{
		"blockstep_link_up":                   {"peer": "beta"},
		"blockstep_volume_epoch":              {"volume": "db"},
		"blockstep_replica_lag_bytes":         {"volume": "db", "replica": "gamma"},
		"blockstep_nbd_request_seconds_count": {"op": "write"},
	} {
		value(t, all, want, labels)
	}
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		base := s.name
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			base = strings.TrimSuffix(base, suffix)
		}
		if strings.HasPrefix(base, "blockstep_") && !strings.Contains(string(page), "`"+base) {
			t.Errorf("docs/metrics.md does not tell of %s", base)
		}
	}
	for where, exprs := range expressions(t) {
		for _, e := range exprs {
			checkExpression(t, where, e, all)
		}
	}
}

// expressions reads what dashboard and alerts ask Prometheus.
func expressions(t *testing.T) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	raw, err := os.ReadFile("../../deploy/grafana/blockstep.json")
	if err != nil {
		t.Fatal(err)
	}
	var find func(v any)
	find = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			for _, key := range []string{"expr", "query"} { // of panels, and of the variables
				if e, ok := v[key].(string); ok && strings.Contains(e, "blockstep_") {
					out["the dashboard"] = append(out["the dashboard"], e)
				}
			}
			for _, x := range v {
				find(x)
			}
		case []any:
			for _, x := range v {
				find(x)
			}
		}
	}
	var dashboard any
	if err := json.Unmarshal(raw, &dashboard); err != nil {
		t.Fatal(err)
	}
	find(dashboard)
	if raw, err = os.ReadFile("../../deploy/prometheus/blockstep.rules.yaml"); err != nil {
		t.Fatal(err)
	}
	var rules struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	if err := yaml.Unmarshal(raw, &rules); err != nil {
		t.Fatal(err)
	}
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			out["alert "+r.Alert] = append(out["alert "+r.Alert], r.Expr)
		}
	}
	if len(out) < 6 || len(out["the dashboard"]) < 6 {
		t.Fatalf("found only %v: does this test still find them?", out)
	}
	return out
}

var (
	selector = regexp.MustCompile(`(blockstep_[a-z_]+)(?:\{([^}]*)\})?`)
	grouping = regexp.MustCompile(`\b(?:by|on|ignoring|without) *\(([^)]*)\)`)
)

// checkExpression demands that each metric of an expression is there, with the
// labels that it is selected and grouped by. Prometheus adds instance itself.
func checkExpression(t *testing.T, where, expr string, all []series) {
	t.Helper()
	known := map[string]bool{"instance": true}
	for _, m := range selector.FindAllStringSubmatch(expr, -1) {
		found := slices.DeleteFunc(slices.Clone(all), func(s series) bool {
			if s.name != m[1] {
				return true
			}
			for _, l := range labelPair.FindAllStringSubmatch(m[2], -1) {
				if v, ok := s.labels[l[1]]; l[1] != "instance" && (!ok || l[2] == "=" && v != l[3]) {
					return true
				}
			}
			return false
		})
		if len(found) == 0 {
			t.Errorf("%s: no node exports %s", where, m[0])
		}
		for _, s := range found {
			for l := range s.labels {
				known[l] = true
			}
		}
	}
	for _, m := range grouping.FindAllStringSubmatch(expr, -1) {
		for l := range strings.SplitSeq(m[1], ",") {
			if l = strings.TrimSpace(l); !known[l] {
				t.Errorf("%s: nothing in %q has the label %s", where, expr, l)
			}
		}
	}
}

// TestHealthAndReadiness: both are fine on a node that serves; a node that stands
// still is not healthy, one that is alone or stopping is not ready.
func TestHealthAndReadiness(t *testing.T) {
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	alpha.create("db", 16<<20)
	is := func(path string, code int, says string) {
		t.Helper()
		if got, body := alpha.scrape(path); got != code || !strings.Contains(body, says) {
			t.Errorf("%s: %d %q; want %d and %q", path, got, body, code, says)
		}
	}
	is("/healthz", http.StatusOK, "ok")
	is("/readyz", http.StatusOK, "ready")

	d := alpha.daemon.Load()
	d.vmu.Lock() // its tables are locked "for ever": there is no beat any more
	d.beat.Store(int64(time.Since(d.start) - beatLate))
	is("/healthz", http.StatusServiceUnavailable, "stands still")
	d.vmu.Unlock()
	alpha.eventually(20*time.Second, "it lives again", func(context.Context) error {
		if code, body := alpha.scrape("/healthz"); code != http.StatusOK {
			return errors.New(body)
		}
		return nil
	})

	d.leaving.Store(true)
	is("/readyz", http.StatusServiceUnavailable, "stopping")
	is("/healthz", http.StatusOK, "ok")
	d.leaving.Store(false)

	nodes["beta"].halt()
	nodes["gamma"].halt()
	alpha.eventually(20*time.Second, "it knows that it is alone", func(context.Context) error {
		if code, body := alpha.scrape("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "no Raft leader") {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
	is("/healthz", http.StatusOK, "ok")
}

// TestMetricOfASuspendedVolume: a primary that is alone keeps its office and
// serves nobody, which is what the alert BlockstepNoPrimary is for.
func TestMetricOfASuspendedVolume(t *testing.T) {
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	alpha.create("db", 16<<20)
	alpha.healthy("db")
	if _, err := alpha.client.Switchover(t.Context(), "db", control.Switchover{To: "alpha"}); err != nil {
		t.Fatal(err)
	}
	primary := func(want string) func(context.Context) error {
		return func(context.Context) error {
			_, text := alpha.scrape("/metrics")
			if got := value(t, parse(text), "blockstep_volume_primary", map[string]string{"volume": "db"}); got != want {
				return fmt.Errorf("blockstep_volume_primary is %s, want %s", got, want)
			}
			return nil
		}
	}
	alpha.eventually(10*time.Second, "it serves", primary("1"))
	nodes["beta"].halt()
	nodes["gamma"].halt()
	alpha.eventually(20*time.Second, "it is suspended", primary("0"))
	d := alpha.daemon.Load()
	if r := d.report(d.state().Volume("db").ID); !r.inOffice() {
		t.Errorf("it is no primary any more, which is another case: %+v", r.Core)
	}
}
