// Package control is the admin API between the blockstep command and a daemon:
// its types, a server for a unix socket or for HTTP connections of the node's
// port, and a client. It is HTTP and JSON; docs/format/admin.md lists the paths.
//
// From TCP only reading is allowed: a changing request is refused, since there
// is no credential that could prove who asks.
package control

import (
	"fmt"
	"time"
)

// Health is a volume's condition in a word.
type Health string

// The conditions.
const (
	Healthy   Health = "healthy"   // every replica is up and in sync
	Degraded  Health = "degraded"  // serving with fewer replicas than configured
	Suspended Health = "suspended" // nobody serves: I/O is held, not failed
)

// ReplicaState is one replica's condition as the glossary names it.
type ReplicaState string

// The replica states.
const (
	InSync     ReplicaState = "InSync"
	CatchingUp ReplicaState = "CatchingUp"
	Resyncing  ReplicaState = "Resyncing"
	Amnesiac   ReplicaState = "Amnesiac"
	Failed     ReplicaState = "Failed"
	Absent     ReplicaState = "Absent"
)

// Resync is the progress of a replica's resync.
type Resync struct {
	DoneBytes  int64 `json:"done_bytes"`
	TotalBytes int64 `json:"total_bytes"`
	// Rate is what was copied a second lately, in bytes, and Left how many
	// seconds the rest takes at that rate; 0 and null while it is not known.
	Rate int64  `json:"bytes_per_second"`
	Left *int64 `json:"seconds_left"`
}

// ReplicaStatus is one replica of a volume.
type ReplicaStatus struct {
	Node       string       `json:"node"`
	State      ReplicaState `json:"state"`
	Position   string       `json:"position"` // EPOCH:SEQ of its last entry; "" when nobody knows
	LagBytes   int64        `json:"lag_bytes"`
	DirtyBytes int64        `json:"dirty_bytes"`
	Resync     *Resync      `json:"resync"` // null when there is none
	Reason     string       `json:"reason,omitempty"`
}

// VolumeStatus is one volume.
type VolumeStatus struct {
	Volume     string          `json:"volume"`
	ID         string          `json:"id"`
	Size       int64           `json:"size"`    // bytes
	Primary    string          `json:"primary"` // "" when nobody serves
	Epoch      uint64          `json:"epoch"`
	Position   string          `json:"position"` // EPOCH:SEQ of the primary's last entry
	Health     Health          `json:"health"`
	Reason     string          `json:"reason"` // why it is not healthy; "" when it is
	Next       string          `json:"next"`   // what to do about it; "" when nothing
	InSync     []string        `json:"in_sync"`
	Replicas   []ReplicaStatus `json:"replicas"`
	Ack        string          `json:"ack"`
	MinCopies  int             `json:"min_copies"`
	Generation uint64          `json:"cache_generation"`
	// Warnings are of what has just been done; a status has none.
	Warnings []Warning `json:"warnings,omitempty"`
}

// VolumeClients is who uses a volume through one node now.
type VolumeClients struct {
	Node    string   `json:"node"`
	Clients []string `json:"clients"`         // each NBD connection's other end: HOST:PORT, or unix:pid=PID,uid=UID
	Error   string   `json:"error,omitempty"` // why the node does not tell
}

// NodeStatus is one node of the cluster.
type NodeStatus struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	Witness bool   `json:"witness"`
	Up      bool   `json:"up"`     // the node that was asked reaches it
	Leader  bool   `json:"leader"` // of the cluster state
	Voter   bool   `json:"voter"`
	Error   string `json:"error,omitempty"` // why it is not reached
}

// ClusterStatus is everything that `blockstep status` shows.
type ClusterStatus struct {
	Cluster string         `json:"cluster"`
	Node    string         `json:"node"` // the node that answers
	Version string         `json:"version"`
	Leader  string         `json:"raft_leader"` // "" when there is none
	Term    uint64         `json:"raft_term"`
	Quorum  bool           `json:"quorum"` // the cluster state can change
	Nodes   []NodeStatus   `json:"nodes"`
	Volumes []VolumeStatus `json:"volumes"`
}

// Event is one thing that happened.
type Event struct {
	Cursor string    `json:"cursor"` // pass it as since to go on after this event
	Time   time.Time `json:"time"`
	Node   string    `json:"node,omitempty"` // that it is about, or that noticed it
	Volume string    `json:"volume,omitempty"`
	Kind   string    `json:"kind"`
	Text   string    `json:"text"`
}

