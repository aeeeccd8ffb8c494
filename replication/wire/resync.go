package wire

import (
	"fmt"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
)

// ResyncStart makes the receiver a resync target. Unless Continue is set, its
// log begins anew after Base, and what is in Payload replaces its epoch
// history, its table of requests and its record of changes. It answers with a
// ResyncState. With Continue it only answers.
type ResyncStart struct {
	Epoch    ident.Epoch
	Stream   uint64
	Base     ident.Position // applied and committed at the source
	Since    ident.Seq      // the point of divergence: what the target holds after it is not ours
	Whole    bool           // there is no such point: everything may differ
	Continue bool
	// Payload is a ResyncData, encoded.
	PayloadCRC uint32
	Payload    *buf.Buf
}

// ResyncState says which blocks the target still lacks.
type ResyncState struct {
	Epoch       ident.Epoch
	Stream      uint64
	Replica     ident.Replica
	Incarnation ident.Incarnation
	PayloadCRC  uint32
	Payload     *buf.Buf // an encoded bitmap
}

// ResyncData is what travels with ResyncStart.
type ResyncData struct {
	Dirty      []byte // encoded bitmap: the blocks that may differ, as far as the source knows
	Changes    []byte // encoded record of changes, as of Base
	History    []ident.EpochStart
	Dedup      []DedupEntry
	DedupFloor ident.Position
}

// DedupEntry remembers that an entry answered a request.
type DedupEntry struct {
	Session, Request uint64
	Seq              ident.Seq
}

// Type implements Message.
func (*ResyncStart) Type() Type { return TypeResyncStart }

// Type implements Message.
func (*ResyncState) Type() Type { return TypeResyncState }

// Encode appends the bytes of d.
func (d *ResyncData) Encode(b []byte) []byte {
	b = le.AppendUint32(b, uint32(len(d.Dirty)))
	b = append(b, d.Dirty...)
	b = le.AppendUint32(b, uint32(len(d.Changes)))
	b = append(b, d.Changes...)
	b = le.AppendUint32(b, uint32(len(d.History)))
	for _, h := range d.History {
		b = le.AppendUint64(le.AppendUint64(b, uint64(h.Epoch)), uint64(h.First))
	}
	b = putPosition(b, d.DedupFloor)
	b = le.AppendUint32(b, uint32(len(d.Dedup)))
	for _, e := range d.Dedup {
		b = le.AppendUint64(le.AppendUint64(le.AppendUint64(b, e.Session), e.Request), uint64(e.Seq))
	}
	return b
}

// DecodeResyncData decodes what Encode made. Its byte slices point into b.
func DecodeResyncData(b []byte) (ResyncData, error) {
	c := cursor{b: b}
	var d ResyncData
	d.Dirty = c.bytes(int(c.u32()))
	d.Changes = c.bytes(int(c.u32()))
	n := int(c.u32())
	if n > HistoryMax || n*epochLen > len(c.b) {
		return d, fmt.Errorf("%w: %d epochs in %d bytes", ErrMalformed, n, len(c.b))
	}
	for range n {
		d.History = append(d.History, ident.EpochStart{Epoch: ident.Epoch(c.u64()), First: ident.Seq(c.u64())})
	}
	d.DedupFloor = c.position()
	n = int(c.u32())
	if c.short || n*24 != len(c.b) {
		return d, fmt.Errorf("%w: %d remembered requests in %d bytes", ErrMalformed, n, len(c.b))
	}
	for range n {
		d.Dedup = append(d.Dedup, DedupEntry{Session: c.u64(), Request: c.u64(), Seq: ident.Seq(c.u64())})
	}
	return d, nil
}

func (c *cursor) bytes(n int) []byte {
	if n < 0 || n > len(c.b) {
		c.short = true
		return nil
	}
	v := c.b[:n:n]
	c.b = c.b[n:]
	return v
}

func (m *ResyncStart) encode(b []byte, pl []*buf.Buf) ([]byte, []*buf.Buf, error) {
	b = le.AppendUint64(b, uint64(m.Epoch))
	b = le.AppendUint64(b, m.Stream)
	b = putPosition(b, m.Base)
	b = le.AppendUint64(b, uint64(m.Since))
	b = le.AppendUint32(b, m.PayloadCRC)
	b = append(b, bit(m.Whole, 0)|bit(m.Continue, 1))
	if m.Payload != nil {
		pl = append(pl, m.Payload)
	}
	return b, pl, nil
}

func (m *ResyncStart) decode(c *cursor, size int, list []payload) []payload {
	m.Epoch = ident.Epoch(c.u64())
	m.Stream = c.u64()
	m.Base = c.position()
	m.Since = ident.Seq(c.u64())
	m.PayloadCRC = c.u32()
	flags := c.bools(2)
	m.Whole, m.Continue = flags&1 != 0, flags&2 != 0
	if size > 0 {
		list = append(list, payload{size: size})
	}
	return list
}

func (m *ResyncState) encode(b []byte, pl []*buf.Buf) ([]byte, []*buf.Buf, error) {
	b = le.AppendUint64(b, uint64(m.Epoch))
	b = le.AppendUint64(b, m.Stream)
	b = le.AppendUint64(b, uint64(m.Replica))
	b = le.AppendUint64(b, uint64(m.Incarnation))
	b = le.AppendUint32(b, m.PayloadCRC)
	if m.Payload != nil {
		pl = append(pl, m.Payload)
	}
	return b, pl, nil
}

func (m *ResyncState) decode(c *cursor, size int, list []payload) []payload {
	m.Epoch = ident.Epoch(c.u64())
	m.Stream = c.u64()
	m.Replica = ident.Replica(c.u64())
	m.Incarnation = ident.Incarnation(c.u64())
	m.PayloadCRC = c.u32()
	if size > 0 {
		list = append(list, payload{size: size})
	}
	return list
}
