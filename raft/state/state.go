// Package state is the cluster state: the nodes, the volumes, who is primary of
// what in which epoch, and whose copies count. Design, sections 1 and 4.
//
// It is pure: State.Apply(Command) gives a new State and a Result, the same on
// each node, and touches neither clock nor network nor file. A State that has
// been handed out never changes, so a reader needs no lock. Every refusal is a
// Result that names the rule.
//
// The encoding is JSON with a version number; docs/format/control.md.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
)

// Version is the newest version of a snapshot that this build understands,
// CommandVersion that of a command. In VersionCompares, RegisterReplica and
// AddReplica say what they were decided on, and a forced Promote has no set with a
// replica that is not registered; in VersionFence a Promote may be a fence. Such a
// command is proposed only where State.Understood.
const (
	Version         = 1
	CommandVersion  = 4
	VersionCompares = 3
	VersionFence    = 4
)

// ErrNewer is returned when bytes were written by a newer blockstep. They are
// good; this build must not go on as if they were not there.
var ErrNewer = errors.New("written by a newer blockstep: upgrade this node")

// ErrCorrupt is returned when bytes are no command or snapshot at all.
var ErrCorrupt = errors.New("not a valid encoding")

// State is everything that the nodes agree on. Treat it, and whatever it points
// to, as read-only.
type State struct {
	V         int                      `json:"v"`
	Cluster   string                   `json:"cluster"`    // name, from the configuration
	ClusterID string                   `json:"cluster_id"` // random; "" before InitCluster
	Nodes     map[ident.Node]*Node     `json:"nodes"`
	Removed   []string                 `json:"removed,omitempty"` // Raft ids that never come back
	Volumes   map[ident.Volume]*Volume `json:"volumes"`           // tombstones included
	Settings  Settings                 `json:"settings"`
	NextEvent uint64                   `json:"next_event"` // id of the next event; the first is 1
	Events    []Event                  `json:"events,omitempty"`
	Outcomes  []Outcome                `json:"outcomes,omitempty"`
}

// Node is a member of the cluster.
type Node struct {
	Name    ident.Node `json:"name"`
	Address string     `json:"address"` // host:port, one for everything
	RaftID  string     `json:"raft_id"` // name and random id; a wiped data_dir has another one
	Witness bool       `json:"witness,omitempty"`
	// Lost is set by a recovery from a lost majority: the node is out of the Raft
	// group until it is replaced or removed.
	Lost bool `json:"lost,omitempty"`
	// Commands is the newest version of a command that the node's build understands, as
	// it said when it last started (Started); 0: it has not said. Nothing is decided by
	// it in Apply, so a release that does not keep it comes to the same state otherwise.
	Commands int `json:"commands,omitempty"`
}

// Settings concern the cluster as a whole.
type Settings struct {
	// ManualFailover switches the automatic failover off: a lapsed lease then
	// waits for `blockstep failover`.
	ManualFailover bool `json:"manual_failover,omitempty"`
	// PowerLossGraceMillis is how long the controller waits for all of the
	// in-sync set after a power loss; 0 means the default.
	PowerLossGraceMillis int64 `json:"power_loss_grace_ms,omitempty"`
}

// AckMode is what an answer to the client waits for (design, section 3).
type AckMode string

// The ack modes.
const (
	AckQuorum  AckMode = "quorum"
	AckDurable AckMode = "durable"
	AckLocal   AckMode = "local"
)

// What a volume does without a quorum, and after a power loss.
const (
	NoQuorumHold   = "hold"
	NoQuorumError  = "error"
	PowerLossAuto  = "auto"
	PowerLossWait  = "wait"
	errorAfterMax  = int64(24 * 3600 * 1000)
	retentionMax   = int64(1) << 44
	resyncRateMost = int64(1) << 40
)

