//go:build race

package sim

// raced: the race detector makes a history ten times as dear.
const raced = true
