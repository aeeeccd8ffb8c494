package nbd_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/nbd/nbdtest"
)

// TestDocumented holds docs/nbd.md to the tests that there are.
func TestDocumented(t *testing.T) {
	doc, err := os.ReadFile("../docs/nbd.md")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	whole, err := filepath.Glob("../e2e/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	files = append(files, whole...)
	var code []byte
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		code = append(code, b...)
	}
	rows := 0
	for line := range strings.Lines(string(doc)) {
		names := regexp.MustCompile(`\b(Test|Fuzz)[A-Z]\w+`).FindAllString(line, -1)
		for _, name := range names {
			rows++
			if !bytes.Contains(code, []byte("func "+name+"(")) {
				t.Errorf("docs/nbd.md names %s, which does not exist", name)
			}
		}
	}
	if rows < 80 {
		t.Errorf("only %d tests are named in docs/nbd.md", rows)
	}
}

func TestDurable(t *testing.T) {
	dev := nbdtest.NewMemDevice(1 << 20)
	addr := serve(t, nbdtest.Exports{"v": dev})
	a, b := dial(t, addr, "v", nbdtest.Options{}), dial(t, addr, "v", nbdtest.Options{Extended: true})
	if a.Flags()&nbdtest.FlagMultiConn == 0 {
		t.Error("no CAN_MULTI_CONN")
	}
	ctx := t.Context()
	for name, change := range map[string]func(...nbdtest.Flag) error{
		"write": func(f ...nbdtest.Flag) error { return a.WriteAt(ctx, []byte("data"), 0, f...) },
		"zero":  func(f ...nbdtest.Flag) error { return a.WriteZeroes(ctx, 0, 512, f...) },
		"trim":  func(f ...nbdtest.Flag) error { return a.Trim(ctx, 0, 512, f...) },
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if dev.Flushed() == dev.Seq() {
			t.Errorf("%s is durable before it was asked to be: the test shows nothing", name)
		}
		if err := b.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		if dev.Flushed() != dev.Seq() {
			t.Errorf("a FLUSH on another connection does not cover the %s", name)
		}
		if err := change(nbdtest.FUA); err != nil {
			t.Fatal(err)
		}
		if dev.Flushed() != dev.Seq() {
			t.Errorf("%s with FUA is not durable", name)
		}
	}
}

func TestFastZero(t *testing.T) {
	c := dial(t, serve(t, one()), "v", nbdtest.Options{})
	ctx := t.Context()
	want := []byte("not to be touched")
	if err := c.WriteAt(ctx, want, 0); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteZeroes(ctx, 0, 512, nbdtest.FastZero, nbdtest.NoHole); !errors.Is(err, nbdtest.ENOTSUP) {
		t.Errorf("%v", err)
	}
	got := make([]byte, len(want))
	if err := c.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%q %v", got, err)
	}
	for _, flags := range []nbdtest.Flag{0, nbdtest.NoHole, nbdtest.FastZero} {
		if err := c.WriteZeroes(ctx, 0, 512, flags); err != nil {
			t.Errorf("flags %d: %v", flags, err)
		}
	}
}

// TestSparse reads over many runs, more than one reply may have chunks.
func TestSparse(t *testing.T) {
	const chunk = 64 << 10
	dev := nbdtest.NewMemDevice(128 * chunk)
	for i := int64(0); i < 128; i += 2 {
		if _, err := dev.WriteAt([]byte{byte(i + 1)}, i*chunk+100); err != nil {
			t.Fatal(err)
		}
	}
	want := content(t, dev)
	for name, style := range styles {
		c := dial(t, serve(t, nbdtest.Exports{"v": dev}), "v", style)
		for _, r := range [][2]uint64{{0, 128 * chunk}, {50, 10 * chunk}, {chunk + 1, 31 * chunk}, {chunk, 2 * chunk}, {chunk, chunk}} {
			got := make([]byte, r[1])
			// The client fails on chunks that overlap, leave gaps or lie outside.
			chunks, err := c.ReadChunks(t.Context(), got, r[0])
			if err != nil || !bytes.Equal(got, want[r[0]:r[0]+r[1]]) {
				t.Errorf("%s: read %v: %v, equal %v", name, r, err, bytes.Equal(got, want[r[0]:r[0]+r[1]]))
			}
			if len(chunks) > 33 {
				t.Errorf("%d chunks", len(chunks))
			}
		}
	}
}

