package wire

import (
	"fmt"

	"github.com/blockstep/blockstep/internal/ident"
)

// cursor takes fields from a body. Reading past its end sets short and gives
// zeroes, so that the caller asks once, at the end.
type cursor struct {
	b     []byte
	short bool
}

func (c *cursor) u8() byte {
	if len(c.b) < 1 {
		c.short = true
		return 0
	}
	v := c.b[0]
	c.b = c.b[1:]
	return v
}

func (c *cursor) u32() uint32 {
	if len(c.b) < 4 {
		c.short = true
		return 0
	}
	v := le.Uint32(c.b)
	c.b = c.b[4:]
	return v
}

func (c *cursor) u64() uint64 {
	if len(c.b) < 8 {
		c.short = true
		return 0
	}
	v := le.Uint64(c.b)
	c.b = c.b[8:]
	return v
}

func (c *cursor) position() ident.Position {
	e := c.u64()
	return ident.Position{Epoch: ident.Epoch(e), Seq: ident.Seq(c.u64())}
}

// bools takes a byte of n booleans; one with other bits is malformed.
func (c *cursor) bools(n uint) byte {
	v := c.u8()
	if v>>n != 0 {
		c.short = true
	}
	return v
}

// zero takes n bytes that have no meaning.
func (c *cursor) zero(n int) {
	for range n {
		if c.u8() != 0 {
			c.short = true
		}
	}
}

// end says whether exactly the body has been taken.
func (c *cursor) end(m Message) error {
	if c.short || len(c.b) != 0 {
		return fmt.Errorf("%w: body of type %d has a wrong length or value", ErrMalformed, m.Type())
	}
	return nil
}

// payload is a payload that follows a body: its length, and where it belongs
// in the message.
type payload struct {
	size  int
	index int
}

// decodeBody makes a message of a verified body, all but the payloads, which it
// lists. The message is a recycled one; on an error it is recycled again.
func decodeBody(h header, body []byte, list []payload) (Message, []payload, error) {
	c := cursor{b: body}
	var m Message
	var err error
	switch h.typ {
	case TypeAppend:
		x := appends.Get()
		list, err = x.decode(&c, list)
		m = x
	case TypeAck:
		x := acks.Get()
		x.decode(&c)
		m = x
	case TypeReject:
		x := new(Reject)
		err = x.decode(&c)
		m = x
	case TypeStale:
		m = &Stale{Epoch: ident.Epoch(c.u64()), Promised: ident.Epoch(c.u64())}
	case TypeRelease:
		m = &Release{Epoch: ident.Epoch(c.u64())}
	case TypeReleased:
		m = &Released{Epoch: ident.Epoch(c.u64())}
	case TypeBlocks:
		x := blocks.Get()
		list, err = x.decode(&c, list)
		m = x
	case TypeBlocksAck:
		x := blockAck.Get()
		*x = BlocksAck{Epoch: ident.Epoch(c.u64()), Stream: c.u64(), ID: c.u64(), Durable: c.bools(1) != 0}
		m = x
	case TypeForward:
		x := forwards.Get()
		list, err = x.decode(&c, h.payload, list)
		m = x
	case TypeReply:
		x := replies.Get()
		list, err = x.decode(&c, h.payload, list)
		m = x
	case TypeResyncStart:
		x := new(ResyncStart)
		list = x.decode(&c, h.payload, list)
		m = x
	case TypeResyncState:
		x := new(ResyncState)
		list = x.decode(&c, h.payload, list)
		m = x
	case TypePing:
		x := pings.Get()
		*x = Ping{Clock: int64(c.u64()), Echo: int64(c.u64()), Held: int64(c.u64())}
		m = x
	default:
		return nil, list, fmt.Errorf("%w: no message has type %d", ErrMalformed, h.typ)
	}
	if err == nil {
		err = c.end(m)
	}
	if err == nil {
		err = checkPayloads(h, list)
	}
	if err != nil {
		recycle(m)
		return nil, list, err
	}
	return m, list, nil
}

func checkPayloads(h header, list []payload) error {
	sum := 0
	for _, p := range list {
		sum += p.size
	}
	if sum != h.payload {
		return fmt.Errorf("%w: payloads of %d bytes in a frame with %d", ErrMalformed, sum, h.payload)
	}
	return nil
}

