package sim

import (
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/invariant"
	"github.com/blockstep/blockstep/replication/core"
	"github.com/blockstep/blockstep/replication/wire"
)

const (
	us = int64(1e3)
	ms = int64(1e6)
	s1 = int64(1e9)

	heartbeat = 50 * ms
	leaseFor  = 300 * ms
	driftPPM  = 10_000
	blockSize = 4096
	volumeID  = ident.Volume(7)
)

// Options say what a history is like. Draw makes them from a seed.
type Options struct {
	Seed     uint64
	Replicas int
	Clients  int // nodes without a replica, which serve clients all the same
	Sessions int // on each node
	Blocks   int // of 4 KiB, at first
	Grow     int // blocks by which it may grow
	Ack      core.AckMode
	MinCopies,
	DedupMax int
	Hold     int64 // on_no_quorum: error after this long; 0: hold
	Entries  int   // UnappliedEntries; 0: only their bytes are bounded
	Rate     int64 // bytes that a resync may move in a second; 0: no ceiling
	FaultFor int64 // ns of virtual time in which faults are injected
	HealFor  int64 // ns within which the healed cluster must serve and converge
	Most     bool  // all but one are healed first, and must serve without it if they are enough
	Faults   []Fault
	Wild     bool // messages are lost, doubled, reordered; TCP would not
	Trim     bool // the log is recycled as soon as it may be
	Manual   bool // no client, fault or failover but what a scenario asks for
	NoCtl    bool // no failover controller

	Trace io.Writer // nil: none
}

// Result is what a history came to.
type Result struct {
	Err      error
	Hash     uint64 // of the whole trace
	Events   int
	Now      int64
	Entries  int // committed
	Answered int // writes and flushes
	Reads    int
	Epochs   int
	Losses   int // promotions that may give something up
	Moved    int // blocks of resyncs
	Excused  string
}

// Draw chooses a history at random.
func Draw(seed uint64) Options {
	r := rand.New(rand.NewPCG(seed, 0x6a09e667f3bcc908))
	o := Options{
		Seed: seed, Replicas: 3, Sessions: 1 + r.IntN(2), Blocks: 4 + r.IntN(28),
		DedupMax: 1 << 12, FaultFor: 2*s1 + r.Int64N(3*s1), HealFor: 30 * s1,
		Wild: r.IntN(4) == 0, Trim: r.IntN(2) == 0,
	}
	switch r.IntN(10) {
	case 0, 1:
		o.Replicas, o.Clients = 2, 1
	case 2:
		o.Replicas = 5
	case 3, 4:
		o.Clients = 1
	}
	if r.IntN(3) == 0 {
		o.Grow = 1 + r.IntN(8)
	}
	if r.IntN(6) == 0 {
		o.DedupMax = 16
	}
	o.MinCopies = 1
	if o.Replicas >= 3 && r.IntN(3) > 0 {
		o.MinCopies = 2
	}
	switch r.IntN(15) {
	case 0, 1, 2:
		o.Ack = core.AckDurable
	case 3:
		o.Ack = core.AckLocal
	}
	if r.IntN(6) == 0 {
		o.Hold = 500*ms + r.Int64N(2*s1)
	}
	if r.IntN(4) == 0 {
		o.Rate = blockSize * (8 + r.Int64N(100))
	}
	o.Faults = drawFaults(r)
	o.Most = r.IntN(2) == 0
	if r.IntN(2) == 0 {
		o.Entries = 64
	}
	return o
}

