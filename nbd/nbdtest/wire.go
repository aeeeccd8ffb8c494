package nbdtest

import "fmt"

// The client has its own copy of the protocol's numbers, so that a wrong one
// in the server is found.
const (
	magicInit       = 0x4e42444d41474943
	magicOption     = 0x49484156454F5054
	magicOptReply   = 0x3e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
	magicExtRequest = 0x21e41c71
	magicExtReply   = 0x6e8a278c
)

// Options.
const (
	OptExportName      = 1
	OptAbort           = 2
	OptList            = 3
	OptStartTLS        = 5
	OptInfo            = 6
	OptGo              = 7
	OptStructuredReply = 8
	OptListMetaContext = 9
	OptSetMetaContext  = 10
	OptExtendedHeaders = 11
)

// Option replies.
const (
	RepAck              = 1
	RepServer           = 2
	RepInfo             = 3
	RepMetaContext      = 4
	RepErrUnsup         = 1<<31 | 1
	RepErrPolicy        = 1<<31 | 2
	RepErrInvalid       = 1<<31 | 3
	RepErrTLSReqd       = 1<<31 | 5
	RepErrUnknown       = 1<<31 | 6
	RepErrShutdown      = 1<<31 | 7
	RepErrTooBig        = 1<<31 | 9
	RepErrExtHeaderReqd = 1<<31 | 10
)

// Transmission flags.
const (
	FlagReadOnly           = 1 << 1
	FlagSendFlush          = 1 << 2
	FlagSendFUA            = 1 << 3
	FlagSendTrim           = 1 << 5
	FlagSendWriteZeroes    = 1 << 6
	FlagSendDF             = 1 << 7
	FlagMultiConn          = 1 << 8
	FlagSendCache          = 1 << 10
	FlagSendFastZero       = 1 << 11
	FlagBlockStatusPayload = 1 << 12
)

// Commands.
const (
	CmdRead        = 0
	CmdWrite       = 1
	CmdDisc        = 2
	CmdFlush       = 3
	CmdTrim        = 4
	CmdCache       = 5
	CmdWriteZeroes = 6
	CmdBlockStatus = 7
)

// Flag is a command flag.
type Flag uint16

// Command flags.
const (
	FUA        Flag = 1 << 0
	NoHole     Flag = 1 << 1
	DF         Flag = 1 << 2
	ReqOne     Flag = 1 << 3
	FastZero   Flag = 1 << 4
	payloadLen Flag = 1 << 5
)

// Errno is an error that the server answered. Whatever was asked has failed;
// a write may have taken effect in part or whole only if it is EIO or
// ESHUTDOWN.
type Errno uint32

// The errors of the protocol.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// Error names the error.
func (e Errno) Error() string {
	names := map[Errno]string{
		EPERM: "EPERM", EIO: "EIO", ENOMEM: "ENOMEM", EINVAL: "EINVAL", ENOSPC: "ENOSPC",
		EOVERFLOW: "EOVERFLOW", ENOTSUP: "ENOTSUP", ESHUTDOWN: "ESHUTDOWN",
	}
	if s, ok := names[e]; ok {
		return "nbd server answered " + s
	}
	return fmt.Sprintf("nbd server answered error %d", uint32(e))
}

// OptionError is an option's error reply.
type OptionError struct {
	Option uint32
	Type   uint32
	Text   string
}

// Error gives the reply's type and text.
func (e *OptionError) Error() string {
	return fmt.Sprintf("nbd option %d refused with %#x: %s", e.Option, e.Type, e.Text)
}
