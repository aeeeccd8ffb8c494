// Package yield lets a goroutine that runs on and on have its turns of the
// scheduler cheaply.
//
// The runtime's monitor takes the processor from a goroutine that has had it for
// 10 ms without a turn, also when it is in a system call just then, and then looks
// every 20 µs for a while: where a wake-up is dear that costs as much as the work.
// runtime.Gosched prevents it, but each time it also wakes a thread, which looks
// for work and mostly finds none.
package yield

import _ "unsafe" // for go:linkname

// Turn lets the goroutines that wait for the caller's processor run first. It is
// runtime.Gosched, but wakes no thread for the caller: the caller stays where it is.
func Turn() { goyield() }

// One of the runtime's functions that are kept for others to link to (go.dev/issue/67401).
//
//go:linkname goyield runtime.goyield
func goyield()
