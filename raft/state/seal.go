package state

import (
	"fmt"
	"slices"
	"strings"

	"github.com/blockstep/blockstep/internal/ident"
)

// Round is what a round of SEAL has heard of one volume: the facts from which
// DecideSeal and DecideForced come to their verdict.
type Round struct {
	Volume  *Volume
	Epoch   ident.Epoch                     // that was asked for
	Answers map[ident.Node]ident.SealAnswer // of those that answered; an absent one is not in it
	Prefer  ident.Node                      // among equals; "" nobody
	Avoid   ident.Node                      // among equals the last; "" nobody
	Has     map[ident.Node]int              // primaries of other volumes: among equals those with few go first
	// PowerLoss allows to promote after a power loss (after_power_loss: auto,
	// or the operator said so); GraceOver, to do so without those that are
	// still absent.
	PowerLoss bool
	GraceOver bool
	// Readmit are replicas that have failed and were opened again at an operator's
	// word: DecideForced counts them, after all that have not failed.
	Readmit []ident.Node
}

// VerdictKind is what follows from a round.
type VerdictKind uint8

// The verdicts.
const (
	VerdictPromote VerdictKind = iota + 1 // promote Node
	VerdictRaise                          // someone has promised more: ask for Epoch
	VerdictLease                          // someone still grants a lease, or is silent: ask again after WaitNanos
	VerdictGrace                          // a power loss: wait for the rest of the set for the grace time
	VerdictWait                           // too few answers: wait for Missing
)

// String names the verdict for logs.
func (k VerdictKind) String() string {
	switch k {
	case VerdictPromote:
		return "promote"
	case VerdictRaise:
		return "raise"
	case VerdictLease:
		return "lease"
	case VerdictGrace:
		return "power-loss-grace"
	case VerdictWait:
		return "wait"
	}
	return fmt.Sprintf("verdict(%d)", uint8(k))
}

// Verdict is what follows from a round, and why.
type Verdict struct {
	Kind      VerdictKind
	Rule      string           // in the words of the design
	Node      ident.Node       // VerdictPromote
	Answer    ident.SealAnswer // of Node
	Loss      Loss
	Heard     []ident.Node // whose answers counted, sorted
	Set       []ident.Node // DecideForced: the set from now on, sorted
	Epoch     ident.Epoch  // VerdictRaise
	WaitNanos int64        // VerdictLease
	Readmit   bool         // DecideForced: Node's replica had failed
	Missing   []string     // who does not count, and why: "gamma (no answer)"
	Sealed    bool         // someone accepted: it serves nobody older from now on
	// PrimaryLives: the primary itself declined because of its lease.
	PrimaryLives bool
}

// Text is the verdict for the operator.
func (v Verdict) Text() string {
	if len(v.Missing) == 0 {
		return v.Rule
	}
	return v.Rule + "; missing: " + strings.Join(v.Missing, ", ")
}

// heard sorts the answers of some nodes by what they are worth.
type heard struct {
	good, amnesiac []ident.Node // accepted, registered, whole
	failed         []ident.Node // known to have failed: as amnesiac, and never promotable
	wait           int64        // the shortest wait of those that decline for a time; 0 none
	waiting        []string
	missing        []string
	promised       ident.Epoch // the highest promise that stands against the asked epoch
	primaryLives   bool
}

func (r *Round) hear(nodes []ident.Node) heard {
	var h heard
	for _, n := range nodes {
		rep := r.Volume.Replica(n)
		a, answered := r.Answers[n]
		miss := func(why string) { h.missing = append(h.missing, fmt.Sprintf("%s (%s)", n, why)) }
		switch {
		case rep.Failed && !slices.Contains(r.Readmit, n):
			h.failed = append(h.failed, n)
			continue
		case rep.Replica == 0:
			miss("its replica is not registered yet")
			continue
		case !answered:
			miss("no answer")
			continue
		}
		switch a.Refusal {
		case ident.SealLease, ident.SealSilent:
			h.waiting = append(h.waiting, fmt.Sprintf("%s (%s)", n, a.Refusal))
			h.missing = append(h.missing, fmt.Sprintf("%s (%s)", n, a.Refusal))
			if w := max(a.WaitNanos, 1); h.wait == 0 || w < h.wait {
				h.wait = w
			}
			h.primaryLives = h.primaryLives || (n == r.Volume.Primary && a.Refusal == ident.SealLease)
		case ident.SealPromised:
			h.promised = max(h.promised, a.Promised, r.Epoch)
			miss("it has promised epoch " + fmt.Sprint(a.Promised))
		case ident.SealUnknown:
			miss("its replica is not the registered one")
		case ident.SealFailed, ident.SealAccepted:
			r.hearAnswer(&h, n, rep, a)
		default:
			miss("it refused: " + a.Refusal.String())
		}
	}
	return h
}

