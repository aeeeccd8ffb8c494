//go:build race

package wal

// raceEnabled: the race detector makes sync.Pool forget on purpose.
const raceEnabled = true
