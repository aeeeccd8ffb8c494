package mux

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

type logBuf struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuf) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuf) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func start(t testing.TB) (*Mux, string, *logBuf) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	logs := &logBuf{}
	m := New(l, slog.New(slog.NewTextHandler(logs, nil)))
	done := make(chan error, 1)
	go func() { done <- m.Serve() }()
	t.Cleanup(func() {
		m.Close()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return m, l.Addr().String(), logs
}

func TestEachProtocolReachesItsListener(t *testing.T) {
	m, addr, _ := start(t)
	for _, p := range []string{PrefaceRaft, PrefacePeer, PrefaceNode} {
		c, err := Dial(t.Context(), addr, p)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "hello "+p); err != nil {
			t.Fatal(err)
		}
		in, err := m.Listener(p).Accept()
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 6+len(p))
		if _, err := io.ReadFull(in, got); err != nil || string(got) != "hello "+p {
			t.Errorf("%s: read %q, %v", p, got, err)
		}
		in.Close()
	}
}

func TestHTTPIsServedBesideThem(t *testing.T) {
	m, addr, _ := start(t)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Method, r.URL.Path) })}
	go srv.Serve(m.HTTP())
	defer srv.Close()
	for _, method := range []string{"GET", "POST", "DELETE"} {
		req, _ := http.NewRequestWithContext(t.Context(), method, "http://"+addr+"/x", nil)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(body) != method+"/x" {
			t.Errorf("got %q", body)
		}
	}
}

// TestGarbageIsClosed sends what no client of ours would: each connection is
// closed, with one line in the log, and the port goes on serving.
func TestGarbageIsClosed(t *testing.T) {
	m, addr, logs := start(t)
	for _, garbage := range []string{"\x00\x00\x00\x00\x00\x00\x00\x00\x00", "SSH-2.0-OpenSSH", "NBDMAGIC", "BSRAFT99", "BSPEER02xxxx", "GETAWAY1", "get / HT", "\x16\x03\x01\x02\x00\x01\x00\x01"} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, garbage); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		var ne net.Error
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("%q: read %d bytes, %v", garbage, n, err)
		} else if errors.As(err, &ne) && ne.Timeout() {
			t.Errorf("%q: was not closed", garbage)
		}
		c.Close()
	}
	if got := strings.Count(logs.String(), "closed a connection"); got != 8 {
		t.Errorf("%d lines in the log for 8 connections:\n%s", got, logs)
	}
	if !strings.Contains(logs.String(), "upgrade this node") {
		t.Error("a newer version is not called newer")
	}
	c, err := Dial(t.Context(), addr, PrefaceNode)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in, err := m.Listener(PrefaceNode).Accept()
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
}

func TestCloseEndsSilentConnectionsAndWaits(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := New(l, slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { done <- m.Serve() }()
	silent, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	waiting, err := Dial(context.Background(), l.Addr().String(), PrefacePeer) // nobody accepts it
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	if err := m.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := <-done; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := m.Listener(PrefaceRaft).Accept(); err == nil {
		t.Error("Accept after Close")
	}
}

func FuzzFirstBytes(f *testing.F) {
	f.Add([]byte(PrefaceRaft))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte{0, 1, 2})
	m, _, _ := start(f)
	f.Fuzz(func(t *testing.T, raw []byte) {
		client, server := net.Pipe()
		go func() {
			client.Write(raw)
			client.Close()
		}()
		target, rest, err := m.sniff(server)
		server.Close()
		if (target == nil) == (err == nil) {
			t.Fatalf("target %v, error %v", target, err)
		}
		if rest != nil && !bytes.HasPrefix(raw, rest) {
			t.Fatalf("gives back %q of %q", rest, raw)
		}
	})
}
