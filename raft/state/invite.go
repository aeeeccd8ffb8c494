package state

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/blockstep/blockstep/internal/ident"
)

const (
	// eventInvited lets a node join with a token.
	eventInvited = "node-invited"
	// eventNodeAdded uses such a one up.
	eventNodeAdded = "node-added"
)

// The fields of such an event.
const (
	fieldToken   = "token_sha256"
	fieldAddress = "address"
	fieldWitness = "witness"
	fieldExpires = "expires_ns"
)

// Invitation lets a node become a member by itself, with a token that is made
// for it. It is an event of the cluster state (adr/0019): each node has it, and
// a build that knows no invitations keeps it all the same.
type Invitation struct {
	ID      uint64 // of the event
	Name    ident.Node
	Address string
	Witness bool
	Expires int64 // Unix nanoseconds; who is shown the token compares, Apply never does

	token string // its SHA-256 in hexadecimal: who reads the state does not get in with it
}

// Command is what puts an invitation for the token into the cluster state.
// until is its end, for people.
func (i Invitation) Command(token, until string) Command {
	return Command{AddEvent: &AddEvent{Event: Event{
		Name: eventInvited, Node: i.Name,
		Text: fmt.Sprintf("node %s may join at %s with its token, until %s", i.Name, i.Address, until),
		Fields: map[string]string{
			fieldToken: tokenHash(token), fieldAddress: i.Address,
			fieldWitness: strconv.FormatBool(i.Witness), fieldExpires: strconv.FormatInt(i.Expires, 10),
		},
	}}}
}

// IsFor reports whether the invitation was made with this token.
func (i Invitation) IsFor(token string) bool { return i.token == tokenHash(token) }

func tokenHash(token string) string {
	h := sha256.Sum256([]byte(token))
	return hex.EncodeToString(h[:])
}

// Invitations are those that are open, by name. One is used up by the node's
// becoming a member, by whichever way, and the newest for a name counts. Those
// that have expired are among them: time is not the cluster state's to judge.
func (s *State) Invitations() []Invitation {
	open := map[ident.Node]Invitation{}
	for _, e := range s.Events {
		switch e.Name {
		case eventInvited:
			if i, ok := invitationOf(e); ok {
				open[e.Node] = i
			}
		case eventNodeAdded:
			delete(open, e.Node)
		}
	}
	out := make([]Invitation, 0, len(open))
	for _, i := range open {
		out = append(out, i)
	}
	slices.SortFunc(out, func(a, b Invitation) int { return strings.Compare(string(a.Name), string(b.Name)) })
	return out
}

// invitationOf reads an event; one that this build did not make may lack
// something, and invites nobody.
func invitationOf(e Event) (Invitation, bool) {
	expires, err := strconv.ParseInt(e.Fields[fieldExpires], 10, 64)
	i := Invitation{
		ID: e.ID, Name: e.Node, Address: e.Fields[fieldAddress], Witness: e.Fields[fieldWitness] == "true", Expires: expires,
		token: e.Fields[fieldToken],
	}
	return i, err == nil && i.token != "" && i.Address != "" && ValidName(string(i.Name))
}
