package config

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var rewrite = flag.Bool("rewrite", false, "write the table of docs/configuration.md anew")

// TestConfigurationPage: docs/configuration.md lists all keys as the table of this
// package has them. With -rewrite it is written anew.
func TestConfigurationPage(t *testing.T) {
	const (
		file  = "../../docs/configuration.md"
		begin = "<!-- keys: go test ./internal/config -run ConfigurationPage -rewrite -->\n"
		end   = "<!-- end -->"
	)
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(raw), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no table between %q and %q", file, begin, end)
	}
	var b strings.Builder
	fmt.Fprint(&b, "| key | what it is | default | unit and range | live |\n|---|---|---|---|---|\n")
	for i, k := range Keys() {
		def, live := "", "no"
		if v := keys[i].def; v != "" {
			def = "`" + v + "`"
		}
		if k.ChangesLive {
			live = "yes"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", k.Name, strings.ReplaceAll(k.Help, "|", `\|`), def, k.Range, live)
	}
	if want := head + begin + b.String() + end + tail; want != string(raw) {
		if !*rewrite {
			t.Errorf("%s is not what the table of keys says: run this test with -rewrite", file)
		} else if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, k := range append(append([]string{}, nodeKeys...), listenerKeys...) {
		if !strings.Contains(head+tail, "`"+k+"`") {
			t.Errorf("%s does not describe %s of an entry of nodes or nbd.listen", file, k)
		}
	}
}
