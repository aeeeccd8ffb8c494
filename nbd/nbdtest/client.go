package nbdtest

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Client is a connection in transmission. Its methods may be called from many
// goroutines at once; each is one request, and they are pipelined.
type Client struct {
	conn       net.Conn
	opts       Options
	structured bool
	contexts   map[uint32]string

	size              uint64
	flags             uint16
	name, description string
	blocks            [3]uint32

	sendMu sync.Mutex // one request is written at a time

	mu      sync.Mutex
	cookie  uint64
	calls   map[uint64]*call
	broken  error // why the connection is of no more use
	reading sync.WaitGroup
}

// ErrUnanswered is returned, wrapped, when a request's outcome is unknown: its
// reply did not come before the deadline, or the connection broke. A write may
// or may not have taken effect.
var ErrUnanswered = errors.New("nbdtest: no answer")

// Extent is one run of a block status.
type Extent struct {
	Offset, Length uint64
	Flags          uint64
}

// Chunk is one reply chunk as it came, for tests of the server.
type Chunk struct {
	Type   uint16
	Flags  uint16
	Length uint64 // of the payload
}

type call struct {
	cmd    uint16
	offset uint64
	length uint64

	mu        sync.Mutex
	data      []byte // where a read goes
	abandoned bool   // the caller has gone: data is not ours any more
	got       uint64 // bytes of data and holes received
	status    map[string][]Extent
	chunks    []Chunk
	err       error
	done      chan struct{}
}

func newClient(opts Options) *Client {
	return &Client{opts: opts, contexts: map[uint32]string{}, calls: map[uint64]*call{}}
}

func (c *Client) start() { c.reading.Go(c.runReader) }

// Size returns the export's size in bytes.
func (c *Client) Size() uint64 { return c.size }

// Flags returns the transmission flags.
func (c *Client) Flags() uint16 { return c.flags }

// Name returns the canonical name that the server gave.
func (c *Client) Name() string { return c.name }

// Description returns the text that the server gave.
func (c *Client) Description() string { return c.description }

// BlockSizes returns the minimum, preferred and maximum sizes, in bytes, or
// zeroes if the server gave none.
func (c *Client) BlockSizes() (least, best, most uint32) {
	return c.blocks[0], c.blocks[1], c.blocks[2]
}

// Contexts lists the meta contexts that were negotiated.
func (c *Client) Contexts() []string {
	var names []string
	for _, name := range c.contexts {
		names = append(names, name)
	}
	return names
}

// ReadAt fills p from offset.
func (c *Client) ReadAt(ctx context.Context, p []byte, offset uint64, flags ...Flag) error {
	_, err := c.do(ctx, CmdRead, join(flags), offset, uint64(len(p)), nil, p)
	return err
}

// ReadChunks is ReadAt, and returns the chunks of the reply too.
func (c *Client) ReadChunks(ctx context.Context, p []byte, offset uint64, flags ...Flag) ([]Chunk, error) {
	k, err := c.do(ctx, CmdRead, join(flags), offset, uint64(len(p)), nil, p)
	if k == nil {
		return nil, err
	}
	return k.chunks, err
}

// WriteAt writes p at offset.
func (c *Client) WriteAt(ctx context.Context, p []byte, offset uint64, flags ...Flag) error {
	_, err := c.do(ctx, CmdWrite, join(flags), offset, uint64(len(p)), p, nil)
	return err
}

// Flush asks that all answered writes be durable.
func (c *Client) Flush(ctx context.Context) error {
	_, err := c.do(ctx, CmdFlush, 0, 0, 0, nil, nil)
	return err
}

// Trim says that an extent is not needed any more.
func (c *Client) Trim(ctx context.Context, offset, length uint64, flags ...Flag) error {
	_, err := c.do(ctx, CmdTrim, join(flags), offset, length, nil, nil)
	return err
}

// WriteZeroes zeroes an extent.
func (c *Client) WriteZeroes(ctx context.Context, offset, length uint64, flags ...Flag) error {
	_, err := c.do(ctx, CmdWriteZeroes, join(flags), offset, length, nil, nil)
	return err
}

// Cache asks the server to have an extent at hand.
func (c *Client) Cache(ctx context.Context, offset, length uint64) error {
	_, err := c.do(ctx, CmdCache, 0, offset, length, nil, nil)
	return err
}

