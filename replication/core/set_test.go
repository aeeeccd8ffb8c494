package core

import (
	"slices"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/wire"
)

// primaryOf returns node a as it takes office in epoch 1 of a new volume, and what it
// asked for so far. All the others have their links up.
func primaryOf(t *testing.T, set []ident.Node, minCopies int) (*Core, *Effects) {
	t.Helper()
	c := New(Config{
		Node: "a", Replica: 1, Incarnation: 1, LeaseFor: 1e9, LeaseMax: 1e9, Heartbeat: 1e8, RetryAfter: 1e9, WindowBytes: 1 << 20,
		AppendBytesMax: 1 << 20, AppendEntriesMax: 100, DedupMax: 16, UnappliedMax: 1 << 30, LagMax: 1 << 20,
	}, Start{Fresh: true}, 1)
	e := new(Effects)
	v := View{Set: set, SetVersion: 1, Size: 1 << 30, MinCopies: minCopies}
	for i, n := range set {
		v.Members = append(v.Members, Member{Node: n, Replica: ident.Replica(i + 1)})
	}
	c.View(1, v)
	c.Seal(1, 1, 1)
	c.Ready(e)
	v.Epoch, v.Primary, v.Incarnation = 1, "a", 1
	for _, n := range set[1:] {
		c.PeerUp(1, n)
	}
	c.View(1, v)
	c.written1(1, e)
	for _, n := range set[1:] {
		c.acked(2, n, c.last.Seq)
	}
	c.written1(2, e)
	if c.role != RolePrimary {
		t.Fatalf("a is %v", c.role)
	}
	return c, e
}

// written1 has the own disk do all that is asked of it.
func (c *Core) written1(now Instant, e *Effects) {
	c.Ready(e)
	c.Written(now, c.last.Seq)
	c.Durable(now, c.last.Seq)
	c.Ready(e)
}

// acked has a peer say that it holds the log up to seq, fsynced, and grants a lease.
func (c *Core) acked(now Instant, n ident.Node, seq ident.Seq) {
	pr := c.peer(n)
	c.Message(now, n, &wire.Ack{Epoch: 1, Stream: pr.stream, Replica: pr.replica, Incarnation: 1, Matched: seq, Durable: seq, LeaseSent: int64(now)})
}

// One of three is away, and is not missed; then the disk of the second fails. With
// min_copies 1 the primary goes on alone: a set of it and the absent one would never
// come to hold anything.
func TestUnfitAndAbsentGoTogether(t *testing.T) {
	c, e := primaryOf(t, []ident.Node{"a", "b", "c"}, 1)
	c.PeerDown(3, "b")
	c.Request(3, Request{Origin: Origin{ID: 1}, Kind: wire.KindZero, Len: 4096, Session: 1, Request: 1, LastSeen: c.last})
	now := Instant(3)
	for ; now < 5e9; now += 1e8 {
		c.Tick(now)
		c.acked(now, "c", c.last.Seq)
		c.written1(now, e)
	}
	if c.role != RolePrimary || c.commit != c.last.Seq || c.p.change != nil {
		t.Fatalf("with b away: %v, commit %d of %d, change %v", c.role, c.commit, c.last.Seq, c.p.change)
	}
	pr := c.peer("c")
	c.Message(now, "c", &wire.Reject{Epoch: 1, Stream: pr.stream, Replica: pr.replica, Incarnation: 1, Reason: wire.RejectFailed})
	for end := now + 5e9; now < end; now += 1e8 {
		c.Tick(now)
		c.written1(now, e)
	}
	if ch := c.p.change; ch == nil || !ch.proposed || !slices.Equal(ch.set, []ident.Node{"a"}) {
		t.Errorf("it asks for %+v, and is to go on alone", ch)
	}
}

