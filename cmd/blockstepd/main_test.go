package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blockstep/blockstep/nbd/nbdtest"
)

// TestCheckConfig: TLS files that the daemon could not start with are a bad
// configuration.
func TestCheckConfig(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	for _, d := range []string{dir, other} {
		if err := nbdtest.WriteCertificates(d); err != nil {
			t.Fatal(err)
		}
	}
	garbage := filepath.Join(dir, "garbage.pem")
	if err := os.WriteFile(garbage, []byte("half a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	cert, key, ca := filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"), filepath.Join(dir, "ca-cert.pem")
	for name, c := range map[string]struct {
		cert, key, ca string
		code          int
		says          string
	}{
		"right":          {cert, key, ca, exitDone, "is valid: node alpha"},
		"without ca":     {cert, key, "", exitDone, "is valid: node alpha"},
		"no certificate": {filepath.Join(dir, "nothing"), key, ca, exitUsage, "nothing: no such file"},
		"of another key": {cert, filepath.Join(other, "server-key.pem"), ca, exitUsage, "private key does not match"},
		"garbage":        {garbage, key, ca, exitUsage, "failed to find any PEM data"},
		"no authority":   {cert, key, filepath.Join(dir, "nothing"), exitUsage, "nothing: no such file"},
		"no such ca":     {cert, key, garbage, exitUsage, "garbage.pem holds no PEM certificate"},
	} {
		file := filepath.Join(t.TempDir(), "blockstep.yaml")
		text := "cluster: test\nnode: alpha\ndata_dir: " + dir + "\nnodes: {alpha: {address: \"127.0.0.1:7700\"}}\n" +
			"nbd: {tls: {cert: \"" + c.cert + "\", key: \"" + c.key + "\", ca: \"" + c.ca + "\"}}\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var out, errOut bytes.Buffer
		code := run(t.Context(), []string{"--check-config", "--config", file}, &out, &errOut)
		if code != c.code || !strings.Contains(out.String()+errOut.String(), c.says) || code != exitDone && !strings.Contains(errOut.String(), "nbd.tls: ") {
			t.Errorf("%s: code %d, %q, %q; want %d and %q", name, code, out.String(), errOut.String(), c.code, c.says)
		}
	}
}