// Options of a volume that can be changed while it is served.
type Options struct {
	Ack              AckMode `json:"ack"`
	MinCopies        int     `json:"min_copies"`
	OnNoQuorum       string  `json:"on_no_quorum"`       // NoQuorumHold or NoQuorumError
	ErrorAfterMillis int64   `json:"error_after_ms"`     // for NoQuorumError
	AfterPowerLoss   string  `json:"after_power_loss"`   // PowerLossAuto or PowerLossWait
	LogRetention     int64   `json:"log_retention"`      // bytes; 0: the node's default
	ResyncRateMax    int64   `json:"resync_rate_max"`    // bytes a second; 0: no ceiling
	ResyncRateMin    int64   `json:"resync_rate_min"`    // bytes a second
	Checksum         bool    `json:"checksum,omitempty"` // resync skips blocks whose hashes agree
}

// Volume is one replicated block device.
type Volume struct {
	Name     string       `json:"name"`
	ID       ident.Volume `json:"id"`
	Size     uint64       `json:"size"` // bytes
	Replicas []Replica    `json:"replicas"`
	Options  Options      `json:"options"`

	Epoch              ident.Epoch       `json:"epoch"` // only grows; 0 before the first primary
	Primary            ident.Node        `json:"primary"`
	PrimaryReplica     ident.Replica     `json:"primary_replica"`
	PrimaryIncarnation ident.Incarnation `json:"primary_incarnation"`
	PrimaryPosition    ident.Position    `json:"primary_position"`

	InSync     []ident.Node `json:"in_sync"`     // sorted by name
	SetVersion uint64       `json:"set_version"` // rises with each change of InSync

	Generation uint64      `json:"generation"`  // of caches: raised when an answered write may be gone, and by a fence
	LossEpoch  ident.Epoch `json:"loss_epoch"`  // newest epoch that began by a promotion that may have lost something
	LocalEpoch ident.Epoch `json:"local_epoch"` // newest epoch in which the ack mode was local for a time

	Created int64 `json:"created"`           // Unix nanoseconds
	Deleted bool  `json:"deleted,omitempty"` // a tombstone: nodes drop their replicas
}

// Replica is one node's copy of a volume.
type Replica struct {
	Node    ident.Node    `json:"node"`
	Replica ident.Replica `json:"replica"`           // 0 until its node has made and registered it
	Device  string        `json:"device,omitempty"`  // backing device; "" is a sparse file in the data_dir
	Failed  bool          `json:"failed,omitempty"`  // sticky: only a new replica id clears it
	Reason  string        `json:"reason,omitempty"`  // of Failed
	Leaving bool          `json:"leaving,omitempty"` // removed as soon as the primary has taken it out of the set
}

// Event is a line of `blockstep events`.
type Event struct {
	ID     uint64            `json:"id"`   // cursor; rises by one
	Time   int64             `json:"time"` // Unix nanoseconds, by the clock of the node that gave the command
	Name   string            `json:"name"`
	Volume string            `json:"volume,omitempty"`
	Node   ident.Node        `json:"node,omitempty"`
	Text   string            `json:"text"`
	Fields map[string]string `json:"fields,omitempty"`
}

// Outcome remembers how a command was answered.
type Outcome struct {
	ID     string `json:"id"`
	Result Result `json:"result"`
}

// New is the state before the first command.
func New() *State {
	return &State{V: Version, Nodes: map[ident.Node]*Node{}, Volumes: map[ident.Volume]*Volume{}, NextEvent: 1}
}

// Volume finds a volume that is not deleted by its name; nil if there is none.
func (s *State) Volume(name string) *Volume {
	for _, v := range s.Volumes {
		if v.Name == name && !v.Deleted {
			return v
		}
	}
	return nil
}