// drawFaults gives each history its own mix: some faults hide each other.
func drawFaults(r *rand.Rand) []Fault {
	var fs []Fault
	sparse := 0
	if r.IntN(2) == 0 {
		sparse = 4
	}
	for f := Fault(0); f < faultKinds; f++ {
		most := 6
		switch f {
		case FaultPower, FaultPowerAll, FaultForce, FaultRot, FaultWipe:
			most = 10
		}
		for n := 3 - r.IntN(most+sparse); n > 0; n-- {
			fs = append(fs, f)
		}
	}
	if slices.ContainsFunc(fs, func(f Fault) bool {
		switch f {
		case FaultPower, FaultPowerAll, FaultCleanStop, FaultDisk, FaultRot, FaultWipe, FaultForce, FaultRemove:
			return true
		}
		return false
	}) {
		// With one replica in doubt and another that has forgotten or failed,
		// only an operator can go on.
		fs = slices.DeleteFunc(fs, func(f Fault) bool { return f == FaultDoubt })
	}
	if len(fs) == 0 {
		fs = []Fault{FaultKill}
	}
	return fs
}

// violation ends a history: an invariant of design section 9 is broken.
type violation struct{ msg string }

func (v violation) Error() string { return v.msg }

// Sim is one history.
type Sim struct {
	opt   Options
	rng   *rand.Rand
	now   int64
	q     queue
	nodes []*node
	links [][]*link
	cl    clusterState
	ctl   [2]*controller
	chk   checker
	cli   []*session

	doubted  bool // once a history
	broken   bool // a disk was lost: once a history
	grown    int
	orders   int // commands that an operator has given
	healed   bool
	quieting bool // clients begin nothing new
	healAt   int64
	gone     *node // who stays down while all others are healed
	wellAt   int64 // since when they must serve without it; 0: they need not
	done     bool
	excused  string
	hash     uint64
	count    int

	appends []*wire.Append

	// drop, when set, says which messages a scenario loses.
	drop func(from, to int, m wire.Message) bool
}

// Run plays one history.
func Run(o Options) (res Result) {
	s := New(o)
	defer s.catch(&res)
	s.schedule()
	s.RunUntil(func() bool { return s.done })
	return
}

// catch turns a violation into the history's error.
func (s *Sim) catch(res *Result) {
	p := recover()
	*res = s.result()
	switch p := p.(type) {
	case nil:
	case violation:
		res.Err = p
	case invariant.Violation:
		res.Err = fmt.Errorf("%w\n%s", p, debug.Stack())
	case error:
		res.Err = fmt.Errorf("panic: %w\n%s", p, debug.Stack())
	default:
		res.Err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
	}
	if res.Err != nil {
		s.note(-1, "VIOLATION", "%v", res.Err)
	}
}

func (s *Sim) result() Result {
	return Result{
		Hash: s.hash, Events: s.count, Now: s.now, Entries: len(s.chk.log), Answered: s.chk.answered,
		Reads: s.chk.reads, Epochs: int(s.cl.vol().Epoch), Losses: len(s.chk.losses), Moved: s.chk.moved, Excused: s.excused,
	}
}

// New makes the cluster with its volume; nothing runs yet.
func New(o Options) *Sim {
	s := &Sim{opt: o, rng: rand.New(rand.NewPCG(o.Seed, 0xbb67ae8584caa73b)), hash: fnv.New64a().Sum64()}
	n := o.Replicas + o.Clients
	for i := range n {
		s.nodes = append(s.nodes, s.newNode(i, i < o.Replicas))
	}
	s.links = make([][]*link, n)
	for i := range s.links {
		s.links[i] = make([]*link, n)
	}
	for i := range n {
		for j := i + 1; j < n; j++ {
			l := &link{a: i, b: j}
			s.links[i][j], s.links[j][i] = l, l
		}
	}
	s.initCluster()
	s.chk.init(s)
	for i := range n {
		for range o.Sessions {
			s.newSession(i)
		}
	}
	return s
}

// schedule sets everything going.
func (s *Sim) schedule() {
	for _, n := range s.nodes {
		s.at(s.delay(ms, 20*ms), event{kind: evStart, node: n.i})
	}
	s.at(50*ms, event{kind: evViewAll})
	if !s.opt.NoCtl {
		s.newController(0)
	}
	if s.opt.Manual {
		return
	}
	s.at(400*ms, event{kind: evFault})
	s.at(400*ms+s.opt.FaultFor, event{kind: evHeal})
	for i := range s.cli {
		s.at(s.delay(50*ms, 300*ms), event{kind: evOp, a: i})
	}
}

