package state

import (
	"encoding/json"
	"fmt"

	"github.com/blockstep/blockstep/internal/ident"
)

// Command is one change of the cluster state. Exactly one of the pointers is
// set.
type Command struct {
	V    int    `json:"v"`    // lowest version that understands it
	ID   string `json:"id"`   // random; a retry with the same id is answered as the first was
	Time int64  `json:"time"` // Unix nanoseconds at the proposer: for events only, never compared

	InitCluster     *InitCluster     `json:"init_cluster,omitempty"`
	SetSettings     *SetSettings     `json:"set_settings,omitempty"`
	AddNode         *AddNode         `json:"add_node,omitempty"`
	RemoveNode      *RemoveNode      `json:"remove_node,omitempty"`
	ReplaceNode     *ReplaceNode     `json:"replace_node,omitempty"`
	CreateVolume    *CreateVolume    `json:"create_volume,omitempty"`
	DeleteVolume    *DeleteVolume    `json:"delete_volume,omitempty"`
	ResizeVolume    *ResizeVolume    `json:"resize_volume,omitempty"`
	SetOptions      *SetOptions      `json:"set_options,omitempty"`
	RegisterReplica *RegisterReplica `json:"register_replica,omitempty"`
	AddReplica      *AddReplica      `json:"add_replica,omitempty"`
	RemoveReplica   *RemoveReplica   `json:"remove_replica,omitempty"`
	MarkFailed      *MarkFailed      `json:"mark_failed,omitempty"`
	Promote         *Promote         `json:"promote,omitempty"`
	ChangeSet       *ChangeSet       `json:"change_set,omitempty"`
	AddEvent        *AddEvent        `json:"add_event,omitempty"`
}

// InitCluster is the first command: it names the cluster and its founders.
type InitCluster struct {
	Cluster   string `json:"cluster"`
	ClusterID string `json:"cluster_id"`
	Nodes     []Node `json:"nodes"`
}

// SetSettings replaces the cluster's settings; nil fields stay.
type SetSettings struct {
	ManualFailover       *bool  `json:"manual_failover,omitempty"`
	PowerLossGraceMillis *int64 `json:"power_loss_grace_ms,omitempty"`
}

// AddNode adds a member.
type AddNode struct {
	Node Node `json:"node"`
}

// RemoveNode removes a member that holds no replica.
type RemoveNode struct {
	Name ident.Node `json:"name"`
}

// ReplaceNode gives a member whose data_dir was lost its new Raft id. Its
// replicas are marked failed: their primaries take them out of the sets, and
// the node then registers new ones.
type ReplaceNode struct {
	Name    ident.Node `json:"name"`
	RaftID  string     `json:"raft_id"`
	Address string     `json:"address,omitempty"` // "" leaves it
}

// CreateVolume makes a volume whose replicas are all in sync: they are empty.
type CreateVolume struct {
	Name     string       `json:"name"`
	ID       ident.Volume `json:"id"` // random, not 0
	Size     uint64       `json:"size"`
	Replicas []Replica    `json:"replicas"` // Node and Device count
	Options  Options      `json:"options"`  // zero fields get their defaults
}

// DeleteVolume leaves a tombstone.
type DeleteVolume struct {
	Volume ident.Volume `json:"volume"`
}

// ResizeVolume makes a volume larger.
type ResizeVolume struct {
	Volume ident.Volume `json:"volume"`
	Size   uint64       `json:"size"`
}

// SetOptions changes options; nil fields stay.
type SetOptions struct {
	Volume           ident.Volume `json:"volume"`
	Ack              *AckMode     `json:"ack,omitempty"`
	MinCopies        *int         `json:"min_copies,omitempty"`
	OnNoQuorum       *string      `json:"on_no_quorum,omitempty"`
	ErrorAfterMillis *int64       `json:"error_after_ms,omitempty"`
	AfterPowerLoss   *string      `json:"after_power_loss,omitempty"`
	LogRetention     *int64       `json:"log_retention,omitempty"`
	ResyncRateMax    *int64       `json:"resync_rate_max,omitempty"`
	ResyncRateMin    *int64       `json:"resync_rate_min,omitempty"`
	Checksum         *bool        `json:"checksum,omitempty"`
}

// RegisterReplica gives a replica its id. It is refused when one is registered,
// unless Replace is set and the replica is out of the in-sync set.
type RegisterReplica struct {
	Volume  ident.Volume  `json:"volume"`
	Node    ident.Node    `json:"node"`
	Replica ident.Replica `json:"replica"`
	Replace bool          `json:"replace,omitempty"`
	// Was, with Replace: the replica that it takes the place of. The command is refused when
	// another one is registered by the time that it comes, or none. 0, from where not every
	// node understands it: whichever is registered.
	Was ident.Replica `json:"was,omitempty"` // version 3
}

// AddReplica adds a replica, which is out of the in-sync set until its primary
// brings it in.
type AddReplica struct {
	Volume ident.Volume `json:"volume"`
	Node   ident.Node   `json:"node"`
	Device string       `json:"device,omitempty"`
	// AtMost is how many replicas, of those that are not about to leave, the volume shall
	// have with this one: where it has them already, the command is refused. 0: no matter.
	AtMost int `json:"at_most,omitempty"` // version 3
}

// RemoveReplica removes a replica. One that is in sync is marked as leaving
// (Result.Pending) and goes when the primary has taken it out of the set.
type RemoveReplica struct {
	Volume ident.Volume `json:"volume"`
	Node   ident.Node   `json:"node"`
}

// MarkFailed records that a replica's disk failed. It is sticky.
type MarkFailed struct {
	Volume  ident.Volume  `json:"volume"`
	Node    ident.Node    `json:"node"`
	Replica ident.Replica `json:"replica"`
	Reason  string        `json:"reason"`
}

