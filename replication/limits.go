package replication

import "time"

// Every queue of this package and its bound, with the reason.
const (
	// memoryDefault is what one busy volume may hold in memory: see share.
	memoryDefault = 64 << 20
	// entryMemory is what an entry that is not applied takes without its payload:
	// in the overlay and its index, and in the core's list of extents.
	entryMemory = 128
	// unappliedMaxDefault lets a bulk write run at the log's speed for about a
	// second of a fast disk before it feels the backing store's.
	unappliedMaxDefault = 512 << 20
	// readersMaxDefault reads at a time keep an NVMe queue full without a
	// thread for each request of a large window.
	readersMaxDefault = 32
	// forwardedMaxDefault requests from other nodes: two nodes with 64
	// connections each and a window of 128 each. What is beyond is sent back to
	// wait at its own node, where the NBD server bounds it.
	forwardedMaxDefault = 2 * 64 * 128
	// logRetentionDefault is what of the log is kept for peers that are away.
	logRetentionDefault = 256 << 20
	// checkpointMaxDefault bounds what a restart must replay, some seconds' work.
	// The longer it takes, the more blocks are overwritten in the page cache and
	// written to the disk once. Twice what the log retains anyway, and the size of
	// the volume at the most.
	checkpointMaxDefault = 512 << 20
	checkpointMaxLeast   = 64 << 20 // with a log_retention or a size below it
	// Of a small disk (less than 4 GiB, as the defaults are) the log is kept to these
	// parts: what is retained, and what a member of the in-sync set may lag behind; what
	// is applied between two checkpoints, and as much again while one is made; and what
	// waits to be applied.
	retentionShare  = 8
	checkpointShare = 8
	unappliedShare  = 16
	// holdShare is the part of any disk that the log has when the applier waits for a
	// checkpoint that is made: of blocks all over a slow disk it takes many minutes.
	holdShare = 4
	// applyHoldMax is how long the applier waits for one that does not get on: it may
	// never end, and a replica whose disk is full makes way for another one.
	applyHoldMax         = time.Minute
	checkpointAgeDefault = 30 * time.Second
	// trimLagMax is for how many bytes of log the trim horizon waits for a member of
	// the in-sync set to be evicted, when log_retention is small: what is written in
	// the time that this takes. Else it would have to copy what its log holds.
	trimLagMax = 128 << 20
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
	// windowBytes of entries at the most may be in flight to one peer: some
	// milliseconds of a 25 Gbit/s link.
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

// setDefaults fills what is not set. What a volume holds in memory is shared out
// of l.Memory, in sixteenths:
//
//	7  payloads of entries that are not applied (overlay); beyond it such an entry
//	   stays by reference into the log, whose bytes are in the page cache anyway
//	1  payloads that the applier reads back from there, in one round
//	2  entries that are not applied, without their payloads; beyond it new
//	   requests wait
//	4  in flight to a peer that does not read: the window of each
//	2  the newest entries, for a peer that lags within memory
//
// Most payloads are in several of these at once, and are there once. A request
// that waits to be admitted is its client's (nbd.Limits), or is forwarded: those
// have another half.
func (l *Limits) setDefaults() {
	def(&l.Memory, memoryDefault)
	def(&l.OverlayBytes, l.Memory*7/16)
	def(&l.ForwardedBytes, l.Memory/2)
	def(&l.UnappliedMax, unappliedMaxDefault)
	def(&l.UnappliedEntries, int(l.Memory/8/entryMemory))
	def(&l.ReadersMax, readersMaxDefault)
	def(&l.ForwardedMax, forwardedMaxDefault)
	def(&l.CheckpointMax, checkpointMaxDefault)
	def(&l.CheckpointAge, checkpointAgeDefault)
	def(&l.SyncBytes, syncBytesDefault)
	def(&l.SyncAge, syncAgeDefault)
	def(&l.LinkLease, linkLeaseDefault)
}

// window is how many bytes of entries may be in flight to one peer.
func (l *Limits) window() int { return int(min(windowBytes, l.Memory/4)) }

// ring is how many bytes of the newest entries the core keeps.
func (l *Limits) ring() int { return int(l.Memory / 8) }

// loadMax is how many bytes of payloads the applier reads back from the log at a
// time, but at least one.
func (l *Limits) loadMax() int { return int(l.Memory / 16) }

// def sets *v to d when it is zero.
func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}
