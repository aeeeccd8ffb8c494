package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// haggler is what a negotiation asks of the server. The negotiation itself
// touches no socket: bytes in, bytes and an outcome out.
type haggler interface {
	list() []listed
	lookup(name string) (Info, error)
	open(name string) (Session, error)
	stopping() bool
}

// listed is one export as LIST shows it.
type listed struct{ name, description string }

// outcome is what the driver of a negotiation does after a step.
type outcome uint8

const (
	goOn     outcome = iota // send the bytes, then step again
	startTLS                // send the bytes, upgrade, call upgraded, step again
	transmit                // send the bytes, then serve requests
	hangUp                  // send the bytes, then close
)

type negState uint8

const (
	negFlags  negState = iota // 4 bytes: the client's flags
	negHeader                 // 16 bytes: an option's header
	negData                   // an option's data, whole
	negSkip                   // the rest of an option that is too long
	negLoose                  // an INFO or GO whose header does not say its length
)

// negotiation is the handshake of one connection. need says how many bytes the
// next step takes; step is given exactly those.
type negotiation struct {
	server      haggler
	tlsOffered  bool // STARTTLS is answered with ACK
	tlsRequired bool // FORCEDTLS

	state    negState
	secure   bool // TLS has been initiated
	fixed    bool
	noZeroes bool
	options  int // counted, see optionsMax

	opt    uint32
	optLen uint32
	skip   uint32
	loose  []byte // what has come of a loose option

	structured bool
	extended   bool
	meta       metaSelection

	// The result, set when step returns transmit.
	name    string
	session Session
	info    Info
	ids     []uint32 // the session's ids of meta.names, in order
}

// skipStep is how much of an overlong option is read at once.
const skipStep = 4096

var errHandshake = errors.New("nbd: handshake")

// greet returns the first bytes, which the server sends unasked.
func (n *negotiation) greet() []byte {
	b := binary.BigEndian.AppendUint64(nil, magicInit)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	return binary.BigEndian.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
}

func (n *negotiation) need() int {
	switch n.state {
	case negFlags:
		return 4
	case negHeader:
		return optHeaderBytes
	case negData:
		return int(n.optLen)
	case negSkip:
		return int(min(n.skip, skipStep))
	case negLoose:
		return n.looseNeed()
	}
	return 0
}

// step takes the next bytes and appends the answer to out. A non-nil error
// says why the outcome is hangUp; it is for the log.
func (n *negotiation) step(in, out []byte) ([]byte, outcome, error) {
	switch n.state {
	case negFlags:
		return n.clientFlags(in, out)
	case negHeader:
		return n.optionHeader(in, out)
	case negData:
		n.state = negHeader
		return n.option(in, out)
	case negSkip:
		n.skip -= uint32(len(in))
		if n.skip > 0 {
			return out, goOn, nil
		}
		n.state = negHeader
		return n.refuseLong(out)
	case negLoose:
		return n.looseStep(in, out)
	}
	return out, hangUp, errHandshake
}

// looseNeed returns how much of a loose option comes next: the length of the
// name, then the name and the count of requests, then those.
func (n *negotiation) looseNeed() int {
	if len(n.loose) < 4 {
		return 4
	}
	name := int(binary.BigEndian.Uint32(n.loose))
	if len(n.loose) < 4+name+2 {
		return name + 2
	}
	return 2 * int(binary.BigEndian.Uint16(n.loose[4+name:]))
}

func (n *negotiation) looseStep(in, out []byte) ([]byte, outcome, error) {
	n.loose = append(n.loose, in...)
	switch {
	case len(n.loose) == 4 && binary.BigEndian.Uint32(n.loose) <= stringMax:
		return out, goOn, nil
	case len(n.loose) == 4:
		return out, hangUp, fmt.Errorf("%w: export name of %d bytes", errHandshake, binary.BigEndian.Uint32(n.loose))
	}
	name := int(binary.BigEndian.Uint32(n.loose))
	requests := int(binary.BigEndian.Uint16(n.loose[4+name:]))
	switch {
	case requests > looseRequestsMax:
		return out, hangUp, fmt.Errorf("%w: %d information requests", errHandshake, requests)
	case len(n.loose) < 4+name+2+2*requests:
		return out, goOn, nil
	}
	data := n.loose
	n.state, n.loose = negHeader, nil
	return n.option(data, out)
}

// upgraded resets what was negotiated before TLS: the protocol forbids to
// keep it, since it may have been injected.
func (n *negotiation) upgraded() {
	n.secure = true
	n.structured, n.extended = false, false
	n.meta.drop()
}

