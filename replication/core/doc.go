// Package core is one replica of one volume as a pure state machine: design
// sections 2 to 6. Inputs are messages, requests, ticks, views of the cluster
// state and the completions of earlier effects; outputs are Effects, which the
// driver performs in their order. It starts no goroutine, reads no clock, does
// no I/O and logs nothing, so the same inputs always give the same effects.
//
// # Duties of the driver
//
//  1. One goroutine calls the core. It calls any number of input methods, then
//     Ready once, and performs the effects in the order of their fields.
//  2. Append is in the log file (not fsynced) before Send goes out and before
//     Written is called. Meta is fsynced before Send and SealReplies go out.
//  3. Written, Durable and Applied are called when it is so, with the highest
//     seq for which it is so, never before. After a Cut or a Reset the driver
//     reports Durable only from an fsync that began after it, and Applied and
//     Checkpointed only for what came after it.
//  4. A failed write or fsync is reported by Failed, once, and never retried.
//  5. Tick is called every Heartbeat/2 or more often; every input carries the
//     current CLOCK_BOOTTIME.
//  6. A checkpoint is: Snapshot, fsync of the backing store, the snapshot
//     written and fsynced, Checkpointed. One at a time.
//  7. TrimTo recycles the log; Trimmed then says where it begins.
//  8. WriteBlocks are written to the backing store by whoever applies entries,
//     after everything applied so far and before anything later; then
//     BlocksWritten. BlockReads are answered by BlocksRead.
//  9. Entry payloads handed out in Effects.Append and in messages stay valid
//     while the core holds them: the core retains what it keeps, and the driver
//     retains what it keeps beyond the call.
package core
