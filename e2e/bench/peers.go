package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// system is one thing that is measured.
type system struct {
	name  string
	uri   string
	procs []*process
	bytes int64 // of the device that jobs use; 0: imageBytes
	// awake is called before each job, to see that it is whole.
	awake func(ctx context.Context) error
}

func (s *system) stop() {
	for _, p := range s.procs {
		p.stop()
	}
}

// The names of the systems in the order in which they run and are printed.
const (
	sysNbdkit    = "nbdkit"
	sysMirror    = "mirror"
	sysQuorum    = "quorum"
	sysBlockstep = "blockstep"
)

// newImage makes a file of size bytes whose blocks are allocated by the
// filling that every system gets before it is measured.
func newImage(dir, name string, size int64) (string, error) {
	file := filepath.Join(dir, name+".img")
	f, err := os.Create(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return file, f.Truncate(size)
}

// startNbdkit serves a new image by nbdkit's file plugin over TCP: buffered,
// multi-conn, its default of 16 threads, TCP_NODELAY as nbdkit sets it.
func startNbdkit(ctx context.Context, dir, name string, size int64) (*process, string, error) {
	img, err := newImage(dir, name, size)
	if err != nil {
		return nil, "", err
	}
	addr, err := freeAddress()
	if err != nil {
		return nil, "", err
	}
	host, port, _ := strings.Cut(addr, ":")
	p, err := startProcess(filepath.Join(dir, name+".log"), "nbdkit", "-f", "-i", host, "-p", port, "file", img)
	if err != nil {
		return nil, "", err
	}
	if err := awaitPort(ctx, addr, p); err != nil {
		p.stop()
		return nil, "", err
	}
	return p, addr, nil
}

// newNbdkit is one copy: what the network and the page cache alone cost.
func newNbdkit(ctx context.Context, dir string, size int64) (*system, error) {
	p, addr, err := startNbdkit(ctx, dir, "nbdkit", size)
	if err != nil {
		return nil, err
	}
	return &system{name: sysNbdkit, uri: "nbd://" + addr, procs: []*process{p}}, nil
}

// remoteNode is the blockdev of a copy that nbdkit serves.
func remoteNode(name, addr string) string {
	host, port, _ := strings.Cut(addr, ":")
	return fmt.Sprintf("driver=nbd,node-name=%s,server.type=inet,server.host=%s,server.port=%s", name, host, port)
}

// startQEMU starts a qemu-storage-daemon with block nodes, exports the node
// "top" over TCP and returns a QMP connection.
func startQEMU(ctx context.Context, dir, name string, nodes []string) (*process, string, *qmp, error) {
	addr, err := freeAddress()
	if err != nil {
		return nil, "", nil, err
	}
	host, port, _ := strings.Cut(addr, ":")
	sock := filepath.Join(dir, name+".qmp")
	var args []string
	for _, n := range nodes {
		args = append(args, "--blockdev", n)
	}
	args = append(
		args,
		"--nbd-server", fmt.Sprintf("addr.type=inet,addr.host=%s,addr.port=%s,max-connections=64", host, port),
		"--export", "type=nbd,id=e,node-name=top,name=,writable=on",
		"--chardev", "socket,id=q,server=on,wait=off,path="+sock, "--monitor", "chardev=q",
	)
	p, err := startProcess(filepath.Join(dir, name+".log"), "qemu-storage-daemon", args...)
	if err != nil {
		return nil, "", nil, err
	}
	if err := awaitPort(ctx, addr, p); err != nil {
		p.stop()
		return nil, "", nil, err
	}
	q, err := dialQMP(sock)
	if err != nil {
		p.stop()
		return nil, "", nil, err
	}
	return p, addr, q, nil
}

// newMirror is two copies: a local file and one behind nbdkit, kept alike by a
// blockdev-mirror job in write-blocking mode, which answers a write when both
// have it. It never flushes its target.
func newMirror(ctx context.Context, dir string, size int64) (_ *system, err error) {
	s := &system{name: sysMirror}
	defer func() {
		if err != nil {
			s.stop()
		}
	}()
	p, addr, err := startNbdkit(ctx, dir, "mirror-copy", size)
	if err != nil {
		return nil, err
	}
	s.procs = append(s.procs, p)
	img, err := newImage(dir, "mirror-local", size)
	if err != nil {
		return nil, err
	}
	top := "driver=file,node-name=top,aio=threads,cache.direct=off,filename=" + img
	p, front, q, err := startQEMU(ctx, dir, "mirror", []string{top, remoteNode("copy", addr)})
	if err != nil {
		return nil, err
	}
	defer closeAll(q)
	s.procs, s.uri = append(s.procs, p), "nbd://"+front
	err = q.do("blockdev-mirror", map[string]any{
		"job-id": "m", "device": "top", "target": "copy", "sync": "full", "copy-mode": "write-blocking",
	})
	if err != nil {
		return nil, err
	}
	return s, q.await("BLOCK_JOB_READY")
}

// newQuorum is three copies behind three nbdkit, under qemu's quorum driver
// with a threshold of two: it answers a write when all three have.
func newQuorum(ctx context.Context, dir string, size int64) (_ *system, err error) {
	s := &system{name: sysQuorum}
	defer func() {
		if err != nil {
			s.stop()
		}
	}()
	var nodes []string
	top := "driver=quorum,node-name=top,vote-threshold=2"
	for i := range 3 {
		p, addr, err := startNbdkit(ctx, dir, fmt.Sprintf("quorum-%d", i), size)
		if err != nil {
			return nil, err
		}
		s.procs = append(s.procs, p)
		nodes = append(nodes, remoteNode(fmt.Sprintf("n%d", i), addr))
		top += fmt.Sprintf(",children.%d=n%d", i, i)
	}
	p, front, q, err := startQEMU(ctx, dir, "quorum", append(nodes, top))
	if err != nil {
		return nil, err
	}
	s.procs, s.uri = append(s.procs, p), "nbd://"+front
	return s, q.Close()
}

// qmp is a connection to qemu's monitor.
type qmp struct {
	net.Conn
	lines *bufio.Scanner
}

// qmpTimeout bounds the wait for an answer or an event.
const qmpTimeout = time.Minute

func dialQMP(sock string) (*qmp, error) {
	c, err := net.Dial("unix", sock)
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(qmpTimeout)); err != nil {
		return nil, err
	}
	q := &qmp{Conn: c, lines: bufio.NewScanner(c)}
	return q, q.do("qmp_capabilities", nil)
}

// do runs a command.
func (q *qmp) do(command string, args map[string]any) error {
	m := map[string]any{"execute": command}
	if args != nil {
		m["arguments"] = args
	}
	if err := json.NewEncoder(q).Encode(m); err != nil {
		return err
	}
	for q.lines.Scan() {
		var a struct {
			Return *json.RawMessage `json:"return"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
		}
		if err := json.Unmarshal(q.lines.Bytes(), &a); err != nil {
			return err
		}
		if a.Error != nil {
			return fmt.Errorf("qemu: %s: %s", command, a.Error.Desc)
		}
		if a.Return != nil {
			return nil
		}
	}
	return fmt.Errorf("qemu: no answer to %s: %w", command, q.lines.Err())
}

// await waits for an event.
func (q *qmp) await(event string) error {
	for q.lines.Scan() {
		if strings.Contains(q.lines.Text(), event) {
			return nil
		}
	}
	return fmt.Errorf("qemu: no event %s: %w", event, q.lines.Err())
}
