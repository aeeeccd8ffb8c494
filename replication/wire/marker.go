package wire

import (
	"bytes"
	"fmt"

	"github.com/blockstep/blockstep/internal/ident"
)

const (
	markerVersion = 1
	markerFixed   = 36
	markerZero    = 24 // bytes of zero at the end of the fixed part
	// MarkerLenMax is the most bytes that an encoded Marker has.
	MarkerLenMax = markerFixed + NameMax
)

// EncodeMarker appends the bytes of m, which stand in the log and on the wire,
// to dst. It returns an error that wraps ErrLimit for too long a name, or
// ErrMalformed for a type that is none.
func EncodeMarker(dst []byte, m Marker) ([]byte, error) {
	if len(m.Node) > NameMax {
		return dst, fmt.Errorf("%w: node name of %d bytes", ErrLimit, len(m.Node))
	}
	if m.Type != MarkerEpoch {
		return dst, fmt.Errorf("%w: marker of type %d", ErrMalformed, m.Type)
	}
	dst = append(dst, markerVersion, byte(m.Type), 0, byte(len(m.Node)))
	dst = le.AppendUint64(dst, uint64(m.Replica))
	dst = append(dst, make([]byte, markerZero)...)
	return append(dst, m.Node...), nil
}

// DecodeMarker is the inverse of EncodeMarker. It returns an error that wraps
// ErrNewer for a marker of a later version, and ErrMalformed for what is none.
func DecodeMarker(b []byte) (Marker, error) {
	if len(b) > 0 && b[0] > markerVersion {
		return Marker{}, fmt.Errorf("%w: version %d of a marker; upgrade this node", ErrNewer, b[0])
	}
	if len(b) < markerFixed || b[0] != markerVersion || b[2] != 0 || int(b[3]) != len(b)-markerFixed {
		return Marker{}, fmt.Errorf("%w: marker of %d bytes", ErrMalformed, len(b))
	}
	m := Marker{
		Type:    MarkerType(b[1]),
		Replica: ident.Replica(le.Uint64(b[4:])),
		Node:    ident.Node(b[markerFixed:]),
	}
	if m.Type != MarkerEpoch || !bytes.Equal(b[markerFixed-markerZero:markerFixed], make([]byte, markerZero)) {
		return Marker{}, fmt.Errorf("%w: marker of type %d", ErrMalformed, m.Type)
	}
	return m, nil
}
