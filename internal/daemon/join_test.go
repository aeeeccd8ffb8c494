package daemon

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
)

// TestInvitations: a token is for one node, for a time, and once; the newest for
// a node counts, and there is a limit.
func TestInvitations(t *testing.T) {
	var all invitations
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	delta := control.AddNode{Name: "delta", Address: "10.1.0.4:7700", Witness: true}
	first, _, err := all.add(delta, time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	second, expires, err := all.add(delta, time.Hour, now)
	if err != nil || !expires.Equal(now.Add(time.Hour)) {
		t.Fatalf("expires %v, %v", expires, err)
	}
	if first == second || !strings.HasPrefix(second, tokenPrefix) || len(second) < len(tokenPrefix)+26 {
		t.Errorf("tokens %q, %q", first, second)
	}
	for _, tc := range []struct {
		token, node, says string
		at                time.Time
	}{
		{first, "delta", "is not known", now},
		{"", "delta", "is not known", now},
		{second + "A", "delta", "is not known", now},
		{second, "beta", "is for node delta", now},
		{second, "delta", "has expired at 2026-01-02T04:04:05Z", now.Add(time.Hour + 1)},
	} {
		if _, err := all.find(tc.token, ident.Node(tc.node), tc.at); err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%q: %v, want %q", tc.token, err, tc.says)
		}
	}
	if inv, err := all.find(second, "delta", now.Add(time.Hour)); err != nil || inv.node != delta {
		t.Errorf("%+v, %v", inv, err)
	}
	all.use(second)
	if _, err := all.find(second, "delta", now); err == nil {
		t.Error("it is good twice")
	}
	for i := range invitationsMax {
		if _, _, err := all.add(control.AddNode{Name: fmt.Sprint("n", i)}, time.Minute, now); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := all.add(delta, time.Minute, now); err == nil {
		t.Error("there is no limit")
	}
	if _, _, err := all.add(delta, time.Minute, now.Add(2*time.Minute)); err != nil {
		t.Errorf("those that have expired count: %v", err)
	}
}
