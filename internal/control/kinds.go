package control

// EventKinds are the kinds of events that this build makes. A daemon of another
// release may have others. internal/archtest holds the list against the source.
var EventKinds = []string{
	// Of the cluster state: each node has them, and they outlive its daemons.
	"cluster-founded", "cluster-recovered", "settings",
	"node-added", "node-invited", "node-removed", "node-replaced", "node-started",
	"volume-created", "volume-deleted", "volume-resized", "options",
	"replica-added", "replica-failed", "replica-leaving", "replica-moves", "replica-registered", "replica-removed",
	"promoted", "fenced", "set-changed", "invalidated",
	// Of a replica, as its node noticed it.
	"amnesia", "cut", "discarded", "drain", "failed", "incarnation", "peer", "reopened", "resync", "role", "set", "stalled",
	// Of the node that is asked.
	"attached", "closed", "detached", "gap",
}
