package state

import (
	"fmt"
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
)

// Rule names the rule by which a command was refused.
type Rule string

// The rules.
const (
	RuleNone           Rule = ""
	RuleInitOnce       Rule = "cluster-founded-once"
	RuleNoCluster      Rule = "cluster-not-founded"
	RuleBadName        Rule = "name-invalid"
	RuleBadValue       Rule = "value-invalid"
	RuleLimit          Rule = "limit"
	RuleNodeExists     Rule = "node-exists"
	RuleNoNode         Rule = "node-unknown"
	RuleRaftIDUsed     Rule = "raft-id-never-again"
	RuleNodeInUse      Rule = "node-holds-replicas"
	RuleLastNode       Rule = "last-node"
	RuleWitness        Rule = "witness-stores-nothing"
	RuleVolumeExists   Rule = "volume-exists"
	RuleNoVolume       Rule = "volume-unknown"
	RuleVolumeIDUsed   Rule = "volume-id-never-again"
	RuleShrink         Rule = "volume-never-shrinks"
	RuleNoReplica      Rule = "replica-unknown"
	RuleReplicaExists  Rule = "replica-exists"
	RuleRegistered     Rule = "replica-registered-once"
	RuleReplicaID      Rule = "replica-id-differs"
	RuleInSync         Rule = "replica-in-sync"
	RuleNotInSync      Rule = "replica-not-in-sync"
	RuleFailed         Rule = "replica-failed"
	RuleLeaving        Rule = "replica-leaving"
	RuleEpoch          Rule = "epoch-moved"
	RuleEpochFalls     Rule = "epoch-only-grows"
	RuleSetVersion     Rule = "set-version-moved"
	RuleMinCopies      Rule = "min-copies"
	RuleEmptySet       Rule = "set-never-empty"
	RulePrimaryInSet   Rule = "primary-in-set"
	RuleOnlyForcedSet  Rule = "set-with-forced-only"
	RulePosition       Rule = "position-below-epoch"
	RulePrimaryReplica Rule = "primary-stays"
	RuleDevice         Rule = "device-in-use"
	RuleReadmit        Rule = "readmit-alone-and-by-force"
	RuleEnough         Rule = "replicas-enough"
)

// Result answers a command.
type Result struct {
	OK     bool   `json:"ok"`
	Rule   Rule   `json:"rule,omitempty"`   // of a refusal
	Reason string `json:"reason,omitempty"` // of a refusal, for the operator

	Pending    bool         `json:"pending,omitempty"`     // RemoveReplica: waits for the primary
	Loss       Loss         `json:"loss,omitempty"`        // Promote: what the epoch began with
	Volume     ident.Volume `json:"volume,omitempty"`      //
	Epoch      ident.Epoch  `json:"epoch,omitempty"`       // of the volume, after the command
	SetVersion uint64       `json:"set_version,omitempty"` // of the volume, after the command
	Event      uint64       `json:"event,omitempty"`       // the event that the command made
}

// Refusal is a refused command as an error.
type Refusal struct {
	Rule   Rule
	Reason string
}

// Error gives the reason and the rule.
func (r *Refusal) Error() string { return fmt.Sprintf("%s (rule: %s)", r.Reason, r.Rule) }

// Err is nil when the command was done, else a *Refusal.
func (r Result) Err() error {
	if r.OK {
		return nil
	}
	return &Refusal{Rule: r.Rule, Reason: r.Reason}
}

// Superseded reports whether a ChangeSet was refused because epoch or version
// moved. What it asked for may have been done all the same: the outcome of a
// command is remembered for OutcomesMax others, and who asks again later than
// that is judged anew. The state of the volume says what came of it.
func (r Result) Superseded() bool {
	return !r.OK && (r.Rule == RuleEpoch || r.Rule == RuleSetVersion)
}

func refuse(rule Rule, format string, a ...any) Result {
	return Result{Rule: rule, Reason: clip(fmt.Sprintf(format, a...))}
}

// clip bounds a text, at a rune's border or not: texts are for people.
func clip(s string) string {
	if len(s) > TextMax {
		return s[:TextMax-3] + "..."
	}
	return s
}

// Apply does one command. It never changes s; a refused command gives a state
// that differs in its remembered outcomes alone.
func (s *State) Apply(c Command) (*State, Result) {
	if c.ID != "" {
		// Newest first: a retry comes soon.
		for i := len(s.Outcomes) - 1; i >= 0; i-- {
			if s.Outcomes[i].ID == c.ID {
				return s, s.Outcomes[i].Result
			}
		}
	}
	next := s.clone()
	r := next.dispatch(&c)
	if !r.OK {
		// A refusal must leave nothing behind, wherever it was found.
		next = s.clone()
	}
	if c.ID != "" {
		next.Outcomes = appendBounded(s.Outcomes, Outcome{ID: c.ID, Result: r}, OutcomesMax)
	}
	return next, r
}

