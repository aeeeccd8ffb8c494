package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

// loadOptions say what the clients of a load do.
type loadOptions struct {
	nodes     []*node // one group of clients each
	perNode   int     // clients a node; 0: 1
	registers int     // 0: 24
	firstReg  int     // offset of the register numbers, to keep loads apart
	small     bool    // 4 KiB registers only, for latency
	writes    float64 // share of writes; 0: 0.5
	flushes   float64 // share of flushes after a write
	fua       float64 // share of writes with FUA
	opTimeout time.Duration
	think     time.Duration // pause of a client between operations; 0: 500 µs
}

// sample is one answered operation. Times are since the load's history began.
type sample struct {
	begin, end time.Duration
	write      bool
}

func (s sample) latency() time.Duration { return s.end - s.begin }

// failure is an operation or a connection that failed under a client.
type failure struct {
	at  time.Duration
	err error
}

// loadClient is one client at one node, with one request under way at a time.
type loadClient struct {
	id       int
	node     *node
	rng      *rand.Rand
	mu       sync.Mutex
	samples  []sample
	failures []failure
}

// load runs clients against a volume until it is stopped, and records what they
// did for the judge and for the clock.
type load struct {
	t       *testing.T
	volume  string
	o       loadOptions
	hist    *history
	regs    []register
	clients []*loadClient
	cancel  context.CancelFunc // clients end after their request under way
	hard    context.Context    // their connections break when it ends
	wg      sync.WaitGroup
}

const (
	regStride = 64 << 10
	// stopMax is how long the requests under way at the end may take before
	// their outcome is called unknown.
	stopMax = 15 * time.Second
)

// layout places n registers; some are of one block, some of many, and some
// begin in the middle of what a log or a network would cut.
func (o loadOptions) layout() []register {
	n := o.registers
	if n == 0 {
		n = 24
	}
	shapes := []register{{0, 4096}, {4096, 4096}, {0, 65536}, {4096, 12288}, {8192, 32768}}
	var out []register
	for i := range n {
		shape := shapes[i%len(shapes)]
		if o.small {
			shape = register{len: 4096}
		}
		shape.off += uint64(o.firstReg+i) * regStride
		out = append(out, shape)
	}
	return out
}

// startLoad starts the clients; each has connected when it returns.
func startLoad(t *testing.T, volume string, seed uint64, o loadOptions) *load {
	t.Helper()
	if o.perNode == 0 {
		o.perNode = 1
	}
	if o.writes == 0 {
		o.writes = 0.5
	}
	if o.think == 0 {
		// Without it the clients alone would fill the machine, and every time
		// that is measured would be the scheduler's.
		o.think = 500 * time.Microsecond
	}
	if o.opTimeout == 0 {
		o.opTimeout = 60 * time.Second
	}
	ctx, cancel := context.WithCancel(context.Background())
	hard, cancelHard := context.WithCancel(context.Background())
	l := &load{t: t, volume: volume, o: o, hist: newHistory(), regs: o.layout(), cancel: func() {
		cancel()
		time.AfterFunc(stopMax, cancelHard)
	}, hard: hard}
	t.Cleanup(l.stop)
	for _, n := range o.nodes {
		for range o.perNode {
			id := len(l.clients)
			c := &loadClient{id: id, node: n, rng: rand.New(rand.NewPCG(seed, uint64(id)))}
			l.clients = append(l.clients, c)
			d, err := dial(n, volume)
			if err != nil {
				t.Fatalf("client %d at %s: %v", id, n.name, err)
			}
			l.wg.Add(1)
			go func() {
				defer l.wg.Done()
				l.runClient(ctx, c, d)
			}()
		}
	}
	return l
}

// stop ends the clients after their request under way.
func (l *load) stop() {
	l.cancel()
	l.wg.Wait()
}

// runClient works until the load is stopped. A client that loses its node comes
// back to it, as a client that cannot move would.
func (l *load) runClient(ctx context.Context, c *loadClient, d *disk) {
	for ctx.Err() == nil {
		if d == nil {
			var err error
			if d, err = dial(c.node, l.volume); err != nil {
				c.fail(l, fmt.Errorf("connect: %w", err))
				d = nil
				pause(ctx, 200*time.Millisecond)
				continue
			}
		}
		if err := l.step(c, d); err != nil {
			c.fail(l, err)
			d.close()
			d = nil
			pause(ctx, 100*time.Millisecond)
			continue
		}
		pause(ctx, l.o.think)
	}
	if d != nil {
		d.close()
	}
}