// Loss says why a promotion may lose answered writes.
type Loss string

// The losses. LossLocal is found by Apply itself.
const (
	LossNone   Loss = ""
	LossPower  Loss = "power-loss"
	LossForced Loss = "forced"
	LossLocal  Loss = "local"
)

// Promote begins an epoch (design, section 4, step 3). It compares the old
// epoch and the set's version, and fails if either moved.
type Promote struct {
	Volume      ident.Volume      `json:"volume"`
	OldEpoch    ident.Epoch       `json:"old_epoch"`
	SetVersion  uint64            `json:"set_version"`
	Epoch       ident.Epoch       `json:"epoch"`
	Node        ident.Node        `json:"node"`
	Replica     ident.Replica     `json:"replica"`
	Incarnation ident.Incarnation `json:"incarnation"`
	Position    ident.Position    `json:"position"`
	Loss        Loss              `json:"loss,omitempty"` // LossNone, LossPower or LossForced
	Heard       []ident.Node      `json:"heard"`          // whose answers counted
	Set         []ident.Node      `json:"set,omitempty"`  // with LossForced only: the set from now on
	Rule        string            `json:"rule,omitempty"` // why, for the event
	// Readmit, with LossForced only: Node's replica had failed and has none beside it in Set. It
	// is taken back with what its disk holds still, at an operator's word.
	Readmit bool `json:"readmit,omitempty"` // version 2
	// Fence raises the cache generation although nothing is lost: sessions from before
	// end with an error, at an operator's word (adr/0022).
	Fence bool `json:"fence,omitempty"` // version 4
}

// ChangeSet changes the in-sync set. Only the primary of Epoch gives it.
type ChangeSet struct {
	Volume  ident.Volume `json:"volume"`
	Epoch   ident.Epoch  `json:"epoch"`
	Version uint64       `json:"version"` // compared; becomes Version+1
	Set     []ident.Node `json:"set"`
	Reason  string       `json:"reason,omitempty"`
	// Unfit: all who leave failed or must be resynced, so the set may fall
	// below min_copies. Its primary answers nobody until they are back.
	Unfit bool `json:"unfit,omitempty"`
}

// AddEvent records something that a node saw.
type AddEvent struct {
	Event Event `json:"event"` // ID and Time are given by Apply
}

// Kind names the command for logs; "" when none or several are set.
func (c *Command) Kind() string {
	name, n := "", 0
	for _, k := range []struct {
		set  bool
		name string
	}{
		{c.InitCluster != nil, "init-cluster"},
		{c.SetSettings != nil, "set-settings"},
		{c.AddNode != nil, "add-node"},
		{c.RemoveNode != nil, "remove-node"},
		{c.ReplaceNode != nil, "replace-node"},
		{c.CreateVolume != nil, "create-volume"},
		{c.DeleteVolume != nil, "delete-volume"},
		{c.ResizeVolume != nil, "resize-volume"},
		{c.SetOptions != nil, "set-options"},
		{c.RegisterReplica != nil, "register-replica"},
		{c.AddReplica != nil, "add-replica"},
		{c.RemoveReplica != nil, "remove-replica"},
		{c.MarkFailed != nil, "mark-failed"},
		{c.Promote != nil, "promote"},
		{c.ChangeSet != nil, "change-set"},
		{c.AddEvent != nil, "add-event"},
	} {
		if k.set {
			name = k.name
			n++
		}
	}
	if n != 1 {
		return ""
	}
	return name
}

// version is the lowest one that understands the command: who leaves out what it does not
// know would do what the others have refused, or the other way round.
func (c *Command) version() int {
	switch {
	case c.Promote != nil && c.Promote.Fence:
		return VersionFence
	case c.RegisterReplica != nil && c.RegisterReplica.Was != 0, c.AddReplica != nil && c.AddReplica.AtMost != 0:
		return VersionCompares
	case c.Promote != nil && c.Promote.Readmit:
		return 2
	}
	return 1
}

// Encode gives the bytes that go into the Raft log. It fails on a command that
// Decode would not take.
func (c *Command) Encode() ([]byte, error) {
	d := *c
	if d.V == 0 {
		d.V = d.version()
	}
	if d.Kind() == "" {
		return nil, fmt.Errorf("command: exactly one kind must be set: %w", ErrCorrupt)
	}
	b, err := json.Marshal(&d)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", d.Kind(), err)
	}
	if len(b) > CommandMax {
		return nil, fmt.Errorf("%s is %d bytes, at most %d: %w", d.Kind(), len(b), CommandMax, ErrCorrupt)
	}
	return b, nil
}

// DecodeCommand reads a command. ErrNewer means that a node must stop rather
// than skip it: those that know the command have applied it.
func DecodeCommand(b []byte) (Command, error) {
	var head struct {
		V int `json:"v"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return Command{}, fmt.Errorf("command: %w: %w", ErrCorrupt, err)
	}
	if head.V > CommandVersion {
		return Command{}, fmt.Errorf("command version %d, this build knows %d: %w", head.V, CommandVersion, ErrNewer)
	}
	if head.V < 1 {
		return Command{}, fmt.Errorf("command version %d: %w", head.V, ErrCorrupt)
	}
	var c Command
	if err := json.Unmarshal(b, &c); err != nil {
		return Command{}, fmt.Errorf("command: %w: %w", ErrCorrupt, err)
	}
	if c.Kind() == "" {
		return Command{}, fmt.Errorf("command: no kind that this build knows, or several: %w", ErrCorrupt)
	}
	return c, nil
}
