// Package invariant stops the process on a programmer's error. An operating
// error (a full disk, a peer that lies, a damaged file) is a value and never
// comes here: only what no input from outside can bring about does.
package invariant

import "fmt"

// Violation is what a failed assertion panics with, so that a test or a
// supervisor can tell it from any other panic.
type Violation struct{ Message string }

// Error makes a Violation an error: recovered, it can be wrapped and printed.
func (v Violation) Error() string { return "invariant violated: " + v.Message }

// Assert panics with a Violation unless cond holds. It is always on: going on
// with a broken invariant may lose data, stopping may not. The arguments are
// evaluated in any case, so the ones on a hot path must be cheap.
func Assert(cond bool, format string, args ...any) {
	if !cond {
		fail(format, args)
	}
}

// Expensive is Assert for conditions that cost more than the code they guard:
// check runs only when Enabled, which the build tag "invariants" and the race
// detector set.
func Expensive(check func() bool, format string, args ...any) {
	if Enabled && !check() {
		fail(format, args)
	}
}

// fail is apart from Assert so that Assert is inlined.
func fail(format string, args []any) {
	panic(Violation{Message: fmt.Sprintf(format, args...)})
}