// BlockStatus returns the extents of each negotiated context, by its name. The
// server may answer for less than was asked.
func (c *Client) BlockStatus(ctx context.Context, offset, length uint64, flags ...Flag) (map[string][]Extent, error) {
	k, err := c.do(ctx, CmdBlockStatus, join(flags), offset, length, nil, nil)
	if err != nil {
		return nil, err
	}
	return k.status, nil
}

// BlockStatusOf is BlockStatus for some of the contexts, by their ids on the
// wire (in the order of Options.MetaContexts they are those that the server
// chose; see ContextID). It needs extended headers.
func (c *Client) BlockStatusOf(ctx context.Context, offset, length uint64, ids ...uint32) (map[string][]Extent, error) {
	p := binary.BigEndian.AppendUint64(nil, length)
	for _, id := range ids {
		p = binary.BigEndian.AppendUint32(p, id)
	}
	k, err := c.do(ctx, CmdBlockStatus, payloadLen, offset, uint64(len(p)), p, nil)
	if err != nil {
		return nil, err
	}
	return k.status, nil
}

// ContextID returns the wire id of a negotiated context.
func (c *Client) ContextID(name string) (uint32, bool) {
	for id, n := range c.contexts {
		if n == name {
			return id, true
		}
	}
	return 0, false
}

// Do sends any command with any flags, for tests of the server. p is sent as
// its payload.
func (c *Client) Do(ctx context.Context, cmd uint16, flags Flag, offset, length uint64, p []byte) error {
	var into []byte
	if cmd == CmdRead {
		into = make([]byte, length)
	}
	_, err := c.do(ctx, cmd, flags, offset, length, p, into)
	return err
}

// Disconnect says goodbye as the protocol asks, and closes.
func (c *Client) Disconnect() error {
	err := c.send(c.header(CmdDisc, 0, 0, 0, 0), nil)
	c.Close()
	return err
}

// Close closes the connection at once. Requests in flight end with
// ErrUnanswered.
func (c *Client) Close() error {
	c.fail(net.ErrClosed)
	err := c.conn.Close()
	c.reading.Wait()
	return err
}

// Err returns why the connection is of no more use, or nil.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

func join(flags []Flag) Flag {
	var all Flag
	for _, f := range flags {
		all |= f
	}
	return all
}

func (c *Client) header(cmd uint16, flags Flag, cookie, offset, length uint64) []byte {
	magic := uint32(magicRequest)
	if c.opts.Extended {
		magic = magicExtRequest
		if cmd == CmdWrite {
			flags |= payloadLen
		}
	}
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 32), magic)
	b = binary.BigEndian.AppendUint16(b, uint16(flags))
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, offset)
	if c.opts.Extended {
		return binary.BigEndian.AppendUint64(b, length)
	}
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

func (c *Client) send(header, payload []byte) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	bufs := net.Buffers{header, payload}
	_, err := bufs.WriteTo(c.conn)
	return err
}

func (c *Client) do(ctx context.Context, cmd uint16, flags Flag, offset, length uint64, payload, into []byte) (*call, error) {
	if c.opts.Timeout > 0 {
		if _, has := ctx.Deadline(); !has {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, c.opts.Timeout)
			defer cancel()
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	k := &call{cmd: cmd, offset: offset, length: length, data: into, done: make(chan struct{})}
	c.mu.Lock()
	if c.broken != nil {
		defer c.mu.Unlock()
		return nil, fmt.Errorf("not sent: %w", c.broken)
	}
	c.cookie++
	cookie := c.cookie
	c.calls[cookie] = k
	c.mu.Unlock()
	// Sending may block when the server takes nothing; the deadline holds for
	// it too, but a request cut in two breaks the connection.
	stop := context.AfterFunc(ctx, func() { c.abandonSend(cookie) })
	err := c.send(c.header(cmd, flags, cookie, offset, length), payload)
	stop()
	if err != nil {
		c.fail(err)
	}
	select {
	case <-k.done:
	case <-ctx.Done():
		k.mu.Lock()
		k.abandoned = true
		k.mu.Unlock()
		select {
		case <-k.done: // it came at the last moment
		default:
			return nil, fmt.Errorf("%w: %w", ErrUnanswered, ctx.Err())
		}
	}
	return k, k.error()
}

// abandonSend gives a send that is still blocked after its deadline a second
// to finish; then the connection is of no more use.
func (c *Client) abandonSend(uint64) {
	if c.sendMu.TryLock() {
		c.sendMu.Unlock()
		return
	}
	c.conn.SetWriteDeadline(time.Now().Add(time.Second)) //nolint:errcheck // a closed one needs none
}

// fail ends all calls and the use of the connection.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.broken == nil {
		c.broken = err
	}
	calls := c.calls
	c.calls = map[uint64]*call{}
	c.mu.Unlock()
	for _, k := range calls {
		k.setErr(fmt.Errorf("%w: %w", ErrUnanswered, err))
		close(k.done)
	}
}