// A member's log is cut behind what it knew to be committed, as after a promotion that
// loses writes: what the new primary puts in their place is committed by nobody yet.
func TestCommitIndexIsCutWithTheLog(t *testing.T) {
	c := New(Config{Node: "c", Replica: 3, Incarnation: 1, LeaseMax: 1, WindowBytes: 1 << 20, DedupMax: 16, UnappliedMax: 1 << 30}, Start{Fresh: true}, 1)
	v := View{
		Epoch: 1, Primary: "a", Set: []ident.Node{"a", "b", "c"}, SetVersion: 1, Size: 1 << 20,
		Members: []Member{{Node: "a", Replica: 1}, {Node: "b", Replica: 2}, {Node: "c", Replica: 3}},
	}
	c.View(1, v)
	entry := func(epoch ident.Epoch, seq ident.Seq) wire.Entry {
		return wire.Entry{Pos: ident.Position{Epoch: epoch, Seq: seq}, Kind: wire.KindZero, Len: 4096}
	}
	var list []wire.Entry
	for s := ident.Seq(1); s <= 10; s++ {
		list = append(list, entry(1, s))
	}
	var e Effects
	c.Message(2, "a", &wire.Append{Epoch: 1, Stream: 1, Entries: list, Commit: 10})
	c.Ready(&e)
	if got := c.Gate().Commit; got != 0 {
		t.Errorf("it shows entries up to %d, and none is in its log yet", got)
	}
	c.Written(2, 10)
	c.Durable(2, 5)
	c.Ready(&e)
	if got := c.Gate().Commit; got != 10 {
		t.Errorf("it shows entries up to %d, want 10", got)
	}

	v.Epoch, v.Primary, v.Set, v.SetVersion, v.LossEpoch = 2, "b", []ident.Node{"b"}, 2, 2
	c.View(3, v)
	c.Message(3, "b", &wire.Append{
		Epoch: 2, Stream: 2, LossEpoch: 2, Prev: ident.Position{Epoch: 1, Seq: 7}, Entries: []wire.Entry{entry(2, 8), entry(2, 9)},
	})
	c.Ready(&e)
	c.Written(3, 9)
	c.Durable(3, 9)
	c.Ready(&e)
	if c.last != (ident.Position{Epoch: 2, Seq: 9}) || c.commit > 7 || c.applyTo > 7 {
		t.Errorf("at %v it takes %d for committed and applies up to %d, at most 7", c.last, c.commit, c.applyTo)
	}
}

// A replica outside the set that is streamed to goes away: when it is back it needs
// what changed since then, and not all since it first left.
func TestWhoFollowedIsRemembered(t *testing.T) {
	c, e := primaryOf(t, []ident.Node{"a", "b", "c"}, 2)
	now := Instant(2)
	write := func(off uint64, n int) {
		for range n {
			off += 256 << 10
			c.Request(now, Request{Origin: Origin{ID: 1}, Kind: wire.KindZero, Off: off, Len: 256 << 10, Session: 1, Request: uint64(c.last.Seq) + 1, LastSeen: c.last})
			c.written1(now, e)
			c.acked(now, "b", c.last.Seq)
			c.written1(now, e)
			c.Applied(now, c.applyTo)
		}
	}
	step := func() {
		now += 1e8
		c.Tick(now)
		c.acked(now, "b", c.last.Seq)
		c.written1(now, e)
	}
	v := c.view
	v.Set, v.SetVersion = []ident.Node{"a", "b"}, 2
	c.View(now, v)
	write(0, 200)
	back := c.last.Seq
	c.acked(now, "c", back) // it has been copied what it lacked
	c.peer("c").state = peerStream
	step()
	if !c.peer("c").follows {
		t.Fatal("c is not streamed to")
	}
	write(100<<20, 10)
	c.PeerDown(now, "c")
	for range 20 {
		step()
	}
	write(200<<20, 200)
	c.Checkpointed(now, c.applied)
	for range 3 {
		step()
		write(300<<20, 100)
	}
	if c.trim <= back {
		t.Fatalf("the trim horizon stands at %d, c is at %d", c.trim, back)
	}
	dirty, ok := c.changes.Since(uint64(back))
	if most := int64(10+200+100+2) * (256 << 10); !ok || dirty.Bytes() > most {
		t.Errorf("since c went away %d bytes changed (known: %v), at most %d", dirty.Bytes(), ok, most)
	}
}

// b must be copied and grants its lease all the same; c has promised a newer epoch in
// a round that promoted nobody, and takes nothing. A write that waits for one of them
// must not hold up the drain that the next round begins with (seed 16024 of a model of
// this day: a primary that kept its lease by b, and could commit by nobody).
func TestDrainDoesNotWaitForWhoHasPromisedMore(t *testing.T) {
	c, e := primaryOf(t, []ident.Node{"a", "b", "c"}, 2)
	now := Instant(2)
	c.Request(now, Request{Origin: Origin{ID: 1}, Kind: wire.KindZero, Len: 4096, Session: 1, Request: 1, LastSeen: c.last})
	c.written1(now, e)
	c.peer("b").state, c.peer("b").rule = peerResync, "it lags"
	drain := func(stale bool) bool {
		c.Undrain(now)
		c.Drain(now, 7, 1)
		for end := now + 1e9; now < end; now += 5e7 {
			c.Tick(now)
			c.granted(c.peer("b"), int64(now))
			if stale {
				c.Message(now, "c", &wire.Stale{Epoch: 1, Promised: 2})
			}
			c.written1(now, e)
			if c.p.released {
				return true
			}
		}
		return false
	}
	if drain(false) {
		t.Fatal("the lease is given back while a write waits for a member that is silent")
	}
	if !drain(true) {
		t.Error("the lease is kept although nobody is left who takes an entry")
	}
}

