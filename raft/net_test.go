package raft

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/blockstep/blockstep/internal/ident"
)

// testNet is a network in memory: pipes, which a synctest bubble can wait for.
type testNet struct {
	mu        sync.Mutex
	listeners map[string]*pipeListener
	nodes     map[ident.Node]*Node
	conns     map[string][]net.Conn // by the address dialled
	cut       map[string]bool       // addresses that nobody reaches
	dead      map[string]bool       // of those: where nothing says so
}

func newTestNet() *testNet {
	return &testNet{
		listeners: map[string]*pipeListener{}, nodes: map[ident.Node]*Node{},
		conns: map[string][]net.Conn{}, cut: map[string]bool{}, dead: map[string]bool{},
	}
}

var errCut = errors.New("test: unreachable")

func (t *testNet) listen(address string) *pipeListener {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := &pipeListener{ch: make(chan net.Conn), done: make(chan struct{})}
	t.listeners[address] = l
	return l
}

func (t *testNet) dialer(from string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, address string) (net.Conn, error) {
		t.mu.Lock()
		l, cut, dead := t.listeners[address], t.cut[address] || t.cut[from], t.dead[address]
		t.mu.Unlock()
		if dead {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		if l == nil || cut {
			return nil, fmt.Errorf("dial %s: %w", address, errCut)
		}
		a, b := net.Pipe()
		select {
		case l.ch <- b:
		case <-l.done:
			return nil, fmt.Errorf("dial %s: %w", address, errCut)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		t.conns[address] = append(t.conns[address], a)
		t.conns[from] = append(t.conns[from], a)
		return a, nil
	}
}

// isolate cuts a node off, open connections included; heal ends it.
func (t *testNet) isolate(address string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cut[address] = true
	for _, c := range t.conns[address] {
		c.Close()
	}
	delete(t.conns, address)
}

// die is isolate, and who dials the node hears nothing.
func (t *testNet) die(address string) {
	t.isolate(address)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dead[address] = true
}

func (t *testNet) node(name ident.Node) *Node {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.nodes[name]
}

func (t *testNet) heal(address string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.cut, address)
}

// Founding makes testNet the Peers of all nodes.
func (t *testNet) Founding(_ context.Context, node ident.Node, address string) (FoundInfo, error) {
	t.mu.Lock()
	n, cut := t.nodes[node], t.cut[address]
	t.mu.Unlock()
	if n == nil || cut {
		return FoundInfo{}, errCut
	}
	return n.FoundInfo(), nil
}

type pipeListener struct {
	ch   chan net.Conn
	done chan struct{}
	once sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ch:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return raftAddr("pipe") }
