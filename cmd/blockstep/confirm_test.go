package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

// TestDestroyingIsConfirmed: a person at a terminal sees what is lost and types
// the name; a script that follows the contract is never asked.
func TestDestroyingIsConfirmed(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "a")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	var deleted []string
	h := http.NewServeMux()
	h.HandleFunc("GET /v1/volumes/{name}", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"volume":"db","size":1073741824,"health":"healthy","primary":"beta","replicas":[{"node":"alpha","state":"InSync","position":"3:9"}]}`))
	})
	h.HandleFunc("GET /v1/volumes/{name}/clients", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`[{"node":"alpha","clients":["10.0.0.9:4711","unix:pid=7,uid=0"]},{"node":"beta","clients":[]},{"node":"gamma","clients":[],"error":"it gives no answer: x"},{"node":"delta","clients":["a:1","a:2","a:3","a:4","a:5"]}]`))
	})
	h.HandleFunc("DELETE /v1/volumes/{name}", func(w http.ResponseWriter, r *http.Request) {
		deleted = append(deleted, r.PathValue("name"))
		_, _ = w.Write([]byte(`{}`))
	})
	s := &http.Server{Handler: h} //nolint:gosec // of a test
	go func() {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
	defer s.Close()
	for _, tc := range []struct {
		name     string
		terminal bool
		typed    string
		args     []string
		code     int
		deletes  bool
	}{
		{"a script is not asked", false, "", nil, 0, true},
		{"a person types the name", true, "db\n", nil, 0, true},
		{"a person types something else", true, "yes\n", nil, 1, false},
		{"a person has no answer", true, "", nil, 1, false},
		{"a person has said so before", true, "", []string{"--yes"}, 0, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			deleted = nil
			var out, errOut strings.Builder
			a := &app{in: strings.NewReader(tc.typed), out: &out, err: &errOut, terminal: func(...any) bool { return tc.terminal }}
			code := a.main(t.Context(), append([]string{"--admin", "unix://" + sock, "volume", "delete", "db"}, tc.args...))
			if code != tc.code || (len(deleted) == 1) != tc.deletes {
				t.Errorf("exit code %d, deleted %v: %s", code, deleted, errOut.String())
			}
			asked := strings.Contains(errOut.String(), "Type db to go on")
			shown := strings.Contains(errOut.String(), "db: 1GiB, healthy, primary beta; replicas:\n  alpha InSync at 3:9\n"+
				"7 NBD connections to it are open:\n  through alpha: 2 (10.0.0.9:4711, unix:pid=7,uid=0)\n"+
				"  through gamma: not known, it gives no answer: x\n  through delta: 5 (a:1, a:2, a:3, a:4 and 1 more)\nThis deletes it")
			if want := tc.terminal && tc.args == nil; asked != want || shown != want {
				t.Errorf("asked: %v, shown: %v: %s", asked, shown, errOut.String())
			}
			if !tc.deletes && !strings.Contains(errOut.String(), "nothing was done") {
				t.Error(errOut.String())
			}
		})
	}
}

// cutReader is a terminal at which somebody types Ctrl-C in the place of an answer.
type cutReader struct {
	interrupt func()
	end       <-chan struct{}
}

func (r cutReader) Read([]byte) (int, error) {
	r.interrupt()
	<-r.end
	return 0, io.EOF
}

// TestCtrlCAtTheQuestion: it ends the command, and nothing is done.
func TestCtrlCAtTheQuestion(t *testing.T) {
	ctx, interrupt := context.WithCancel(t.Context())
	end := make(chan struct{})
	defer close(end)
	var out, errOut strings.Builder
	a := &app{in: cutReader{interrupt, end}, out: &out, err: &errOut, terminal: func(...any) bool { return true }}
	code := a.main(ctx, []string{"--admin", "unix:///nosuch", "node", "remove", "delta"})
	if code != exitFailed || !strings.HasSuffix(errOut.String(), "Type delta to go on: \nblockstep: interrupted: nothing was done\n") {
		t.Errorf("exit code %d: %s", code, errOut.String())
	}
}
