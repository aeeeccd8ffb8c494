// Package daemon builds one node from its parts, wires them, and starts and
// stops everything in order. It is the only place where nbd, replication and
// raft meet: raft decides who is primary, replication carries it out, nbd shows
// the result to clients, and none of them knows the others.
//
// Order of starting: data directory, mux, raft, links, volumes, NBD, admin.
// Stopping is the reverse, except that the NBD server goes first and takes its
// time: what clients have in flight is answered by volumes that still work.
package daemon
