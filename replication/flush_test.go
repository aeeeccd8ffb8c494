package replication

import (
	"testing"
	"testing/synctest"
)

// sent returns how many messages pass between the nodes until a request is
// answered and all is still. No time passes, so there are no heartbeats.
func (c *testCluster) sent(do func()) int {
	count := func() int {
		synctest.Wait()
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.sends
	}
	before := count()
	do()
	return count() - before
}

// TestAFlushCostsOneRound counts messages: the wish to fsync goes to both
// secondaries, and each answers once, when it is done.
func TestAFlushCostsOneRound(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 1<<20, 3)
		defer c.close()
		ts := c.session(c.promote("n1"))
		ts.mustWrite(0, pattern(1, 4096))
		ts.must(ts.flush())
		synctest.Wait() // an fsync that is late would cover what is written now
		ts.mustWrite(4096, pattern(2, 4096))
		ts.mustWrite(8192, pattern(3, 4096))
		if n := c.sent(func() { ts.must(ts.flush()) }); n != 4 {
			t.Errorf("a FLUSH cost %d messages, 2 wishes and 2 answers are enough", n)
		}
		if n := c.sent(func() { ts.must(ts.flush()) }); n != 0 {
			t.Errorf("a FLUSH of nothing cost %d messages", n)
		}
	})
}

// TestAnExpectedFlushIsDoneBefore: after some FLUSHes that each came after two
// writes, the second write brings the fsync with it, and the FLUSH behind it
// finds everything done. When the client changes its ways, a FLUSH still means
// what it means.
func TestAnExpectedFlushIsDoneBefore(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newTestCluster(t, 1<<20, 3)
		defer c.close()
		p := c.promote("n1")
		ts := c.session(p)
		durable := func() uint64 { return uint64(c.nodes[p].volume().rep().log.Durable()) }
		last := func() uint64 { return uint64(c.nodes[p].volume().rep().log.Last().Seq) }
		for i := range 5 {
			ts.mustWrite(0, pattern(byte(i), 4096))
			ts.mustWrite(4096, pattern(byte(i), 4096))
			ts.must(ts.flush())
		}
		// A FLUSH is answered when a majority is done: an fsync that is late at the
		// primary would cover what is written now.
		synctest.Wait()
		ts.mustWrite(0, pattern(9, 4096))
		synctest.Wait()
		if durable() == last() {
			t.Error("the first of two writes was fsynced at once")
		}
		// 2 Appends, each acked when written and when fsynced.
		if n := c.sent(func() { ts.mustWrite(4096, pattern(9, 4096)) }); n != 6 {
			t.Errorf("a write before an expected FLUSH cost %d messages", n)
		}
		if durable() != last() {
			t.Errorf("%d of %d durable before the FLUSH that is expected", durable(), last())
		}
		if n := c.sent(func() { ts.must(ts.flush()) }); n != 0 {
			t.Errorf("an expected FLUSH cost %d messages", n)
		}
		for range 3 {
			ts.mustWrite(0, pattern(10, 4096))
		}
		ts.must(ts.flush()) // after three
		synctest.Wait()
		if durable() != last() {
			t.Errorf("after a FLUSH %d of %d are durable", durable(), last())
		}
		ts.mustWrite(0, pattern(11, 4096))
		ts.mustWrite(0, pattern(11, 4096))
		synctest.Wait()
		if durable() == last() {
			t.Error("the habit outlives a FLUSH that broke it")
		}
	})
}
