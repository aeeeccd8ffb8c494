package state

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/blockstep/blockstep/internal/ident"
)

const (
	// eventStarted says which build runs on a node from now on.
	eventStarted = "node-started"
	// fieldCommands is the newest version of a command that the build understands.
	fieldCommands = "commands"
)

// Started is what a daemon puts into the cluster state at its start, under an id of the
// caller's. It is an event and no kind of its own, as invitations are (adr/0019): each
// release keeps it.
func Started(node ident.Node, build string) Command {
	return Command{AddEvent: &AddEvent{Event: Event{
		Name: eventStarted, Node: node, Text: fmt.Sprintf("node %s started, blockstep %s", node, build),
		Fields: map[string]string{fieldCommands: strconv.Itoa(CommandVersion)},
	}}}
}

// started notes what a node's build understands, which an older one does not say.
func (s *State) started(e *Event) {
	old := s.Nodes[e.Node]
	if e.Name != eventStarted || old == nil {
		return
	}
	n := *old
	n.Commands, _ = strconv.Atoi(e.Fields[fieldCommands]) // 0 where there is none
	s.Nodes[e.Node] = &n
}

// Understood reports whether each member has said, when it last started, that it
// understands the commands of a version. Whoever proposes such a command asks first: a node
// that does not understand it would stop there until it is upgraded. It is false where one
// has not started since it became a member: what a command adds in that version has to be
// something that can be left out (adr/0021), or refused (adr/0022).
func (s *State) Understood(version int) bool { return len(s.Lacking(version)) == 0 }

// Lacking lists the members that Understood is false for, by name.
func (s *State) Lacking(version int) []ident.Node {
	return slices.DeleteFunc(s.NodeNames(), func(n ident.Node) bool { return s.Nodes[n].Commands >= version })
}
