package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/vfs"
)

// faults makes a node's disk fail or hang.
type faults struct {
	mu   sync.Mutex
	rule func(vfs.Call) error // nil: a good disk
	held chan struct{}        // closed when the calls that hang may go on
	hung atomic.Int64         // calls that hang
}

// over lays the faults over a file system; nil has none.
func (f *faults) over(fs vfs.FS) vfs.FS {
	if f == nil {
		return fs
	}
	return vfs.Inject(fs, func(c vfs.Call) error {
		for {
			f.mu.Lock()
			rule, held := f.rule, f.held
			f.mu.Unlock()
			if rule == nil {
				return nil
			}
			err := rule(c)
			if !errors.Is(err, errHang) {
				return err
			}
			f.hung.Add(1)
			<-held
			f.hung.Add(-1)
		}
	})
}

// errHang makes a call wait until the fault is taken back, or is another one.
var errHang = errors.New("test: the disk hangs")

// on makes calls of these kinds on files with this in their path end so.
func (f *faults) on(err error, part string, ops ...vfs.Op) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.rule != nil {
		close(f.held)
	}
	f.held = make(chan struct{})
	f.rule = func(c vfs.Call) error {
		for _, op := range ops {
			if c.Op == op && strings.Contains(c.Path, part) {
				return &faultError{c, err}
			}
		}
		return nil
	}
}

// off mends the disk.
func (f *faults) off() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.rule != nil {
		close(f.held)
	}
	f.rule = nil
}

type faultError struct {
	call vfs.Call
	err  error
}

func (e *faultError) Error() string { return fmt.Sprintf("%s %s: %v", e.call.Op, e.call.Path, e.err) }
func (e *faultError) Unwrap() error { return e.err }

// repeat calls step, a millisecond apart, until it returns false or is stopped.
func repeat(t *testing.T, step func(ctx context.Context, i uint64) bool) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := uint64(0); ctx.Err() == nil && step(ctx, i); i++ {
			pause(ctx, time.Millisecond)
		}
	}()
	return func() { cancel(); <-done }
}

// writer writes through a node without a pause until it is stopped, and fails
// the test if a write fails.
func (n *testNode) writer() (stop func()) {
	n.t.Helper()
	return n.writes(8)
}

// writes is writer with a FLUSH after so many writes, 0 for none.
func (n *testNode) writes(flush uint64) (stop func()) {
	n.t.Helper()
	c := n.open("db")
	block := bytes.Repeat([]byte{1}, 16384)
	return repeat(n.t, func(_ context.Context, i uint64) bool {
		err := c.WriteAt(n.t.Context(), block, i%64*16384)
		if err == nil && flush > 0 && i%flush == 0 {
			err = c.Flush(n.t.Context())
		}
		if err != nil {
			n.t.Errorf("write through %s: %v", n.name, err)
		}
		return err == nil
	})
}

// sees waits until the status at a node shows a replica so; the state "" is any
// but in sync.
func (n *testNode) sees(replica string, state control.ReplicaState, reason string) {
	n.t.Helper()
	n.eventually(30*time.Second, fmt.Sprintf("%s is %s, for %q", replica, state, reason), func(ctx context.Context) error {
		v, err := n.client.VolumeStatus(ctx, "db")
		if err != nil {
			return err
		}
		for _, r := range v.Replicas {
			if r.Node == replica && (r.State == state || state == "" && r.State != control.InSync) && strings.Contains(r.Reason, reason) {
				return nil
			}
		}
		return fmt.Errorf("%+v", v.Replicas)
	})
}

// hasEvent waits until the cluster's events have one of a kind with this text.
func (n *testNode) hasEvent(kind, text string) {
	n.t.Helper()
	n.eventually(20*time.Second, fmt.Sprintf("an event %q that says %q", kind, text), func(ctx context.Context) error {
		var all []string
		err := n.client.Events(ctx, "", false, func(e control.Event) error {
			if e.Kind == kind && strings.Contains(e.Text, text) {
				return errFound
			}
			all = append(all, e.Kind+": "+e.Text)
			return nil
		})
		if errors.Is(err, errFound) {
			return nil
		}
		if err == nil {
			err = errors.New("there is none")
		}
		return fmt.Errorf("%w; events:\n%s", err, strings.Join(all, "\n"))
	})
}

var errFound = errors.New("found")

// same waits until every replica shows the same bytes.
func (n *testNode) same(names ...string) {
	n.t.Helper()
	for _, name := range names {
		n.eventually(20*time.Second, "the replica on "+name+" is equal", func(context.Context) error {
			// The writer goes on; it comes to an end of what it changes.
			if want := n.read("db", 0, 1<<20); !bytes.Equal(n.read("db@"+name, 0, 1<<20), want) {
				return errors.New("it differs")
			}
			return nil
		})
	}
}

