package nbd

import (
	"encoding/binary"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// All integers on the wire are big-endian. Where go-nbd defines a value it is
// used; the rest of the protocol stands here.

// Magic numbers.
const (
	magicInit     = protocol.NEGOTIATION_MAGIC_OLDSTYLE // "NBDMAGIC"
	magicOption   = protocol.NEGOTIATION_MAGIC_OPTION   // "IHAVEOPT"
	magicOptReply = protocol.NEGOTIATION_MAGIC_REPLY

	magicRequest         = protocol.TRANSMISSION_MAGIC_REQUEST
	magicSimpleReply     = protocol.TRANSMISSION_MAGIC_REPLY
	magicStructuredReply = uint32(0x668e33ef)
	magicExtRequest      = uint32(0x21e41c71)
	magicExtReply        = uint32(0x6e8a278c)
)

// Handshake flags of the server and, with the same values, of the client.
const (
	flagFixedNewstyle = protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE
	flagNoZeroes      = uint16(1 << 1)
)

// Transmission flags.
const (
	flagHasFlags           = protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS
	flagReadOnly           = uint16(1 << 1)
	flagSendFlush          = uint16(1 << 2)
	flagSendFUA            = uint16(1 << 3)
	flagSendTrim           = uint16(1 << 5)
	flagSendWriteZeroes    = uint16(1 << 6)
	flagSendDF             = uint16(1 << 7)
	flagMultiConn          = protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN
	flagSendCache          = uint16(1 << 10)
	flagSendFastZero       = uint16(1 << 11)
	flagBlockStatusPayload = uint16(1 << 12)
)

// Options.
const (
	optExportName      = uint32(1)
	optAbort           = protocol.NEGOTIATION_ID_OPTION_ABORT
	optList            = protocol.NEGOTIATION_ID_OPTION_LIST
	optStartTLS        = uint32(5)
	optInfo            = protocol.NEGOTIATION_ID_OPTION_INFO
	optGo              = protocol.NEGOTIATION_ID_OPTION_GO
	optStructuredReply = uint32(8)
	optListMetaContext = uint32(9)
	optSetMetaContext  = uint32(10)
	optExtendedHeaders = uint32(11)
)

// Option reply types. Errors have bit 31 set and may carry a message.
const (
	repAck         = protocol.NEGOTIATION_TYPE_REPLY_ACK
	repServer      = protocol.NEGOTIATION_TYPE_REPLY_SERVER
	repInfo        = protocol.NEGOTIATION_TYPE_REPLY_INFO
	repMetaContext = uint32(4)

	repErrUnsup         = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED
	repErrPolicy        = uint32(1<<31 | 2)
	repErrInvalid       = uint32(1<<31 | 3)
	repErrTLSReqd       = uint32(1<<31 | 5)
	repErrUnknown       = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN
	repErrShutdown      = uint32(1<<31 | 7)
	repErrTooBig        = uint32(1<<31 | 9)
	repErrExtHeaderReqd = uint32(1<<31 | 10)
)

// Information types of INFO and GO.
const (
	infoExport      = protocol.NEGOTIATION_TYPE_INFO_EXPORT
	infoName        = protocol.NEGOTIATION_TYPE_INFO_NAME
	infoDescription = protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION
	infoBlockSize   = protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE
)

// Commands.
const (
	cmdRead        = protocol.TRANSMISSION_TYPE_REQUEST_READ
	cmdWrite       = protocol.TRANSMISSION_TYPE_REQUEST_WRITE
	cmdDisc        = protocol.TRANSMISSION_TYPE_REQUEST_DISC
	cmdFlush       = uint16(3)
	cmdTrim        = uint16(4)
	cmdCache       = uint16(5)
	cmdWriteZeroes = uint16(6)
	cmdBlockStatus = uint16(7)
)

// Command flags.
const (
	cmdFlagFUA        = uint16(1 << 0)
	cmdFlagNoHole     = uint16(1 << 1)
	cmdFlagDF         = uint16(1 << 2)
	cmdFlagReqOne     = uint16(1 << 3)
	cmdFlagFastZero   = uint16(1 << 4)
	cmdFlagPayloadLen = uint16(1 << 5)
)

// Reply chunks.
const (
	chunkDone = uint16(1 << 0) // the flag of the last chunk

	chunkNone           = uint16(0)
	chunkOffsetData     = uint16(1)
	chunkOffsetHole     = uint16(2)
	chunkBlockStatus    = uint16(5)
	chunkBlockStatusExt = uint16(6)
	chunkError          = uint16(1<<15 | 1)
)

// Flags of the base:allocation context, for Extent.Flags.
const (
	StateHole = uint32(1 << 0) // not allocated
	StateZero = uint32(1 << 1) // reads as zeroes
)

// AllocationContext is the name of the one context that every export has.
const AllocationContext = "base:allocation"

// NBD errors: the only values that the protocol allows in a reply.
const (
	nbdEPERM     = protocol.TRANSMISSION_ERROR_EPERM
	nbdEIO       = uint32(5)
	nbdENOMEM    = uint32(12)
	nbdEINVAL    = protocol.TRANSMISSION_ERROR_EINVAL
	nbdENOSPC    = uint32(28)
	nbdEOVERFLOW = uint32(75)
	nbdENOTSUP   = uint32(95)
	nbdESHUTDOWN = uint32(108)
)

// Sizes of what is parsed and written, in bytes.
const (
	optHeaderBytes       = 16
	requestHeaderBytes   = 28
	extRequestBytes      = 32
	simpleReplyBytes     = 16
	structuredReplyBytes = 20
	extReplyBytes        = 32
	exportNamePadBytes   = 124
)

// requestHeader is a request as it stands on the wire:
//
//	compact                          extended
//	 0  u32 magic 0x25609513          0  u32 magic 0x21e41c71
//	 4  u16 flags                     4  u16 flags
//	 6  u16 type                      6  u16 type
//	 8  u64 cookie                    8  u64 cookie
//	16  u64 offset                   16  u64 offset
//	24  u32 length                   24  u64 length (of payload or effect)
type requestHeader struct {
	magic  uint32
	flags  uint16
	typ    uint16
	cookie uint64
	offset uint64
	length uint64
}

// parseRequestHeader reads a header from b, which holds requestHeaderBytes or,
// if extended, extRequestBytes.
func parseRequestHeader(b []byte, extended bool) requestHeader {
	h := requestHeader{
		magic:  binary.BigEndian.Uint32(b[0:4]),
		flags:  binary.BigEndian.Uint16(b[4:6]),
		typ:    binary.BigEndian.Uint16(b[6:8]),
		cookie: binary.BigEndian.Uint64(b[8:16]),
		offset: binary.BigEndian.Uint64(b[16:24]),
	}
	if extended {
		h.length = binary.BigEndian.Uint64(b[24:32])
	} else {
		h.length = uint64(binary.BigEndian.Uint32(b[24:28]))
	}
	return h
}

// appendSimpleReply appends
//
//	0 u32 magic 0x67446698 | 4 u32 error | 8 u64 cookie
func appendSimpleReply(b []byte, errno uint32, cookie uint64) []byte {
	b = binary.BigEndian.AppendUint32(b, magicSimpleReply)
	b = binary.BigEndian.AppendUint32(b, errno)
	return binary.BigEndian.AppendUint64(b, cookie)
}

// appendChunk appends the header of a structured reply chunk
//
//	0 u32 magic 0x668e33ef | 4 u16 flags | 6 u16 type | 8 u64 cookie | 16 u32 length
//
// or of an extended one
//
//	0 u32 magic 0x6e8a278c | 4 u16 flags | 6 u16 type | 8 u64 cookie |
//	16 u64 offset of the request | 24 u64 length
func appendChunk(b []byte, extended bool, flags, typ uint16, cookie, offset uint64, length uint32) []byte {
	magic := magicStructuredReply
	if extended {
		magic = magicExtReply
	}
	b = binary.BigEndian.AppendUint32(b, magic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, typ)
	b = binary.BigEndian.AppendUint64(b, cookie)
	if extended {
		b = binary.BigEndian.AppendUint64(b, offset)
		return binary.BigEndian.AppendUint64(b, uint64(length))
	}
	return binary.BigEndian.AppendUint32(b, length)
}
