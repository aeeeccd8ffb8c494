package replication

import (
	"bytes"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
)

var (
	histories   = flag.Int("histories", 6, "random histories of TestHistoriesAreLinearizable")
	historySeed = flag.Uint64("history-seed", 0, "the one seed to run; 0: from 1 on")
)

// A history's volume is an array of registers of three blocks each, written in
// one request, so that a torn write shows.
const (
	registers     = 4
	registerBytes = 12 << 10
)

type registerInput struct {
	register int
	write    bool
	value    uint64
}

// Half of the histories are of sectors instead: ranges of any place and length are
// written, zeroed and read, and each sector is judged by itself.
const (
	sectorBytes = 512
	sectors     = registers * registerBytes / sectorBytes
	sectorsMost = 24 // of one request
)

var registerModel = porcupine.Model{
	Partition: func(h []porcupine.Operation) [][]porcupine.Operation {
		parts := make([][]porcupine.Operation, max(registers, sectors))
		for _, op := range h {
			r := op.Input.(registerInput).register
			parts[r] = append(parts[r], op)
		}
		return parts
	},
	Init: func() any { return uint64(0) },
	Step: func(state, in, out any) (bool, any) {
		i := in.(registerInput)
		if i.write {
			return true, i.value
		}
		return state == out, state
	},
	DescribeOperation: func(in, out any) string { return fmt.Sprintf("%+v -> %v", in, out) },
}

// history is what the clients of one run did.
type history struct {
	t     *testing.T
	c     *testCluster
	count atomic.Int64 // the order of calls and returns
	mu    sync.Mutex
	ops   []porcupine.Operation
	torn  []string
	stop  atomic.Bool
	value atomic.Uint64
	part  bool // of sectors
}

