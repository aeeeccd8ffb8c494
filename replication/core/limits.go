package core

const (
	// ringEntriesMax bounds the entries kept in memory when they are small.
	ringEntriesMax = 64 << 10
	// ringTailShare is what part of the ring's room the newest entries keep when
	// every peer that listens has been sent them: one may have to be told again.
	// ringTailMax bounds it: a buffer that is used again soon is still in the
	// processor's cache.
	ringTailShare = 8
	ringTailMax   = 1 << 20
	// drainSettle is how long a drained primary waits for the connected
	// members of the in-sync set to hold its whole log, in ns: so that the node
	// that is to take over is among the best.
	drainSettle = 100e6
	// reportEvery is the time between two reports of the same kind, in ns.
	reportEvery = 100e6
	// quietHeartbeat is the time between messages to a peer that does not
	// answer, in ns: a stopped process must not fill the link's queue.
	quietHeartbeat = 1e9
	// queueMax bounds the requests that wait to be admitted. The NBD server's
	// own limits are far below; beyond it a request is answered Retry.
	queueMax = 1 << 16
	// flushHabitMin is how many FLUSHes in a row must have come after the same
	// number of entries before the next one is expected.
	flushHabitMin = 3
	// replayGuard is how long every request of a session that has replayed is
	// looked up, in ns: its first sending may still be under way.
	replayGuard = 30e9
	// historyMax bounds the epochs that are remembered; each costs a failover.
	historyMax = 8192
	// mergeAbove is how many segments of the record of changes are kept before
	// old ones are merged.
	mergeAbove = 64
	// resyncWindow bounds the blocks in flight to a resync target, in bytes.
	resyncWindow = 8 << 20
	// resyncReads bounds the block reads that are out for one target.
	resyncReads = 4
	// resyncSpoils is how often a block read may be spoiled by a client's write
	// before new writes wait for it.
	resyncSpoils = 3
	// resyncChunkMin is the least that is read at a time, in bytes.
	resyncChunkMin = 64 << 10
	// zeroDiscount is by how much less a block of zeroes counts for the rate.
	zeroDiscount = 16
	// rateEvery is how often the rate of a resync is measured, in ns.
	rateEvery = 1e9
	// busyFor is how long after a client's request the clients count as busy, in ns.
	busyFor = 50e6
	// resyncDirtyMax bounds an encoded ResyncData, in bytes.
	resyncDirtyMax = 40 << 20
	// entryOverhead is what an entry costs in the log beside its payload, in bytes.
	entryOverhead = 96
)
