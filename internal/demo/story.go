package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/nbd/nbdtest"
)

const (
	// chunk is what the story writes and reads at a time.
	chunk = 256 << 10
	// window is how many writes are in flight.
	window = 8
	// flushEvery is how much is written between two FLUSHes.
	flushEvery = 8 << 20
	// pauseMax is how long I/O may stand still after the kill.
	pauseMax = 5 * time.Second
	// healTime is how long the dead node may take to come back.
	healTime = 2 * time.Minute
)

// story is one run of the story.
type story struct {
	o     Options
	nodes []*node
	procs map[string]*exec.Cmd
	began time.Time
}

// Story tells the main job on real data, and returns nil only if all of it
// held.
func Story(ctx context.Context, o Options) error {
	if _, err := findTool("mkfs.ext4", "e2fsprogs"); err != nil {
		return err
	}
	dir, remove, err := o.directory()
	if err != nil {
		return err
	}
	s := &story{o: o, procs: map[string]*exec.Cmd{}, began: time.Now()}
	defer remove()
	defer s.killAll()
	err = s.tell(ctx, dir)
	if err != nil {
		s.showLogs()
	}
	return err
}

// say prints one line with the time since the beginning.
func (s *story) say(format string, args ...any) {
	fmt.Fprintf(s.o.Out, "%7.2fs  %s\n", time.Since(s.began).Seconds(), fmt.Sprintf(format, args...))
}

func (s *story) tell(ctx context.Context, dir string) error {
	tree, treeBytes, files, err := chooseTree(ctx, s.o.From)
	if err != nil {
		return err
	}
	size := imageSize(treeBytes, files)
	image := filepath.Join(dir, "image.ext4")
	if err := makeImage(ctx, image, tree, size); err != nil {
		return err
	}
	s.say("mkfs.ext4 made an image of %s with the %d files of %s", config.FormatSize(size), files, tree)

	if s.nodes, err = makeNodes(dir); err != nil {
		return err
	}
	for _, n := range s.nodes {
		if err := s.start(n); err != nil {
			return err
		}
	}
	v, err := createVolume(ctx, s.nodes[0], size)
	if err != nil {
		return err
	}
	s.say("three nodes run, and serve volume %s of %s; the primary is %s", v.Volume, config.FormatSize(v.Size), v.Primary)

	victim, via, err := s.choose(v.Primary)
	if err != nil {
		return err
	}
	client, err := nbdtest.Dial(ctx, "unix://"+via.nbdSock, volumeName, nbdtest.Options{})
	if err != nil {
		return fmt.Errorf("opening the volume at %s: %w", via.name, err)
	}
	defer func() { _ = client.Close() }() // whatever it had to say was said
	s.say("one NBD session at %s (unix socket) writes the image, with a FLUSH each %s", via.name, config.FormatSize(flushEvery))
	if err := s.writeThrough(ctx, client, image, victim, via); err != nil {
		return err
	}
	if err := s.bringBack(ctx, victim, via); err != nil {
		return err
	}
	if err := s.compare(ctx, client, image, via); err != nil {
		return err
	}
	s.say("all of it held")
	return nil
}

// choose picks who is killed (the primary) and whom the client uses (another).
func (s *story) choose(primary string) (victim, via *node, err error) {
	for _, n := range s.nodes {
		if n.name == primary {
			victim = n
		} else {
			via = n
		}
	}
	if victim == nil || via == nil {
		return nil, nil, fmt.Errorf("the primary %q is none of the demo's nodes", primary)
	}
	return victim, via, nil
}

// writeThrough writes the image and kills the primary when half is written.
func (s *story) writeThrough(ctx context.Context, client *nbdtest.Client, image string, victim, via *node) error {
	f, err := os.Open(image)
	if err != nil {
		return fmt.Errorf("reading the image: %w", err)
	}
	defer f.Close()
	total, err := dataBytes(f)
	if err != nil {
		return err
	}
	w := &writer{client: client, file: f, gap: newGap()}
	killed := make(chan error, 1)
	w.half, w.onHalf = total/2, func() { killed <- s.kill(victim) }
	if err := w.run(ctx); err != nil {
		return fmt.Errorf("writing through %s: %w", via.name, err)
	}
	if err := <-killed; err != nil {
		return err
	}
	v, err := via.client.VolumeStatus(ctx, volumeName)
	if err != nil {
		return err
	}
	s.say("wrote %s and flushed it, on the same session; the primary is now %s in epoch %d", config.FormatSize(w.written.Load()), v.Primary, v.Epoch)
	pause := w.gap.longest()
	s.say("the longest pause in I/O was %.2f s; no request failed", pause.Seconds())
	if pause > pauseMax {
		return fmt.Errorf("I/O stood still for %v, more than %v", pause, pauseMax)
	}
	return nil
}

// kill is kill -9 of a node's process.
func (s *story) kill(n *node) error {
	cmd := s.procs[n.name]
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		return fmt.Errorf("killing %s: %w", n.name, err)
	}
	_ = cmd.Wait() // it was killed: that is its error
	delete(s.procs, n.name)
	s.say("kill -9 of %s, the primary, in the middle of it", n.name)
	return nil
}

