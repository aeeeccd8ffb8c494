package core

import "github.com/blockstep/blockstep/internal/ident"

// flushHabit guesses when the next FLUSH comes. A database that commits, or a
// file system that is fsynced, sends the same number of writes before each
// FLUSH for a long time; then the fsync may begin everywhere with the last of
// them instead of two messages later. The guess only moves a wish to fsync
// forward, so a wrong one costs one fsync that nobody waits for and never
// anything else: what a FLUSH means does not rest on it.
type flushHabit struct {
	at    ident.Seq // the last entry when the newest FLUSH came
	every ident.Seq // entries between the two newest FLUSHes
	seen  int       // how often in a row
}

// flushed notes a FLUSH behind the entry last.
func (h *flushHabit) flushed(last ident.Seq) {
	n := last - h.at
	switch n {
	case 0:
		return // nothing was written between: it says nothing
	case h.every:
		h.seen++
	default:
		h.every, h.seen = n, 0
	}
	h.at = last
}

// expects reports whether a FLUSH is likely to come right after the entry last.
func (h *flushHabit) expects(last ident.Seq) bool {
	return h.seen >= flushHabitMin && last == h.at+h.every
}