func (n *negotiation) clientFlags(in, out []byte) ([]byte, outcome, error) {
	flags := binary.BigEndian.Uint32(in)
	if flags&^uint32(flagFixedNewstyle|flagNoZeroes) != 0 {
		return out, hangUp, fmt.Errorf("%w: unknown client flags %#x", errHandshake, flags)
	}
	n.fixed = flags&uint32(flagFixedNewstyle) != 0
	n.noZeroes = flags&uint32(flagNoZeroes) != 0
	if !n.fixed {
		// Its options are honoured as far as they go, which the protocol leaves
		// to the server, but TLS is not for such a client.
		n.tlsOffered = false
		if n.tlsRequired {
			return out, hangUp, fmt.Errorf("%w: TLS is required and the client cannot do fixed newstyle", errHandshake)
		}
	}
	n.state = negHeader
	return out, goOn, nil
}

func (n *negotiation) optionHeader(in, out []byte) ([]byte, outcome, error) {
	if magic := binary.BigEndian.Uint64(in); magic != magicOption {
		return out, hangUp, fmt.Errorf("%w: no option magic", errHandshake)
	}
	n.opt = binary.BigEndian.Uint32(in[8:])
	n.optLen = binary.BigEndian.Uint32(in[12:])
	n.options++
	switch {
	case n.options > optionsMax:
		return out, hangUp, fmt.Errorf("%w: more than %d options", errHandshake, optionsMax)
	case !n.fixed && n.optLen == 0 && (n.opt == optInfo || n.opt == optGo):
		// Invalid, and no client of fixed newstyle does it. go-nbd's client
		// does, and sends the data all the same.
		n.state = negLoose
		return out, goOn, nil
	case n.optLen > optionSkipMax:
		return out, hangUp, fmt.Errorf("%w: option %d of %d bytes", errHandshake, n.opt, n.optLen)
	case n.optLen > optionDataMax:
		if n.opt == optExportName {
			return out, hangUp, fmt.Errorf("%w: export name of %d bytes", errHandshake, n.optLen)
		}
		n.state, n.skip = negSkip, n.optLen
		return out, goOn, nil
	case n.optLen > 0:
		n.state = negData
		return out, goOn, nil
	}
	return n.option(nil, out)
}

// refuseLong answers an option whose data was skipped.
func (n *negotiation) refuseLong(out []byte) ([]byte, outcome, error) {
	switch {
	case n.opt == optAbort:
		return n.reply(out, repAck, nil), hangUp, nil
	case n.tlsRequired && !n.secure:
		return n.fail(out, repErrTLSReqd, "TLS is required"), goOn, nil
	case !knownOption(n.opt):
		return n.fail(out, repErrUnsup, "unknown option"), goOn, nil
	case n.opt == optSetMetaContext:
		n.meta.drop()
	}
	return n.fail(out, repErrTooBig, "the option is too long"), goOn, nil
}

func knownOption(opt uint32) bool {
	switch opt {
	case optExportName, optAbort, optList, optStartTLS, optInfo, optGo,
		optStructuredReply, optListMetaContext, optSetMetaContext, optExtendedHeaders:
		return true
	}
	return false
}

// option answers one whole option.
func (n *negotiation) option(data, out []byte) ([]byte, outcome, error) {
	if n.opt == optAbort { // data is ignored
		return n.reply(out, repAck, nil), hangUp, nil
	}
	if n.server.stopping() {
		if n.opt == optExportName {
			return out, hangUp, ErrShutdown
		}
		return n.fail(out, repErrShutdown, ErrShutdown.Error()), goOn, nil
	}
	if n.tlsRequired && !n.secure && n.opt != optStartTLS {
		if n.opt == optExportName {
			return out, hangUp, fmt.Errorf("%w: TLS is required", errHandshake)
		}
		return n.fail(out, repErrTLSReqd, "TLS is required"), goOn, nil
	}
	switch n.opt {
	case optExportName:
		return n.exportName(data, out)
	case optList:
		return n.list(data, out), goOn, nil
	case optStartTLS:
		return n.startTLS(data, out)
	case optInfo, optGo:
		return n.infoOrGo(data, out)
	case optStructuredReply:
		switch {
		case len(data) > 0:
			return n.fail(out, repErrInvalid, "the option takes no data"), goOn, nil
		case n.extended:
			return n.fail(out, repErrExtHeaderReqd, "extended headers are in use already"), goOn, nil
		}
		n.structured = true
		return n.reply(out, repAck, nil), goOn, nil
	case optExtendedHeaders:
		if len(data) > 0 {
			return n.fail(out, repErrInvalid, "the option takes no data"), goOn, nil
		}
		n.structured, n.extended = true, true
		return n.reply(out, repAck, nil), goOn, nil
	case optListMetaContext:
		return n.listMeta(data, out), goOn, nil
	case optSetMetaContext:
		return n.setMeta(data, out), goOn, nil
	}
	return n.fail(out, repErrUnsup, "unknown option"), goOn, nil
}

