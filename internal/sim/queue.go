package sim

import "github.com/blockstep/blockstep/replication/wire"

// kind tells events apart.
type kind uint8

const (
	evTick       kind = iota + 1 // node: the driver's timer
	evStep                       // node: the next step of performing effects
	evMsg                        // node b's message for node; x: link generation
	evPeer                       // node: its connection to b is up (x=1) or down (x=0)
	evLinkTry                    // link node-b: try to connect
	evLinkStale                  // link node-b: break it if it is still blocked; x: link generation
	evSync                       // node: an fsync of the log has returned
	evApply                      // node: the applier goes on
	evCkpt                       // node: begin (x=0) or end (x=1) a checkpoint
	evRead                       // node: read a ends; x its number
	evLogRead                    // node: an entry of n.logReads is ready
	evBlockRead                  // node: blocks of n.blockReads are read
	evBlockShown                 // node: its core hears of those of n.blocksRead
	evStart                      // node: the process starts
	evCont                       // node: SIGCONT
	evOp                         // session a goes on
	evApplyCmd                   // cluster state: command x commits
	evOutcome                    // its proposer hears of it
	evView                       // node: view number x arrives
	evViewAll                    // the cluster state repeats itself to everybody
	evCtl                        // controller a: time passes
	evSeal                       // node: controller a's SEAL(x)
	evSealed                     // controller a: answer of node
	evReport                     // controllers: report of node
	evDrain                      // node: controller a asks it to drain epoch x
	evUndrain                    // node: nobody waits for drain x any more
	evDrained                    // controller a: node has drained
	evFault                      // the next fault
	evUnhang                     // node: its disk is quick again
	evUnblock                    // links node-b: a partition ends; b<0: all of node's
	evHeal                       // faults end
	evCheck                      // are we there yet
	evCall                       // a scenario's own step
)

type event struct {
	at   int64
	kind kind
	node int
	b    int
	a    int
	gen  uint32 // of the node's process; 0: of any
	x    uint64
	msg  wire.Message
	fn   func()
}

// queue is a binary heap by time, then by order of arrival. The heap holds keys
// without pointers, which are cheap to move; the events lie in slots.
type queue struct {
	h     []queueKey
	slots []event
	free  []int32
	ord   uint64
}

type queueKey struct {
	at   int64
	ord  uint64
	slot int32
}

func (k *queueKey) less(l *queueKey) bool {
	return k.at < l.at || (k.at == l.at && k.ord < l.ord)
}

func (q *queue) push(e *event) {
	q.ord++
	slot := int32(len(q.slots))
	if n := len(q.free); n > 0 {
		slot, q.free = q.free[n-1], q.free[:n-1]
		q.slots[slot] = *e
	} else {
		q.slots = append(q.slots, *e)
	}
	k := queueKey{e.at, q.ord, slot}
	q.h = append(q.h, k)
	i := len(q.h) - 1
	for i > 0 {
		p := (i - 1) / 2
		if !k.less(&q.h[p]) {
			break
		}
		q.h[i] = q.h[p]
		i = p
	}
	q.h[i] = k
}

func (q *queue) pop() event {
	slot := q.h[0].slot
	e := q.slots[slot]
	q.slots[slot].msg, q.slots[slot].fn = nil, nil
	q.free = append(q.free, slot)
	n := len(q.h) - 1
	k := q.h[n]
	q.h = q.h[:n]
	if n == 0 {
		return e
	}
	i := 0
	for {
		c := 2*i + 1
		if c >= n {
			break
		}
		if c+1 < n && q.h[c+1].less(&q.h[c]) {
			c++
		}
		if !q.h[c].less(&k) {
			break
		}
		q.h[i] = q.h[c]
		i = c
	}
	q.h[i] = k
	return e
}
