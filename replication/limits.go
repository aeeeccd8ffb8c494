package replication

import "time"

// Every queue of this package and its bound, with the reason.
const (
	// overlayBytesDefault is payload memory of one volume's backlog. Beyond it
	// entries stay in the overlay by reference into the log, whose bytes are in
	// the page cache anyway.
	overlayBytesDefault = 64 << 20
	// unappliedMaxDefault lets a bulk write run at the log's speed for about a
	// second of a fast disk before it feels the backing store's.
	unappliedMaxDefault = 512 << 20
	// readersMaxDefault reads at a time keep an NVMe queue full without a
	// thread for each request of a large window.
	readersMaxDefault = 32
	// forwardedMaxDefault requests from other nodes: two nodes with 64
	// connections each and a window of 128 each. What is beyond is sent back to
	// wait at its own node, where the NBD server bounds it.
	forwardedMaxDefault   = 2 * 64 * 128
	forwardedBytesDefault = 512 << 20
	// checkpointMaxDefault bounds what a restart must replay, some seconds' work.
	// The longer it takes, the more blocks are overwritten in the page cache and
	// written to the disk once. Twice what the log retains anyway.
	checkpointMaxDefault = 512 << 20
	checkpointMaxLeast   = 64 << 20 // with a log_retention below it
	checkpointAgeDefault = 30 * time.Second
	// checkpointYield is how long a checkpoint leaves the disk alone when a
	// FLUSH waits, before each group of blocks that it writes out.
	checkpointYield = 2 * time.Millisecond
	// syncBytesDefault and syncAgeDefault keep the unfsynced tail short, so
	// that applying never waits long and the overlay need not read the log again.
	syncBytesDefault = 16 << 20
	syncAgeDefault   = 100 * time.Millisecond
	// writeOutBytes of log are sent to the disk as they come, without an fsync,
	// so that a FLUSH finds little left to do.
	writeOutBytes = 4 << 20
	// linkLeaseDefault is how late an unanswered write may still take effect
	// (design section 3, forwarders are fenced too).
	linkLeaseDefault = 5 * time.Second

	// applyBatchBytes and applyBatchEntries bound one round of the applier.
	// Larger rounds merge more overwrites; smaller ones free the overlay sooner.
	applyBatchBytes   = 8 << 20
	applyBatchEntries = 1024
	// readTriesMax is how often a read starts over because an entry was applied
	// under it, before it holds the applier back.
	readTriesMax = 3
	// windowBytes of entries may be in flight to one peer: some milliseconds of
	// a 25 Gbit/s link.
	windowBytes = 16 << 20
	// appendBytesMax and appendEntriesMax bound one message, so that a peer
	// acks often enough.
	appendBytesMax   = 1 << 20
	appendEntriesMax = 1024
	// dedupMax requests are remembered: more than all clients of a volume can
	// have in flight at a failover, at 24 bytes each.
	dedupMax = 64 << 10
	// holdTick is how often requests that wait for a primary look for one. News
	// of a primary or of a link wakes them at once; this is for lost news and
	// for a primary that is named but not in office yet.
	holdTick = 20 * time.Millisecond
	// blockSize is the alignment that every request has: NBD's minimum block.
	blockSize = 512
	// requestMax is the largest payload of one request.
	requestMax = 32 << 20
	// blockStatusExtentsMax bounds one answer to BlockStatus.
	blockStatusExtentsMax = 4096
)

func (l *Limits) setDefaults() {
	def(&l.OverlayBytes, overlayBytesDefault)
	def(&l.UnappliedMax, unappliedMaxDefault)
	def(&l.ReadersMax, readersMaxDefault)
	def(&l.ForwardedMax, forwardedMaxDefault)
	def(&l.ForwardedBytes, forwardedBytesDefault)
	def(&l.CheckpointMax, checkpointMaxDefault)
	def(&l.CheckpointAge, checkpointAgeDefault)
	def(&l.SyncBytes, syncBytesDefault)
	def(&l.SyncAge, syncAgeDefault)
	def(&l.LinkLease, linkLeaseDefault)
}

// def sets *v to d when it is zero.
func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}