func (n *negotiation) exportName(data, out []byte) ([]byte, outcome, error) {
	name, ok := wireString(data)
	if !ok || n.extended {
		return out, hangUp, fmt.Errorf("%w: EXPORT_NAME with a bad name or extended headers", errHandshake)
	}
	if err := n.enter(name); err != nil {
		return out, hangUp, err
	}
	out = binary.BigEndian.AppendUint64(out, n.info.Size)
	out = binary.BigEndian.AppendUint16(out, n.transmissionFlags(n.info, len(n.ids) > 0))
	if !n.noZeroes {
		out = append(out, make([]byte, exportNamePadBytes)...)
	}
	return out, transmit, nil
}

func (n *negotiation) list(data, out []byte) []byte {
	if len(data) > 0 {
		return n.fail(out, repErrInvalid, "LIST takes no data")
	}
	for _, e := range n.server.list() {
		p := binary.BigEndian.AppendUint32(nil, uint32(len(e.name)))
		p = append(p, e.name...)
		if n.fixed { // go-nbd's client takes what follows for the next name
			p = append(p, e.description...)
		}
		out = n.reply(out, repServer, p)
	}
	return n.reply(out, repAck, nil)
}

func (n *negotiation) startTLS(data, out []byte) ([]byte, outcome, error) {
	switch {
	case len(data) > 0:
		return n.fail(out, repErrInvalid, "STARTTLS takes no data"), goOn, nil
	case n.secure:
		return n.fail(out, repErrInvalid, "TLS is in use already"), goOn, nil
	case !n.tlsOffered:
		return n.fail(out, repErrPolicy, "TLS is not configured here"), goOn, nil
	}
	return n.reply(out, repAck, nil), startTLS, nil
}

// infoOrGo answers INFO and GO:
//
//	u32 length of name | name | u16 count | count times u16 information type
func (n *negotiation) infoOrGo(data, out []byte) ([]byte, outcome, error) {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 2 {
		return n.fail(out, repErrInvalid, "malformed name"), goOn, nil
	}
	count := int(binary.BigEndian.Uint16(rest))
	rest = rest[2:]
	if len(rest) != 2*count {
		return n.fail(out, repErrInvalid, "malformed list of information requests"), goOn, nil
	}
	known := 0
	for i := range count {
		if binary.BigEndian.Uint16(rest[2*i:]) <= infoBlockSize {
			known++
		}
	}
	if known > infoRequestsMax {
		return n.fail(out, repErrTooBig, "too many information requests"), goOn, nil
	}
	var info Info
	var err error
	contexts := n.meta.of(name) > 0
	if n.opt == optGo {
		err = n.enter(name)
		info = n.info
	} else if info, err = n.server.lookup(name); err == nil {
		info, err = info.normal()
	}
	if err != nil {
		return n.failExport(out, err), goOn, nil
	}
	p := binary.BigEndian.AppendUint16(nil, infoExport)
	p = binary.BigEndian.AppendUint64(p, info.Size)
	out = n.reply(out, repInfo, binary.BigEndian.AppendUint16(p, n.transmissionFlags(info, contexts)))
	p = binary.BigEndian.AppendUint16(p[:0], infoBlockSize)
	p = binary.BigEndian.AppendUint32(p, info.BlockMin)
	p = binary.BigEndian.AppendUint32(p, info.BlockBest)
	out = n.reply(out, repInfo, binary.BigEndian.AppendUint32(p, info.BlockMax))
	seen := [2]bool{}
	for ; len(rest) > 0; rest = rest[2:] {
		switch binary.BigEndian.Uint16(rest) {
		case infoName:
			if !seen[0] {
				out = n.reply(out, repInfo, append(binary.BigEndian.AppendUint16(nil, infoName), name...))
			}
			seen[0] = true
		case infoDescription:
			if !seen[1] && info.Description != "" {
				p := binary.BigEndian.AppendUint16(nil, infoDescription)
				out = n.reply(out, repInfo, append(p, info.Description...))
			}
			seen[1] = true
		}
	}
	out = n.reply(out, repAck, nil)
	if n.opt == optGo {
		return out, transmit, nil
	}
	return out, goOn, nil
}

