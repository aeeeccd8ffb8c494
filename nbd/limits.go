package nbd

import (
	"errors"
	"fmt"
	"time"
)

// Limits bounds what clients can make the server hold. The zero value of a
// field stands for its default. At most
//
//	BytesTotal + connections * (connReserveBytes + ReadBuffer + 64 KiB)
//
// bytes of payload and buffers are held at any time; and one payload more for each
// export whose first large request came while others had used up BytesTotal.
type Limits struct {
	// Requests is how many requests of one connection are in flight, from
	// parsed to reply sent. Default 256: fio and the kernel use up to 128.
	Requests int
	// BytesPerConn bounds the payload bytes, of reads, writes and the answers to
	// block status, that one connection has in flight. Default 32 MiB, which is also the least.
	BytesPerConn int64
	// BytesTotal bounds the same over all connections, not counting the 1 MiB
	// that each one may always use. Default 128 MiB, at least 32 MiB: one request
	// of the largest size always finds room when the others are done, and when
	// those of other exports never are.
	BytesTotal int64
	// ReadBuffer is how far a busy connection's read buffer grows, in bytes.
	// Default 256 KiB.
	ReadBuffer int
	// Connections bounds those of all listeners together; three quarters of it
	// those by TCP that have not chosen an export yet. Default 1024.
	Connections int
	// Handshake is the time from accept to the end of negotiation, TLS
	// included. Default 30 s.
	Handshake time.Duration
	// Stall is how long a client may leave a request half sent, or take no
	// byte of its replies, before it is cut off. Default 60 s.
	Stall time.Duration
	// Idle ends a connection without requests after this time. 0 is never.
	Idle time.Duration
	// Drain is how long requests in flight are waited for after a client's
	// disconnect request, before those that no peer has are dropped.
	// Default 30 s.
	Drain time.Duration
}

// What is fixed because the protocol or the code's structure says so.
const (
	// PayloadMax is the largest READ or WRITE, 32 MiB: what the protocol asks
	// every server to take, and the largest buffer that buf pools.
	PayloadMax = 32 << 20
	// payloadSkipMax is the largest payload that is read and thrown away to
	// answer a refused WRITE; a larger one ends the connection.
	payloadSkipMax = 2 * PayloadMax
	// payloadClaimMax is the memory that a claim alone may cost: a payload
	// larger than this is given its buffer as its bytes arrive.
	payloadClaimMax = 1 << 20
	// connReserveBytes is what each connection may have in flight whatever
	// others use, so that nobody is starved by a slow client.
	connReserveBytes = 1 << 20
	// inlineBytesMax is how much a goroutine that completes requests sends to one
	// client before it leaves the rest to the connection's own writer: whoever
	// answers all clients of a volume must not copy one client's large reads for
	// long.
	inlineBytesMax = 1 << 20
	// readBufferMin holds a header and a 4 KiB write; idle connections keep
	// no more than this.
	readBufferMin = 16 << 10
	// A payload of leanPayload bytes and more is read straight to its place but
	// for what came with its header: at most leanRead bytes of it, which are
	// copied.
	leanPayload = 64 << 10
	leanRead    = 4 << 10

	// lingerMax is how long a connection that the server ends waits for the
	// client to take the last answers.
	lingerMax = 5 * time.Second
	// lingerQuiet is how long it waits for more once the client's kernel has
	// them.
	lingerQuiet = 100 * time.Millisecond

	// stringMax is the protocol's limit for every string, in bytes.
	stringMax = 4096
	// optionDataMax is the largest option that is parsed: the name and
	// queriesMax queries of ordinary length.
	optionDataMax = 64 << 10
	// optionSkipMax is the largest option that is skipped with an error; the
	// sender of a larger one is cut off.
	optionSkipMax = 1 << 20
	// optionsMax bounds the options of one negotiation.
	optionsMax = 1024
	// infoRequestsMax bounds the information requests of INFO and GO that are
	// answered; those that mean nothing here are not counted.
	infoRequestsMax = 64
	// looseRequestsMax bounds the information requests of an option that does not
	// say how long it is.
	looseRequestsMax = 64
	// queriesMax bounds the queries of one meta context option.
	queriesMax = 64
	// contextsMax bounds the meta contexts of one session.
	contextsMax = 16

	// ExtentsMax bounds the extents of one context in the answer to a block status:
	// a session need give no more, since a client asks on behind them. The protocol
	// says at most 2^20.
	ExtentsMax = 4096
	// statusBytes is what the answer to a block status counts for in the budget, for
	// each context: its extents, and as they are sent.
	statusBytes = ExtentsMax * (16 + 16)
	// holeRunsMax is how many chunks a sparse read is split into at most; one
	// with more runs travels as data.
	holeRunsMax = 32
	// errorTextMax bounds the text of an error chunk, in bytes.
	errorTextMax = 256
)

func (l *Limits) setDefaults() error {
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{{&l.Handshake, 30 * time.Second}, {&l.Stall, time.Minute}, {&l.Drain, 30 * time.Second}} {
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	if l.Requests == 0 {
		l.Requests = 256
	}
	if l.BytesPerConn == 0 {
		l.BytesPerConn = PayloadMax
	}
	if l.BytesTotal == 0 {
		l.BytesTotal = 128 << 20
	}
	if l.ReadBuffer == 0 {
		l.ReadBuffer = 256 << 10
	}
	if l.Connections == 0 {
		l.Connections = 1024
	}
	switch {
	case l.Requests < 1 || l.Requests > 1<<16:
		return fmt.Errorf("nbd: limit of %d requests a connection: set 1 to 65536", l.Requests)
	case l.BytesPerConn < PayloadMax:
		return fmt.Errorf("nbd: limit of %d bytes a connection: one request may have %d", l.BytesPerConn, PayloadMax)
	case l.BytesTotal < PayloadMax:
		return fmt.Errorf("nbd: limit of %d bytes in all: set at least %d", l.BytesTotal, PayloadMax)
	case l.ReadBuffer < readBufferMin || l.ReadBuffer > PayloadMax:
		return fmt.Errorf("nbd: read buffer of %d bytes: set %d to %d", l.ReadBuffer, readBufferMin, PayloadMax)
	case l.Connections < 1:
		return fmt.Errorf("nbd: limit of %d connections: set at least 1", l.Connections)
	case l.Handshake < 0 || l.Stall < 0 || l.Idle < 0 || l.Drain < 0:
		return errors.New("nbd: a time-out is negative")
	}
	return nil
}
