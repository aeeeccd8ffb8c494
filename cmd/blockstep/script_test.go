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
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"blockstep": main}) }

// TestScripts runs testdata/*.txtar. Each script finds three configurations
// (alpha.yaml, beta.yaml, gamma.yaml) in its directory, the addresses of their
// sockets in ALPHA, BETA and GAMMA, and those of their ports in ALPHA_TCP, …; and
// the same for delta, whom the others do not know.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:   "testdata",
		Setup: setUp,
		Condition: func(cond string) (bool, error) {
			// With the module an attach would take a device of this machine.
			if cond != "nbd-module" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			_, err := os.Stat("/sys/module/nbd")
			return err == nil, nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"code": codeCmd, "appendto": appendCmd, "schema": schemaCmd, "flip": flipCmd, "await": awaitCmd, "until": untilCmd},
	})
}

func setUp(env *testscript.Env) error {
	var nodes strings.Builder
	founders := ""
	names := []string{"alpha", "beta", "gamma", "delta"}
	for _, n := range names {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer l.Close()
		if n == "delta" {
			founders = nodes.String()
		}
		fmt.Fprintf(&nodes, "  %s: {address: %q}\n", n, l.Addr())
		env.Setenv(strings.ToUpper(n)+"_TCP", "tcp://"+l.Addr().String())
	}
	for _, n := range names {
		members := founders
		if n == "delta" {
			members = nodes.String()
		}
		sock := filepath.Join(env.WorkDir, n+".adm")
		text := fmt.Sprintf("cluster: script\nnode: %s\ndata_dir: %s\nnodes:\n%snbd: {listen: [\"unix://%s\"]}\nadmin: {listen: \"unix://%s\"}\n",
			n, filepath.Join(env.WorkDir, n), members, filepath.Join(env.WorkDir, n+"-run", "nbd"), sock)
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

// flipCmd is `flip NODE`: one byte in the backing store of the only volume of a
// node is another one than before, as after a fault of its disk.
func flipCmd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: flip NODE")
	}
	files, err := filepath.Glob(ts.MkAbs(filepath.Join(args[0], "volumes", "*", "data")))
	ts.Check(err)
	if len(files) != 1 {
		ts.Fatalf("backing stores: %q", files)
	}
	f, err := os.OpenFile(files[0], os.O_RDWR, 0)
	ts.Check(err)
	b := make([]byte, 1)
	_, err = f.ReadAt(b, 4096)
	ts.Check(err)
	_, err = f.WriteAt([]byte{^b[0]}, 4096)
	ts.Check(errors.Join(err, f.Close()))
}

// untilCmd is `until COMMAND...`: again and again, until it ends with 0.
func untilCmd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: until COMMAND...")
	}
	var err error
	for end := time.Now().Add(40 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = ts.Exec(args[0], args[1:]...); err == nil {
			return
		}
	}
	ts.Fatalf("it never ended with 0: %v\n%s%s", err, ts.ReadFile("stdout"), ts.ReadFile("stderr"))
}

// awaitCmd is `await FILE LINES`: until the file has that many lines.
func awaitCmd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: await FILE LINES")
	}
	want, err := strconv.Atoi(args[1])
	ts.Check(err)
	var text []byte
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		text, err = os.ReadFile(ts.MkAbs(args[0]))
		if err == nil && strings.Count(string(text), "\n") >= want {
			return
		}
	}
	ts.Fatalf("%s has not %d lines: %v\n%s", args[0], want, err, text)
}

// appendCmd is `appendto FILE MORE`.
func appendCmd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: appendto FILE MORE")
	}
	text := ts.ReadFile(args[0]) + ts.ReadFile(args[1])
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(text), 0o600))
}
