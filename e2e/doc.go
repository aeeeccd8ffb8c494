// Package e2e judges blockstep from outside: it starts real blockstepd
// processes from configuration files, drives them with real NBD clients and
// with the blockstep command, kills and stops them, and checks what a user was
// promised. Nothing here imports a package of the daemon.
//
// The tests build the binaries unless BLOCKSTEP_BIN names a directory that has
// them. A program that a test needs and that is missing fails the test and says
// what to install; nothing is skipped. A random run prints its seed, and
// BLOCKSTEP_E2E_SEED replays it as far as real processes can be replayed.
//
// On a failure each node's log goes into the test's output. With
// BLOCKSTEP_E2E_KEEP=1 the cluster's directory stays for a closer look.
package e2e
