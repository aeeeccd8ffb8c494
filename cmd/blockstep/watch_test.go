package main

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
)

// script answers what is asked for as it comes: each call takes the next answer,
// and the last one stays.
type script struct {
	control.Backend
	asked   atomic.Int64
	answers []error // nil: it is there
	primary string
}

func (s *script) VolumeStatus(_ context.Context, volume string) (control.VolumeStatus, error) {
	n := int(s.asked.Add(1)) - 1
	if err := s.answers[min(n, len(s.answers)-1)]; err != nil {
		return control.VolumeStatus{}, err
	}
	return control.VolumeStatus{Volume: volume, Primary: s.primary, Health: control.Healthy, InSync: []string{}, Replicas: []control.ReplicaStatus{}}, nil
}

func (s *script) Status(context.Context) (control.ClusterStatus, error) {
	return control.ClusterStatus{Node: "alpha"}, nil
}

func (s *script) Events(ctx context.Context, _ string, _ bool, _ func(control.Event) error) error {
	<-ctx.Done()
	return ctx.Err()
}

// lockedText is written by who runs, and read by who waits.
type lockedText struct {
	mu   sync.Mutex
	text strings.Builder
	news func(text string)
}

func (l *lockedText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	l.news(l.text.String())
	return len(p), nil
}

func (l *lockedText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// TestWatchOutlivesARestart: a daemon that has just started and does not know its
// cluster yet is no reason to end, as one that is not reached is none. A volume
// that is not there is.
func TestWatchOutlivesARestart(t *testing.T) {
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	b := &script{answers: []error{
		nil, control.Errorf(control.CodeFailed, "start the nodes", "this node has not heard the cluster state since its start"), nil,
	}}
	out := &lockedText{news: func(text string) {
		if strings.Count(text, "db is healthy") == 2 {
			stop()
		}
	}}
	said := &lockedText{news: func(string) {}}
	a := &app{in: strings.NewReader(""), out: out, err: said, terminal: func(...any) bool { return false }}
	if code := a.main(ctx, []string{"--admin", serveBackend(t, b), "status", "db", "--watch"}); code != exitDone || !strings.Contains(out.String(), "has not heard the cluster state") {
		t.Errorf("exit code %d: %s%s", code, out, said)
	}
	b = &script{answers: []error{control.Errorf(control.CodeNotFound, "there are: db", `there is no volume "bd"`)}}
	if code := a.main(t.Context(), []string{"--admin", serveBackend(t, b), "status", "bd", "--watch"}); code != exitFailed {
		t.Errorf("a volume that is not there: exit code %d: %s", code, said)
	}
}
