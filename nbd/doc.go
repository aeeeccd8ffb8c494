// Package nbd serves a block device over the NBD protocol (doc/proto.md of
// NetworkBlockDevice/nbd, with its EXTENDED_HEADERS extension). It knows
// blocks, never replicas: what is served stands behind Exports and Session.
//
// Bytes from a socket are judged at two places and nowhere else: negotiate.go,
// a state machine over bytes, and request.go, the one gate between a request
// header and a Request. Errors become NBD errors in errno.go alone.
//
// A connection has a reader, which parses, admits and submits; and a writer's
// role, which whoever completes a request takes on when it is free: replies
// are queued, encoded in batches and sent with one writev that cannot block.
// What the socket does not take at once is left to the connection's writer
// goroutine. docs/nbd.md maps each MUST of the protocol to its test.
package nbd
