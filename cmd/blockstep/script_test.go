package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"blockstep": main}) }

// TestScripts runs testdata/*.txtar. Each script finds three configurations
// (alpha.yaml, beta.yaml, gamma.yaml) in its directory, and the addresses of
// their sockets in ALPHA, BETA and GAMMA.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:   "testdata",
		Setup: setUp,
		Cmds:  map[string]func(*testscript.TestScript, bool, []string){"code": codeCmd, "appendto": appendCmd},
	})
}

func setUp(env *testscript.Env) error {
	var nodes strings.Builder
	names := []string{"alpha", "beta", "gamma"}
	for _, n := range names {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer l.Close()
		fmt.Fprintf(&nodes, "  %s: {address: %q}\n", n, l.Addr())
		env.Setenv(strings.ToUpper(n)+"_TCP", "tcp://"+l.Addr().String())
	}
	for _, n := range names {
		sock := filepath.Join(env.WorkDir, n+".adm")
		text := fmt.Sprintf("cluster: script\nnode: %s\ndata_dir: %s\nnodes:\n%snbd: {listen: [\"unix://%s\"]}\nadmin: {listen: \"unix://%s\"}\n",
			n, filepath.Join(env.WorkDir, n), nodes.String(), filepath.Join(env.WorkDir, n+".nbd"), sock)
		if err := os.WriteFile(filepath.Join(env.WorkDir, n+".yaml"), []byte(text), 0o600); err != nil {
			return err
		}
		env.Setenv(strings.ToUpper(n), "unix://"+sock)
	}
	return nil
}

// codeCmd is `code N COMMAND...`: the command must end with exactly that code.
func codeCmd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var exit *exec.ExitError
	switch err := ts.Exec(args[1], args[2:]...); {
	case errors.As(err, &exit):
		got = exit.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d\n%s%s", got, want, ts.ReadFile("stdout"), ts.ReadFile("stderr"))
	}
}

// appendCmd is `appendto FILE MORE`.
func appendCmd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: appendto FILE MORE")
	}
	text := ts.ReadFile(args[0]) + ts.ReadFile(args[1])
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(text), 0o600))
}
