package daemon

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
)

// TestInvitation: a token is for one node, and for a time.
func TestInvitation(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	st := state.New()
	for _, c := range []state.Command{
		{InitCluster: &state.InitCluster{Cluster: "c", ClusterID: "1", Nodes: []state.Node{{Name: "alpha", Address: "a:1", RaftID: "alpha/1"}}}},
		state.Invitation{Name: "delta", Address: "d:1", Expires: now.Add(time.Hour).UnixNano()}.Command("token of delta", ""),
	} {
		next, r := st.Apply(c)
		if !r.OK {
			t.Fatal(r.Err())
		}
		st = next
	}
	for _, tc := range []struct {
		token, node string
		at          time.Time
		code        control.Code
		says        string
	}{
		{"token of beta", "delta", now, control.CodeNotFound, "is not known"},
		{"", "delta", now, control.CodeNotFound, "is not known"},
		{"token of delta", "beta", now, control.CodeRefused, "is for node delta"},
		{"token of delta", "delta", now.Add(time.Hour + 1), control.CodeRefused, "has expired at 2026-01-02T04:04:05Z"},
	} {
		var e *control.Error
		if _, err := invitation(st, tc.token, ident.Node(tc.node), tc.at); !errors.As(err, &e) || e.Code != tc.code || !strings.Contains(e.Message, tc.says) {
			t.Errorf("%q of %s: %v, want %s, %q", tc.token, tc.node, err, tc.code, tc.says)
		}
	}
	if inv, err := invitation(st, "token of delta", "delta", now.Add(time.Hour)); err != nil || inv.Address != "d:1" {
		t.Errorf("%+v, %v", inv, err)
	}
}

// TestNewAddress: a node that is to join has an address of its own, at which others can
// reach it; with a token nobody asks it there before.
func TestNewAddress(t *testing.T) {
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	for address, says := range map[string]string{
		"0.0.0.0:7700":                        "is no address that other nodes can reach",
		"[::]:7700":                           "is no address that other nodes can reach",
		"10.1.0.4":                            "is not HOST:PORT",
		nodes["beta"].config().Self().Address: "is the address of node beta",
	} {
		for _, token := range []bool{false, true} {
			r := control.AddNode{Name: "delta", Address: address, Token: token}
			if token {
				r.TokenSeconds = 60
			}
			var e *control.Error
			if out, err := alpha.client.AddNode(t.Context(), r); !errors.As(err, &e) || !strings.Contains(e.Message, says) || e.Next == "" {
				t.Errorf("%s, token %v: %+v, %v", address, token, out, err)
			}
		}
	}
	if out, err := alpha.client.AddNode(t.Context(), control.AddNode{Name: "delta", Address: freeAddress(t), Token: true, TokenSeconds: 60}); err != nil || out.Token == "" {
		t.Errorf("an address of its own: %+v, %v", out, err)
	}
}