// enter opens the session that transmission will use, or takes the one that
// SET_META_CONTEXT opened for the same name.
func (n *negotiation) enter(name string) error {
	s, opened := n.meta.sessionOf(name), false
	if s == nil {
		var err error
		if s, err = n.server.open(name); err != nil {
			return err // and the selection stays: the client may try again
		}
		opened = true
	}
	info, err := s.Info().normal()
	if err != nil {
		if opened {
			s.Close()
		}
		return err
	}
	names, ids := n.meta.take(name)
	n.name, n.session, n.info = name, s, info
	if len(names) > 0 {
		n.ids = ids
	}
	return nil
}

// abandon closes a session that no transmission will use.
func (n *negotiation) abandon() {
	n.meta.drop()
	if n.session != nil {
		n.session.Close()
		n.session = nil
	}
}

func (n *negotiation) transmissionFlags(info Info, contexts bool) uint16 {
	f := flagHasFlags | flagSendFlush | flagSendFUA | flagSendCache
	if info.ReadOnly {
		f |= flagReadOnly
	} else {
		f |= flagSendTrim | flagSendWriteZeroes | flagSendFastZero
	}
	if info.MultiConn {
		f |= flagMultiConn
	}
	if n.structured {
		f |= flagSendDF
	}
	if n.extended && contexts {
		f |= flagBlockStatusPayload
	}
	return f
}

// reply appends an option reply:
//
//	u64 magic | u32 option | u32 type | u32 length | payload
func (n *negotiation) reply(out []byte, typ uint32, payload []byte) []byte {
	out = binary.BigEndian.AppendUint64(out, magicOptReply)
	out = binary.BigEndian.AppendUint32(out, n.opt)
	out = binary.BigEndian.AppendUint32(out, typ)
	out = binary.BigEndian.AppendUint32(out, uint32(len(payload)))
	return append(out, payload...)
}

// fail appends an error reply with a text for the user.
func (n *negotiation) fail(out []byte, typ uint32, text string) []byte {
	return n.reply(out, typ, []byte(cutText(text)))
}

// failExport answers an export that could not be looked up or opened.
func (n *negotiation) failExport(out []byte, err error) []byte {
	typ := repErrPolicy
	switch {
	case errors.Is(err, ErrNoExport):
		typ = repErrUnknown
	case errors.Is(err, ErrShutdown):
		typ = repErrShutdown
	case errors.Is(err, ErrInvalid):
		typ = repErrInvalid
	}
	return n.fail(out, typ, err.Error())
}

// cutText shortens a text for the wire, at a character's border.
func cutText(s string) string {
	s = strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", ""), "?")
	if len(s) <= errorTextMax {
		return s
	}
	cut := errorTextMax
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut]
}

// wireString checks a string by the protocol's rules.
func wireString(b []byte) (string, bool) {
	if len(b) > stringMax || !utf8.Valid(b) {
		return "", false
	}
	s := string(b)
	return s, !strings.Contains(s, "\x00")
}

// cutString takes a string with its u32 length from the front of b.
func cutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(b)
	b = b[4:]
	if uint64(n) > uint64(len(b)) {
		return "", nil, false
	}
	s, ok = wireString(b[:n])
	return s, b[n:], ok
}

// normal fills in the block sizes that an export leaves open, and refuses
// those that the protocol does not allow.
func (i Info) normal() (Info, error) {
	if i.BlockMin == 0 {
		i.BlockMin = 1
	}
	if i.BlockBest == 0 {
		i.BlockBest = max(4096, i.BlockMin)
	}
	if i.BlockMax == 0 || i.BlockMax > PayloadMax {
		i.BlockMax = PayloadMax
	}
	pow2 := func(v uint32) bool { return v&(v-1) == 0 }
	if !pow2(i.BlockMin) || i.BlockMin > 1<<16 || !pow2(i.BlockBest) ||
		i.BlockBest < max(i.BlockMin, 512) || i.BlockMax < i.BlockBest {
		return i, fmt.Errorf("nbd: block sizes %d, %d, %d of the export are not what the protocol allows",
			i.BlockMin, i.BlockBest, i.BlockMax)
	}
	return i, nil
}
