package sim

import "github.com/blockstep/blockstep/replication/wire"

// kind tells events apart.
type kind uint8

const (
	evTick      kind = iota + 1 // node: the driver's timer
	evStep                      // node: the next step of performing effects
	evMsg                       // node b's message for node; x: link generation
	evPeer                      // node: its connection to b is up (x=1) or down (x=0)
	evLinkTry                   // link node-b: try to connect
	evLinkStale                 // link node-b: break it if it is still blocked; x: link generation
	evSync                      // node: an fsync of the log has returned
	evApply                     // node: the applier goes on
	evCkpt                      // node: begin (x=0) or end (x=1) a checkpoint
	evRead                      // node: read a ends; x its number
	evLogRead                   // node: an entry of n.logReads is ready
	evBlockRead                 // node: blocks of n.blockReads are read
	evStart                     // node: the process starts
	evCont                      // node: SIGCONT
	evOp                        // session a goes on
	evApplyCmd                  // cluster state: command x commits
	evOutcome                   // its proposer hears of it
	evView                      // node: view number x arrives
	evViewAll                   // the cluster state repeats itself to everybody
	evCtl                       // controller a: time passes
	evSeal                      // node: controller a's SEAL(x)
	evSealed                    // controller a: answer of node
	evReport                    // controllers: report of node
	evDrain                     // node: controller a asks it to drain epoch x
	evUndrain                   // node: nobody waits for drain x any more
	evDrained                   // controller a: node has drained
	evFault                     // the next fault
	evUnhang                    // node: its disk is quick again
	evUnblock                   // links node-b: a partition ends; b<0: all of node's
	evHeal                      // faults end
	evCheck                     // are we there yet
	evCall                      // a scenario's own step
)

type event struct {
	at   int64
	ord  uint64
	kind kind
	node int
	b    int
	a    int
	gen  uint32 // of the node's process; 0: of any
	x    uint64
	msg  wire.Message
	fn   func()
}

// queue is a binary heap by time, then by order of arrival.
type queue struct {
	h   []event
	ord uint64
}

func (q *queue) less(i, j int) bool {
	return q.h[i].at < q.h[j].at || (q.h[i].at == q.h[j].at && q.h[i].ord < q.h[j].ord)
}

func (q *queue) push(e event) {
	q.ord++
	e.ord = q.ord
	q.h = append(q.h, e)
	for i := len(q.h) - 1; i > 0; {
		p := (i - 1) / 2
		if !q.less(i, p) {
			break
		}
		q.h[i], q.h[p] = q.h[p], q.h[i]
		i = p
	}
}

func (q *queue) pop() event {
	e := q.h[0]
	n := len(q.h) - 1
	q.h[0] = q.h[n]
	q.h[n] = event{}
	q.h = q.h[:n]
	for i := 0; ; {
		c := 2*i + 1
		if c >= n {
			break
		}
		if c+1 < n && q.less(c+1, c) {
			c++
		}
		if !q.less(c, i) {
			break
		}
		q.h[i], q.h[c] = q.h[c], q.h[i]
		i = c
	}
	return e
}
