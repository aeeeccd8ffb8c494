package wire

import "fmt"

// Extent is one run of a block status, as NBD's base:allocation has it.
type Extent struct {
	Len   uint64 // bytes, not 0
	Flags uint32 // 1: a hole; 2: reads as zeroes
}

const extentLen = 12

// EncodeExtents appends the bytes of list, the payload of a Reply to
// OpBlockStatus, to dst. Extents beyond ExtentsMax are left out: an answer may
// cover less than what was asked for.
func EncodeExtents(dst []byte, list []Extent) []byte {
	for _, e := range list[:min(len(list), ExtentsMax)] {
		dst = le.AppendUint64(dst, e.Len)
		dst = le.AppendUint32(dst, e.Flags)
	}
	return dst
}

// DecodeExtents appends the extents of b to dst. It returns an error that wraps
// ErrMalformed for bytes that EncodeExtents does not make.
func DecodeExtents(dst []Extent, b []byte) ([]Extent, error) {
	if len(b)%extentLen != 0 || len(b)/extentLen > ExtentsMax {
		return dst, fmt.Errorf("%w: block status of %d bytes", ErrMalformed, len(b))
	}
	end := uint64(0)
	for ; len(b) > 0; b = b[extentLen:] {
		e := Extent{Len: le.Uint64(b), Flags: le.Uint32(b[8:])}
		if e.Len == 0 {
			return dst, fmt.Errorf("%w: empty extent in a block status", ErrMalformed)
		}
		if err := checkExtent(end, e.Len); err != nil {
			return dst, err
		}
		end += e.Len
		dst = append(dst, e)
	}
	return dst, nil
}
