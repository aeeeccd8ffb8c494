package nbd

import (
	"errors"
	"testing"
)

// TestGateGrows: where an export grows under a client that knows of it, the gate
// asks for the size when a range is beyond the one it knows, and then only.
func TestGateGrows(t *testing.T) {
	size, asked := uint64(1<<20), 0
	g := gate{size: size, blockMin: 1, payloadMax: 1 << 20, grown: func() uint64 { asked++; return size }}
	if err := g.extent(OpWrite, 0, 4096); err != nil || asked != 0 {
		t.Errorf("within: %v, asked %d times", err, asked)
	}
	if err := g.extent(OpRead, 1<<20, 4096); !errors.Is(err, ErrRange) || asked != 1 {
		t.Errorf("beyond, not grown: %v, asked %d times", err, asked)
	}
	size = 2 << 20
	if err := g.extent(OpRead, 2<<20-4096, 4096); err != nil {
		t.Errorf("grown: %v", err)
	}
	if err := g.extent(OpWrite, 2<<20-4096, 8192); !errors.Is(err, ErrRange) {
		t.Errorf("over the new end: %v", err)
	}
	g.grown, size = nil, 4<<20
	if err := g.extent(OpWrite, 3<<20, 4096); !errors.Is(err, ErrRange) {
		t.Errorf("a fixed size: %v", err)
	}
}
