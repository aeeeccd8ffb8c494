package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
)

// fakeDaemon answers at a socket of its own, whose address it returns.
func fakeDaemon(t *testing.T, h http.Handler) string {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "a")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h} //nolint:gosec // of a test
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		_ = s.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return "unix://" + sock
}

// full is a disk without room, behind stdout.
type full struct{ room int }

var errFull = errors.New("no space left on device")

func (f *full) Write(p []byte) (int, error) {
	if len(p) > f.room {
		return f.room, errFull
	}
	f.room -= len(p)
	return len(p), nil
}

// TestOutputThatIsLost: a verb whose output cannot be written ends with 1, and
// does not go on for ever.
func TestOutputThatIsLost(t *testing.T) {
	h := http.NewServeMux()
	h.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"cluster":"c","node":"alpha","leader":"alpha","quorum":true,"nodes":[],"volumes":[]}`))
	})
	h.HandleFunc("GET /v1/events", func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte(`{"cursor":"1.0","kind":"role","text":"x"}` + "\n"))
		if r.URL.Query().Get("follow") == "true" {
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
	})
	h.HandleFunc("DELETE /v1/volumes/db", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{}`)) })
	admin := fakeDaemon(t, h)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, line := range []string{
		"status", "status --json", "status --watch", "status --watch --json", "events", "events --json", "events --follow",
		"volume delete db", "version", "help status", "completion bash", "completion zsh",
	} {
		for _, room := range []int{0, 10} {
			var says bytes.Buffer
			code := run(ctx, append([]string{"--admin", admin}, strings.Fields(line)...), strings.NewReader(""), &full{room}, &says)
			if want := "blockstep: the output is not whole: no space left on device\n"; code != exitFailed || says.String() != want {
				t.Errorf("%s, room for %d bytes: exit code %d, %q; want %d, %q", line, room, code, says.String(), exitFailed, want)
			}
		}
	}
	if err := ctx.Err(); err != nil {
		t.Errorf("one of them went on: %v", err)
	}
}

// TestInterrupted: Ctrl-C ends a verb at once, with 1, and says whether it may
// have done something.
func TestInterrupted(t *testing.T) {
	asked := make(chan struct{}, 1)
	admin := fakeDaemon(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		<-r.Context().Done()
	}))
	for line, want := range map[string]string{
		"status":                        "interrupted",
		"verify db":                     "interrupted",
		"wait db --for healthy":         "interrupted",
		"volume delete db":              "interrupted; it may still happen: look at blockstep status",
		"node drain alpha":              "interrupted; it may still happen: look at blockstep status",
		"fence db":                      "interrupted; it may still happen: look at blockstep status",
		"failover db":                   "interrupted; it may still happen: look at blockstep status",
		"volume create db --size 10GiB": "interrupted; it may still happen: look at blockstep status",
	} {
		ctx, interrupt := context.WithCancel(t.Context())
		go func() {
			<-asked
			interrupt()
		}()
		var out, says bytes.Buffer
		code := run(ctx, append([]string{"--admin", admin}, strings.Fields(line)...), strings.NewReader(""), &out, &says)
		if code != exitFailed || says.String() != "blockstep: "+want+"\n" || out.Len() != 0 {
			t.Errorf("%s: exit code %d, %q, %q; want %d, %q", line, code, says.String(), out.String(), exitFailed, want)
		}
		interrupt()
	}
}

// TestVerifyTellsWhatItCompared: who was compared, up to where, and what it ends with.
func TestVerifyTellsWhatItCompared(t *testing.T) {
	const found = `"found":[{"node":"beta","offset":4096,"length":8192,"repaired":false}]`
	for _, tc := range []struct {
		line string // of the daemon
		code int
		out  string
		err  string
	}{
		{`"done_bytes":9,"compared":["alpha","beta","gamma"]`, 0, "all replicas of db are equal\n", ""},
		{
			`"done_bytes":9,"compared":["alpha","beta"],"left_out":["gamma"]`, 0,
			"the replicas of db on alpha, beta are equal; not compared, since not in sync: gamma (blockstep status db)\n", "",
		},
		{
			`"done_bytes":9,"compared":["alpha","beta"],"left_out":["gamma"],` + found, 1,
			"beta differs at 4096, 8192 bytes, repaired: no\ncompared: alpha, beta; not, since not in sync: gamma (blockstep status db)\n",
			"blockstep: 1 ranges differ; run blockstep verify db --repair\n",
		},
		{
			`"done_bytes":7,"compared":["alpha","beta","gamma"],` + found, 1, "beta differs at 4096, 8192 bytes, repaired: no\n",
			"blockstep: compared up to 7 of 9 bytes: 1 ranges differ; run blockstep verify db --repair, which goes on to the end\n",
		},
		{
			`"done_bytes":9,"found_more":2000,` + strings.Replace(found, "false", "true", 1), 0,
			"beta differs at 4096, 8192 bytes, repaired: yes\nand 2000 ranges more, repaired: yes\n", "",
		},
	} {
		h := http.NewServeMux()
		h.HandleFunc("POST /v1/volumes/db/verify", func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte(`{"total_bytes":9,"waits":"waits for web"}` + "\n"))
			_, _ = w.Write([]byte(`{"done":true,"total_bytes":9,` + tc.line + "}\n"))
		})
		var out, errOut bytes.Buffer
		code := run(t.Context(), []string{"--admin", fakeDaemon(t, h), "verify", "db"}, strings.NewReader(""), &out, &errOut)
		if code != tc.code || out.String() != tc.out || !strings.HasPrefix(errOut.String(), "waits for web\n\r") || !strings.HasSuffix(errOut.String(), "%\n"+tc.err) {
			t.Errorf("%s: exit code %d\n%s%s", tc.line, code, out.String(), errOut.String())
		}
	}
}