// appendBounded gives a fresh slice, so that states that were handed out before
// never share one that grows.
func appendBounded[T any](old []T, x T, limit int) []T {
	if drop := len(old) + 1 - limit; drop > 0 {
		old = old[drop:]
	}
	out := make([]T, 0, len(old)+1)
	return append(append(out, old...), x)
}

// dispatch performs the command on s, which is a clone of its own.
func (s *State) dispatch(c *Command) Result {
	if c.Kind() == "" {
		return refuse(RuleBadValue, "the command has no kind that this build knows")
	}
	if c.InitCluster != nil {
		return s.initCluster(c, c.InitCluster)
	}
	if s.ClusterID == "" {
		return refuse(RuleNoCluster, "the cluster is not founded yet: wait until all founding nodes are up")
	}
	switch {
	case c.SetSettings != nil:
		return s.setSettings(c, c.SetSettings)
	case c.AddNode != nil:
		return s.addNode(c, c.AddNode)
	case c.RemoveNode != nil:
		return s.removeNode(c, c.RemoveNode)
	case c.ReplaceNode != nil:
		return s.replaceNode(c, c.ReplaceNode)
	case c.CreateVolume != nil:
		return s.createVolume(c, c.CreateVolume)
	case c.DeleteVolume != nil:
		return s.deleteVolume(c, c.DeleteVolume)
	case c.ResizeVolume != nil:
		return s.resizeVolume(c, c.ResizeVolume)
	case c.SetOptions != nil:
		return s.setOptions(c, c.SetOptions)
	case c.RegisterReplica != nil:
		return s.registerReplica(c, c.RegisterReplica)
	case c.AddReplica != nil:
		return s.addReplica(c, c.AddReplica)
	case c.RemoveReplica != nil:
		return s.removeReplica(c, c.RemoveReplica)
	case c.MarkFailed != nil:
		return s.markFailed(c, c.MarkFailed)
	case c.Promote != nil:
		return s.promote(c, c.Promote)
	case c.ChangeSet != nil:
		return s.changeSet(c, c.ChangeSet)
	case c.AddEvent != nil:
		return s.addEvent(c, c.AddEvent)
	}
	return refuse(RuleBadValue, "the command has no kind that this build knows")
}

// event records what the command did and completes its result.
func (s *State) event(c *Command, v *Volume, e Event) Result {
	r := Result{OK: true, Event: s.NextEvent}
	if v != nil {
		e.Volume = v.Name
		r.Volume, r.Epoch, r.SetVersion = v.ID, v.Epoch, v.SetVersion
	}
	e.ID, e.Time, e.Text = s.NextEvent, c.Time, clip(e.Text)
	s.NextEvent++
	s.Events = appendBounded(s.Events, e, EventsMax)
	return r
}

// ValidName reports whether a node, volume or cluster may be called so: letters
// of a to z, digits, '.', '_' and '-', beginning with a letter or digit. '@' is
// free for VOLUME@NODE, '/' for Raft ids.
func ValidName(name string) bool {
	if name == "" || len(name) > NameMax {
		return false
	}
	for i, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case i > 0 && (c == '.' || c == '_' || c == '-'):
		default:
			return false
		}
	}
	return true
}

func (s *State) initCluster(c *Command, p *InitCluster) Result {
	if s.ClusterID != "" {
		return refuse(RuleInitOnce, "cluster %q is founded already", s.Cluster)
	}
	if !ValidName(p.Cluster) || p.ClusterID == "" || len(p.ClusterID) > NameMax {
		return refuse(RuleBadName, "cluster %q, id %q: not a valid name and id", p.Cluster, p.ClusterID)
	}
	s.Cluster, s.ClusterID = p.Cluster, p.ClusterID
	for _, n := range p.Nodes {
		if r := s.putNode(n); !r.OK {
			return r
		}
	}
	return s.event(c, nil, Event{Name: "cluster-founded", Text: fmt.Sprintf("cluster %s founded by %v", p.Cluster, s.NodeNames())})
}