// CreateVolume asks for a volume.
type CreateVolume struct {
	Name     string            `json:"name"`
	Size     int64             `json:"size"` // bytes
	Replicas []string          `json:"replicas,omitempty"`
	Devices  map[string]string `json:"devices,omitempty"` // node: path of its backing device
	Ack      string            `json:"ack,omitempty"`
	MinCopy  int               `json:"min_copies,omitempty"`
}

// SetOptions changes options of a volume; what is left out stays.
type SetOptions struct {
	// Replicas is how many it shall have: new ones are placed where there are fewer.
	Replicas      *int   `json:"replicas,omitempty"`
	MinCopies     *int   `json:"min_copies,omitempty"`
	ResyncRateMax *int64 `json:"resync_rate_max,omitempty"` // bytes a second; 0: as the nodes are configured
	ResyncRateMin *int64 `json:"resync_rate_min,omitempty"` // bytes a second; 0: as the nodes are configured
}

// Resize asks for another size.
type Resize struct {
	Size int64 `json:"size"` // bytes
}

// Switchover asks for another primary, with nothing lost.
type Switchover struct {
	To string `json:"to"`
}

// Failover asks for a new primary because the old one is gone.
type Failover struct {
	To             string `json:"to,omitempty"`
	Force          bool   `json:"force,omitempty"`
	AcceptDataLoss bool   `json:"accept_data_loss,omitempty"`
}

// FailoverResult says what a failover did.
type FailoverResult struct {
	Primary string `json:"primary"`
	Epoch   uint64 `json:"epoch"`
	Lost    string `json:"lost,omitempty"` // what may be gone, after a forced one
}

// FenceResult says what a fence did.
type FenceResult struct {
	Volume     string          `json:"volume"`
	Primary    string          `json:"primary"`
	Epoch      uint64          `json:"epoch"`
	Generation uint64          `json:"cache_generation"`
	Ended      []EndedSessions `json:"ended"`
	Lost       string          `json:"lost,omitempty"` // what may be gone, when the primary was
}

// EndedSessions is who had a fenced volume open through one node.
type EndedSessions struct {
	Node    string   `json:"node"`
	Clients []string `json:"clients"`          // each NBD connection's other end, as VolumeClients has it
	Device  string   `json:"device,omitempty"` // the kernel device there, which fails its I/O for good
	Error   string   `json:"error,omitempty"`  // why the node does not tell: what it has open has ended all the same
}

// Invalidate asks to resync one replica anew.
type Invalidate struct {
	Node string `json:"node"`
}

// Verify asks to compare the replicas.
type Verify struct {
	Repair bool `json:"repair,omitempty"`
}

// VerifyProgress is a line of a running verify; the last has Done. One that has
// compared less than all has found more than it reports, or than it could repair.
type VerifyProgress struct {
	DoneBytes  int64          `json:"done_bytes"`
	TotalBytes int64          `json:"total_bytes"`
	Done       bool           `json:"done"`
	Found      []VerifyExtent `json:"found,omitempty"`
	// More is how many ranges were found and repaired beside those of Found, of
	// which there are not more than some.
	More int64 `json:"found_more,omitempty"`
	// Compared are the nodes whose replicas are compared, those that are in sync;
	// LeftOut are the others.
	Compared []string `json:"compared,omitempty"`
	LeftOut  []string `json:"left_out,omitempty"`
	// Waits says for which other runs this one waits, before it begins.
	Waits string `json:"waits,omitempty"`
	Err   *Error `json:"error,omitempty"`
}

// VerifyExtent is a range in which a replica differs.
type VerifyExtent struct {
	Node     string `json:"node"`
	Offset   uint64 `json:"offset"`
	Length   uint64 `json:"length"`
	Repaired bool   `json:"repaired"`
}

// AddNode asks for a new member.
type AddNode struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	Witness bool   `json:"witness,omitempty"`
	// Token asks for a token with which the node joins by itself within
	// TokenSeconds, in the place of adding one that runs and waits.
	Token        bool  `json:"token,omitempty"`
	TokenSeconds int64 `json:"token_seconds,omitempty"`
}

// AddedNode is a new member, or one that may become it.
type AddedNode struct {
	Name    string     `json:"name"`
	Address string     `json:"address"`
	Witness bool       `json:"witness,omitempty"`
	Token   string     `json:"token,omitempty"` // with it the node joins, once
	Expires *time.Time `json:"expires,omitempty"`
	// Already: it was a member before, just as it was asked for; perhaps by the same
	// command, whose answer was lost.
	Already bool `json:"already,omitempty"`
}

