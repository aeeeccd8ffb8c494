package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is a daemon that runs during the measurement.
type process struct {
	cmd  *exec.Cmd
	name string
	done chan struct{} // closed when it has ended
}

// startProcess starts a program whose output goes to a log file. The kernel
// kills it with us.
func startProcess(logFile, name string, args ...string) (*process, error) {
	f, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{cmd: cmd, name: name, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(p.done)
	}()
	return p, nil
}

// stop ends the process: first as asked, then by force.
func (p *process) stop() {
	if p == nil {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGCONT)
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

func (p *process) signal(s syscall.Signal) error { return p.cmd.Process.Signal(s) }

// clockTicks is USER_HZ, which is 100 on every Linux that Go runs on.
const clockTicks = 100

// cpu returns utime+stime in seconds.
func (p *process) cpu() (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	// The name in parentheses may hold blanks; utime is the 12th field after it.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", p.cmd.Process.Pid, b)
	}
	sum := 0.0
	for _, s := range f[11:13] {
		n, err := strconv.ParseFloat(s, 64)
		if err != nil {
			return 0, err
		}
		sum += n / clockTicks
	}
	return sum, nil
}

// rss returns the resident anonymous memory in bytes.
func (p *process) rss() int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			n, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return n << 10
		}
	}
	return 0
}

func cpuOf(ps []*process) (float64, error) {
	sum := 0.0
	for _, p := range ps {
		c, err := p.cpu()
		if err != nil {
			return 0, fmt.Errorf("CPU time of %s: %w", p.name, err)
		}
		sum += c
	}
	return sum, nil
}

// settle waits until the processes have stopped working, for a few seconds at
// most, and returns their CPU time.
func settle(ps []*process) (float64, error) {
	last, err := cpuOf(ps)
	for range 50 {
		if err != nil {
			return 0, err
		}
		time.Sleep(100 * time.Millisecond)
		var now float64
		now, err = cpuOf(ps)
		if now-last <= 1.5/clockTicks {
			return now, err
		}
		last = now
	}
	return last, err
}

// freeAddress returns a loopback address that nobody listens on, and that it has
// returned to nobody else: the kernel may offer a port again once it is closed.
func freeAddress() (string, error) {
	for {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", err
		}
		address := l.Addr().String()
		closeAll(l)
		if _, given := givenAddresses.LoadOrStore(address, true); !given {
			return address, nil
		}
	}
}

var givenAddresses sync.Map

// awaitPort waits until somebody listens there.
func awaitPort(ctx context.Context, address string, p *process) error {
	for {
		c, err := net.Dial("tcp", address)
		if err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.done:
			return fmt.Errorf("%s ended before it listened on %s", p.name, address)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// closeAll closes what is open, ignoring errors: it is for the way out.
func closeAll(list ...io.Closer) {
	for _, c := range list {
		_ = c.Close()
	}
}
