package wire

import (
	"errors"
	"fmt"
	"io"

	"github.com/blockstep/blockstep/internal/buf"
)

// Reader takes frames from a stream. It is for one goroutine.
type Reader struct {
	src  io.Reader
	know Versions
	buf  []byte
	r, w int // buf[r:w] is read and not taken
	// ahead is how much may be read that nobody has asked for. After a large
	// payload it is little: the next one then comes straight to its place.
	ahead int
	list  []payload
	n     uint64
}

// NewReader returns a Reader of src. It reads ahead, so nobody else may read
// from src after the first Next.
func NewReader(src io.Reader) *Reader { return NewReaderOf(src, Known()) }

// NewReaderOf is NewReader for frames of certain versions only: those of a link
// whose ends have agreed on one.
func NewReaderOf(src io.Reader, versions Versions) *Reader {
	return &Reader{src: src, know: versions, buf: make([]byte, readBuffer), ahead: readBuffer}
}

// Bytes returns how many bytes of frames Next has taken.
func (r *Reader) Bytes() uint64 { return r.n }

// Next waits for a frame and fills e, whose holder then owns the message: see
// Envelope.Free. Every payload has been compared with its checksum. It returns
// io.EOF at an end between frames, io.ErrUnexpectedEOF within one, an error
// that wraps ErrMalformed, ErrChecksum, ErrNewer or ErrLimit for bytes that are
// no frame, and the source's own errors. After an error the stream is done for.
func (r *Reader) Next(e *Envelope) error {
	if err := r.fill(HeaderLen); err != nil {
		return err
	}
	h, err := parseHeader(r.buf[r.r:], r.know)
	if err != nil {
		return err
	}
	if err := r.fill(HeaderLen + h.body); err != nil {
		return unexpected(err)
	}
	frame := r.buf[r.r : r.r+HeaderLen+h.body]
	if le.Uint32(frame[offCRC:]) != frameCRC(frame) {
		return fmt.Errorf("%w: header of type %d", ErrChecksum, h.typ)
	}
	if frame[offFlags] != 0 || frame[offFlags+1] != 0 {
		return fmt.Errorf("%w: frame flags % x", ErrMalformed, frame[offFlags:offVolume])
	}
	m, list, err := decodeBody(h, frame[HeaderLen:], r.list[:0])
	r.list = list
	if err != nil {
		return err
	}
	r.r += len(frame)
	r.ahead = readBuffer
	*e = Envelope{Volume: h.volume, Msg: m}
	if len(list) > 0 {
		if err := r.payloads(m); err != nil {
			e.Free()
			return err
		}
	}
	r.n += uint64(h.frameLen())
	return nil
}

// Ready reports whether the whole of another frame has been read already, so
// that Next will not wait (or will find that what was read is no frame).
func (r *Reader) Ready() bool {
	if r.w-r.r < HeaderLen {
		return false
	}
	h, err := parseHeader(r.buf[r.r:], r.know)
	return err != nil || h.frameLen() <= r.w-r.r
}

// payloads reads the payloads that r.list names into m.
func (r *Reader) payloads(m Message) error {
	switch m := m.(type) {
	case *Append:
		for _, p := range r.list {
			e := &m.Entries[p.index]
			var err error
			if e.Payload, err = r.payload(p.size, e.PayloadCRC); err != nil {
				return fmt.Errorf("entry %v: %w", e.Pos, err)
			}
			if e.Kind == KindMarker {
				if _, err := DecodeMarker(e.Payload.B); err != nil {
					return fmt.Errorf("entry %v: %w", e.Pos, err)
				}
			}
		}
		return nil
	case *Blocks:
		for _, p := range r.list {
			k := &m.Blocks[p.index]
			var err error
			if k.Payload, err = r.payload(p.size, k.CRC); err != nil {
				return fmt.Errorf("block at %d: %w", k.Off, err)
			}
		}
		return nil
	case *Forward:
		var err error
		m.Payload, err = r.payload(r.list[0].size, m.PayloadCRC)
		return err
	case *ResyncStart:
		var err error
		m.Payload, err = r.payload(r.list[0].size, m.PayloadCRC)
		return err
	case *ResyncState:
		var err error
		m.Payload, err = r.payload(r.list[0].size, m.PayloadCRC)
		return err
	case *Reply:
		var err error
		m.Payload, err = r.payload(r.list[0].size, m.PayloadCRC)
		return err
	}
	return fmt.Errorf("%w: payload of type %d", ErrMalformed, m.Type())
}

func (r *Reader) payload(size int, sum uint32) (*buf.Buf, error) {
	if size >= 2*directRead {
		r.ahead = leanAhead
	}
	p := buf.Get(size)
	if err := r.readFull(p.B); err != nil {
		p.Release()
		return nil, err
	}
	if got := Checksum(p.B); got != sum {
		p.Release()
		return nil, fmt.Errorf("%w: payload of %d bytes has %08x, not %08x", ErrChecksum, size, got, sum)
	}
	return p, nil
}

// readFull fills p, a large rest straight from the source. An end is unexpected.
func (r *Reader) readFull(p []byte) error {
	for {
		n := copy(p, r.buf[r.r:r.w])
		r.r += n
		if p = p[n:]; len(p) == 0 {
			return nil
		}
		if len(p) >= directRead {
			if err := r.readDirect(p); err != nil {
				return unexpected(err)
			}
			return nil
		}
		if err := r.fill(len(p)); err != nil {
			return unexpected(err)
		}
	}
}

// readDirect fills p from the source.
func (r *Reader) readDirect(p []byte) error {
	most, ok := r.src.(interface{ ReadMost(p []byte) (int, error) })
	if !ok {
		_, err := io.ReadFull(r.src, p)
		return err
	}
	for len(p) > 0 {
		n, err := most.ReadMost(p)
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// fill reads until n bytes are there, to at most FrameBodyMax and a header.
func (r *Reader) fill(n int) error {
	if r.w-r.r >= n {
		return nil
	}
	if r.r > 0 {
		r.w = copy(r.buf, r.buf[r.r:r.w])
		r.r = 0
	}
	if n > len(r.buf) {
		grown := make([]byte, n)
		copy(grown, r.buf[:r.w])
		r.buf = grown
	}
	for r.w < n {
		k, err := r.src.Read(r.buf[r.w:min(len(r.buf), max(n, r.w+r.ahead))])
		r.w += k
		if r.w >= n {
			return nil
		}
		if r.w > 0 && errors.Is(err, io.EOF) {
			return io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// unexpected turns an end within a frame into the error that says so.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
