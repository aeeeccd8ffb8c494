package state

import (
	"fmt"
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
// command adds in that version has to be something that can be left out (adr/0021).
func (s *State) Understood(version int) bool {
	known := make(map[ident.Node]bool, len(s.Nodes))
	for i := len(s.Events) - 1; i >= 0 && len(known) < len(s.Nodes); i-- {
		e := &s.Events[i]
		if s.Nodes[e.Node] == nil || known[e.Node] {
			continue
		}
		switch e.Name {
		case eventStarted:
			if v, err := strconv.Atoi(e.Fields[fieldCommands]); err != nil || v < version {
				return false
			}
			known[e.Node] = true
		case eventNodeAdded, eventNodeReplaced:
			return false
		}
	}
	return len(known) == len(s.Nodes)
}
