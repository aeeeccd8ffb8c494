//go:build race

package nbd_test

// raced is whether the race detector is on: it makes sync.Pool forget at
// random, so allocations cannot be counted.
const raced = true
