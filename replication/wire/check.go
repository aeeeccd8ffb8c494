package wire

import (
	"fmt"
	"math"

	"github.com/blockstep/blockstep/internal/ident"
)

// The checks of this file are the gate: the decoder makes no value that fails
// one, so nobody behind it has to ask again; the encoder sends none either, so
// that a mistake shows where it is made.

// offsetMax is the largest end of an extent: offsets are signed to the kernel.
const offsetMax = math.MaxInt64

func checkExtent(off, n uint64) error {
	if off > offsetMax || n > offsetMax-off {
		return fmt.Errorf("%w: extent %d+%d ends beyond what a file can have", ErrMalformed, off, n)
	}
	return nil
}

// check judges an entry that follows prev and carries n bytes of payload.
func (e *Entry) check(prev ident.Position, n int) error {
	if e.Pos.Seq != prev.Seq+1 || e.Pos.Epoch < prev.Epoch {
		return fmt.Errorf("%w: entry %v after %v", ErrMalformed, e.Pos, prev)
	}
	if n > EntryPayloadMax {
		return fmt.Errorf("%w: entry %v with %d bytes of payload", ErrLimit, e.Pos, n)
	}
	if e.Flags&^FlagNoHole != 0 {
		return fmt.Errorf("%w: entry %v with flags %#x", ErrMalformed, e.Pos, e.Flags)
	}
	if err := checkExtent(e.Off, e.Len); err != nil {
		return err
	}
	ok := false
	switch e.Kind {
	case KindData:
		ok = n > 0 && uint64(n) == e.Len
	case KindZero, KindTrim:
		ok = n == 0 && e.Len > 0
	case KindMarker:
		ok = n > 0 && n <= MarkerLenMax && e.Len == 0
	}
	if !ok {
		return fmt.Errorf("%w: entry %v of kind %d, %d bytes long, with %d bytes of payload", ErrMalformed, e.Pos, e.Kind, e.Len, n)
	}
	return nil
}

func (k *Block) check(payload bool) error {
	if k.Len == 0 {
		return fmt.Errorf("%w: empty block at %d", ErrMalformed, k.Off)
	}
	if payload && k.Len > EntryPayloadMax {
		return fmt.Errorf("%w: block of %d bytes", ErrLimit, k.Len)
	}
	return checkExtent(k.Off, k.Len)
}

func (m *Reject) check() error {
	if m.Reason < RejectGap || m.Reason > RejectFailed {
		return fmt.Errorf("%w: reject for reason %d", ErrMalformed, m.Reason)
	}
	for i := 1; i < len(m.History); i++ {
		if a, b := m.History[i-1], m.History[i]; b.Epoch <= a.Epoch || b.First < a.First {
			return fmt.Errorf("%w: epoch history has %d:%d after %d:%d", ErrMalformed, b.Epoch, b.First, a.Epoch, a.First)
		}
	}
	return nil
}

func (m *Forward) check(n int) error {
	if n > EntryPayloadMax || (m.Op == OpRead && m.Len > EntryPayloadMax) {
		return fmt.Errorf("%w: request for %d bytes", ErrLimit, m.Len)
	}
	if m.Flags&^(ForwardFUA|ForwardNoHole|ForwardReqOne|ForwardReplica) != 0 {
		return fmt.Errorf("%w: request with flags %#x", ErrMalformed, m.Flags)
	}
	if err := checkExtent(m.Off, m.Len); err != nil {
		return err
	}
	ok := false
	switch m.Op {
	case OpWrite:
		ok = n > 0 && uint64(n) == m.Len
	case OpRead, OpTrim, OpZero, OpBlockStatus:
		ok = n == 0 && m.Len > 0
	case OpFlush, OpForget:
		ok = n == 0
	}
	if !ok {
		return fmt.Errorf("%w: request %d, %d bytes long, with %d bytes of payload", ErrMalformed, m.Op, m.Len, n)
	}
	return nil
}

func (m *Reply) check(n int) error {
	switch {
	case n > EntryPayloadMax:
		return fmt.Errorf("%w: reply with %d bytes of payload", ErrLimit, n)
	case m.Status < StatusOK || m.Status > StatusUnsupported:
		return fmt.Errorf("%w: reply with status %d", ErrMalformed, m.Status)
	case len(m.Primary) > NameMax:
		return fmt.Errorf("%w: node name of %d bytes", ErrLimit, len(m.Primary))
	case n > 0 && m.Status != StatusOK:
		return fmt.Errorf("%w: reply with status %d and a payload", ErrMalformed, m.Status)
	}
	return nil
}