// diskCluster is three nodes and a volume whose primary is alpha.
func diskCluster(t *testing.T, extra string) map[string]*testNode {
	t.Helper()
	nodes := newCluster(t, extra)
	t.Cleanup(func() {
		for _, n := range nodes {
			n.faults.off() // or it would not stop
		}
	})
	nodes["alpha"].create("db", 16<<20)
	nodes["beta"].healthy("db")
	if _, err := nodes["beta"].client.Switchover(t.Context(), "db", control.Switchover{To: "alpha"}); err != nil {
		t.Fatal(err)
	}
	return nodes
}

// TestAHungDisk: the disk of the primary stands still, in an fsync or in the
// append itself. Another node takes over, status and events say why, and when
// the disk answers again the replica is back without a command.
func TestAHungDisk(t *testing.T) {
	t.Parallel()
	nodes := diskCluster(t, "volume: {stall_timeout: 1s}\n")
	beta, gamma := nodes["beta"], nodes["gamma"]
	stop := beta.writer()
	defer stop()
	for _, tc := range []struct {
		name string
		op   vfs.Op
	}{{"fsync", vfs.OpSync}, {"append", vfs.OpWrite}} {
		victim := nodes[beta.status("db").Primary]
		asks := beta
		if victim == beta {
			asks = gamma
		}
		victim.faults.on(errHang, "/log/", tc.op)
		asks.eventually(30*time.Second, tc.name+": another node is primary", func(ctx context.Context) error {
			v, err := asks.client.VolumeStatus(ctx, "db")
			if err == nil && (v.Primary == "" || v.Primary == victim.name) {
				err = fmt.Errorf("primary %q: %s", v.Primary, v.Reason)
			}
			return err
		})
		asks.hasEvent("stalled", "hangs")
		asks.sees(victim.name, "", "hangs")
		victim.faults.off()
		asks.hasEvent("stalled", "answers again")
		asks.healthy("db")
	}
	stop()
	beta.same("alpha", "beta", "gamma")
}

// TestAHungWriteOut: the same where nobody waits for an fsync, and the disk stands
// still in what goes before it.
func TestAHungWriteOut(t *testing.T) {
	t.Parallel()
	nodes := diskCluster(t, "volume: {stall_timeout: 1s}\n")
	beta := nodes["beta"]
	stop := beta.writes(0)
	defer stop()
	nodes["alpha"].faults.on(errHang, "/log/", vfs.OpWriteOut)
	beta.hasEvent("stalled", "hangs")
	beta.sees("alpha", "", "hangs")
	nodes["alpha"].faults.off()
	beta.hasEvent("stalled", "answers again")
	beta.healthy("db")
	stop()
	beta.same("alpha", "beta", "gamma")
}

// TestADiskThatFails: each way in which log and backing store can fail, on a
// secondary and on the primary: the volume goes on, status and events have the
// reason, and one command heals.
func TestADiskThatFails(t *testing.T) {
	t.Parallel()
	nodes := diskCluster(t, "")
	beta := nodes["beta"]
	stop := beta.writer()
	defer stop()
	for _, tc := range []struct {
		name, victim, part string
		op                 vfs.Op
	}{
		{"write of the log", "gamma", "/log/", vfs.OpWrite},
		{"fsync of the log", "gamma", "/log/", vfs.OpSync},
		{"write of the backing store", "gamma", "/data", vfs.OpWrite},
		{"fsync of the backing store", "gamma", "/data", vfs.OpSync},
		{"write of the log of the primary", "alpha", "/log/", vfs.OpWrite},
		{"fsync of the log of the primary", "alpha", "/log/", vfs.OpSync},
	} {
		victim := nodes[tc.victim]
		if beta.status("db").Primary != "alpha" {
			if _, err := beta.client.Switchover(t.Context(), "db", control.Switchover{To: "alpha"}); err != nil {
				t.Fatalf("%s: %v", tc.name, err)
			}
		}
		victim.faults.on(syscall.EIO, tc.part, tc.op)
		if tc.op == vfs.OpSync && tc.part == "/data" {
			d := victim.daemon.Load() // not only after the ten seconds that it may take
			if err := d.volume(d.state().Volume("db").ID).driver.Checkpoint(t.Context()); err == nil {
				t.Errorf("%s: a checkpoint was made", tc.name)
			}
		}
		beta.sees(tc.victim, control.Failed, "input/output error")
		beta.hasEvent("replica-failed", "input/output error")
		beta.eventually(20*time.Second, tc.name+": the volume goes on with the others", func(ctx context.Context) error {
			v, err := beta.client.VolumeStatus(ctx, "db")
			if err == nil && (v.Primary == tc.victim || v.Health != control.Degraded) {
				err = fmt.Errorf("primary %q, health %s: %s", v.Primary, v.Health, v.Reason)
			}
			return err
		})
		victim.faults.off()
		if err := beta.client.Invalidate(t.Context(), "db", control.Invalidate{Node: tc.victim}); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		beta.healthy("db")
	}
	stop()
	beta.same("alpha", "beta", "gamma")
}

