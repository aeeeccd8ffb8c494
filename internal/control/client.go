package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	// connectTimeout is how long a daemon may take to accept.
	connectTimeout = 3 * time.Second
	// lineBytesMax bounds a line of a streamed answer.
	lineBytesMax = 1 << 20
	// answerBytesMax bounds a whole answer: a thousand volumes fit.
	answerBytesMax = 64 << 20
)

// ErrUnreachable is returned (wrapped) when no daemon answers at the address.
var ErrUnreachable = errors.New("no daemon reachable")

// Client asks one daemon.
type Client struct {
	address string
	http    *http.Client
}

// Dial returns a client for unix:///PATH or tcp://HOST:PORT. It connects with
// the first request.
func Dial(address string) (*Client, error) {
	network, rest, ok := strings.Cut(address, "://")
	if network == "tcp" {
		_, port, err := net.SplitHostPort(rest)
		n, bad := strconv.ParseUint(port, 10, 16)
		ok = ok && err == nil && bad == nil && n > 0
	}
	if !ok || (network != "unix" && network != "tcp") || rest == "" {
		return nil, Errorf(CodeUsage, "write it like unix:///run/blockstep/admin.sock or tcp://10.1.0.1:7700", "%q is not an admin address", address)
	}
	dialer := net.Dialer{Timeout: connectTimeout}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, rest)
			if err != nil {
				return nil, err
			}
			return &httpConn{Conn: conn}, nil
		},
		MaxIdleConns: 1,
	}
	return &Client{address: address, http: &http.Client{Transport: transport}}, nil
}

// httpBegins is how each answer does.
const httpBegins = "HTTP/"

// errNotHTTP is returned by a connection at whose other end nobody speaks HTTP.
var errNotHTTP = errors.New("it does not speak HTTP")

// httpConn is a connection that judges the first bytes of what answers: an NBD port
// greets by itself, and net/http would only tell of a malformed response, or that the
// connection broke.
type httpConn struct {
	net.Conn
	judged bool // used by the one goroutine that reads
}

func (c *httpConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 && !c.judged {
		c.judged = true
		if k := min(n, len(httpBegins)); string(p[:k]) != httpBegins[:k] {
			return 0, errNotHTTP
		}
	}
	return n, err
}

// Local reports whether the daemon is one of this host.
func (c *Client) Local() bool { return strings.HasPrefix(c.address, "unix://") }

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func (c *Client) open(ctx context.Context, method, path string, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encoding the request: %w", err)
		}
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://blockstep"+path, body)
	if err != nil {
		return nil, fmt.Errorf("making the request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.classify(ctx, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	var e Error
	if err := json.NewDecoder(io.LimitReader(resp.Body, answerBytesMax)).Decode(&e); err != nil || e.Message == "" {
		return nil, fmt.Errorf("%w: %s answered %s: it does not look like blockstepd; check --admin", ErrUnreachable, c.address, resp.Status)
	}
	return nil, &e
}

// classify tells a daemon that is not there from one that was too slow, and
// both from a connection that broke in the middle.
func (c *Client) classify(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		if errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("%w: this user may not use %s; be root, or a member of the socket's group (ls -l shows it)", ErrUnreachable, c.address)
		}
		return fmt.Errorf("%w at %s (%w); start blockstepd, or name another daemon with --admin", ErrUnreachable, c.address, op.Err)
	}
	if errors.Is(err, errNotHTTP) {
		return fmt.Errorf("%w: what answers at %s does not look like blockstepd; check --admin", ErrUnreachable, c.address)
	}
	return fmt.Errorf("%w: the connection to %s broke (%w); look at blockstepd's log, then try again", ErrUnreachable, c.address, err)
}

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	resp, err := c.open(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		out = &struct{}{}
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, answerBytesMax)).Decode(out); err != nil {
		return c.classify(ctx, err)
	}
	return nil
}

