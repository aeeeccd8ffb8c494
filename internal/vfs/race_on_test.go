//go:build race

package vfs

// raceEnabled: the race detector makes sync.Pool forget on purpose.
const raceEnabled = true