func (m *Append) decode(c *cursor, list []payload) ([]payload, error) {
	m.Epoch = ident.Epoch(c.u64())
	m.Stream = c.u64()
	m.Prev = c.position()
	m.Commit = ident.Seq(c.u64())
	m.SyncTo = ident.Seq(c.u64())
	m.Trim = ident.Seq(c.u64())
	m.LossEpoch = ident.Epoch(c.u64())
	m.Met = ident.Incarnation(c.u64())
	m.Generation = c.u64()
	m.LeaseSent = int64(c.u64())
	m.LeaseFor = int64(c.u64())
	n := int(c.u32())
	if n > FrameEntriesMax || n*entryLen != len(c.b) {
		return list, fmt.Errorf("%w: %d entries in %d bytes", ErrMalformed, n, len(c.b))
	}
	if cap(m.Entries) < n {
		m.Entries = make([]Entry, 0, max(n, 16))
	}
	prev := m.Prev
	for i := range n {
		e := Entry{Pos: c.position(), Off: c.u64(), Len: c.u64(), Session: c.u64(), Request: c.u64(), PayloadCRC: c.u32()}
		size := int(c.u32())
		e.Kind, e.Flags = Kind(c.u8()), c.u8()
		c.zero(2)
		if err := e.check(prev, size); err != nil {
			return list, err
		}
		prev = e.Pos
		if size > 0 {
			list = append(list, payload{size: size, index: i})
		}
		m.Entries = append(m.Entries, e)
	}
	return list, nil
}

func (m *Ack) decode(c *cursor) {
	m.Epoch = ident.Epoch(c.u64())
	m.Stream = c.u64()
	m.Replica = ident.Replica(c.u64())
	m.Incarnation = ident.Incarnation(c.u64())
	m.Matched = ident.Seq(c.u64())
	m.Durable = ident.Seq(c.u64())
	m.Applied = ident.Seq(c.u64())
	m.LeaseSent = int64(c.u64())
	m.Checkpoint = ident.Seq(c.u64())
	flags := c.bools(2)
	m.Amnesiac, m.Inconsistent = flags&1 != 0, flags&2 != 0
}

func (m *Reject) decode(c *cursor) error {
	m.Epoch = ident.Epoch(c.u64())
	m.Stream = c.u64()
	m.Replica = ident.Replica(c.u64())
	m.Incarnation = ident.Incarnation(c.u64())
	m.Last = c.position()
	m.Base = c.position()
	m.Applied = ident.Seq(c.u64())
	m.Durable = ident.Seq(c.u64())
	m.LeaseSent = int64(c.u64())
	m.Reason = RejectReason(c.u8())
	m.Amnesiac = c.bools(1) != 0
	n := int(c.u32())
	if n > HistoryMax || n*epochLen != len(c.b) {
		return fmt.Errorf("%w: %d epochs in %d bytes", ErrMalformed, n, len(c.b))
	}
	if n > 0 {
		m.History = make([]ident.EpochStart, n)
	}
	for i := range m.History {
		m.History[i] = ident.EpochStart{Epoch: ident.Epoch(c.u64()), First: ident.Seq(c.u64())}
	}
	return m.check()
}

func (m *Blocks) decode(c *cursor, list []payload) ([]payload, error) {
	m.Epoch = ident.Epoch(c.u64())
	m.Stream = c.u64()
	m.ID = c.u64()
	m.AsOf = ident.Seq(c.u64())
	n := int(c.u32())
	flags := c.bools(2)
	m.First, m.Last = flags&1 != 0, flags&2 != 0
	c.zero(3)
	if n > FrameBlocksMax || n*blockLen != len(c.b) {
		return list, fmt.Errorf("%w: %d blocks in %d bytes", ErrMalformed, n, len(c.b))
	}
	if cap(m.Blocks) < n {
		m.Blocks = make([]Block, 0, max(n, 16))
	}
	for i := range n {
		k := Block{Off: c.u64(), Len: c.u64(), CRC: c.u32()}
		has := c.u32()
		if has > 1 {
			c.short = true
		}
		if err := k.check(has == 1); err != nil {
			return list, err
		}
		if has == 1 {
			list = append(list, payload{size: int(k.Len), index: i})
		}
		m.Blocks = append(m.Blocks, k)
	}
	return list, nil
}

func (m *Forward) decode(c *cursor, size int, list []payload) ([]payload, error) {
	m.ID = c.u64()
	m.Off = c.u64()
	m.Len = c.u64()
	m.Session = c.u64()
	m.Request = c.u64()
	m.LastSeen = c.position()
	m.Generation = c.u64()
	m.Echo = int64(c.u64())
	m.PayloadCRC = c.u32()
	m.Op, m.Flags = Op(c.u8()), c.u8()
	m.Replay = c.bools(1) != 0
	if size > 0 {
		list = append(list, payload{size: size})
	}
	return list, m.check(size)
}

func (m *Reply) decode(c *cursor, size int, list []payload) ([]payload, error) {
	m.ID = c.u64()
	m.Pos = c.position()
	m.PayloadCRC = c.u32()
	m.Status = Status(c.u8())
	c.zero(1)
	n := int(c.u8())
	if n != len(c.b) {
		return list, fmt.Errorf("%w: name of %d bytes in %d", ErrMalformed, n, len(c.b))
	}
	if n > 0 {
		m.Primary = ident.Node(c.b)
		c.b = nil
	}
	if size > 0 {
		list = append(list, payload{size: size})
	}
	return list, m.check(size)
}