// TestWarnings: what was done as it was asked for, and may not be meant, is told on stderr,
// and is in the JSON.
func TestWarnings(t *testing.T) {
	h := http.NewServeMux()
	h.HandleFunc("POST /v1/volumes", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"volume":"db","size":1024,"primary":"alpha","warnings":[{"volume":"db","text":"it is thin","next":"see to it"}]}`))
	})
	admin := fakeDaemon(t, h)
	for flag, want := range map[string]string{"--json=false": "volume db of 1KiB serves, primary alpha\n", "--json": `"text": "it is thin"`} {
		var out, errOut bytes.Buffer
		code := run(t.Context(), []string{"--admin", admin, flag, "volume", "create", "db", "--size", "1KiB"}, strings.NewReader(""), &out, &errOut)
		if code != 0 || !strings.Contains(out.String(), want) || errOut.String() != "warning: it is thin\n  next: see to it\n" {
			t.Errorf("%s: exit code %d, %s%s", flag, code, out.String(), errOut.String())
		}
	}
}

// TestNextWithoutALeader: nobody is sent to a node that has no name.
func TestNextWithoutALeader(t *testing.T) {
	for want, up := range map[string]bool{
		"  next: start blockstepd on beta, or check the network between the nodes\n":                     false,
		"  next: wait: one is elected within seconds; if none is, check the network between the nodes\n": true,
	} {
		var out bytes.Buffer
		verdict(&out, control.ClusterStatus{Nodes: []control.NodeStatus{{Name: "alpha", Up: true}, {Name: "beta", Up: up}}})
		if !strings.Contains(out.String(), want) {
			t.Errorf("beta is up: %v:\n%s", up, out.String())
		}
	}
}

// TestNoDaemonThere: whatever answers at the address and is no blockstepd, a
// metrics port or an NBD one, is the same to a script: no daemon is reached.
func TestNoDaemonThere(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("NBDMAGICIHAVEOPT\x00\x03"))
			defer conn.Close()
		}
	}()
	for _, admin := range []string{fakeDaemon(t, http.NotFoundHandler()), "tcp://" + l.Addr().String()} {
		for _, verb := range []string{"status", "volume list", "doctor"} {
			var says bytes.Buffer
			code := run(t.Context(), append([]string{"--config", "nosuch.yaml", "--admin", admin}, strings.Fields(verb)...), strings.NewReader(""), &bytes.Buffer{}, &says)
			if code != exitUnreachable || !strings.Contains(says.String(), "no daemon reachable") || !strings.Contains(says.String(), "does not look like blockstepd; check --admin") {
				t.Errorf("%s at %s: exit code %d: %s", verb, admin, code, says.String())
			}
		}
	}
}

// TestDrainLines: what a drain tells is of the volumes that the node has, and of the
// replicas that are not in sync yet.
func TestDrainLines(t *testing.T) {
	left := int64(24)
	on := func(volume string, rs ...control.ReplicaStatus) control.VolumeStatus {
		return control.VolumeStatus{Volume: volume, Replicas: rs}
	}
	got := drainLines([]control.VolumeStatus{
		on("db", control.ReplicaStatus{Node: "beta", State: control.InSync}, control.ReplicaStatus{Node: "gamma", State: control.CatchingUp},
			control.ReplicaStatus{Node: "delta", State: control.Resyncing, Resync: &control.Resync{DoneBytes: 8 << 20, TotalBytes: 32 << 20, Rate: 1 << 20, Left: &left}}),
		on("other", control.ReplicaStatus{Node: "delta", State: control.Resyncing}),
		on("log", control.ReplicaStatus{Node: "gamma", State: control.InSync}, control.ReplicaStatus{Node: "delta", State: control.Failed, Reason: "no space left on device"}),
	}, "gamma")
	want := []string{
		"db: the replica on delta is Resyncing, 25% of 32MiB, 1MiB/s, 24s left",
		"log: the replica on delta is Failed: no space left on device",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}
