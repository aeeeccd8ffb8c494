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
	// eventNodeReplaced begins a node anew.
	eventNodeReplaced = "node-replaced"
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

// Understood reports whether each member has said, when it last started, that it
// understands the commands of a version. Whoever proposes such a command asks first: a node
// that does not understand it would stop there until it is upgraded. It is false where one
// has not started since it became a member, or so long ago that its event is gone: what a
// command adds in that version has to be something that can be left out (adr/0021), or
// refused (adr/0022).
func (s *State) Understood(version int) bool { return len(s.Lacking(version)) == 0 }

// Lacking lists the members that Understood is false for, by name.
func (s *State) Lacking(version int) []ident.Node {
	known := make(map[ident.Node]bool, len(s.Nodes)) // with what its newest event says
	for i := len(s.Events) - 1; i >= 0 && len(known) < len(s.Nodes); i-- {
		e := &s.Events[i]
		if _, ok := known[e.Node]; ok || s.Nodes[e.Node] == nil {
			continue
		}
		switch e.Name {
		case eventStarted:
			v, err := strconv.Atoi(e.Fields[fieldCommands])
			known[e.Node] = err == nil && v >= version
		case eventNodeAdded, eventNodeReplaced:
			known[e.Node] = false
		}
	}
	return slices.DeleteFunc(s.NodeNames(), func(n ident.Node) bool { return known[n] })
}
