package peer

import "time"

// The limits of a link. Each is a ceiling that a slow or hostile peer cannot
// push through.
const (
	// queueBytesMax is the default of Limits.QueueBytes: several windows of
	// entries and some of the largest requests. The payloads are shared with
	// the log's window, so most of it costs no memory of its own.
	queueBytesMax = 256 << 20
	// queueFramesMax is the default of Limits.QueueFrames: at some 180 bytes
	// of header a frame, 12 MiB.
	queueFramesMax = 65536
	// roundBytes is about what one round of writing takes from the queue: what
	// a ping or an ack may have to wait for. A frame is never split, so a
	// larger frame makes a larger round.
	roundBytes = 256 << 10
	// directRounds and directBytes bound what a Flush writes itself before it
	// leaves the rest to the link's sender: a volume's loop has more to do.
	directRounds = 4
	directBytes  = 512 << 10
	// smallBytes is the payload up to which a message does not count as bulk.
	smallBytes = 64 << 10
	// iovecMax is the kernel's limit of pieces for one writev (UIO_MAXIOV).
	iovecMax = 1024
	// inlinePayload is the size up to which a payload is copied next to its
	// header: less work than a piece of its own in writev.
	inlinePayload = 512
	// notSentBytes is what the kernel may hold unsent before we keep the rest,
	// so that pings and acks can still overtake it (TCP_NOTSENT_LOWAT).
	notSentBytes = 512 << 10
	// soonAfter is how long what nobody waits for may wait for more of its kind:
	// nothing against a lease, and long enough that all volumes of a node have
	// had their turn when they tick.
	soonAfter = 500 * time.Microsecond
	// slabKeep is the capacity up to which an idle link keeps its buffer for
	// headers.
	slabKeep = 256 << 10
	// batchMax is the most messages that are delivered in one call.
	batchMax = 256

	// refusalsMax dialers who are turned away again and again are told apart in the log:
	// the other nodes of a cluster that was recovered, say.
	refusalsMax = 16
	// handshakesMax bounds the accepted connections whose handshake is not
	// done; more are closed at once.
	handshakesMax    = 64
	handshakeTimeout = 5 * time.Second

	// The pause before dialing again: none the first time, then doubled from
	// the least to the most, each with jitter.
	backoffFirst = 50 * time.Millisecond
	backoffLast  = time.Second

	// watchesPerPing is how often in a ping interval it is looked whether the
	// reader of a connection is held up: with pings every 300 ms one that is
	// has been so for 150 to 300 ms, well below any lease. As often as a replica
	// ticks, and at the same moments: that wakes an idle process once.
	watchesPerPing = 2
	// heardPings is the number of ping intervals without a sign of life after
	// which a peer counts as not heard.
	heardPings = 4
	// silentLeases is the number of lease times without a sign of life after
	// which an accepted connection is closed.
	silentLeases = 2
)