func (s *State) setSettings(c *Command, p *SetSettings) Result {
	if p.PowerLossGraceMillis != nil {
		if *p.PowerLossGraceMillis < 0 || *p.PowerLossGraceMillis > errorAfterMax {
			return refuse(RuleBadValue, "power_loss_grace %d ms: give 0 (default) to %d", *p.PowerLossGraceMillis, errorAfterMax)
		}
		s.Settings.PowerLossGraceMillis = *p.PowerLossGraceMillis
	}
	if p.ManualFailover != nil {
		s.Settings.ManualFailover = *p.ManualFailover
	}
	return s.event(c, nil, Event{Name: "settings", Text: fmt.Sprintf("automatic failover %s, power_loss_grace %d ms (0: default)",
		onOff(!s.Settings.ManualFailover), s.Settings.PowerLossGraceMillis)})
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// putNode adds a node to the maps, after checking it.
func (s *State) putNode(n Node) Result {
	switch {
	case !ValidName(string(n.Name)):
		return refuse(RuleBadName, "node name %q: use letters, digits, '.', '_', '-', at most %d", n.Name, NameMax)
	case s.Nodes[n.Name] != nil:
		return refuse(RuleNodeExists, "node %q is a member already: to give it a new data_dir use 'node replace %s'", n.Name, n.Name)
	case n.Address == "" || len(n.Address) > 256:
		return refuse(RuleBadValue, "node %q: give its address as HOST:PORT", n.Name)
	case len(s.Nodes) >= NodesMax:
		return refuse(RuleLimit, "a cluster has at most %d nodes", NodesMax)
	}
	if r := s.freshRaftID(n.RaftID); !r.OK {
		return r
	}
	n.Commands = 0 // it says so itself
	s.Nodes[n.Name] = &n
	return Result{OK: true}
}

func (s *State) freshRaftID(id string) Result {
	if id == "" || len(id) > 2*NameMax {
		return refuse(RuleBadValue, "raft id %q is not valid", id)
	}
	if slices.Contains(s.Removed, id) {
		return refuse(RuleRaftIDUsed, "raft id %q was removed and never comes back: empty the node's data_dir first", id)
	}
	for _, n := range s.Nodes {
		if n.RaftID == id {
			return refuse(RuleRaftIDUsed, "raft id %q is node %q already", id, n.Name)
		}
	}
	return Result{OK: true}
}

func (s *State) addNode(c *Command, p *AddNode) Result {
	if r := s.putNode(p.Node); !r.OK {
		return r
	}
	return s.event(c, nil, Event{Name: eventNodeAdded, Node: p.Node.Name, Text: fmt.Sprintf("node %s added at %s", p.Node.Name, p.Node.Address)})
}

func (s *State) removeNode(c *Command, p *RemoveNode) Result {
	n := s.Nodes[p.Name]
	if n == nil {
		return refuse(RuleNoNode, "there is no node %q", p.Name)
	}
	if len(s.Nodes) == 1 {
		return refuse(RuleLastNode, "%q is the last node", p.Name)
	}
	for _, v := range s.Live() {
		if v.Replica(p.Name) != nil {
			return refuse(RuleNodeInUse, "node %q holds a replica of %q: 'blockstep node drain %s' first", p.Name, v.Name, p.Name)
		}
	}
	delete(s.Nodes, p.Name)
	if !n.Lost {
		s.Removed = appendBounded(s.Removed, n.RaftID, RemovedMax)
	}
	return s.event(c, nil, Event{Name: "node-removed", Node: p.Name, Text: fmt.Sprintf("node %s removed", p.Name)})
}

func (s *State) replaceNode(c *Command, p *ReplaceNode) Result {
	old := s.Nodes[p.Name]
	if old == nil {
		return refuse(RuleNoNode, "there is no node %q: 'node add' adds one", p.Name)
	}
	if len(p.Address) > 256 {
		return refuse(RuleBadValue, "node %q: give its address as HOST:PORT", p.Name)
	}
	if r := s.freshRaftID(p.RaftID); !r.OK {
		return r
	}
	n := *old
	n.RaftID, n.Lost, n.Commands = p.RaftID, false, 0
	if p.Address != "" {
		n.Address = p.Address
	}
	s.Nodes[p.Name] = &n
	if !old.Lost {
		s.Removed = appendBounded(s.Removed, old.RaftID, RemovedMax)
	}
	for _, v := range s.Live() {
		if r := v.Replica(p.Name); r != nil && r.Replica != 0 && !r.Failed {
			nv := v.clone()
			nr := nv.Replica(p.Name)
			nr.Failed, nr.Reason = true, "the node was replaced: its data_dir is a new one"
			s.Volumes[v.ID] = nv
		}
	}
	return s.event(c, nil, Event{Name: "node-replaced", Node: p.Name, Text: fmt.Sprintf("node %s replaced: a new data_dir takes its place", p.Name)})
}

func (s *State) addEvent(c *Command, p *AddEvent) Result {
	e := p.Event
	if e.Name == "" || len(e.Name) > NameMax || len(e.Volume) > NameMax || len(e.Node) > NameMax {
		return refuse(RuleBadValue, "an event needs a name of at most %d bytes", NameMax)
	}
	if len(e.Fields) > FieldsMax {
		return refuse(RuleLimit, "an event has at most %d fields", FieldsMax)
	}
	for k, v := range e.Fields {
		if len(k) > NameMax || len(v) > TextMax {
			return refuse(RuleLimit, "event field %q is too long", clip(k))
		}
	}
	s.started(&e)
	return s.event(c, nil, e)
}
