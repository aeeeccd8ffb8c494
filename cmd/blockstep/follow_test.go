package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
)

// TestFollowOfNoVolume: that a volume is not there is said once, and each time
// anew that it goes; it is waited for.
func TestFollowOfNoVolume(t *testing.T) {
	ctx, stop := context.WithTimeout(t.Context(), 50*time.Second)
	defer stop()
	none := control.Errorf(control.CodeNotFound, "there are: db", `there is no volume "bd"`)
	b := &script{primary: "alpha", answers: []error{none, none, nil}}
	out := &lockedText{news: func(text string) {
		if strings.HasSuffix(text, "start\n") {
			stop()
		}
	}}
	said := &lockedText{news: func(string) {}}
	a := &app{in: strings.NewReader(""), out: out, err: said, terminal: func(...any) bool { return false }}
	code := a.main(ctx, []string{"--admin", serveBackend(t, b), "follow", "bd", "--start", "echo start", "--stop", "echo stop"})
	const want = "blockstep: there is no volume \"bd\"; there are: db; waiting for it\n"
	if code != exitDone || out.String() != "stop\nstart\n" || said.String() != want {
		t.Errorf("exit code %d: %q, %q; want the words once: %q", code, out, said, want)
	}
}