// RunUntil handles events until stop says so.
func (s *Sim) RunUntil(stop func() bool) {
	for len(s.q.h) > 0 && !stop() {
		e := s.q.pop()
		s.now = e.at
		s.count++
		s.mix(uint64(e.kind), uint64(e.at), uint64(e.node)<<32|uint64(uint32(e.b)), e.x)
		s.handle(&e)
		if s.count > 5_000_000 {
			s.fail("I8", "five million events and no end: something goes round in circles")
		}
	}
}

// RunFor lets virtual time pass.
func (s *Sim) RunFor(d int64) {
	end := s.now + d
	fin := false
	s.at(d, event{kind: evCall, fn: func() { fin = true }})
	s.RunUntil(func() bool { return fin })
	s.now = max(s.now, end)
}

func (s *Sim) at(after int64, e event) {
	e.at = s.now + after
	s.q.push(&e)
}

// delay draws a time between lo and hi, mostly near lo.
func (s *Sim) delay(lo, hi int64) int64 {
	d := hi - lo
	if d <= 0 {
		return lo
	}
	if s.rng.IntN(8) > 0 {
		d = max(d/8, 1)
	}
	return lo + s.rng.Int64N(d)
}

func (s *Sim) chance(p float64) bool { return p > 0 && s.rng.Float64() < p }

func (s *Sim) mix(v ...uint64) {
	for _, x := range v {
		s.hash ^= x
		s.hash *= 0x100000001b3
		s.hash ^= s.hash >> 29
	}
}

// fail ends the history with a broken promise.
func (s *Sim) fail(name, format string, args ...any) {
	panic(violation{fmt.Sprintf("%s at %s: %s", name, clock(s.now), fmt.Sprintf(format, args...))})
}

// note writes one line of the trace: time, node, what, details.
func (s *Sim) note(node int, what, format string, args ...any) {
	if s.opt.Trace == nil {
		return
	}
	name := "-"
	if node >= 0 {
		name = string(s.nodes[node].name)
	}
	fmt.Fprintf(s.opt.Trace, "%s %-2s %-10s %s\n", clock(s.now), name, what, strings.TrimSpace(fmt.Sprintf(format, args...)))
}

func (s *Sim) tracing() bool { return s.opt.Trace != nil }

func clock(t int64) string { return fmt.Sprintf("%9.3fms", float64(t)/1e6) }

func (s *Sim) handle(e *event) {
	switch e.kind {
	case evOp:
		s.stepSession(s.cli[e.a], e.x)
		return
	case evLinkTry:
		l := s.links[e.node][e.b]
		s.dial(l, l.dir(e.node))
		return
	case evLinkStale:
		s.linkStale(s.links[e.node][e.b], e.x)
		return
	case evStart:
		if n := s.nodes[e.node]; n != s.gone {
			s.start(n)
		}
		return
	case evCont:
		s.cont(s.nodes[e.node])
		return
	case evApplyCmd, evViewAll:
		s.clusterEvent(e)
		return
	case evCtl, evSealed, evReport, evDrained:
		s.controllerEvent(e)
		return
	case evFault:
		s.fault()
		return
	case evUnhang:
		d := &s.nodes[e.node].disk
		d.hungTo, d.storeHungTo, d.slowTo = 0, 0, 0
		return
	case evUnblock:
		s.unblock(e.node, e.b)
		return
	case evHeal:
		if s.opt.Most {
			s.healMost()
		} else {
			s.heal()
		}
		return
	case evCheck:
		s.checkHealed()
		return
	case evCall:
		e.fn()
		return
	}
	s.nodeEvent(s.nodes[e.node], e)
}
