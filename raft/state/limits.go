package state

// Limits of the cluster state. It is small by design: it is copied on each
// command, kept whole in memory on each node and written whole in a snapshot.
const (
	NodesMax      = 64       // hashicorp/raft groups above this are no good idea
	ReplicasMax   = 7        // of one volume: each write goes to all of them
	VolumesMax    = 4096     // that are not deleted
	TombstonesMax = 1024     // deleted volumes remembered, for nodes that were away
	RemovedMax    = 1024     // Raft ids of removed nodes remembered
	EventsMax     = 1000     // events kept for `blockstep events`
	OutcomesMax   = 512      // commands whose outcome is remembered for a retry
	NameMax       = 63       // bytes of a node's, volume's or cluster's name
	TextMax       = 1024     // bytes of a reason or an event's text
	FieldsMax     = 16       // fields of an event
	CommandMax    = 64 << 10 // bytes of an encoded command
	SizeMultiple  = 512      // a volume's size is a multiple of it
	SizeMax       = 1 << 44  // bytes of a volume: what a dirty bitmap covers, 2^32 blocks of 4 KiB
)