// ChangedNode says what became of a change of a member.
type ChangedNode struct {
	Already bool `json:"already,omitempty"` // as of AddedNode
	// Warnings are what the change leaves to be seen to.
	Warnings []Warning `json:"warnings,omitempty"`
}

// Warning is something that was done as it was asked for, and may not be meant.
type Warning struct {
	Volume string `json:"volume,omitempty"`
	Text   string `json:"text"`
	Next   string `json:"next"` // what to do about it
}

// RemoveNode asks to end a membership.
type RemoveNode struct {
	// Force gives the replicas of a node up that is down, where others hold
	// what they hold.
	Force bool `json:"force,omitempty"`
}

// Finding is one thing that doctor looked at.
type Finding struct {
	Node  string `json:"node"`
	Check string `json:"check"`
	State string `json:"state"` // ok, warn, bad
	Text  string `json:"text"`
	Next  string `json:"next,omitempty"` // what to do about it
}

// The states of a Finding.
const (
	FindingOK   = "ok"
	FindingWarn = "warn" // worth a look
	FindingBad  = "bad"  // has to be mended
)

// Recovery says what a recovery from a lost majority did, or would do.
type Recovery struct {
	Cluster string            `json:"cluster"`
	Index   uint64            `json:"raft_index"` // the higher, the newer is what this node knows
	Keep    []string          `json:"keep"`       // the whole Raft group now
	Lost    []string          `json:"lost"`       // to be replaced or removed
	Volumes []RecoveredVolume `json:"volumes"`
}

// RecoveredVolume is what a recovery leaves of a volume.
type RecoveredVolume struct {
	Volume   string   `json:"volume"`
	Replicas []string `json:"replicas"` // on nodes that are kept
	InSync   []string `json:"in_sync"`  // of them
	Next     string   `json:"next"`
}

// Reloaded says what a daemon made of its configuration, read again.
type Reloaded struct {
	Applied []KeyChange `json:"applied"` // in force now
	Restart []KeyChange `json:"restart"` // in force after a restart of blockstepd only
	// Ignored are in force neither now nor after a restart, as is meant.
	Ignored []IgnoredChange `json:"ignored,omitempty"`
}

// IgnoredChange is a key of which another value has no effect.
type IgnoredChange struct {
	Key  string `json:"key"`
	Old  string `json:"old"`
	New  string `json:"new"`
	Next string `json:"next"` // what to do in its place
}

// KeyChange is a configuration key with another value than before.
type KeyChange struct {
	Key string `json:"key"`
	Old string `json:"old"`
	New string `json:"new"`
}

// Attach asks for a kernel device.
type Attach struct {
	Device      string `json:"device,omitempty"` // /dev/nbdN; "": a free one
	Connections int    `json:"connections,omitempty"`
	ReadOnly    bool   `json:"read_only,omitempty"`
}

// Attachment is a volume on a kernel device.
type Attachment struct {
	Volume      string `json:"volume"`
	Device      string `json:"device"`
	Connections int    `json:"connections"`
	ReadOnly    bool   `json:"read_only"`
	Lost        string `json:"lost,omitempty"` // why the device fails all I/O; "" while it serves
	// Warnings are of what has just been attached; a list has none.
	Warnings []Warning `json:"warnings,omitempty"`
}

// Code classifies an Error; the CLI makes its exit code from it.
type Code string

// The classes.
const (
	CodeRefused  Code = "refused"   // it would lose data, or does not fit the state
	CodeFailed   Code = "failed"    // it was tried
	CodeNotFound Code = "not_found" // no such volume or node
	CodeUsage    Code = "usage"     // the request itself is wrong
	CodeTimeout  Code = "timeout"   // its outcome is not known, or it goes on
	CodeReadOnly Code = "read_only" // changing is not allowed from there
)

// Error is an answer that is not success.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"error"`
	Next    string `json:"next,omitempty"` // what to do now
}

// Error puts the message and the next step in one line.
func (e *Error) Error() string {
	if e.Next == "" {
		return e.Message
	}
	return e.Message + "; " + e.Next
}

// Errorf makes an Error; next says what to do now.
func Errorf(code Code, next, format string, args ...any) *Error {
	return &Error{Code: code, Next: next, Message: fmt.Sprintf(format, args...)}
}
