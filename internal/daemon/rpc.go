package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/mux"
)

// Node-to-node calls are HTTP/1.1 with JSON behind the mux's preface, one pool
// of kept-alive connections a peer. They carry no client I/O: seals, reports,
// raft commands for the leader, questions for the status.

const (
	headerCluster = "Blockstep-Cluster"
	headerNode    = "Blockstep-Node"
	// headerClusterID tells a cluster from another one of its name, and from what it
	// was before a recovery. It is left out while it is not known.
	headerClusterID = "Blockstep-Cluster-Id"
	// headerTo guards against an address that now belongs to another node.
	headerTo = "Blockstep-To"

	// pathFounding is what is asked before it is known whose node it is.
	pathFounding = "/node/v1/founding"

	rpcBytesMax     = 4 << 20 // of a request or an answer
	rpcConnsPerPeer = 16
	rpcDialTimeout  = 2 * time.Second
	rpcIdle         = time.Minute
	// rpcHandlersMax bounds the calls that are served at a time.
	rpcHandlersMax = 256
)

// rpcClient calls other nodes.
type rpcClient struct {
	cluster string
	id      atomic.Pointer[string] // the cluster's; nil while it is not known
	self    ident.Node
	address func(ident.Node) (string, bool)
	http    *http.Client
}

func newRPCClient(cluster string, self ident.Node, address func(ident.Node) (string, bool)) *rpcClient {
	c := &rpcClient{cluster: cluster, self: self, address: address}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, rpcDialTimeout)
			defer cancel()
			return mux.Dial(ctx, addr, mux.PrefaceNode)
		},
		MaxConnsPerHost:     rpcConnsPerPeer,
		MaxIdleConnsPerHost: rpcConnsPerPeer,
		IdleConnTimeout:     rpcIdle,
		DisableCompression:  true,
	}}
	return c
}

func (c *rpcClient) close() { c.http.CloseIdleConnections() }

// errNoNode is returned when a node is not a member.
var errNoNode = errors.New("no such node")

// call asks node for path with in as the body and decodes the answer into out.
// An error that the other node answered is a *control.Error; every other one
// means that it is not known whether the call was carried out.
func (c *rpcClient) call(ctx context.Context, node ident.Node, path string, in, out any) error {
	address, ok := c.address(node)
	if !ok {
		return fmt.Errorf("calling %s: %w", node, errNoNode)
	}
	return c.callAddress(ctx, node, address, path, in, out)
}

func (c *rpcClient) callAddress(ctx context.Context, node ident.Node, address, path string, in, out any) error {
	raw, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("encoding %s: %w", path, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+address+path, bytes.NewReader(raw))
	if err != nil {
		return fmt.Errorf("calling %s: %w", node, err)
	}
	req.Header.Set(headerCluster, c.cluster)
	if id := c.id.Load(); id != nil {
		req.Header.Set(headerClusterID, *id)
	}
	req.Header.Set(headerNode, string(c.self))
	req.Header.Set(headerTo, string(node))
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("calling %s at %s: %w", node, address, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, rpcBytesMax+1))
	if err == nil && len(body) > rpcBytesMax {
		err = fmt.Errorf("an answer of more than %d bytes", rpcBytesMax)
	}
	if err != nil {
		return fmt.Errorf("calling %s at %s: %w", node, address, err)
	}
	if resp.StatusCode != http.StatusOK {
		var e control.Error
		if json.Unmarshal(body, &e) == nil && e.Message != "" {
			return &e
		}
		return fmt.Errorf("calling %s at %s: it answered %s", node, address, resp.Status)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("reading %s's answer to %s: %w", node, path, err)
	}
	return nil
}

// rpcServer serves calls of other nodes.
type rpcServer struct {
	cluster string
	id      atomic.Pointer[string] // the cluster's; nil while it is not known
	self    ident.Node
	mux     *http.ServeMux
	slots   chan struct{}
	http    *http.Server
}

func newRPCServer(cluster string, self ident.Node, logger *slog.Logger) *rpcServer {
	s := &rpcServer{cluster: cluster, self: self, mux: http.NewServeMux(), slots: make(chan struct{}, rpcHandlersMax)}
	s.http = &http.Server{
		Handler:           http.HandlerFunc(s.serve),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * rpcIdle,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
	return s
}

// serve judges who calls, then lets the handler answer.
func (s *rpcServer) serve(w http.ResponseWriter, r *http.Request) {
	if got := r.Header.Get(headerCluster); got != s.cluster {
		rpcError(w, control.Errorf(control.CodeRefused, "correct cluster or nodes in one of the configurations", "this node belongs to cluster %q, the caller to %q", s.cluster, got))
		return
	}
	if id, got := s.id.Load(), r.Header.Get(headerClusterID); id != nil && got != "" && got != *id && r.URL.Path != pathFounding {
		rpcError(w, control.Errorf(control.CodeRefused, "empty the data_dir of the node that does not belong here, then: blockstep node replace NODE",
			"this node belongs to the cluster %q of id %s, the caller to that of id %s", s.cluster, *id, got))
		return
	}
	if got := r.Header.Get(headerTo); got != string(s.self) {
		rpcError(w, control.Errorf(control.CodeRefused, "correct the addresses under nodes", "this node is %q, the caller takes it for %q", s.self, got))
		return
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		rpcError(w, control.Errorf(control.CodeFailed, "", "%s is busy with %d calls", s.self, rpcHandlersMax))
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, rpcBytesMax)
	s.mux.ServeHTTP(w, r)
}

// handle adds a call. from is the caller's name as it says.
func handle[In, Out any](s *rpcServer, path string, f func(ctx context.Context, from ident.Node, in In) (Out, error)) {
	s.mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		var in In
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			rpcError(w, control.Errorf(control.CodeUsage, "run the same version on all nodes", "the call %s is not understood: %v", path, err))
			return
		}
		out, err := f(r.Context(), ident.Node(r.Header.Get(headerNode)), in)
		if err != nil {
			rpcError(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(out) // the caller is gone: it will ask again
	})
}

func rpcError(w http.ResponseWriter, err error) {
	var e *control.Error
	if !errors.As(err, &e) {
		e = control.Errorf(control.CodeFailed, "", "%v", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusConflict)
	_ = json.NewEncoder(w).Encode(e)
}