// bringBack starts the dead node again and waits until it has caught up.
func (s *story) bringBack(ctx context.Context, victim, via *node) error {
	if err := s.start(victim); err != nil {
		return err
	}
	back := time.Now()
	s.say("%s is started again", victim.name)
	ctx, cancel := context.WithTimeout(ctx, healTime)
	defer cancel()
	last := ""
	v, err := poll(ctx, func() (control.VolumeStatus, bool, error) {
		v, err := via.client.VolumeStatus(ctx, volumeName)
		for _, r := range v.Replicas {
			if now := string(r.State); r.Node == victim.name && now != last {
				s.say("%s is %s (%s behind)", r.Node, now, config.FormatSize(r.LagBytes))
				last = now
			}
		}
		return v, err == nil && v.Health == control.Healthy, err
	})
	if err != nil {
		return fmt.Errorf("%s did not come back within %v: %s: %w", victim.name, healTime, v.Reason, err)
	}
	s.say("healthy after %.1f s: %s is in sync again, by itself", time.Since(back).Seconds(), victim.name)
	return nil
}

// compare reads the volume and each replica, and holds them against the image.
func (s *story) compare(ctx context.Context, client *nbdtest.Client, image string, via *node) error {
	if err := equal(ctx, client, image); err != nil {
		return fmt.Errorf("the volume, read back on the same session: %w", err)
	}
	s.say("the volume, read back on the same session, is the image")
	for _, n := range s.nodes {
		export := volumeName + "@" + n.name
		c, err := nbdtest.Dial(ctx, "unix://"+via.nbdSock, export, nbdtest.Options{})
		if err != nil {
			return fmt.Errorf("opening %s: %w", export, err)
		}
		err = equal(ctx, c, image)
		_ = c.Close() // it has been read
		if err != nil {
			return fmt.Errorf("%s: %w", export, err)
		}
		s.say("%s is equal to it byte by byte", export)
	}
	return nil
}

// equal reads an export and compares it with the image.
func equal(ctx context.Context, c *nbdtest.Client, image string) error {
	f, err := os.Open(image)
	if err != nil {
		return fmt.Errorf("reading the image: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("reading the image: %w", err)
	}
	if uint64(info.Size()) != c.Size() {
		return fmt.Errorf("it has %d bytes, the image %d", c.Size(), info.Size())
	}
	const step = 4 << 20
	var wg sync.WaitGroup
	offsets := make(chan int64)
	errs := make(chan error, window)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for range window {
		wg.Go(func() {
			got, want := make([]byte, step), make([]byte, step)
			for off := range offsets {
				if err := equalAt(ctx, c, f, off, got, want); err != nil {
					errs <- err
					cancel()
					return
				}
			}
		})
	}
feed:
	for off := int64(0); off < info.Size(); off += step {
		select {
		case offsets <- off:
		case <-ctx.Done():
			break feed
		}
	}
	close(offsets)
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return ctx.Err()
	}
}

func equalAt(ctx context.Context, c *nbdtest.Client, f *os.File, off int64, got, want []byte) error {
	n := min(int64(len(got)), int64(c.Size())-off)
	got, want = got[:n], want[:n]
	if err := c.ReadAt(ctx, got, uint64(off)); err != nil {
		return fmt.Errorf("reading at %d: %w", off, err)
	}
	if _, err := f.ReadAt(want, off); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("reading the image at %d: %w", off, err)
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("differs from the image first at byte %d", off+int64(i))
		}
	}
	return nil
}

// start starts a node as a process of its own.
func (s *story) start(n *node) error {
	f, err := os.OpenFile(n.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("opening the log of %s: %w", n.name, err)
	}
	defer f.Close()
	cmd := exec.Command(s.o.Exe, "demo-node", "--config", n.config)
	cmd.Stdout, cmd.Stderr = f, f
	// A story that is killed takes its nodes along; Ctrl-C is the story's alone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", n.name, err)
	}
	s.procs[n.name] = cmd
	return nil
}

// killAll ends the nodes; their data is the demo's own.
func (s *story) killAll() {
	for _, cmd := range s.procs {
		_ = cmd.Process.Kill() // already gone is as good
		_ = cmd.Wait()
	}
}

// showLogs prints the end of each log: after a failure they are all there is.
func (s *story) showLogs() {
	const lines = 15
	for _, n := range s.nodes {
		raw, err := os.ReadFile(n.log)
		if err != nil {
			continue
		}
		all := strings.Split(strings.TrimSpace(string(raw)), "\n")
		fmt.Fprintf(s.o.Out, "\nthe end of %s's log:\n%s\n", n.name, strings.Join(all[max(0, len(all)-lines):], "\n"))
	}
}

// zeroes reports whether a chunk has nothing in it.
func zeroes(p []byte) bool { return len(bytes.TrimLeft(p, "\x00")) == 0 }
