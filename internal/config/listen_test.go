package config

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// withNBD is the design's example with another nbd section.
func withNBD(section string) string {
	return strings.Replace(good, `nbd:   {listen: ["unix:///run/blockstep/nbd.sock", "tcp://127.0.0.1:10809"]}`, "nbd:\n"+section, 1)
}

func TestListenersWithOptions(t *testing.T) {
	c, err := Load(write(t, withNBD(`  listen:
    - unix:///run/blockstep/nbd.sock
    - {address: "unix:///run/blockstep/backup.sock", mode: 0600, group: backup, read_only: true, allow: ["db@*", web]}
    - {address: "tcp://0.0.0.0:10809", max_connections: 16, tls: required, allow: db}
    - {address: "fd://public", tls: off}
  max_requests: 64
  stall_timeout: 5s
  tls: {cert: /c.pem, key: /k.pem, ca: /a.pem}
`)+"memory: {nbd: 256MiB, nbd_connection: 64MiB}\n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []Listener{
		{Network: "unix", Address: "/run/blockstep/nbd.sock", Mode: 0o660},
		{Network: "unix", Address: "/run/blockstep/backup.sock", Mode: 0o600, Group: "backup", ReadOnly: true, Allow: []string{"db@*", "web"}},
		{Network: "tcp", Address: "0.0.0.0:10809", Mode: 0o660, MaxConnections: 16, TLS: TLSRequired, Allow: []string{"db"}},
		{Network: "fd", Address: "public", Mode: 0o660, TLS: TLSOff},
	}
	if diff := cmp.Diff(want, c.NBD.Listen); diff != "" {
		t.Errorf("nbd.listen (-want +got):\n%s", diff)
	}
	if c.NBD.MaxRequests != 64 || c.NBD.StallTimeout != 5*time.Second || c.Memory.NBD != 256<<20 || c.Memory.NBDConnection != 64<<20 {
		t.Errorf("%+v %+v", c.NBD, c.Memory)
	}
	if c, err = Load(write(t, good), nil); err != nil || c.NBD.MaxRequests != 256 || c.NBD.StallTimeout != time.Minute || c.Memory.NBDConnection != 32<<20 {
		t.Errorf("defaults: %+v %+v %v", c.NBD, c.Memory, err)
	}
}

func TestListenerErrors(t *testing.T) {
	for section, want := range map[string]string{
		"  listen: [{read_only: true}]\n":                                     `FILE:9: nbd.listen[0]: has no address; write it as {address: "unix:///run/blockstep/nbd.sock", mode: "0660"}; allowed here: address, allow, group, max_connections, mode, read_only, tls`,
		"  listen: [{address: \"tcp://:1\", readonly: true}]\n":               `FILE:9: nbd.listen[0].readonly: unknown key; did you mean "read_only"? allowed here: address, allow, group, max_connections, mode, read_only, tls`,
		"  listen: [{address: \"tcp://:1\", mode: \"0600\"}]\n":               `FILE:9: nbd.listen[0].mode: is for unix sockets, and this listener is none; remove it; tcp has tls and the firewall, and a socket of systemd's has SocketMode= and SocketGroup= in its unit`,
		"  listen: [{address: \"unix:///a\", mode: \"0999\"}]\n":              `FILE:9: nbd.listen[0].mode: "0999" is not a file mode; allowed are octal modes, for example 0660`,
		"  listen: [{address: \"tcp://:1\", max_connections: 0}]\n":           `FILE:9: nbd.listen[0].max_connections: "0" is not a number in range; allowed are 1 to 65536`,
		"  listen: [{address: \"tcp://:1\", tls: yes}]\n":                     `FILE:9: nbd.listen[0].tls: "yes" is not known; allowed are off, offered, required`,
		"  listen: [\"unix:///a\", {address: \"tcp://:1\", tls: required}]\n": `FILE:9: nbd.listen: entry 1, tcp://:1, has tls: required, and there is no certificate; set nbd.tls.cert and nbd.tls.key to PEM files, or remove it`,
		"  listen: [{address: \"tcp://:1\", read_only: maybe}]\n":             `FILE:9: nbd.listen[0].read_only: "maybe" is neither true nor false; allowed are true and false`,
		"  listen: [{address: \"tcp://:1\", allow: [\"[\"]}]\n":               `FILE:9: nbd.listen[0].allow: "[" is neither an export's name nor a pattern; write it like [db, "db@*", web]; * stands for any characters, ? for one`,
		"  listen: [{address: \"tcp://:1\", allow: []}]\n":                    `FILE:9: nbd.listen[0].allow: is not a list of export names; write it like [db, "db@*", web]; leave it out to allow all`,
		"  listen: [\"fd://\"]\n":                                             `FILE:9: nbd.listen[0]: "fd://" names no socket; write fd://NAME with the FileDescriptorName= of systemd's socket unit`,
		"  listen: [\"fd://a\", \"fd://a\"]\n":                                `FILE:9: nbd.listen: a is used by nbd.listen already; give each its own address`,
		"  listen: [\"tcp://:1\"]\n  stall_timeout: 1ms\n":                    `FILE:10: nbd.stall_timeout: 1ms is out of range; allowed are 1s to 24h0m0s, written like 300ms, 2s or 1m30s`,
		"  listen: [\"tcp://:1\"]\nmemory: {nbd_connection: 1GiB}\n":          `FILE:10: memory.nbd_connection: 1GiB is more than memory.nbd, 32MiB; lower it, or raise memory.nbd`,
		"  listen: {address: \"tcp://:1\"}\n":                                 `FILE:9: nbd.listen: is not a list of addresses; write it like ["unix:///run/blockstep/nbd.sock", "tcp://127.0.0.1:10809"]`,
	} {
		file := write(t, withNBD(section))
		_, err := Load(file, nil)
		if err == nil {
			t.Errorf("no error for\n%s", section)
			continue
		}
		if got := strings.ReplaceAll(err.Error(), file, "FILE"); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}
