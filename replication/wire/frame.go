package wire

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
)

// Versions of the frame that this build speaks. A link uses the newest one
// that both ends know (Hello).
const (
	VersionMin = 1
	VersionMax = 1
)

// Versions are the versions of the frame that a process speaks.
type Versions struct{ Min, Max uint8 }

// Known are those of this build.
func Known() Versions { return Versions{Min: VersionMin, Max: VersionMax} }

// Has reports whether version is one of them.
func (v Versions) Has(version uint8) bool { return version >= v.Min && version <= v.Max }

// The header of every frame, little-endian (docs/format/wire.md).
const (
	HeaderLen = 28

	frameMagic = 0x4653_4242 // "BBSF" as bytes 42 42 53 46

	offVersion = 4
	offType    = 5
	offFlags   = 6
	offVolume  = 8
	offBody    = 16
	offPayload = 20
	offCRC     = 24
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum returns the CRC-32C of a payload, as PayloadCRC has it.
func Checksum(payload []byte) uint32 { return crc32.Checksum(payload, castagnoli) }

// AppendFrame is AppendFrameAs in the newest version that this build knows.
func AppendFrame(dst []byte, payloads []*buf.Buf, vol ident.Volume, m Message) ([]byte, []*buf.Buf, error) {
	return AppendFrameAs(VersionMax, dst, payloads, vol, m)
}

// AppendFrameAs appends the header and the body of m's frame, in the version
// that the link's ends have agreed on, to dst, and the
// buffers whose bytes follow them on the wire, in order, to payloads; nothing
// of a payload is copied, and no reference taken. For a message beyond a limit,
// or one that no receiver would take, it returns dst and payloads unchanged and
// an error that wraps ErrLimit or ErrMalformed.
func AppendFrameAs(version uint8, dst []byte, payloads []*buf.Buf, vol ident.Volume, m Message) ([]byte, []*buf.Buf, error) {
	start, first := len(dst), len(payloads)
	var header [HeaderLen]byte
	out := append(dst, header[:]...)
	out, list, err := appendBody(out, payloads, m)
	if err != nil {
		clear(list[min(first, len(list)):])
		return dst, payloads, err
	}
	size := 0
	for _, p := range list[first:] {
		size += len(p.B)
	}
	body := len(out) - start - HeaderLen
	if body > FrameBodyMax || size > FramePayloadMax {
		clear(list[first:])
		return dst, payloads, fmt.Errorf("%w: frame of %d and %d bytes", ErrLimit, body, size)
	}
	h := out[start:]
	binary.LittleEndian.PutUint32(h, frameMagic)
	h[offVersion] = version
	h[offType] = byte(m.Type())
	binary.LittleEndian.PutUint64(h[offVolume:], uint64(vol))
	binary.LittleEndian.PutUint32(h[offBody:], uint32(body))
	binary.LittleEndian.PutUint32(h[offPayload:], uint32(size))
	binary.LittleEndian.PutUint32(h[offCRC:], frameCRC(h))
	return out, list, nil
}

// frameCRC is the CRC-32C of the header before its CRC field, and of the body.
func frameCRC(frame []byte) uint32 {
	c := crc32.Update(0, castagnoli, frame[:offCRC])
	return crc32.Update(c, castagnoli, frame[HeaderLen:])
}

// header is a frame's header, judged.
type header struct {
	typ     Type
	volume  ident.Volume
	body    int
	payload int
}

func (h header) frameLen() int { return HeaderLen + h.body + h.payload }

// parseHeader judges the first HeaderLen bytes of b. The checksum, which covers
// the body too, is for later; magic, version and limits come before anything
// is allocated or waited for.
func parseHeader(b []byte, known Versions) (header, error) {
	if binary.LittleEndian.Uint32(b) != frameMagic {
		return header{}, fmt.Errorf("%w: no frame begins with % x", ErrMalformed, b[:4])
	}
	switch v := b[offVersion]; {
	case v > known.Max:
		return header{}, fmt.Errorf("%w: version %d of a frame, known are %d to %d; upgrade this node", ErrNewer, v, known.Min, known.Max)
	case v < known.Min:
		return header{}, fmt.Errorf("%w: version %d of a frame", ErrMalformed, v)
	}
	h := header{
		typ:     Type(b[offType]),
		volume:  ident.Volume(binary.LittleEndian.Uint64(b[offVolume:])),
		body:    int(binary.LittleEndian.Uint32(b[offBody:])),
		payload: int(binary.LittleEndian.Uint32(b[offPayload:])),
	}
	if h.body > FrameBodyMax || h.payload > FramePayloadMax {
		return header{}, fmt.Errorf("%w: frame of %d and %d bytes", ErrLimit, h.body, h.payload)
	}
	return h, nil
}
