package wire

import (
	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
)

// Envelope is a message with the volume that it is for. A Reader fills it; the
// holder of a received envelope owns the message struct, its slices and one
// reference of each payload.
type Envelope struct {
	Volume ident.Volume
	Msg    Message
}

// Free ends the holder's use of a *received* envelope: it releases the payloads
// and recycles the message struct and its slices. Whoever keeps an entry copies
// the Entry and retains its payload before. It is not for messages that were
// not made by a Reader, since their slices may belong to someone else. It may
// be called on an empty envelope.
func (e *Envelope) Free() {
	m := e.Msg
	if m == nil {
		return
	}
	*e = Envelope{}
	ReleasePayloads(m)
	recycle(m)
}

// RetainPayloads adds a reference to each payload of m. A sender that keeps m's
// payloads calls it before it hands m to a link, which takes one reference.
func RetainPayloads(m Message) {
	switch m := m.(type) {
	case *Append:
		for i := range m.Entries {
			m.Entries[i].Payload.Retain()
		}
	case *Blocks:
		for i := range m.Blocks {
			m.Blocks[i].Payload.Retain()
		}
	case *Forward:
		m.Payload.Retain()
	case *Reply:
		m.Payload.Retain()
	case *ResyncStart:
		m.Payload.Retain()
	case *ResyncState:
		m.Payload.Retain()
	}
}

// ReleasePayloads drops one reference of each payload of m. The struct m itself stays
// the caller's.
func ReleasePayloads(m Message) {
	switch m := m.(type) {
	case *Append:
		for i := range m.Entries {
			m.Entries[i].Payload.Release()
		}
	case *Blocks:
		for i := range m.Blocks {
			m.Blocks[i].Payload.Release()
		}
	case *Forward:
		m.Payload.Release()
	case *Reply:
		m.Payload.Release()
	case *ResyncStart:
		m.Payload.Release()
	case *ResyncState:
		m.Payload.Release()
	}
}

// The structs of the messages that make up the steady traffic are recycled.
var (
	appends  buf.Pool[Append]
	acks     buf.Pool[Ack]
	forwards buf.Pool[Forward]
	replies  buf.Pool[Reply]
	blocks   buf.Pool[Blocks]
	blockAck buf.Pool[BlocksAck]
	pings    buf.Pool[Ping]
)

func recycle(m Message) {
	switch m := m.(type) {
	case *Append:
		clear(m.Entries)
		entries := m.Entries[:0]
		if cap(entries) > keepEntries {
			entries = nil
		}
		*m = Append{Entries: entries}
		appends.Put(m)
	case *Blocks:
		clear(m.Blocks)
		list := m.Blocks[:0]
		if cap(list) > keepEntries {
			list = nil
		}
		*m = Blocks{Blocks: list}
		blocks.Put(m)
	case *Ack:
		*m = Ack{}
		acks.Put(m)
	case *Forward:
		*m = Forward{}
		forwards.Put(m)
	case *Reply:
		*m = Reply{}
		replies.Put(m)
	case *BlocksAck:
		*m = BlocksAck{}
		blockAck.Put(m)
	case *Ping:
		*m = Ping{}
		pings.Put(m)
	}
}
