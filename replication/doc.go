// Package replication runs volumes. A Volume is one node's end of one
// replicated block device: optionally a replica (a core, which decides, with
// the log, the backing store and the goroutines that perform what it decides),
// and always the client side (sessions, which take requests to the primary,
// wherever it is).
//
// # The replica
//
// One goroutine at a time has the turn: it owns the core (core.Core). Everything
// that happens, a message, a request, the end of an fsync, is put into an inbox;
// who has brought it takes the turn if it is free, feeds the whole inbox to the
// core, and performs the effects in their documented order. A goroutine of the
// replica's own, the loop, takes the turns that nobody else takes. Beside it run
// the syncer (fdatasync of the log),
// the applier (committed and durable entries go to the backing store), the
// checkpointer (fdatasync of the backing store, then the recycling of the log)
// and, for a while each, readers of the log for peers that lag.
//
// Entries that are not applied yet stand in the overlay; reads patch the bytes
// of the backing store with them. Reads do not pass through the loop: they
// check the gate (lease, epoch, serving) before and after they have read.
//
// # The client side
//
// A session numbers its requests with a random session id and a counter, so
// that one that had to be sent again takes effect once. Requests wait while no
// primary is known, and go to the next one when it is; a client sees a pause
// and no error.
//
// DESIGN.md tells both in prose.
package replication