// TestADiskThatIsFull: no room for log or backing store takes the replica out, a
// restart does not help and does not hurt, and with room again it is back
// without a command.
func TestADiskThatIsFull(t *testing.T) {
	t.Parallel()
	nodes := diskCluster(t, "")
	beta, gamma := nodes["beta"], nodes["gamma"]
	stop := beta.writer()
	defer stop()
	for _, part := range []string{"/log/", "/data"} {
		gamma.faults.on(syscall.ENOSPC, part, vfs.OpWrite, vfs.OpAllocate)
		beta.sees("gamma", control.Failed, "no space left")
		gamma.halt()
		gamma.start()
		gamma.eventually(20*time.Second, "it is up with its disk full", func(ctx context.Context) error {
			_, err := gamma.client.Nodes(ctx)
			return err
		})
		gamma.faults.off()
		beta.healthy("db")
	}
	stop()
	beta.same("alpha", "beta", "gamma")
}

// TestEveryDiskFails: the disks of all replicas fail, one after the other. The
// volume stands still, and nothing is guessed; what status suggests works when it
// is typed, up to a healthy volume with all that was flushed.
func TestEveryDiskFails(t *testing.T) {
	t.Parallel()
	nodes := diskCluster(t, "")
	beta := nodes["beta"]
	c := beta.open("db")
	flushed := bytes.Repeat([]byte("this was flushed "), 4000)[:65536]
	for i := range uint64(8) {
		if err := errors.Join(c.WriteAt(t.Context(), flushed, i*65536), c.Flush(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	stop := beta.pusher()
	defer stop()
	// Each is at an fsync when they fail: with two of them gone the third gets nothing
	// more that it could fail with.
	for _, n := range nodes {
		n.faults.on(errHang, "/log/", vfs.OpSync)
	}
	for _, n := range nodes {
		n.eventually(20*time.Second, "it fsyncs its log", func(context.Context) error {
			if n.faults.hung.Load() == 0 {
				return errors.New("it does not")
			}
			return nil
		})
	}
	for _, n := range nodes {
		n.faults.on(syscall.EIO, "/log/", vfs.OpSync)
	}
	for _, name := range []string{"alpha", "beta", "gamma"} {
		beta.sees(name, control.Failed, "input/output error")
	}
	stop()
	for _, n := range nodes {
		n.faults.off()
	}
	nodes["gamma"].halt() // a restart forgets nothing
	nodes["gamma"].start()
	beta.sees("gamma", control.Failed, "input/output error")
	beta.eventually(30*time.Second, "all three say so, and what to do", func(ctx context.Context) error {
		v, err := beta.client.VolumeStatus(ctx, "db")
		if err == nil && (v.Health != control.Suspended || v.Next != "blockstep failover db --force --accept-data-loss") {
			err = fmt.Errorf("%s: %s; next: %s", v.Health, v.Reason, v.Next)
		}
		return err
	})
	if _, err := beta.client.Failover(t.Context(), "db", control.Failover{}); err == nil || !strings.Contains(err.Error(), "--force --accept-data-loss") {
		t.Errorf("a failover without force: %v", err)
	}
	if err := beta.client.Invalidate(t.Context(), "db", control.Invalidate{Node: "gamma"}); err == nil {
		t.Error("the replica on gamma was given up while there was none to copy it from")
	}
	before := beta.daemon.Load().state().Volume("db")
	res, err := beta.client.Failover(t.Context(), "db", control.Failover{Force: true, AcceptDataLoss: true})
	if err != nil || !strings.Contains(res.Lost, "input/output error") {
		t.Fatalf("%+v, %v", res, err)
	}
	// While its raft log is replayed it has failed, as it had.
	old := nodes[res.Primary].daemon.Load()
	nodes[res.Primary].halt()
	nodes[res.Primary].start()
	nodes[res.Primary].eventually(20*time.Second, "its copy of the cluster state is whole", func(context.Context) error {
		d := nodes[res.Primary].daemon.Load()
		if d == nil || d == old || !d.isCurrent() {
			return errors.New("it is not")
		}
		// Whoever read the state before that, and looks at it now, must not take
		// the failure for one of today: nothing would take it back.
		for _, m := range d.viewOf(before).Members {
			if m.Node == d.self && m.Failed {
				t.Errorf("the replica on %s failed, says a view made of an old state", m.Node)
			}
		}
		return nil
	})
	for range 2 {
		var node string
		beta.eventually(20*time.Second, "the next step is to copy one that failed", func(ctx context.Context) error {
			v, err := beta.client.VolumeStatus(ctx, "db")
			if err == nil {
				if _, step, _ := strings.Cut(v.Next, ", then: blockstep invalidate db --node "); step != "" && step != node {
					node = step
					return nil
				}
				err = fmt.Errorf("%s: %s; next: %s", v.Health, v.Reason, v.Next)
			}
			return err
		})
		if err := beta.client.Invalidate(t.Context(), "db", control.Invalidate{Node: node}); err != nil {
			t.Fatal(err)
		}
		beta.sees(node, control.InSync, "")
	}
	beta.healthy("db")
	for i := range uint64(8) {
		if got := beta.read("db", i*65536, 65536); !bytes.Equal(got, flushed) {
			t.Errorf("block %d: what was flushed is gone", i)
		}
	}
	beta.same("alpha", "beta", "gamma")
}

// pusher writes behind the first MiB through a node until it is stopped; what comes
// of it is nobody's business.
func (n *testNode) pusher() (stop func()) {
	n.t.Helper()
	c := n.open("db")
	return repeat(n.t, func(ctx context.Context, i uint64) bool {
		return c.WriteAt(ctx, bytes.Repeat([]byte{byte(i)}, 16384), 1<<20+i%64*16384) == nil
	})
}

// TestAResizeWithoutRoom: a volume that one replica's disk has no room for does
// not grow, and no replica has failed for it: with the new size in the cluster
// state each one without the room would have, and nothing would bring it back.
func TestAResizeWithoutRoom(t *testing.T) {
	t.Parallel()
	nodes := diskCluster(t, "")
	beta, gamma := nodes["beta"], nodes["gamma"]
	gamma.faults.on(syscall.EFBIG, "/data", vfs.OpTruncate)
	_, err := beta.client.ResizeVolume(t.Context(), "db", control.Resize{Size: 32 << 20})
	if err == nil || !strings.Contains(err.Error(), "gamma has no room") {
		t.Errorf("the resize ends with %v", err)
	}
	if v := beta.status("db"); v.Size != 16<<20 || v.Health != control.Healthy {
		t.Errorf("after it db has %d bytes and is %s: %s", v.Size, v.Health, v.Reason)
	}
	gamma.faults.off()
	if _, err := beta.client.ResizeVolume(t.Context(), "db", control.Resize{Size: 32 << 20}); err != nil {
		t.Fatal(err)
	}
	beta.healthy("db")
	c := gamma.open("db")
	if err := c.WriteAt(t.Context(), make([]byte, 4096), 32<<20-4096); err != nil {
		t.Errorf("write at the new end: %v", err)
	}
}

// TestUsedDisks: a volume on disks that hold other things shows none of them, at
// no replica, and none where it grows.
func TestUsedDisks(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	beta := nodes["beta"]
	devices := map[string]string{}
	for name, n := range nodes {
		devices[name] = n.dir + ".disk"
		if err := os.WriteFile(devices[name], bytes.Repeat([]byte("junk of "+name), 1<<19), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := beta.client.CreateVolume(t.Context(), control.CreateVolume{Name: "db", Size: 1 << 20, Devices: devices}); err != nil {
		t.Fatal(err)
	}
	beta.healthy("db")
	if _, err := beta.client.ResizeVolume(t.Context(), "db", control.Resize{Size: 2 << 20}); err != nil {
		t.Fatal(err)
	}
	for _, export := range []string{"db", "db@alpha", "db@beta", "db@gamma"} {
		if b := beta.read(export, 0, 2<<20); !bytes.Equal(b, make([]byte, len(b))) {
			t.Errorf("%s shows what was on the disk", export)
		}
	}
}

// TestALogThatAPeerNeeds: the primary cannot read the part of its log that a
// replica needs which was away. It gives way to another one, from which that
// replica catches up.
func TestALogThatAPeerNeeds(t *testing.T) {
	t.Parallel()
	nodes := diskCluster(t, "")
	alpha, beta, gamma := nodes["alpha"], nodes["beta"], nodes["gamma"]
	gamma.halt()
	c := beta.open("db")
	block := bytes.Repeat([]byte("more than what is kept in memory"), 1<<15)
	for i := range uint64(40) {
		if err := c.WriteAt(t.Context(), block, i%16<<20); err != nil {
			t.Fatal(err)
		}
	}
	d := alpha.daemon.Load()
	alpha.eventually(20*time.Second, "it has applied all of it, for which it reads its log too", func(context.Context) error {
		if st := d.volume(d.state().Volume("db").ID).driver.Status().Core; st.Applied < st.Last.Seq {
			return fmt.Errorf("%d of %v", st.Applied, st.Last)
		}
		return nil
	})
	alpha.faults.on(syscall.EIO, "/log/", vfs.OpRead)
	gamma.start()
	beta.sees("alpha", control.Failed, "read the log for gamma")
	beta.sees("gamma", control.InSync, "")
	alpha.faults.off()
	beta.eventually(10*time.Second, "it is invalidated", func(ctx context.Context) error {
		return beta.client.Invalidate(ctx, "db", control.Invalidate{Node: "alpha"})
	})
	beta.healthy("db")
	beta.same("alpha", "beta", "gamma")
}

// TestACorruptLog: a byte of the log flips below the durable position while the
// process is down. That is no torn tail: the replica fails itself rather than
// forget what it has acknowledged, says so, and one command heals.
func TestACorruptLog(t *testing.T) {
	t.Parallel()
	nodes := diskCluster(t, "")
	beta, gamma := nodes["beta"], nodes["gamma"]
	d := gamma.daemon.Load()
	driver := d.volume(d.state().Volume("db").ID).driver
	if err := driver.Checkpoint(t.Context()); err != nil { // what follows is in the log alone for some seconds
		t.Fatal(err)
	}
	c := beta.open("db")
	mark := bytes.Repeat([]byte("this was acknowledged "), 3000)
	for i := range uint64(8) {
		if err := errors.Join(c.WriteAt(t.Context(), mark, i*65536), c.Flush(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	p := nodes["alpha"].daemon.Load()
	last := p.volume(p.state().Volume("db").ID).driver.Status().Core.Last
	gamma.eventually(20*time.Second, "it has all of it durable", func(context.Context) error {
		if at := driver.Status().Core.Durable; at < last.Seq {
			return fmt.Errorf("%d of %v", at, last)
		}
		return nil
	})
	driver.Kill() // as kill -9 would
	gamma.halt()
	if n := flipFirst(t, filepath.Join(d.replicaDir(d.state().Volume("db").ID), "log"), mark); n == 0 {
		t.Fatal("the write is not in the log")
	}
	gamma.start()
	beta.sees("gamma", control.Failed, "corrupt")
	beta.hasEvent("replica-failed", "corrupt")
	if err := c.WriteAt(t.Context(), []byte("goes on"), 0); err != nil {
		t.Error(err)
	}
	gamma.refusesReadmission("corrupt")
	if err := beta.client.Invalidate(t.Context(), "db", control.Invalidate{Node: "gamma"}); err != nil {
		t.Fatal(err)
	}
	beta.healthy("db")
	beta.same("alpha", "beta", "gamma")
}

// refusesReadmission: a replica that does not verify is not taken back, and that it
// was tried is not told again and again.
func (n *testNode) refusesReadmission(reason string) {
	n.t.Helper()
	d := n.daemon.Load()
	sv := d.state().Volume("db")
	ctx, cancel := context.WithTimeout(n.t.Context(), 20*time.Second)
	defer cancel()
	if _, err := d.serveReadmit(ctx, d.self, epochCall{sv.ID, sv.Epoch}); err == nil || !strings.Contains(err.Error(), reason) {
		n.t.Errorf("%s is taken back: %v", n.name, err)
	}
	told := func() (count int) {
		if err := n.client.Events(ctx, "", false, func(e control.Event) error {
			if e.Kind == "failed" {
				count++
			}
			return nil
		}); err != nil {
			n.t.Fatal(err)
		}
		return count
	}
	before := told()
	for range 20 {
		d.wake() // the keeper of the volume tries to open it
		pause(ctx, 100*time.Millisecond)
	}
	if after := told(); before == 0 || after > before+1 {
		n.t.Errorf("it is told %d times, and was %d times", after, before)
	}
}

// flipFirst flips a bit in the first place of the files in dir where the bytes
// are, and returns how many places there are.
func flipFirst(t *testing.T, dir string, want []byte) (n int) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		at := bytes.Index(b, want)
		if at >= 0 && n == 0 {
			b[at+len(want)/2] ^= 4
			if err := os.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		n += bytes.Count(b, want)
	}
	return n
}