func (c *Client) runReader() {
	in := bufio.NewReaderSize(c.conn, 64<<10)
	for {
		if err := c.readReply(in); err != nil {
			c.fail(err)
			c.conn.Close()
			return
		}
	}
}

// find returns the call of a cookie.
func (c *Client) find(cookie uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.calls[cookie]
	if k == nil {
		if c.broken != nil {
			return nil, c.broken
		}
		return nil, fmt.Errorf("nbdtest: a reply to %#x, which was not asked", cookie)
	}
	return k, nil
}

func (c *Client) finish(cookie uint64) {
	c.mu.Lock()
	k := c.calls[cookie]
	delete(c.calls, cookie)
	c.mu.Unlock()
	if k != nil {
		close(k.done)
	}
}

func (c *Client) readReply(in *bufio.Reader) error {
	b, err := in.Peek(4)
	if err != nil {
		return err
	}
	magic := binary.BigEndian.Uint32(b)
	switch {
	case magic == magicSimple && !c.opts.Extended:
		return c.readSimple(in)
	case magic == magicStructured && c.structured && !c.opts.Extended:
		return c.readChunk(in, 20)
	case magic == magicExtReply && c.opts.Extended:
		return c.readChunk(in, 32)
	}
	return fmt.Errorf("nbdtest: reply magic %#x", magic)
}

func (c *Client) readSimple(in *bufio.Reader) error {
	var b [16]byte
	if _, err := io.ReadFull(in, b[:]); err != nil {
		return err
	}
	cookie := binary.BigEndian.Uint64(b[8:])
	k, err := c.find(cookie)
	if err != nil {
		return err
	}
	if no := binary.BigEndian.Uint32(b[4:]); no != 0 {
		k.setErr(Errno(no))
	} else if k.cmd == CmdRead {
		if c.structured {
			return errors.New("nbdtest: a simple reply to READ in spite of structured replies")
		}
		if err := k.receive(in, 0, k.length); err != nil {
			return err
		}
	}
	c.finish(cookie)
	return nil
}

func (k *call) setErr(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.err = err
}

func (k *call) error() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.err
}

// receive reads n bytes of data into their place.
func (k *call) receive(in io.Reader, at, n uint64) error {
	p := make([]byte, n)
	if _, err := io.ReadFull(in, p); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.got += n
	if !k.abandoned && k.data != nil {
		copy(k.data[at:at+n], p)
	}
	return nil
}

func (c *Client) readChunk(in *bufio.Reader, headerBytes int) error {
	b := make([]byte, headerBytes)
	if _, err := io.ReadFull(in, b); err != nil {
		return err
	}
	ch := Chunk{Flags: binary.BigEndian.Uint16(b[4:]), Type: binary.BigEndian.Uint16(b[6:])}
	cookie := binary.BigEndian.Uint64(b[8:])
	k, err := c.find(cookie)
	if err != nil {
		return err
	}
	if headerBytes == 32 {
		ch.Length = binary.BigEndian.Uint64(b[24:])
		if off := binary.BigEndian.Uint64(b[16:]); off != k.offset {
			return fmt.Errorf("nbdtest: reply for offset %d, asked %d", off, k.offset)
		}
	} else {
		ch.Length = uint64(binary.BigEndian.Uint32(b[16:]))
	}
	if ch.Length > 64<<20 {
		return fmt.Errorf("nbdtest: chunk of %d bytes", ch.Length)
	}
	k.chunks = append(k.chunks, ch)
	if err := c.content(in, k, ch); err != nil {
		return err
	}
	if ch.Flags&1 == 0 {
		return nil
	}
	if k.error() == nil && k.cmd == CmdRead && k.got != k.length {
		return fmt.Errorf("nbdtest: %d bytes of %d read", k.got, k.length)
	}
	if k.error() == nil && k.cmd == CmdBlockStatus && len(k.status) == 0 {
		return errors.New("nbdtest: a block status without a context")
	}
	c.finish(cookie)
	return nil
}

