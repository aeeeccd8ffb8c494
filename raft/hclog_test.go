package raft

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"

	hraft "github.com/hashicorp/raft"
)

// What hashicorp/raft says of a connection that this node has closed is no complaint:
// it came after the line by which a node that was removed says what to do.
func TestOwnEndIsNoComplaint(t *testing.T) {
	var out bytes.Buffer
	h := newHclog(slog.New(slog.NewTextHandler(&out, nil)))
	for _, err := range []error{&net.OpError{Op: "read", Net: "tcp", Err: net.ErrClosed}, hraft.ErrTransportShutdown, hraft.ErrRaftShutdown} {
		h.Error("failed to decode incoming command", "error", err)
	}
	if out.Len() > 0 {
		t.Errorf("it complains: %s", out.String())
	}
	h.Error("failed to decode incoming command", "error", fmt.Errorf("unknown rpc type 9"))
	if !strings.Contains(out.String(), "level=ERROR") || !strings.Contains(out.String(), "rpc type 9") {
		t.Errorf("it says: %s", out.String())
	}
}
