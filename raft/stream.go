package raft

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"
)

// A hashicorp/raft server answers whoever reaches its address, under whatever
// id it was meant. A node whose data_dir was wiped would so vote a second time,
// and its empty log would be filled under the name of the lost one. Therefore
// each connection begins with a greeting that names both Raft ids, and the
// accepting side closes one that is meant for another id, or comes from another
// cluster of the same name. docs/format/control.md.
//
// The Raft address of a server is RAFTID@HOST:PORT, so that the dialer knows
// whom it means without asking the cluster state.

const (
	greetingVersion = 1
	greetingMax     = 1 << 10 // bytes
	greetingTimeout = 3 * time.Second
	greetingsMax    = 64 // connections that have not greeted yet; beyond it new ones are closed
)

type greeting struct {
	V       int    `json:"v"`
	Cluster string `json:"cluster"`
	From    string `json:"from"` // Raft ids
	To      string `json:"to"`
	// ClusterID is what the dialer knows of the cluster's id; "" before it is
	// named, and from a release that does not send it.
	ClusterID string `json:"cluster_id,omitempty"`
}

type greetingReply struct {
	OK     bool   `json:"ok"`
	Reason string `json:"reason,omitempty"`
}

func serverAddress(raftID, address string) hraft.ServerAddress {
	return hraft.ServerAddress(raftID + "@" + address)
}

func splitAddress(a hraft.ServerAddress) (raftID, address string) {
	raftID, address, ok := strings.Cut(string(a), "@")
	if !ok {
		return "", string(a)
	}
	return raftID, address
}

// boundStream is the hraft.StreamLayer whose connections are bound to Raft ids.
type boundStream struct {
	cluster string
	self    string // our Raft id
	address string
	id      func() string // the cluster's id; "" while it is not known
	dial    func(ctx context.Context, address string) (net.Conn, error)
	l       net.Listener
	log     *slog.Logger

	mute   *muteSwitch
	ready  chan net.Conn
	slots  chan struct{}
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

var _ hraft.StreamLayer = (*boundStream)(nil)

func newBoundStream(ctx context.Context, o *Options, raftID, address string, clusterID func() string) *boundStream {
	s := &boundStream{
		cluster: o.Cluster, self: raftID, address: address, id: clusterID, dial: o.Dial, l: o.Listener, log: o.Logger,
		mute: newMuteSwitch(), ready: make(chan net.Conn), slots: make(chan struct{}, greetingsMax),
	}
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	s.wg.Add(1)
	go s.runAccept()
	return s
}

// boundConn is a connection that ends with the stream, or when it is muted:
// hashicorp/raft reads from one that it accepted until its other end goes.
type boundConn struct {
	net.Conn
	stop func()
}

// Close closes the connection.
func (c *boundConn) Close() error {
	c.stop()
	return c.Conn.Close()
}

type raftAddr string

func (a raftAddr) Network() string { return "blockstep-raft" }
func (a raftAddr) String() string  { return string(a) }

// Addr is what the leader is known by in the others' Leader().
func (s *boundStream) Addr() net.Addr { return raftAddr(serverAddress(s.self, s.address)) }

// Close ends accepting and waits for the connections that are being greeted.
func (s *boundStream) Close() error {
	s.cancel()
	s.mute.set(true)
	err := s.l.Close()
	s.wg.Wait()
	return err
}

// Accept gives the next connection that has greeted us by our own Raft id.
func (s *boundStream) Accept() (net.Conn, error) {
	select {
	case c := <-s.ready:
		return c, nil
	case <-s.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (s *boundStream) runAccept() {
	defer s.wg.Done()
	for {
		conn, err := s.l.Accept()
		if err != nil {
			if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			s.log.Warn("raft: accept failed", "err", err)
			if !pause(s.ctx, 50*time.Millisecond) {
				return
			}
			continue
		}
		select {
		case s.slots <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		s.wg.Add(1)
		go s.runGreeted(conn)
	}
}

// runGreeted judges one accepted connection.
func (s *boundStream) runGreeted(raw net.Conn) {
	defer s.wg.Done()
	defer func() { <-s.slots }()
	conn := s.mute.bind(s.ctx, raw)
	_ = conn.SetDeadline(time.Now().Add(greetingTimeout))
	var g greeting
	own := s.id()
	if err := readJSON(conn, &g); err != nil {
		s.log.Debug("raft: a connection did not greet", "remote", conn.RemoteAddr(), "err", err)
		conn.Close()
		return
	}
	reply := greetingReply{OK: true}
	switch {
	case g.V != greetingVersion:
		reply = greetingReply{Reason: fmt.Sprintf("greeting version %d, this node knows %d", g.V, greetingVersion)}
	case g.Cluster != s.cluster:
		reply = greetingReply{Reason: fmt.Sprintf("this node belongs to cluster %q, not %q", s.cluster, g.Cluster)}
	case g.ClusterID != "" && own != "" && g.ClusterID != own:
		reply = greetingReply{Reason: fmt.Sprintf("this node belongs to the cluster %q of id %s, not to that of id %s", s.cluster, own, g.ClusterID)}
	case g.To != s.self:
		reply = greetingReply{Reason: fmt.Sprintf("this node is %q, not %q: its data_dir is another one", s.self, g.To)}
	}
	if err := writeJSON(conn, reply); err != nil || !reply.OK {
		s.log.Debug("raft: refused a connection", "from", g.From, "reason", reply.Reason, "err", err)
		conn.Close()
		return
	}
	_ = conn.SetDeadline(time.Time{})
	select {
	case s.ready <- conn:
	case <-s.ctx.Done():
		conn.Close()
	}
}

// Dial connects to RAFTID@HOST:PORT.
func (s *boundStream) Dial(target hraft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	raftID, address := splitAddress(target)
	if raftID == "" {
		return nil, fmt.Errorf("raft address %q names no Raft id", target)
	}
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	defer cancel()
	raw, err := s.dial(ctx, address)
	if err != nil {
		return nil, err
	}
	conn := s.mute.bind(s.ctx, raw)
	if err := s.greet(ctx, conn, raftID); err != nil {
		conn.Close()
		return nil, fmt.Errorf("raft connection to %s: %w", target, err)
	}
	return conn, nil
}

func (s *boundStream) greet(ctx context.Context, conn net.Conn, to string) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := writeJSON(conn, greeting{V: greetingVersion, Cluster: s.cluster, From: s.self, To: to, ClusterID: s.id()}); err != nil {
		return err
	}
	var r greetingReply
	if err := readJSON(conn, &r); err != nil {
		return err
	}
	if !r.OK {
		return fmt.Errorf("refused: %s", r.Reason)
	}
	if !stop() {
		return ctx.Err()
	}
	return nil
}

// writeJSON writes a value behind its length, two bytes big-endian.
func writeJSON(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode greeting: %w", err)
	}
	if len(b) > greetingMax {
		return fmt.Errorf("greeting of %d bytes, at most %d", len(b), greetingMax)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
	return err
}

func readJSON(r io.Reader, v any) error {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint16(head[:])
	if n > greetingMax {
		return fmt.Errorf("greeting of %d bytes, at most %d", n, greetingMax)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

// pause waits; false when the context ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