// content reads a chunk's payload.
func (c *Client) content(in *bufio.Reader, k *call, ch Chunk) error {
	if ch.Type == 1 { // data
		if k.cmd != CmdRead || ch.Length < 9 {
			return errors.New("nbdtest: unexpected data chunk")
		}
		at, err := k.place(in, ch.Length-8)
		if err != nil {
			return err
		}
		return k.receive(in, at, ch.Length-8)
	}
	p := make([]byte, ch.Length)
	if _, err := io.ReadFull(in, p); err != nil {
		return err
	}
	switch {
	case ch.Type == 0:
		if ch.Length != 0 || ch.Flags&1 == 0 {
			return errors.New("nbdtest: malformed NONE chunk")
		}
	case ch.Type == 2:
		return k.hole(p)
	case ch.Type == 5 && !c.opts.Extended:
		return c.status(k, p, 4, 8)
	case ch.Type == 6 && c.opts.Extended:
		return c.status(k, p, 8, 16)
	case ch.Type == 1<<15|1 && len(p) >= 6 && len(p) == 6+int(binary.BigEndian.Uint16(p[4:])):
		k.setErr(fmt.Errorf("%w (%s)", Errno(binary.BigEndian.Uint32(p)), p[6:]))
	default:
		return fmt.Errorf("nbdtest: chunk type %d of %d bytes", ch.Type, ch.Length)
	}
	return nil
}

// place reads a content chunk's offset and returns where in the request it is.
func (k *call) place(in io.Reader, n uint64) (uint64, error) {
	var b [8]byte
	if _, err := io.ReadFull(in, b[:]); err != nil {
		return 0, err
	}
	return k.within(binary.BigEndian.Uint64(b[:]), n)
}

func (k *call) within(off, n uint64) (uint64, error) {
	if n == 0 || off < k.offset || n > k.length || off-k.offset > k.length-n {
		return 0, fmt.Errorf("nbdtest: content at %d of %d bytes is outside of the request", off, n)
	}
	return off - k.offset, nil
}

func (k *call) hole(p []byte) error {
	if len(p) != 12 || k.cmd != CmdRead {
		return errors.New("nbdtest: malformed hole")
	}
	n := uint64(binary.BigEndian.Uint32(p[8:]))
	at, err := k.within(binary.BigEndian.Uint64(p), n)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.got += n
	if !k.abandoned && k.data != nil {
		clear(k.data[at : at+n])
	}
	return nil
}

// status reads a block status chunk with the given sizes of head and extent.
func (c *Client) status(k *call, p []byte, head, each int) error {
	if k.cmd != CmdBlockStatus || len(p) < head+each || (len(p)-head)%each != 0 {
		return errors.New("nbdtest: malformed block status")
	}
	name, ok := c.contexts[binary.BigEndian.Uint32(p)]
	if !ok {
		return errors.New("nbdtest: status of a context that was not negotiated")
	}
	if head == 8 && int(binary.BigEndian.Uint32(p[4:])) != (len(p)-head)/each {
		return errors.New("nbdtest: wrong count of extents")
	}
	if k.status == nil {
		k.status = map[string][]Extent{}
	}
	if k.status[name] != nil {
		return errors.New("nbdtest: two chunks of one context")
	}
	at := k.offset
	for p = p[head:]; len(p) > 0; p = p[each:] {
		e := Extent{Offset: at}
		if each == 16 {
			e.Length, e.Flags = binary.BigEndian.Uint64(p), binary.BigEndian.Uint64(p[8:])
		} else {
			e.Length, e.Flags = uint64(binary.BigEndian.Uint32(p)), uint64(binary.BigEndian.Uint32(p[4:]))
		}
		if e.Length == 0 {
			return errors.New("nbdtest: an empty extent")
		}
		at += e.Length
		k.status[name] = append(k.status[name], e)
	}
	return nil
}