// step is one operation of a client, and perhaps a flush after it.
func (l *load) step(c *loadClient, d *disk) error {
	d.deadline(time.Now().Add(l.o.opTimeout))
	defer context.AfterFunc(l.hard, func() { d.deadline(time.Now()) })()
	i := c.rng.IntN(len(l.regs))
	reg, id := l.regs[i], l.o.firstReg+i
	call := l.hist.now()
	if c.rng.Float64() >= l.o.writes {
		b := make([]byte, reg.len)
		if err := d.read(b, reg.off); err != nil {
			return fmt.Errorf("read: %w", err)
		}
		l.hist.read(c.id, id, b, call)
		c.done(l, call, false)
		return nil
	}
	value := l.hist.newValue()
	err := d.write(fill(value, reg.len), reg.off, c.rng.Float64() < l.o.fua)
	l.hist.wrote(c.id, id, value, call, err)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	c.done(l, call, true)
	if c.rng.Float64() < l.o.flushes {
		if err := d.flush(); err != nil {
			return fmt.Errorf("flush: %w", err)
		}
	}
	return nil
}

func (c *loadClient) done(l *load, call int64, write bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.samples = append(c.samples, sample{begin: time.Duration(call), end: time.Duration(l.hist.now()), write: write})
}

func (c *loadClient) fail(l *load, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failures = append(c.failures, failure{at: time.Duration(l.hist.now()), err: err})
}

// now is the load's clock.
func (l *load) now() time.Duration { return time.Duration(l.hist.now()) }

// at returns the clients at a node; nil is every client.
func (l *load) at(nodes ...*node) []*loadClient {
	var out []*loadClient
	for _, c := range l.clients {
		if nodes == nil || slices.Contains(nodes, c.node) {
			out = append(out, c)
		}
	}
	return out
}

// pauseOf returns the longest time between from and to in which a client had no
// answer, of all the clients given.
func pauseOf(clients []*loadClient, from, to time.Duration) time.Duration {
	var worst time.Duration
	for _, c := range clients {
		c.mu.Lock()
		last := from
		for _, s := range c.samples {
			if s.end < from || s.end > to {
				continue
			}
			worst = max(worst, s.end-last)
			last = s.end
		}
		worst = max(worst, to-last)
		c.mu.Unlock()
	}
	return worst
}

// slowestWrite returns the write with the longest latency, of those that were
// under way between from and to and have been answered, and how many there were.
func slowestWrite(clients []*loadClient, from, to time.Duration) (worst sample, writes int) {
	for _, c := range clients {
		c.mu.Lock()
		for _, s := range c.samples {
			if s.write && s.end >= from && s.begin <= to {
				if s.latency() > worst.latency() {
					worst = s
				}
				writes++
			}
		}
		c.mu.Unlock()
	}
	return worst, writes
}

// answered counts the operations that were answered between from and to.
func answered(clients []*loadClient, from, to time.Duration) int {
	n := 0
	for _, c := range clients {
		c.mu.Lock()
		for _, s := range c.samples {
			if s.end >= from && s.end <= to {
				n++
			}
		}
		c.mu.Unlock()
	}
	return n
}

// failuresSince returns the clients' failures from a moment on.
func failuresSince(clients []*loadClient, from time.Duration) []failure {
	var out []failure
	for _, c := range clients {
		c.mu.Lock()
		for _, f := range c.failures {
			if f.at >= from {
				out = append(out, f)
			}
		}
		c.mu.Unlock()
	}
	return out
}

// noFailures fails the test for every failure of the clients.
func (l *load) noFailures(clients []*loadClient) {
	l.t.Helper()
	for _, c := range clients {
		c.mu.Lock()
		for i, f := range c.failures {
			if i == 3 {
				l.t.Errorf("client %d at %s: … and %d more", c.id, c.node.name, len(c.failures)-i)
				break
			}
			l.t.Errorf("client %d at %s, %v after the load began: %v", c.id, c.node.name, f.at.Round(time.Millisecond), f.err)
		}
		c.mu.Unlock()
	}
}

// readAll reads every register through a node into the history, so that the
// judge sees the end of the run: an answered write that is lost shows there.
func (l *load) readAll(n *node) {
	l.t.Helper()
	d := mustDial(l.t, n, l.volume)
	defer d.close()
	for i, reg := range l.regs {
		call := l.hist.now()
		b := make([]byte, reg.len)
		if err := d.read(b, reg.off); err != nil {
			l.t.Fatalf("read register %d through %s: %v", i, n.name, err)
		}
		l.hist.read(len(l.clients), l.o.firstReg+i, b, call)
	}
}

// finish stops the load, reads everything back through each running node and
// judges the history.
func (l *load) finish(c *cluster) {
	l.t.Helper()
	l.stop()
	for _, n := range c.nodes {
		if n.running() {
			l.readAll(n)
		}
	}
	l.hist.check(l.t)
}

// pause waits, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