// hearAnswer judges an answer that tells of a replica's content.
func (r *Round) hearAnswer(h *heard, n ident.Node, rep *Replica, a ident.SealAnswer) {
	miss := func(why string) { h.missing = append(h.missing, fmt.Sprintf("%s (%s)", n, why)) }
	switch {
	case a.Replica != rep.Replica:
		// A wiped or swapped disk answers nothing, not even that it failed.
		miss("its replica is not the registered one")
	case a.Refusal == ident.SealFailed:
		h.failed = append(h.failed, n)
	case a.Epoch != r.Epoch || a.Last.Epoch >= r.Epoch:
		miss("its answer is for another epoch")
	case a.Inconsistent:
		miss("it is being resynced")
	case a.Amnesiac:
		h.amnesiac = append(h.amnesiac, n)
	default:
		h.good = append(h.good, n)
	}
}

// best is the one with the highest position; among equals the preferred one, else
// of those that are not to be avoided the one that is primary of the fewest other
// volumes, the first by name.
func (r *Round) best(nodes []ident.Node) ident.Node {
	sorted := slices.Sorted(slices.Values(nodes))
	rank := func(n ident.Node) int {
		switch {
		case r.Volume.Replica(n).Failed:
			return -1
		case n == r.Prefer:
			return 3
		case n == r.Avoid:
			return 0
		}
		if r.Volume.Replica(n).Leaving {
			return 1 // as primary it could not leave
		}
		return 2
	}
	win := sorted[0]
	for _, n := range sorted[1:] {
		c := r.Answers[n].Last.Compare(r.Answers[win].Last)
		if d := rank(n) - rank(win); c > 0 || c == 0 && (d > 0 || d == 0 && r.Has[n] < r.Has[win]) {
			win = n
		}
	}
	return win
}

// DecideSeal is design section 4, step 3 and section 5: from the answers to
// SEAL to the promotion that loses nothing, or to what must be waited for. It
// never guesses: an absent member is neither good nor amnesiac.
func DecideSeal(r Round) Verdict {
	v := r.Volume
	h := r.hear(v.InSync)
	usable := slices.Sorted(slices.Values(slices.Concat(h.good, h.amnesiac)))
	out := Verdict{Missing: h.missing, Sealed: len(usable) > 0, PrimaryLives: h.primaryLives}
	need, w := v.SealsNeeded(), v.Majority()
	switch {
	case h.promised >= r.Epoch && h.promised > 0:
		out.Kind, out.Epoch = VerdictRaise, h.promised+1
		out.Rule = fmt.Sprintf("a replica has promised epoch %d: asking for the next one", h.promised)
	case len(h.good) >= need:
		good := r.passOver(h.good, need)
		out.Heard = slices.Sorted(slices.Values(good))
		r.elect(&out, good)
		out.Rule = fmt.Sprintf("%d of %d sealed, %d needed: the highest position has every committed write", len(good), len(v.InSync), need)
	case len(h.amnesiac)+len(h.failed) >= w && len(usable) >= need:
		all := len(usable)+len(h.failed) == len(v.InSync)
		out.Heard = usable
		switch {
		case !r.PowerLoss:
			out.Kind = VerdictWait
			out.Rule = fmt.Sprintf("power loss: %d of %d may have forgotten unflushed writes, and after_power_loss is wait: 'blockstep failover %s' goes on with the best of them", len(h.amnesiac)+len(h.failed), len(v.InSync), v.Name)
		case all || r.GraceOver:
			r.elect(&out, usable)
			out.Loss = LossPower
			out.Rule = fmt.Sprintf("power loss: %d of %d may have forgotten unflushed writes; the highest position has every flushed one", len(h.amnesiac)+len(h.failed), len(v.InSync))
		default:
			out.Kind, out.WaitNanos = VerdictGrace, h.wait
			out.Rule = "power loss: a better copy may still come within power_loss_grace"
		}
	case h.wait > 0:
		out.Kind, out.WaitNanos = VerdictLease, h.wait
		out.Rule = "a lease may still be in force at " + strings.Join(h.waiting, ", ")
	default:
		out.Kind = VerdictWait
		out.Rule = fmt.Sprintf("%d whole copies of %d are needed to know every committed write, %d answered", need, len(v.InSync), len(h.good))
		if len(h.amnesiac) > 0 {
			out.Rule += fmt.Sprintf(" (%d may have forgotten some)", len(h.amnesiac))
		}
	}
	return out
}

