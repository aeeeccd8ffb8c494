package wire

import (
	"encoding/binary"
	"fmt"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
)

// Lengths of what repeats in bodies.
const (
	entryLen = 60
	epochLen = 16
	blockLen = 24
)

var le = binary.LittleEndian

func appendBody(b []byte, pl []*buf.Buf, m Message) ([]byte, []*buf.Buf, error) {
	switch m := m.(type) {
	case *Append:
		return m.encode(b, pl)
	case *Ack:
		return m.encode(b), pl, nil
	case *Reject:
		return m.encode(b, pl)
	case *Stale:
		return le.AppendUint64(le.AppendUint64(b, uint64(m.Epoch)), uint64(m.Promised)), pl, nil
	case *Release:
		return le.AppendUint64(b, uint64(m.Epoch)), pl, nil
	case *Released:
		return le.AppendUint64(b, uint64(m.Epoch)), pl, nil
	case *Blocks:
		return m.encode(b, pl)
	case *BlocksAck:
		b = le.AppendUint64(b, uint64(m.Epoch))
		b = le.AppendUint64(b, m.Stream)
		b = le.AppendUint64(b, m.ID)
		return append(b, bit(m.Durable, 0)), pl, nil
	case *Forward:
		return m.encode(b, pl)
	case *Reply:
		return m.encode(b, pl)
	case *ResyncStart:
		return m.encode(b, pl)
	case *ResyncState:
		return m.encode(b, pl)
	case *Ping:
		b = le.AppendUint64(b, uint64(m.Clock))
		b = le.AppendUint64(b, uint64(m.Echo))
		return le.AppendUint64(b, uint64(m.Held)), pl, nil
	}
	return b, pl, fmt.Errorf("%w: no bytes are defined for a %T", ErrMalformed, m)
}

func bit(set bool, n uint) byte {
	if set {
		return 1 << n
	}
	return 0
}

func putPosition(b []byte, p ident.Position) []byte {
	return le.AppendUint64(le.AppendUint64(b, uint64(p.Epoch)), uint64(p.Seq))
}

func (m *Append) encode(b []byte, pl []*buf.Buf) ([]byte, []*buf.Buf, error) {
	if len(m.Entries) > FrameEntriesMax {
		return b, pl, fmt.Errorf("%w: %d entries in one append", ErrLimit, len(m.Entries))
	}
	b = le.AppendUint64(b, uint64(m.Epoch))
	b = le.AppendUint64(b, m.Stream)
	b = putPosition(b, m.Prev)
	b = le.AppendUint64(b, uint64(m.Commit))
	b = le.AppendUint64(b, uint64(m.SyncTo))
	b = le.AppendUint64(b, uint64(m.Trim))
	b = le.AppendUint64(b, uint64(m.LossEpoch))
	b = le.AppendUint64(b, uint64(m.Met))
	b = le.AppendUint64(b, m.Generation)
	b = le.AppendUint64(b, uint64(m.LeaseSent))
	b = le.AppendUint64(b, uint64(m.LeaseFor))
	b = le.AppendUint32(b, uint32(len(m.Entries)))
	prev := m.Prev
	for i := range m.Entries {
		e := &m.Entries[i]
		n := e.PayloadLen()
		if err := e.check(prev, n); err != nil {
			return b, pl, err
		}
		prev = e.Pos
		b = putPosition(b, e.Pos)
		b = le.AppendUint64(b, e.Off)
		b = le.AppendUint64(b, e.Len)
		b = le.AppendUint64(b, e.Session)
		b = le.AppendUint64(b, e.Request)
		b = le.AppendUint32(b, e.PayloadCRC)
		b = le.AppendUint32(b, uint32(n))
		b = append(b, byte(e.Kind), e.Flags, 0, 0)
		if e.Payload != nil {
			pl = append(pl, e.Payload)
		}
	}
	return b, pl, nil
}

func (m *Ack) encode(b []byte) []byte {
	b = le.AppendUint64(b, uint64(m.Epoch))
	b = le.AppendUint64(b, m.Stream)
	b = le.AppendUint64(b, uint64(m.Replica))
	b = le.AppendUint64(b, uint64(m.Incarnation))
	b = le.AppendUint64(b, uint64(m.Matched))
	b = le.AppendUint64(b, uint64(m.Durable))
	b = le.AppendUint64(b, uint64(m.Applied))
	b = le.AppendUint64(b, uint64(m.LeaseSent))
	b = le.AppendUint64(b, uint64(m.Checkpoint))
	return append(b, bit(m.Amnesiac, 0)|bit(m.Inconsistent, 1))
}