// How far a replica that is away is behind, once the horizon has passed it: since it
// left, and not since the primary took office.
func TestLagOfWhoIsAway(t *testing.T) {
	const many = 30_000 // nearly 3 MiB of log
	c, e := primaryOf(t, []ident.Node{"a", "b", "c"}, 2)
	now := Instant(2)
	write := func() {
		for i := range many {
			c.Request(now, Request{Origin: Origin{ID: 1}, Kind: wire.KindZero, Len: 4096, Session: 1, Request: uint64(c.last.Seq) + 1, LastSeen: c.last})
			if i%100 == 99 {
				c.written1(now, e)
				c.acked(now, "b", c.last.Seq)
				c.written1(now, e)
				c.Applied(now, c.applyTo)
			}
		}
	}
	write()
	c.acked(now, "c", c.last.Seq)
	left := c.last.Seq
	c.PeerDown(now, "c")
	v := c.view
	v.Set, v.SetVersion = []ident.Node{"a", "b"}, 2
	c.View(now, v)
	write()
	c.Checkpointed(now, c.applied)
	now += 1e8
	c.Tick(now)
	c.acked(now, "b", c.last.Seq)
	c.written1(now, e)
	write()
	if c.trim <= left {
		t.Fatalf("the trim horizon stands at %d, c left at %d", c.trim, left)
	}
	for _, p := range c.Status(now).Peers {
		if want := int64(2*many) * entryOverhead; p.Node == "c" && (p.LagBytes < want || p.LagBytes > want+2<<20) {
			t.Errorf("c lags by %d bytes, want %d and up to 2 MiB more", p.LagBytes, want)
		}
	}
}

// A primary rests between two askings for its lease while nobody has anything to do,
// and a secondary until what it granted lapses; a request, a member that has left or
// fallen silent, and a member that leaves end that.
func TestWhoHasNothingToDoRests(t *testing.T) {
	c, e := primaryOf(t, []ident.Node{"a", "b", "c"}, 1)
	now := Instant(15e7)
	beat := func() {
		t.Helper()
		c.Tick(now)
		c.written1(now, e)
		for _, n := range []ident.Node{"b", "c"} {
			c.acked(now, n, c.last.Seq)
		}
		c.written1(now, e)
	}
	beat()
	beat()
	if got := c.RestsUntil(); got != 2e8 {
		t.Fatalf("a quiet primary rests until %d, and asks again at 200000000", got)
	}
	now += 1e6
	c.Request(now, Request{Origin: Origin{ID: 1}, Kind: wire.KindZero, Len: 4096, Session: 1, Request: 1, LastSeen: c.last})
	c.written1(now, e)
	if c.RestsUntil() != 0 {
		t.Error("a primary rests beside a request that is not held by all")
	}
	beat()
	beat()
	if c.RestsUntil() == 0 {
		t.Error("a primary does not rest after a request")
	}
	v := c.view
	v.SetVersion++
	v.Members = slices.Clone(v.Members)
	v.Members[2].Leaving = true
	c.View(now, v)
	if c.RestsUntil() != 0 {
		t.Error("a primary rests that is to evict who leaves")
	}
	v.SetVersion++
	v.Members[2].Leaving = false
	c.View(now, v)
	if c.RestsUntil() == 0 {
		t.Error("a primary does not rest when all stay")
	}
	c.advance(now + 2e9)
	if c.RestsUntil() != 0 {
		t.Error("a primary rests whose members are silent")
	}

	s := New(Config{Node: "b", Replica: 2, Incarnation: 1, LeaseFor: 1e9, LeaseMax: 1e9, Heartbeat: 1e8}, Start{Fresh: true}, 1)
	s.View(1, View{Set: []ident.Node{"a", "b"}, SetVersion: 1, Size: 1 << 30, MinCopies: 1, Members: []Member{{Node: "a", Replica: 1}, {Node: "b", Replica: 2}}})
	s.grantUntil = 5e9
	if got := s.RestsUntil(); got != 5e9 {
		t.Errorf("a secondary rests until %d, and has granted a lease until 5000000000", got)
	}
	s.Failed(2, "for the test")
	if s.RestsUntil() != 0 {
		t.Error("a secondary that has failed rests")
	}
}
