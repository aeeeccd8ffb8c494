package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// node is one blockstepd: its configuration, its process, its log.
type node struct {
	c    *cluster
	name string

	addr     string // the node's port, HOST:PORT
	nbdTCP   string // HOST:PORT
	nbdSock  string // path
	admin    string // path
	metrics  string // HOST:PORT
	dataDir  string
	bootFile string
	cfgFile  string
	logFile  string
	bin      string // directory of its daemon; "": the one that is tested
	boots    int    // how often the machine "booted"
	disk     *crashDisk
	// sockets are handed to the daemon as systemd does it, under these names.
	sockets     []*os.File
	socketNames string // with colons between

	mu   sync.Mutex
	proc *exec.Cmd     // nil: not running
	done chan struct{} // closed when proc has been waited for
	exit error         // of proc, once done is closed
}

// start starts the daemon. It returns at once: what a test waits for, it waits
// for by the CLI or by a client.
func (n *node) start() {
	n.c.t.Helper()
	if err := n.tryStart(); err != nil {
		n.c.t.Fatalf("start %s: %v", n.name, err)
	}
}

func (n *node) tryStart() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc != nil {
		return errors.New("it is running already")
	}
	log, err := os.OpenFile(n.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	fmt.Fprintf(log, "--- %s: start of %s\n", time.Now().Format("15:04:05.000"), n.name)
	bin := binDir
	if n.bin != "" {
		bin = n.bin
	}
	args := []string{filepath.Join(bin, "blockstepd"), "--config", n.cfgFile}
	if n.c.net != nil {
		// ip becomes the daemon by exec: the process id is the daemon's.
		args = append([]string{"ip", "netns", "exec", n.c.net.name(n.name)}, args...)
	}
	if n.sockets != nil {
		// The shell becomes the daemon by exec, and so knows its process id.
		args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh"}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr, cmd.Stdout = log, log
	if n.sockets != nil {
		cmd.ExtraFiles = n.sockets
		cmd.Env = append(os.Environ(), fmt.Sprintf("LISTEN_FDS=%d", len(n.sockets)), "LISTEN_FDNAMES="+n.socketNames)
	}
	// A test binary that dies takes its daemons along.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	done := make(chan struct{})
	n.proc, n.done = cmd, done
	go func() {
		err := cmd.Wait()
		n.mu.Lock()
		n.exit = err
		if n.proc == cmd {
			n.proc = nil
		}
		n.mu.Unlock()
		close(done)
	}()
	return nil
}

// signal sends a signal to the daemon's process, by its id.
func (n *node) signal(sig syscall.Signal) {
	n.mu.Lock()
	cmd := n.proc
	n.mu.Unlock()
	if cmd == nil {
		n.c.t.Fatalf("%s is not running, so it cannot be sent %v", n.name, sig)
	}
	if err := cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		n.c.t.Fatalf("%v to %s: %v", sig, n.name, err)
	}
}

// kill is kill -9; it returns when the process is gone.
func (n *node) kill() {
	n.mu.Lock()
	cmd, done := n.proc, n.done
	n.mu.Unlock()
	if cmd == nil {
		return
	}
	_ = cmd.Process.Signal(syscall.SIGKILL) // already gone is as good
	<-done
}

// pause is kill -STOP; it returns when every thread stands. The signal alone is
// no stop: on a busy machine one thread has to run first to take it, and until
// then the others go on, for milliseconds.
func (n *node) pause() {
	n.c.t.Helper()
	n.signal(syscall.SIGSTOP)
	eventually(n.c.t, 20*time.Second, n.name+" stands still", n.stands)
}

// stands reports whether every thread of the daemon is stopped.
func (n *node) stands() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc == nil {
		return true
	}
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", n.proc.Process.Pid))
	if err != nil || len(stats) == 0 {
		return false
	}
	for _, name := range stats {
		b, err := os.ReadFile(name)
		// PID (NAME) STATE …; the name may hold anything.
		if i := bytes.LastIndexByte(b, ')'); err != nil || i < 0 || !bytes.HasPrefix(b[i+1:], []byte(" T")) {
			return false
		}
	}
	return true
}

func (n *node) resume() { n.signal(syscall.SIGCONT) }

// stop ends the daemon with SIGTERM and fails the test unless it ends cleanly
// and soon.
func (n *node) stop() {
	n.c.t.Helper()
	n.mu.Lock()
	cmd, done := n.proc, n.done
	n.mu.Unlock()
	if cmd == nil {
		return
	}
	n.signal(syscall.SIGTERM)
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		n.signal(syscall.SIGQUIT) // its goroutines go into the log
		time.Sleep(500 * time.Millisecond)
		n.kill()
		n.c.t.Fatalf("%s did not stop within 20 s of SIGTERM", n.name)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.exit != nil {
		n.c.t.Fatalf("%s ended with %v after SIGTERM, want exit code 0", n.name, n.exit)
	}
}

// running reports whether the process lives.
func (n *node) running() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.proc != nil
}

// newBoot changes the boot id: to the daemon the machine has crashed, unless it
// was stopped cleanly before.
func (n *node) newBoot() {
	n.c.t.Helper()
	n.boots++
	id := fmt.Sprintf("00000000-0000-4000-8000-%012d\n", n.boots)
	if err := os.WriteFile(n.bootFile, []byte(id), 0o600); err != nil {
		n.c.t.Fatal(err)
	}
}

// powerCut takes the power from the machine: the daemon dies, the disk loses
// what was not fsynced, and the next start is another boot. Several machines
// lose it together: none lives on to see another one gone.
func powerCut(nodes ...*node) {
	for _, n := range nodes {
		n.kill()
	}
	for _, n := range nodes {
		n.disk.powerCut()
		n.newBoot()
	}
}

// uri is the export as libnbd, qemu and fio spell it.
func (n *node) uri(export string) string {
	return "nbd://" + n.nbdTCP + "/" + export
}

// log returns what the daemon has written.
func (n *node) log() string {
	b, err := os.ReadFile(n.logFile)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// checkLog looks for what must never be there.
func (n *node) checkLog(t testing.TB) {
	for _, bad := range []string{"panic:", "goroutine 1 [", "fatal error:", "DATA RACE", "invariant"} {
		if i := strings.Index(n.log(), bad); i >= 0 {
			s := n.log()[i:]
			t.Errorf("%s: the log has %q:\n%s", n.name, bad, s[:min(len(s), 4000)])
			return
		}
	}
}

// tail returns the last lines of the log.
func (n *node) tail(lines int) string {
	b := []byte(n.log())
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] != '\n' {
			continue
		}
		if lines--; lines < 0 {
			b = b[i+1:]
			break
		}
	}
	return string(bytes.TrimSpace(b))
}