func (m *Reject) encode(b []byte, pl []*buf.Buf) ([]byte, []*buf.Buf, error) {
	if len(m.History) > HistoryMax {
		return b, pl, fmt.Errorf("%w: %d epochs in one reject", ErrLimit, len(m.History))
	}
	if err := m.check(); err != nil {
		return b, pl, err
	}
	b = le.AppendUint64(b, uint64(m.Epoch))
	b = le.AppendUint64(b, m.Stream)
	b = le.AppendUint64(b, uint64(m.Replica))
	b = le.AppendUint64(b, uint64(m.Incarnation))
	b = putPosition(b, m.Last)
	b = putPosition(b, m.Base)
	b = le.AppendUint64(b, uint64(m.Applied))
	b = le.AppendUint64(b, uint64(m.Durable))
	b = le.AppendUint64(b, uint64(m.LeaseSent))
	b = append(b, byte(m.Reason), bit(m.Amnesiac, 0))
	b = le.AppendUint32(b, uint32(len(m.History)))
	for _, h := range m.History {
		b = le.AppendUint64(b, uint64(h.Epoch))
		b = le.AppendUint64(b, uint64(h.First))
	}
	return b, pl, nil
}

func (m *Blocks) encode(b []byte, pl []*buf.Buf) ([]byte, []*buf.Buf, error) {
	if len(m.Blocks) > FrameBlocksMax {
		return b, pl, fmt.Errorf("%w: %d extents in one blocks", ErrLimit, len(m.Blocks))
	}
	b = le.AppendUint64(b, uint64(m.Epoch))
	b = le.AppendUint64(b, m.Stream)
	b = le.AppendUint64(b, m.ID)
	b = le.AppendUint64(b, uint64(m.AsOf))
	b = le.AppendUint32(b, uint32(len(m.Blocks)))
	b = append(b, bit(m.First, 0)|bit(m.Last, 1), 0, 0, 0)
	for i := range m.Blocks {
		k := &m.Blocks[i]
		if err := k.check(k.Payload != nil); err != nil {
			return b, pl, err
		}
		has := uint32(0)
		if k.Payload != nil {
			if uint64(len(k.Payload.B)) != k.Len {
				return b, pl, fmt.Errorf("%w: block of %d bytes with a payload of %d", ErrMalformed, k.Len, len(k.Payload.B))
			}
			has = 1
			pl = append(pl, k.Payload)
		}
		b = le.AppendUint64(b, k.Off)
		b = le.AppendUint64(b, k.Len)
		b = le.AppendUint32(b, k.CRC)
		b = le.AppendUint32(b, has)
	}
	return b, pl, nil
}

func (m *Forward) encode(b []byte, pl []*buf.Buf) ([]byte, []*buf.Buf, error) {
	n := 0
	if m.Payload != nil {
		n = len(m.Payload.B)
	}
	if err := m.check(n); err != nil {
		return b, pl, err
	}
	b = le.AppendUint64(b, m.ID)
	b = le.AppendUint64(b, m.Off)
	b = le.AppendUint64(b, m.Len)
	b = le.AppendUint64(b, m.Session)
	b = le.AppendUint64(b, m.Request)
	b = putPosition(b, m.LastSeen)
	b = le.AppendUint64(b, m.Generation)
	b = le.AppendUint64(b, uint64(m.Echo))
	b = le.AppendUint32(b, m.PayloadCRC)
	b = append(b, byte(m.Op), m.Flags, bit(m.Replay, 0))
	if m.Payload != nil {
		pl = append(pl, m.Payload)
	}
	return b, pl, nil
}

func (m *Reply) encode(b []byte, pl []*buf.Buf) ([]byte, []*buf.Buf, error) {
	n := 0
	if m.Payload != nil {
		n = len(m.Payload.B)
	}
	if err := m.check(n); err != nil {
		return b, pl, err
	}
	b = le.AppendUint64(b, m.ID)
	b = putPosition(b, m.Pos)
	b = le.AppendUint32(b, m.PayloadCRC)
	b = append(b, byte(m.Status), 0, byte(len(m.Primary)))
	b = append(b, m.Primary...)
	if m.Payload != nil {
		pl = append(pl, m.Payload)
	}
	return b, pl, nil
}
