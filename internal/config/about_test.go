package config

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestEachKeyIsDescribed(t *testing.T) {
	for _, k := range Keys() {
		if k.Help == "" {
			t.Errorf("%s has no help in about.go", k.Name)
		}
	}
}

const twoNodes = "cluster: prod\nnode: alpha\nnodes: {alpha: {address: \"10.1.0.1:7700\"}, beta: {address: \"10.1.0.2:7700\"}}\n"

func load(t *testing.T, text string) *Config {
	t.Helper()
	file := filepath.Join(t.TempDir(), "b.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDiffNamesWhatChanged(t *testing.T) {
	from := load(t, twoNodes)
	// The same values in other words are no change.
	same := load(t, "nodes: {beta: {address: \"10.1.0.2:7700\"}, alpha: {address: \"10.1.0.1:7700\"}}\ncluster: prod\nnode: alpha\nvolume: {log_retention: 268435456, lease: 1.5s}\nfailover: {auto: 1}\n")
	if d := Diff(from, same); len(d) > 0 {
		t.Errorf("the same configuration differs: %v", d)
	}
	to := load(t, strings.Replace(twoNodes, "0.2:7700", "0.2:7701", 1)+"log: {level: debug}\nvolume: {lease: 3s}\nnbd: {listen: [{address: \"tcp://127.0.0.1:10809\", read_only: true}]}\n")
	want := []string{"nodes false", "nbd.listen false", "log.level true", "volume.lease false"}
	var got []string
	for _, c := range Diff(from, to) {
		live := " false"
		if c.Live {
			live = " true"
		}
		got = append(got, c.Key+live)
		if c.Old == c.New || c.New == "" {
			t.Errorf("%+v", c)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("changed are %v, want %v", got, want)
	}
	if s := from.Shared(); s["nodes"] != "alpha=10.1.0.1:7700, beta=10.1.0.2:7700" || s["volume.lease"] != "1.5s" {
		t.Errorf("shared are %v", s)
	}
}