// Live lists the volumes that are not deleted, by name.
func (s *State) Live() []*Volume {
	var out []*Volume
	for _, v := range s.Volumes {
		if !v.Deleted {
			out = append(out, v)
		}
	}
	slices.SortFunc(out, func(a, b *Volume) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return out
}

// Primaries is of how many volumes each node is the primary.
func (s *State) Primaries() map[ident.Node]int {
	has := map[ident.Node]int{}
	for _, v := range s.Volumes {
		if !v.Deleted && v.Epoch > 0 {
			has[v.Primary]++
		}
	}
	return has
}

// NodeNames lists the members, by name.
func (s *State) NodeNames() []ident.Node { return slices.Sorted(maps.Keys(s.Nodes)) }

// EventsSince lists the events with an id above cursor, oldest first. gap says
// that events between cursor and the first one given have been dropped.
func (s *State) EventsSince(cursor uint64) (events []Event, gap bool) {
	i, _ := slices.BinarySearchFunc(s.Events, cursor+1, func(e Event, id uint64) int {
		if e.ID < id {
			return -1
		}
		if e.ID > id {
			return 1
		}
		return 0
	})
	events = s.Events[i:len(s.Events):len(s.Events)]
	return events, len(events) > 0 && events[0].ID > cursor+1
}

// Replica finds the replica on a node; nil if it has none.
func (v *Volume) Replica(node ident.Node) *Replica {
	for i := range v.Replicas {
		if v.Replicas[i].Node == node {
			return &v.Replicas[i]
		}
	}
	return nil
}

// InSet reports whether the node's replica is in the in-sync set.
func (v *Volume) InSet(node ident.Node) bool { return slices.Contains(v.InSync, node) }

// Staying is how many replicas are not about to leave.
func (v *Volume) Staying() (n int) {
	for i := range v.Replicas {
		if !v.Replicas[i].Leaving {
			n++
		}
	}
	return n
}

// Majority is W: how many of the in-sync set must hold an entry for it to be
// committed.
func (v *Volume) Majority() int { return len(v.InSync)/2 + 1 }

// SealsNeeded is how many of the in-sync set must have been sealed so that each
// committed entry is held by one of them: |I|-W+1.
func (v *Volume) SealsNeeded() int { return len(v.InSync) - v.Majority() + 1 }

// clone copies the volume so far that its copy may be changed.
func (v *Volume) clone() *Volume {
	c := *v
	c.Replicas = slices.Clone(v.Replicas)
	c.InSync = slices.Clone(v.InSync)
	return &c
}

// clone copies the state so far that maps and slices of the copy may be
// changed; what the maps point to is shared until it is replaced.
func (s *State) clone() *State {
	c := *s
	c.Nodes = maps.Clone(s.Nodes)
	c.Volumes = maps.Clone(s.Volumes)
	// Removed, Events and Outcomes are replaced whole by those who change them.
	return &c
}

// Encode gives the bytes of a snapshot.
func (s *State) Encode() ([]byte, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode cluster state: %w", err)
	}
	return b, nil
}

// Decode reads a snapshot. It returns ErrNewer or ErrCorrupt, wrapped.
func Decode(b []byte) (*State, error) {
	var head struct {
		V int `json:"v"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, fmt.Errorf("cluster state: %w: %w", ErrCorrupt, err)
	}
	if head.V > Version {
		return nil, fmt.Errorf("cluster state version %d, this build knows %d: %w", head.V, Version, ErrNewer)
	}
	if head.V < 1 {
		return nil, fmt.Errorf("cluster state version %d: %w", head.V, ErrCorrupt)
	}
	s := New()
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("cluster state: %w: %w", ErrCorrupt, err)
	}
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("cluster state: %w: %w", ErrCorrupt, err)
	}
	return s, nil
}

// check finds what no sequence of commands can have made.
func (s *State) check() error {
	if s.Nodes == nil || s.Volumes == nil || s.NextEvent == 0 {
		return errors.New("nodes, volumes or events are missing")
	}
	for name, n := range s.Nodes {
		if n == nil || n.Name != name {
			return fmt.Errorf("node %q has no entry of its own name", name)
		}
	}
	for id, v := range s.Volumes {
		if v == nil || v.ID != id || id == 0 {
			return fmt.Errorf("volume %d has no entry of its own id", id)
		}
		for _, n := range v.InSync {
			if v.Replica(n) == nil {
				return fmt.Errorf("volume %q: %q is in sync and has no replica", v.Name, n)
			}
		}
		if !slices.IsSorted(v.InSync) {
			return fmt.Errorf("volume %q: the in-sync set is not sorted", v.Name)
		}
	}
	return nil
}