func TestSetMetaReplaces(t *testing.T) {
	addr := serve(t, one())
	for name, second := range map[string][]byte{
		"by nothing":  nbdtest.MetaData("v"),
		"by an error": nbdtest.MetaData("v", "no colon"),
		"by too much": make([]byte, 1<<17),
	} {
		h := begin(t, addr)
		for _, s := range []step{
			{nbdtest.OptStructuredReply, nil, nil},
			{nbdtest.OptSetMetaContext, nbdtest.MetaData("v", "base:allocation"), nil},
		} {
			if _, err := h.Ask(s.opt, s.data); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.Send(nbdtest.OptSetMetaContext, second); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Receive(); err != nil {
			t.Fatal(err)
		}
		wantAlive(t, h)
		send(t, h.Conn, request(nbdtest.CmdBlockStatus, 0, 1, 0, 512))
		if got := errorChunk(t, h.Conn); got != nbdtest.EINVAL {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestBlockSizes(t *testing.T) {
	for _, c := range []struct {
		least, best, most uint32
		want              [3]uint32 // zeroes: refused
	}{
		{0, 0, 0, [3]uint32{1, 4096, nbd.PayloadMax}},
		{512, 4096, 1 << 20, [3]uint32{512, 4096, 1 << 20}},
		{1 << 16, 0, 0, [3]uint32{1 << 16, 1 << 16, nbd.PayloadMax}},
		{1, 512, 1<<32 - 1, [3]uint32{1, 512, nbd.PayloadMax}},
		{3, 4096, 0, [3]uint32{}},
		{1 << 17, 1 << 17, 0, [3]uint32{}},
		{1, 256, 0, [3]uint32{}},
		{4096, 512, 0, [3]uint32{}},
		{1, 4096, 1024, [3]uint32{}},
	} {
		dev := nbdtest.NewMemDevice(1 << 20)
		dev.SetInfo(nbd.Info{BlockMin: c.least, BlockBest: c.best, BlockMax: c.most})
		h := begin(t, serve(t, nbdtest.Exports{"v": dev}))
		for _, opt := range []uint32{nbdtest.OptInfo, nbdtest.OptGo} {
			got, err := h.Ask(opt, nbdtest.GoData("v", 3))
			if c.want == [3]uint32{} {
				if err == nil {
					t.Errorf("%v was advertised", c)
				}
				continue
			}
			want := cat(be(2, 3), be(4, uint64(c.want[0])), be(4, uint64(c.want[1])), be(4, uint64(c.want[2])))
			if err != nil || !bytes.Equal(got[1].Data, want) {
				t.Errorf("%v: %x %v", c, got[1].Data, err)
			}
		}
	}
}

func TestTLSVersions(t *testing.T) {
	mutual, cli := tlsConfigs(t)
	dir := certificates(t)
	oneWay, err := nbd.LoadTLS(filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"), "")
	if err != nil {
		t.Fatal(err)
	}
	open := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // a test of versions
	for name, c := range map[string]struct {
		srv, cli *tls.Config
		versions map[uint16]bool
	}{
		"mutual":  {mutual, cli, map[uint16]bool{tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: false}}, // see readTLS
		"one way": {oneWay, open, map[uint16]bool{tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true}},
	} {
		addr := serve(t, one(), nbd.Config{TLS: c.srv})
		for version, ok := range c.versions {
			cfg := c.cli.Clone()
			cfg.MinVersion, cfg.MaxVersion = version, version
			conn, err := nbdtest.Dial(t.Context(), addr, "v", nbdtest.Options{TLS: cfg})
			if (err == nil) != ok {
				t.Errorf("%s, %s: %v", name, tls.VersionName(version), err)
			}
			if err == nil {
				conn.Close()
			}
		}
	}
}

// TestRenewedCertificate replaces the files: the next handshake has the new
// ones, and a broken file leaves the old ones, which is logged once.
func TestRenewedCertificate(t *testing.T) {
	dir, newer := certificates(t), certificates(t)
	file := func(name string) string { return filepath.Join(dir, name) }
	var log bytes.Buffer // written under the lock of files
	files, err := nbd.OpenTLS(file("server-cert.pem"), file("server-key.pem"), "", slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	addr := serve(t, one(), nbd.Config{TLS: files.Config()})
	seen := func() string {
		var raw []byte
		cfg := &tls.Config{InsecureSkipVerify: true, VerifyPeerCertificate: func(certs [][]byte, _ [][]*x509.Certificate) error { //nolint:gosec // a test looks at what it is shown
			raw = certs[0]
			return nil
		}}
		c, err := nbdtest.Dial(t.Context(), addr, "v", nbdtest.Options{TLS: cfg})
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		return string(raw)
	}
	first := seen()
	if err := os.WriteFile(file("server-cert.pem"), []byte("half a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if seen() != first {
			t.Error("a broken file was taken")
		}
	}
	leaf, err := x509.ParseCertificate([]byte(first))
	if err != nil {
		t.Fatal(err)
	}
	if until, broken := files.State(); broken == nil || !until.Equal(leaf.NotAfter) {
		t.Errorf("it is said to be %v, valid until %v, want %v", broken, until, leaf.NotAfter)
	}
	const stays = "the certificate of before stays in use"
	if text := log.String(); strings.Count(text, stays) != 1 || !strings.Contains(text, "valid_until="+leaf.NotAfter.Format("2006-01-02")) {
		t.Errorf("three handshakes with a broken file are to be logged once: %q", text)
	}
	for _, name := range []string{"server-key.pem", "server-cert.pem"} {
		b, err := os.ReadFile(filepath.Join(newer, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if seen() == first {
		t.Error("the renewed certificate is not used")
	}
	if _, broken := files.State(); broken != nil || strings.Count(log.String(), "is in use") != 1 {
		t.Errorf("after the renewal: %v, %q", broken, log.String())
	}
	// Each change that does not load is told of.
	for _, text := range []string{"another half", "nothing"} {
		if err := os.WriteFile(file("server-key.pem"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		seen()
	}
	if _, broken := files.State(); broken == nil {
		t.Error("a key that is nothing is said to be in use")
	}
	if n := strings.Count(log.String(), stays); n != 3 {
		t.Errorf("three changes were logged %d times: %q", n, log.String())
	}
}

// TestExtended64 uses lengths that 32 bits cannot hold.
func TestExtended64(t *testing.T) {
	const size = 1 << 40
	c := dial(t, serve(t, nbdtest.Exports{"v": nbdtest.NewMemDevice(size)}), "v",
		nbdtest.Options{Extended: true, MetaContexts: []string{nbd.AllocationContext}})
	ctx := t.Context()
	if err := c.WriteAt(ctx, []byte("x"), 1<<39); err != nil {
		t.Fatal(err)
	}
	st, err := c.BlockStatus(ctx, 0, 1<<39)
	if err != nil || len(st[nbd.AllocationContext]) != 1 || st[nbd.AllocationContext][0].Length != 1<<39 {
		t.Errorf("%v %v", st, err)
	}
	if err := c.WriteZeroes(ctx, 0, size); err != nil {
		t.Error(err)
	}
	if err := c.Trim(ctx, 0, size); err != nil {
		t.Error(err)
	}
	got := make([]byte, 1)
	if err := c.ReadAt(ctx, got, 1<<39); err != nil || got[0] != 0 {
		t.Errorf("%v %v", got, err)
	}
}
