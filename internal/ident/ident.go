// Package ident holds the names and numbers that the control layer (raft) and
// the data layer (replication) share. It has no behaviour beyond comparing and
// printing them.
package ident

import (
	"cmp"
	"fmt"
)

// Node is a node's name, as the configuration spells it. Names are unique in a
// cluster at any time; a name that is removed and added anew is a new node and
// is told apart by its Replica ids and incarnations.
type Node string

// Volume is a volume's random identifier, made when the volume is created and
// never used again.
type Volume uint64

// Replica is one replica's random identifier, made with the replica and
// registered in the cluster state. A wiped or swapped disk has another one (or
// none), so it can never answer for the replica that it replaced.
type Replica uint64

// Incarnation is a durable count of a replica's starts. It rises by one each
// time that a daemon opens the replica.
type Incarnation uint64

// Epoch numbers one primary's reign over one volume. Cluster state gives it;
// it only grows. Zero is before the first primary.
type Epoch uint64

// Seq is an entry's place in a volume's write order. It rises by one from
// entry to entry, across epochs too. The first entry has Seq 1.
type Seq uint64

// Position names a log entry for ever.
type Position struct {
	Epoch Epoch `json:"epoch"`
	Seq   Seq   `json:"seq"`
}

// Compare orders positions by epoch first: of two logs, the one whose last
// position is higher holds every committed entry of the other (Raft §5.4.1).
func (p Position) Compare(q Position) int {
	if c := cmp.Compare(p.Epoch, q.Epoch); c != 0 {
		return c
	}
	return cmp.Compare(p.Seq, q.Seq)
}

// Less reports whether p sorts before q.
func (p Position) Less(q Position) bool { return p.Compare(q) < 0 }

// String prints a position as EPOCH:SEQ, the form that the CLI shows.
func (p Position) String() string { return fmt.Sprintf("%d:%d", p.Epoch, p.Seq) }

// EpochStart says at which Seq an epoch's first entry stands. A log's epoch
// history is a list of these, rising in both fields.
type EpochStart struct {
	Epoch Epoch `json:"epoch"`
	First Seq   `json:"first"`
}

// SealRefusal says why a replica did not accept a SEAL.
type SealRefusal uint8

// The reasons for which a replica declines a SEAL (design, section 4).
const (
	SealAccepted SealRefusal = iota // accepted: no refusal
	SealLease                       // it still grants a live lease to the primary
	SealPromised                    // it has promised this or a newer epoch already, and seen an entry or grant of it
	SealSilent                      // it restarted lately and has forgotten what it granted
	SealUnknown                     // its replica id is not the registered one, or it has no such volume
	SealFailed                      // its disk failed
)

// String names the refusal for logs and the operator.
func (r SealRefusal) String() string {
	switch r {
	case SealAccepted:
		return "accepted"
	case SealLease:
		return "lease"
	case SealPromised:
		return "promised"
	case SealSilent:
		return "silent-after-restart"
	case SealUnknown:
		return "unknown-replica"
	case SealFailed:
		return "failed"
	}
	return fmt.Sprintf("refusal(%d)", uint8(r))
}

// SealAnswer is a replica's answer to SEAL(Epoch).
type SealAnswer struct {
	Refusal      SealRefusal `json:"refusal"`
	Epoch        Epoch       `json:"epoch"`    // the epoch that was asked for
	Promised     Epoch       `json:"promised"` // the newest epoch it has promised, durable
	Last         Position    `json:"last"`     // its log's last position; meaningful when accepted
	Replica      Replica     `json:"replica"`
	Incarnation  Incarnation `json:"incarnation"`
	Amnesiac     bool        `json:"amnesiac"`     // it may have lost entries that it had acked
	Inconsistent bool        `json:"inconsistent"` // it is a resync target that is not whole; never promotable
	WaitNanos    int64       `json:"wait_nanos"`   // for lease and silent: how long until it may answer
}
