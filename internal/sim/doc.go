// Package sim runs whole clusters of the real replica state machine
// (replication/core) in virtual time from one seed: faulty disks, links,
// clocks and processes around it, a model of cluster state and failover
// controller, clients, and the checkers that judge every step. It is an
// instrument of tests and starts no goroutine; the same seed gives the same
// history. docs/simulator.md says how to read a failing one.
package sim