// passOver leaves out the primary whose reign ends if nobody else who answered
// has an entry of it, and enough others did: it is cut off from those with whom
// it would have to commit, and its log, the longest by its own markers, would
// have it promoted for ever. What only it holds was never committed. With ack
// local it was answered all the same, so there it counts.
func (r *Round) passOver(good []ident.Node, need int) []ident.Node {
	v := r.Volume
	rest := slices.DeleteFunc(slices.Clone(good), func(n ident.Node) bool { return n == v.Primary })
	if len(rest) < need || v.LocalEpoch == v.Epoch || r.Prefer == v.Primary || r.Answers[v.Primary].Last.Epoch != v.Epoch {
		return good
	}
	for _, n := range rest {
		if r.Answers[n].Last.Epoch >= v.Epoch {
			return good
		}
	}
	return rest
}

// elect fills in a promotion.
func (r *Round) elect(out *Verdict, nodes []ident.Node) {
	out.Kind = VerdictPromote
	out.Node = r.best(nodes)
	out.Answer = r.Answers[out.Node]
}

// DecideForced is the operator's way round step 3: the best of those that
// could be sealed, which may lack what others hold. A lease that is in force is
// never overruled. Members of the in-sync set go first; only when none of them
// could be sealed is another whole replica taken, alone. One that had failed and
// is taken back (Readmit) is alone too: what else failed is copied anew from it.
func DecideForced(r Round) Verdict {
	v := r.Volume
	in := r.hear(v.InSync)
	var others []ident.Node
	for i := range v.Replicas {
		if !v.InSet(v.Replicas[i].Node) {
			others = append(others, v.Replicas[i].Node)
		}
	}
	out := r.hear(others)
	usable := slices.Concat(in.good, in.amnesiac)
	set := slices.Sorted(slices.Values(usable))
	if len(usable) == 0 {
		usable = slices.Concat(out.good, out.amnesiac)
	}
	verdict := Verdict{Missing: in.missing, Sealed: len(usable) > 0, PrimaryLives: in.primaryLives}
	promised := max(in.promised, out.promised)
	switch {
	case promised >= r.Epoch && promised > 0:
		verdict.Kind, verdict.Epoch = VerdictRaise, promised+1
		verdict.Rule = fmt.Sprintf("a replica has promised epoch %d: asking for the next one", promised)
	case in.wait > 0:
		verdict.Kind, verdict.WaitNanos = VerdictLease, in.wait
		verdict.Rule = "a lease may still be in force at " + strings.Join(in.waiting, ", ")
	case len(usable) == 0:
		verdict.Kind = VerdictWait
		verdict.Rule = "no whole replica could be sealed"
	default:
		r.elect(&verdict, usable)
		verdict.Loss = LossForced
		verdict.Heard = slices.Sorted(slices.Values(usable))
		verdict.Set = slices.DeleteFunc(set, func(n ident.Node) bool { return v.Replica(n).Failed })
		verdict.Rule = "forced by an operator, who accepts that answered writes may be lost"
		if v.Replica(verdict.Node).Failed {
			verdict.Set, verdict.Readmit = nil, true
			verdict.Rule += "; no better replica is left than one that had failed"
		}
		if len(verdict.Set) == 0 {
			verdict.Set = []ident.Node{verdict.Node}
		}
	}
	return verdict
}
