//go:build invariants || race

package invariant

// Enabled says whether Expensive checks run.
const Enabled = true
