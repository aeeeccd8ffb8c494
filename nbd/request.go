package nbd

import (
	"errors"
	"fmt"
)

// gate judges request headers. It is the only way from wire to Request: what
// it lets through has a known command, flags that this command takes, a range
// within the export, aligned, and a payload within the limits, so that nothing
// behind it checks again.
type gate struct {
	size       uint64
	grown      func() uint64 // asked for the size when a range is beyond it; nil: it is fixed
	blockMin   uint64
	payloadMax uint64
	readOnly   bool
	fastZero   bool
	extended   bool // 64-bit headers
	structured bool // reply chunks, also true with extended headers
	contexts   int  // negotiated meta contexts
}

// verdict is what is to be done with a request.
type verdict struct {
	op      Op
	disc    bool   // NBD_CMD_DISC
	payload uint64 // bytes that follow the header, to be taken or, with err, skipped
	filter  bool   // the payload selects meta contexts
	err     error  // answer with this
	fatal   error  // end the connection with this, unanswered
}

var (
	errMagic   = errors.New("nbd: not a request: the client is out of step")
	errUnknown = fmt.Errorf("%w: unknown command", ErrInvalid)
	errFlags   = fmt.Errorf("%w: a flag that the command does not take", ErrInvalid)
	errEmpty   = fmt.Errorf("%w: length 0", ErrInvalid)
	errUnalign = fmt.Errorf("%w: not aligned to the minimum block size", ErrInvalid)
	errPayload = fmt.Errorf("%w: the command takes no payload", ErrInvalid)
	errNeedLen = fmt.Errorf("%w: WRITE needs the payload flag with extended headers", ErrInvalid)
	errOversz  = fmt.Errorf("%w: longer than the maximum payload size", ErrInvalid)
	errNoCtx   = fmt.Errorf("%w: no meta context was negotiated", ErrInvalid)
)

// judge returns the verdict on one request header.
func (g *gate) judge(h requestHeader) verdict {
	want := magicRequest
	if g.extended {
		want = magicExtRequest
	}
	if h.magic != want {
		return verdict{fatal: errMagic}
	}
	v := verdict{}
	if g.extended && h.flags&cmdFlagPayloadLen != 0 || !g.extended && h.typ == cmdWrite {
		v.payload = h.length
	}
	skipMax := uint64(payloadSkipMax)
	if g.extended {
		// The extension asks for a disconnect above the advertised maximum.
		skipMax = g.payloadMax
	}
	if v.payload > skipMax {
		return verdict{fatal: fmt.Errorf("nbd: payload of %d bytes: at most %d are taken", v.payload, g.payloadMax)}
	}
	v.op, v.disc, v.err = g.command(h)
	if v.disc || v.err != nil {
		return v
	}
	if g.extended {
		v.filter, v.err = g.payloadFlag(h)
		if v.err != nil || v.filter {
			return v // a filter's range is in its payload
		}
	}
	v.err = g.extent(v.op, h.offset, h.length)
	return v
}

// command maps the type and checks the flags and the right to do it.
func (g *gate) command(h requestHeader) (op Op, disc bool, err error) {
	// FUA is to be accepted with every command (proto.md, Command flags).
	flags := cmdFlagFUA
	if g.extended {
		flags |= cmdFlagPayloadLen // judged by payloadFlag
	}
	changes := false
	switch h.typ {
	case cmdRead:
		op = OpRead
		if g.structured {
			flags |= cmdFlagDF
		}
	case cmdWrite:
		op, changes = OpWrite, true
	case cmdDisc:
		return 0, true, nil
	case cmdFlush:
		op = OpFlush
	case cmdTrim:
		op, changes = OpTrim, true
	case cmdCache:
		op = OpCache
	case cmdWriteZeroes:
		op, changes = OpZero, true
		flags |= cmdFlagNoHole
		if g.fastZero {
			flags |= cmdFlagFastZero
		}
	case cmdBlockStatus:
		op = OpBlockStatus
		flags |= cmdFlagReqOne
	default:
		return 0, false, errUnknown
	}
	switch {
	case h.flags&^flags != 0:
		return op, false, errFlags
	case changes && g.readOnly:
		return op, false, ErrReadOnly
	case op == OpBlockStatus && g.contexts == 0:
		return op, false, errNoCtx
	}
	return op, false, nil
}

// payloadFlag checks NBD_CMD_FLAG_PAYLOAD_LEN: WRITE must have it,
// BLOCK_STATUS may, others must not.
func (g *gate) payloadFlag(h requestHeader) (filter bool, err error) {
	has := h.flags&cmdFlagPayloadLen != 0
	switch h.typ {
	case cmdWrite:
		if !has {
			return false, errNeedLen
		}
		return false, nil
	case cmdBlockStatus:
		if !has {
			return false, nil
		}
		if h.length < 12 || (h.length-8)%4 != 0 || h.length > uint64(8+4*g.contexts) {
			return false, fmt.Errorf("%w: a malformed list of meta contexts", ErrInvalid)
		}
		return true, nil
	}
	if has {
		return false, errPayload
	}
	return false, nil
}

// beyond reports whether a range ends behind the export, which may have grown.
func (g *gate) beyond(offset, length uint64) bool {
	if offset <= g.size && length <= g.size-offset {
		return false
	}
	if g.grown == nil {
		return true
	}
	g.size = max(g.size, g.grown())
	return offset > g.size || length > g.size-offset
}

// extent checks a command's range.
func (g *gate) extent(op Op, offset, length uint64) error {
	if op == OpFlush {
		if offset != 0 || length != 0 {
			return fmt.Errorf("%w: a flush has no range", ErrInvalid)
		}
		return nil
	}
	switch {
	case length == 0:
		return errEmpty
	case g.beyond(offset, length):
		return ErrRange
	case (offset|length)&(g.blockMin-1) != 0:
		return errUnalign
	case (op == OpRead || op == OpWrite) && length > g.payloadMax:
		if op == OpRead && g.structured {
			return ErrTooLarge
		}
		return errOversz
	}
	return nil
}
