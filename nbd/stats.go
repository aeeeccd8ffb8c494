package nbd

import (
	"errors"
	"math/bits"
	"sync/atomic"
	"time"
)

// LatencyBuckets is how many buckets a latency histogram has. Bucket i counts
// requests that took less than 2^i microseconds, and no less than the bucket
// before; the last one counts all the rest.
const LatencyBuckets = 26

const ops = int(OpBlockStatus) + 1

type opStats struct {
	count, bytes, errs, nanos atomic.Uint64
	latency                   [LatencyBuckets]atomic.Uint64
}

type serverStats struct {
	accepted, refused, handshakesFailed atomic.Uint64
	connections                         atomic.Int64
	op                                  [ops]opStats
}

// OpStats counts one operation. Bytes are those of successful reads, writes,
// zeroes and trims; latencies are from the request's arrival in memory to its
// reply's hand-over to the socket.
type OpStats struct {
	Count, Bytes, Errors uint64
	Latency              [LatencyBuckets]uint64
	LatencySum           time.Duration
}

// Stats is what the server has counted since it was made.
type Stats struct {
	Accepted, Refused, HandshakesFailed uint64
	Connections                         int64 // now
	BudgetUsed                          int64 // bytes of Limits.BytesTotal in use now
	PayloadBytes                        int64 // of requests in flight on all connections now
	Ops                                 map[Op]OpStats
}

// answered counts a batch and reports whether one of it ended its session.
func (s *serverStats) answered(now int64, batch []*request) (lost bool) {
	for _, q := range batch {
		if int(q.Op) >= ops {
			continue
		}
		o := &s.op[q.Op]
		o.count.Add(1)
		switch {
		case q.err == nil:
			o.bytes.Add(q.Length)
		default:
			o.errs.Add(1)
			lost = lost || errors.Is(q.err, ErrSessionLost)
		}
		d := max(0, now-q.start)
		o.nanos.Add(uint64(d))
		o.latency[min(bits.Len64(uint64(d)/1000), LatencyBuckets-1)].Add(1)
	}
	return lost
}

// Stats returns a snapshot.
func (s *Server) Stats() Stats {
	st := Stats{
		Accepted:         s.stats.accepted.Load(),
		Refused:          s.stats.refused.Load(),
		HandshakesFailed: s.stats.handshakesFailed.Load(),
		Connections:      s.stats.connections.Load(),
		BudgetUsed:       s.budget.inUse(),
		Ops:              make(map[Op]OpStats, ops),
	}
	for _, c := range s.snapshot() {
		c.mu.Lock()
		st.PayloadBytes += c.mu.bytes
		c.mu.Unlock()
	}
	for op := OpRead; int(op) < ops; op++ {
		from := &s.stats.op[op]
		o := OpStats{
			Count: from.count.Load(), Bytes: from.bytes.Load(), Errors: from.errs.Load(),
			LatencySum: time.Duration(from.nanos.Load()),
		}
		for i := range from.latency {
			o.Latency[i] = from.latency[i].Load()
		}
		st.Ops[op] = o
	}
	return st
}

// ClientInfo describes one connection in transmission.
type ClientInfo struct {
	Export   string
	Remote   string
	Secure   bool // TLS
	Since    time.Time
	InFlight int
}

// Clients lists the connections that have an export open.
func (s *Server) Clients() []ClientInfo {
	var list []ClientInfo
	for _, c := range s.snapshot() {
		if !c.serving.Load() {
			continue
		}
		c.mu.Lock()
		inflight := c.mu.inflight
		c.mu.Unlock()
		list = append(list, ClientInfo{Export: c.export, Remote: c.remote, Secure: c.secure, Since: c.since, InFlight: inflight})
	}
	return list
}

// String names an operation as metrics and logs do.
func (o Op) String() string {
	switch o {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpFlush:
		return "flush"
	case OpTrim:
		return "trim"
	case OpZero:
		return "write_zeroes"
	case OpCache:
		return "cache"
	case OpBlockStatus:
		return "block_status"
	}
	return "unknown"
}