// lines reads a streamed answer and calls each with a line at a time.
func (c *Client) lines(ctx context.Context, method, path string, in any, each func(line []byte) error) error {
	return c.linesOpened(ctx, method, path, in, func() {}, each)
}

func (c *Client) linesOpened(ctx context.Context, method, path string, in any, opened func(), each func(line []byte) error) error {
	resp, err := c.open(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	opened()
	s := bufio.NewScanner(resp.Body)
	s.Buffer(nil, lineBytesMax)
	for s.Scan() {
		var e Error
		if json.Unmarshal(s.Bytes(), &e) == nil && e.Message != "" && e.Code != "" {
			return &e
		}
		if err := each(s.Bytes()); err != nil {
			return err
		}
	}
	if err := s.Err(); err != nil {
		return c.classify(ctx, err)
	}
	return nil
}

func volumePath(name, verb string) string {
	p := "/v1/volumes/" + url.PathEscape(name)
	if verb != "" {
		p += "/" + verb
	}
	return p
}

// Status asks for everything.
func (c *Client) Status(ctx context.Context) (out ClusterStatus, err error) {
	return out, c.do(ctx, http.MethodGet, "/v1/status", nil, &out)
}

// Volumes asks for each volume's status.
func (c *Client) Volumes(ctx context.Context) (out []VolumeStatus, err error) {
	return out, c.do(ctx, http.MethodGet, "/v1/volumes", nil, &out)
}

// VolumeStatus asks for one volume's status.
func (c *Client) VolumeStatus(ctx context.Context, volume string) (out VolumeStatus, err error) {
	return out, c.do(ctx, http.MethodGet, volumePath(volume, ""), nil, &out)
}

// VolumeClients asks who uses a volume, through which node.
func (c *Client) VolumeClients(ctx context.Context, volume string) (out []VolumeClients, err error) {
	return out, c.do(ctx, http.MethodGet, volumePath(volume, "clients"), nil, &out)
}

// CreateVolume returns when the volume serves.
func (c *Client) CreateVolume(ctx context.Context, r CreateVolume) (out VolumeStatus, err error) {
	return out, c.do(ctx, http.MethodPost, "/v1/volumes", r, &out)
}

// DeleteVolume deletes a volume and its replicas' content.
func (c *Client) DeleteVolume(ctx context.Context, volume string) error {
	return c.do(ctx, http.MethodDelete, volumePath(volume, ""), nil, nil)
}

// ResizeVolume makes a volume larger.
func (c *Client) ResizeVolume(ctx context.Context, volume string, r Resize) (out VolumeStatus, err error) {
	return out, c.do(ctx, http.MethodPost, volumePath(volume, "resize"), r, &out)
}

// SetOptions changes options of a volume.
func (c *Client) SetOptions(ctx context.Context, volume string, r SetOptions) (out VolumeStatus, err error) {
	return out, c.do(ctx, http.MethodPost, volumePath(volume, "options"), r, &out)
}

// Switchover returns when the new primary serves.
func (c *Client) Switchover(ctx context.Context, volume string, r Switchover) (out VolumeStatus, err error) {
	return out, c.do(ctx, http.MethodPost, volumePath(volume, "switchover"), r, &out)
}

// Fence returns when no write of a session from before can take effect any more.
func (c *Client) Fence(ctx context.Context, volume string) (out FenceResult, err error) {
	return out, c.do(ctx, http.MethodPost, volumePath(volume, "fence"), struct{}{}, &out)
}

// Failover returns when a new primary is named.
func (c *Client) Failover(ctx context.Context, volume string, r Failover) (out FailoverResult, err error) {
	return out, c.do(ctx, http.MethodPost, volumePath(volume, "failover"), r, &out)
}

// Invalidate has a replica resynced anew.
func (c *Client) Invalidate(ctx context.Context, volume string, r Invalidate) error {
	return c.do(ctx, http.MethodPost, volumePath(volume, "invalidate"), r, nil)
}

// Verify compares the replicas; progress is called now and then.
func (c *Client) Verify(ctx context.Context, volume string, r Verify, progress func(VerifyProgress) error) error {
	return c.lines(ctx, http.MethodPost, volumePath(volume, "verify"), r, func(line []byte) error {
		var p VerifyProgress
		if err := json.Unmarshal(line, &p); err != nil {
			return fmt.Errorf("reading the progress: %w", err)
		}
		return progress(p)
	})
}

// Events calls each with every event after the cursor since.
func (c *Client) Events(ctx context.Context, since string, follow bool, each func(Event) error) error {
	q := url.Values{"since": {since}}
	if follow {
		q.Set("follow", "true")
	}
	return c.lines(ctx, http.MethodGet, "/v1/events?"+q.Encode(), nil, func(line []byte) error {
		var e Event
		if err := json.Unmarshal(line, &e); err != nil {
			return fmt.Errorf("reading an event: %w", err)
		}
		return each(e)
	})
}

// Follow is Events that goes on until ctx ends or the daemon stops, which is no
// error. open is called when the daemon has taken the request.
func (c *Client) Follow(ctx context.Context, since string, open func(), each func(Event) error) error {
	q := url.Values{"since": {since}, "follow": {"true"}}
	return c.linesOpened(ctx, http.MethodGet, "/v1/events?"+q.Encode(), nil, open, func(line []byte) error {
		var e Event
		if err := json.Unmarshal(line, &e); err != nil {
			return fmt.Errorf("reading an event: %w", err)
		}
		return each(e)
	})
}

// Nodes asks for the members.
func (c *Client) Nodes(ctx context.Context) (out []NodeStatus, err error) {
	return out, c.do(ctx, http.MethodGet, "/v1/nodes", nil, &out)
}

// AddNode adds a member, or makes a token for one.
func (c *Client) AddNode(ctx context.Context, r AddNode) (AddedNode, error) {
	out := AddedNode{Name: r.Name, Address: r.Address, Witness: r.Witness} // an older daemon says nothing
	return out, c.do(ctx, http.MethodPost, "/v1/nodes", r, &out)
}

// ChangeNode does replace or drain to a member.
func (c *Client) ChangeNode(ctx context.Context, node, verb string) (out ChangedNode, err error) {
	return out, c.do(ctx, http.MethodPost, "/v1/nodes/"+url.PathEscape(node)+"/"+verb, nil, &out)
}

// RemoveNode ends a membership.
func (c *Client) RemoveNode(ctx context.Context, node string, r RemoveNode) (out ChangedNode, err error) {
	var in any
	if r != (RemoveNode{}) {
		in = r // an older daemon knows no body
	}
	return out, c.do(ctx, http.MethodPost, "/v1/nodes/"+url.PathEscape(node)+"/remove", in, &out)
}

// Reload has the daemon read its configuration again.
func (c *Client) Reload(ctx context.Context) (out Reloaded, err error) {
	return out, c.do(ctx, http.MethodPost, "/v1/reload", nil, &out)
}

// Doctor has every node that is reached looked at.
func (c *Client) Doctor(ctx context.Context) (out []Finding, err error) {
	return out, c.do(ctx, http.MethodGet, "/v1/doctor", nil, &out)
}

// Attach connects a volume to a kernel device.
func (c *Client) Attach(ctx context.Context, volume string, r Attach) (out Attachment, err error) {
	return out, c.do(ctx, http.MethodPost, volumePath(volume, "attach"), r, &out)
}

// Detach disconnects a volume from its kernel device.
func (c *Client) Detach(ctx context.Context, volume string) error {
	return c.do(ctx, http.MethodPost, volumePath(volume, "detach"), nil, nil)
}

// Attachments asks for this node's kernel devices.
func (c *Client) Attachments(ctx context.Context) (out []Attachment, err error) {
	return out, c.do(ctx, http.MethodGet, "/v1/attachments", nil, &out)
}