// client does random requests at a node until the history ends.
func (h *history) client(id int, node ident.Node, rng *rand.Rand) {
	for !h.stop.Load() {
		v := h.c.nodes[node].volume()
		if v == nil {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		ts := &testSession{t: h.t}
		s, err := v.OpenSession(context.Background(), Client{
			Local: true, Gone: func() bool { return false }, Kill: func(error) {},
		})
		if err != nil {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		ts.s = s
		for !h.stop.Load() && h.request(id, ts, rng) {
			time.Sleep(time.Duration(rng.IntN(80)) * time.Millisecond)
		}
		s.Close()
	}
}

// request does one and notes it. It reports whether the session goes on.
func (h *history) request(id int, ts *testSession, rng *rand.Rand) bool {
	if h.part {
		return h.sectors(id, ts, rng)
	}
	in := registerInput{register: rng.IntN(registers), write: rng.IntN(2) == 0}
	b := buf.Get(registerBytes)
	clear(b.B)
	defer b.Release()
	r := &Request{Op: OpRead, Offset: uint64(in.register) * registerBytes, Length: registerBytes, Data: b}
	if in.write {
		in.value = h.value.Add(1)
		for i := 0; i < registerBytes; i += 8 {
			binary.LittleEndian.PutUint64(b.B[i:], in.value)
		}
		r.Op, r.FUA = OpWrite, rng.IntN(8) == 0
	}
	call := h.count.Add(1)
	err := <-ts.start(r)
	ret := h.count.Add(1)
	out := uint64(0)
	if !in.write && err == nil {
		out = binary.LittleEndian.Uint64(b.B)
		for i := 0; i < registerBytes; i += 8 {
			if got := binary.LittleEndian.Uint64(b.B[i:]); got != out {
				h.mu.Lock()
				h.torn = append(h.torn, fmt.Sprintf("register %d: %d and %d", in.register, out, got))
				h.mu.Unlock()
				break
			}
		}
	}
	if err != nil {
		if !in.write {
			return false
		}
		ret = 1 << 60 // it may take effect at any time from its call on
	}
	h.mu.Lock()
	h.ops = append(h.ops, porcupine.Operation{ClientId: id, Input: in, Call: call, Output: out, Return: ret})
	h.mu.Unlock()
	return err == nil
}

// sectors is request where sectors are judged.
func (h *history) sectors(id int, ts *testSession, rng *rand.Rand) bool {
	n := 1 + rng.IntN(sectorsMost)
	first := rng.IntN(sectors - n + 1)
	b := buf.Get(n * sectorBytes)
	clear(b.B)
	defer b.Release()
	r := &Request{Op: OpRead, Offset: uint64(first) * sectorBytes, Length: uint64(n) * sectorBytes, Data: b}
	value := uint64(0)
	switch rng.IntN(8) {
	case 0:
		r.Op, r.NoHole, r.FUA, r.Data = OpZero, rng.IntN(2) == 0, rng.IntN(8) == 0, nil
	case 1, 2, 3:
		value = h.value.Add(1)
		r.Op, r.FUA = OpWrite, rng.IntN(8) == 0
		for i := 0; i < len(b.B); i += 8 {
			binary.LittleEndian.PutUint64(b.B[i:], value)
		}
	}
	read := r.Op == OpRead
	call := h.count.Add(1)
	err := <-ts.start(r)
	ret := h.count.Add(1)
	if err != nil {
		if read {
			return false
		}
		ret = 1 << 60 // it may take effect at any time from its call on
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range n {
		out := uint64(0)
		if read {
			sector := b.B[i*sectorBytes : (i+1)*sectorBytes]
			if out = binary.LittleEndian.Uint64(sector); !bytes.Equal(sector[8:], sector[:sectorBytes-8]) {
				h.torn = append(h.torn, fmt.Sprintf("sector %d begins with %d", first+i, out))
			}
		}
		h.ops = append(h.ops, porcupine.Operation{
			ClientId: id, Input: registerInput{register: first + i, write: !read, value: value}, Call: call, Output: out, Return: ret,
		})
	}
	return err == nil
}

// wipe gives a node an empty disk, and waits until all copies are there again: no
// other disk may be lost meanwhile.
func (h *history) wipe(victim ident.Node, rng *rand.Rand) {
	c := h.c
	if !h.whole(10 * time.Second) {
		return // one that is lost below three good copies is not this test's
	}
	n := c.nodes[victim]
	c.kill(victim)
	n.mem = vfs.NewMem(rng.Uint64())
	n.fs = n.mem
	rid, err := CreateReplica(context.Background(), n.options(), c.size)
	if err != nil {
		h.t.Errorf("an empty disk: %v", err)
		return
	}
	c.mu.Lock()
	c.view.Members = slices.Clone(c.view.Members)
	for i := range c.view.Members {
		if m := &c.view.Members[i]; m.Replica == n.rid {
			m.Replica = rid
		}
	}
	// What cannot be asked for what it forgot is not of the set any more.
	c.view.Set = slices.DeleteFunc(slices.Clone(c.view.Set), func(m ident.Node) bool { return m == victim })
	c.view.SetVersion++
	n.rid = rid
	c.mu.Unlock()
	c.push()
	c.start(victim)
	c.promote("")
	if !h.whole(time.Minute) {
		h.t.Errorf("%s has an empty disk and is not copied to: in sync are %v", victim, c.view.Set)
	}
}

// whole waits until all replicas are in the in-sync set.
func (h *history) whole(within time.Duration) bool {
	for range within / (100 * time.Millisecond) {
		h.c.mu.Lock()
		all := len(h.c.view.Set) == 3
		h.c.mu.Unlock()
		if all && h.c.healthy() {
			return true
		}
		time.Sleep(100 * time.Millisecond)
	}
	return false
}

// faults brings trouble until the history ends: at most one node is down or cut
// off at a time, and it comes back.
func (h *history) faults(rng *rand.Rand, rounds int) {
	c := h.c
	for range rounds {
		time.Sleep(time.Duration(200+rng.IntN(1500)) * time.Millisecond)
		victim := ident.Node(fmt.Sprintf("n%d", 1+rng.IntN(3)))
		faults := 5
		if h.part {
			faults++
		}
		switch rng.IntN(faults) {
		case 0: // the process dies
			c.kill(victim)
			h.settle(rng)
			c.start(victim)
		case 1: // the machine dies
			n := c.nodes[victim]
			c.kill(victim)
			n.mem.Crash()
			n.boot += "+"
			h.settle(rng)
			c.start(victim)
		case 2: // a clean stop
			c.stop(victim)
			h.settle(rng)
			c.start(victim)
		case 3: // it is cut off from the others
			c.partition(victim, true)
			h.settle(rng)
			c.partition(victim, false)
		case 4: // a switchover
			p := c.view.Primary
			if v := c.nodes[p].volume(); v != nil {
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				_ = v.Drain(ctx, c.view.Epoch)
				cancel()
			}
		case 5:
			h.wipe(victim, rng)
		}
		c.promote(victim)
	}
}

func (h *history) settle(rng *rand.Rand) {
	if rng.IntN(2) == 0 {
		h.c.promote("")
	}
	time.Sleep(time.Duration(rng.IntN(2000)) * time.Millisecond)
}

// partition cuts a node off from all others, or joins it again.
func (c *testCluster) partition(name ident.Node, cut bool) {
	c.mu.Lock()
	for _, other := range c.names {
		c.cut[[2]ident.Node{name, other}] = cut
		c.cut[[2]ident.Node{other, name}] = cut
	}
	c.mu.Unlock()
	v := c.nodes[name].volume()
	for _, other := range c.names {
		p := c.nodes[other].volume()
		if other == name || p == nil || v == nil {
			continue
		}
		if cut {
			p.PeerDown(name)
			v.PeerDown(other)
		} else {
			p.PeerUp(name)
			v.PeerUp(other)
		}
	}
	c.push()
}

// TestHistoriesAreLinearizable lets clients on all nodes read and write while
// nodes die, lose their unsynced data, are cut off and hand over, and judges
// what the clients saw (I3, I5), then that all replicas are equal (I6).
func TestHistoriesAreLinearizable(t *testing.T) {
	seeds := []uint64{*historySeed}
	if *historySeed == 0 {
		seeds = nil
		for i := range *histories {
			seeds = append(seeds, uint64(i)+1)
		}
	}
	for _, seed := range seeds {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			inBubble(t, func(t *testing.T) { runHistory(t, seed) })
		})
	}
}

func runHistory(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	h := &history{t: t, c: makeTestCluster(t, seed%4 >= 2, registers*registerBytes, 3, "client"), part: seed%8 >= 4}
	h.c.view.MinCopies = 1 + int(seed%2)
	h.c.promote("n1")
	var wg sync.WaitGroup
	for i, node := range []ident.Node{"n1", "n2", "n3", "client", "client"} {
		r := rand.New(rand.NewPCG(seed, uint64(i)+2))
		wg.Go(func() { h.client(i, node, r) })
	}
	h.faults(rng, 8)
	time.Sleep(3 * time.Second)
	h.stop.Store(true)
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		// The design's I8: with everybody back, every request is answered.
		for name, n := range h.c.nodes {
			t.Errorf("requests wait for ever at %s: %s", name, n.volume().debug())
		}
		h.c.close()
		<-done
		return
	}
	for _, s := range h.torn {
		t.Errorf("torn write: %s", s)
	}
	res, info := porcupine.CheckOperationsVerbose(registerModel, h.ops, time.Minute)
	if res != porcupine.Ok {
		t.Errorf("not linearizable: %v (%d operations, %d partitions)", res, len(h.ops), len(info.PartialLinearizations()))
	}
	h.converge(t)
	h.c.close()
	t.Logf("%d operations", len(h.ops))
}

// converge waits until all replicas have the primary's bytes.
func (h *history) converge(t *testing.T) {
	const size = registers * registerBytes
	var last string
	for range 100 {
		last = ""
		want := make([]byte, size)
		if _, err := h.c.nodes[h.c.view.Primary].vol.ReadReplica(want, 0); err != nil {
			last = err.Error()
		}
		for _, name := range []ident.Node{"n1", "n2", "n3"} {
			got := make([]byte, size)
			if _, err := h.c.nodes[name].vol.ReadReplica(got, 0); err != nil {
				last = fmt.Sprintf("%s: %v", name, err)
			} else if !bytes.Equal(got, want) {
				last = fmt.Sprintf("%s differs from %s", name, h.c.view.Primary)
			}
		}
		if last == "" {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
	t.Errorf("replicas are not equal: %s", last)
}
