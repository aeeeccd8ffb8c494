package nbd

import "slices"

// Flusher sends the replies that Queue has queued.
type Flusher interface{ Flush() }

// Queue is Complete for one of several requests that are completed together:
// the reply is queued and not yet sent. The caller calls Flush on the Flusher
// that it returns once the others are queued too; one Flush does for all
// requests of a connection, which then leave in one system call. Like
// Complete, it is called exactly once, instead of Complete.
func (r *Request) Queue(err error) Flusher {
	if q, ok := r.Server.(*request); ok {
		c := q.c
		c.completed(q, err, false)
		return c
	}
	r.Complete(r, err)
	return noFlush{}
}

type noFlush struct{}

func (noFlush) Flush() {}

// Batch collects completions and flushes each connection that they touch once.
// Its zero value is ready; it is used by one goroutine, again and again.
type Batch struct {
	flushers []Flusher
}

// Complete queues the answer to r.
func (b *Batch) Complete(r *Request, err error) {
	f := r.Queue(err)
	if last := len(b.flushers) - 1; last >= 0 && b.flushers[last] == f {
		return
	}
	if !slices.Contains(b.flushers, f) {
		b.flushers = append(b.flushers, f)
	}
}

// Flush sends all that is queued, and blocks for no client.
func (b *Batch) Flush() {
	for _, f := range b.flushers {
		f.Flush()
	}
	clear(b.flushers)
	b.flushers = b.flushers[:0]
}
