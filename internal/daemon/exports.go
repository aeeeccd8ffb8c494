package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication"
	"github.com/blockstep/blockstep/replication/bitmap"
)

const (
	exportBlockMin  = 1 // a log entry has any extent
	exportBlockBest = 4096
	// exportPause is how often it is looked whether an export is there meanwhile.
	exportPause = 10 * time.Millisecond
)

// exports shows the volumes to the NBD server: VOLUME on every node, and
// VOLUME@NODE, read-only, for each replica.
type exports struct {
	d *Daemon
	// old is from when on a volume is shown as this node remembers it, when it has
	// not heard the cluster's state since its start, and there is no Raft leader to
	// hear it from.
	old time.Time
}

// exports returns what the NBD server shows from now on.
func (d *Daemon) exports() exports {
	return exports{d: d, old: time.Now().Add(d.cfg.NBD.HandshakeTimeout / 2)}
}

// List implements nbd.Exports.
func (e exports) List() []string {
	st := e.d.state()
	var names []string
	for _, v := range st.Live() {
		names = append(names, v.Name)
	}
	for _, v := range st.Live() {
		for _, r := range v.Replicas {
			names = append(names, v.Name+"@"+string(r.Node))
		}
	}
	return names
}

// wait bounds how long a client waits for a node that has just started: half of
// what its handshake may take, so that there is time for the answer.
func (e exports) wait(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, e.d.cfg.NBD.HandshakeTimeout/2)
}

// target is what an export's name stands for.
type target struct {
	volume *state.Volume
	at     ident.Node // "": the volume itself; else the replica there
	info   nbd.Info
}

// find looks an export's name up in the cluster state.
func (e exports) find(name string) (target, error) {
	base, node, replica := strings.Cut(name, "@")
	sv := e.d.state().Volume(base)
	switch {
	case name == "":
		return target{}, fmt.Errorf("there is no default export, name a volume: %w", nbd.ErrNoExport)
	case sv == nil:
		return target{}, fmt.Errorf("volume %q: %w", base, nbd.ErrNoExport)
	case replica && sv.Replica(ident.Node(node)) == nil:
		var on []string
		for _, r := range sv.Replicas {
			on = append(on, string(r.Node))
		}
		return target{}, fmt.Errorf("volume %q has no replica on %q, only on %s: %w", base, node, strings.Join(on, ", "), nbd.ErrNoExport)
	}
	t := target{volume: sv, at: ident.Node(node), info: nbd.Info{
		Size: sv.Size, Description: "blockstep volume " + base, MultiConn: true,
		BlockMin: exportBlockMin, BlockBest: exportBlockBest, BlockMax: nbd.PayloadMax,
	}}
	if !replica {
		t.info.MetaContexts = []string{dirtyContext}
	} else {
		t.info.ReadOnly = true
		t.info.Description = "committed content of the replica of " + base + " on " + node
	}
	return t, nil
}

// await is find for a daemon that may have just started: it waits until this node
// has heard the cluster's state, so that a client that comes back at once is not
// told that its volume is gone, or smaller than it was. Without a Raft leader a
// volume that is remembered is served all the same, after one such wait for all.
// (With one the node is about to hear, and on the way there sees sizes, and volumes,
// of long ago.)
func (e exports) await(ctx context.Context, name string) (target, error) {
	for {
		current := e.d.isCurrent()
		t, err := e.find(name)
		switch {
		case current, err == nil && e.alone():
			return t, err
		case pause(ctx, exportPause):
		case err == nil:
			return t, nil
		default:
			return t, notYet{name}
		}
	}
}

// alone reports whether it is no use to wait until this node hears how the cluster is.
func (e exports) alone() bool {
	leader, _ := e.d.raft.Leader()
	return leader == "" && !time.Now().Before(e.old)
}

// notYet is an nbd.ErrNoExport of a node that has not heard the cluster's state
// since it has started.
type notYet struct{ name string }

func (e notYet) Error() string {
	return fmt.Sprintf("this node does not know yet whether there is a volume %q, since it has heard of no Raft leader: try again, or see blockstep status", e.name)
}

// Is makes it an nbd.ErrNoExport.
func (notYet) Is(target error) bool { return target == nbd.ErrNoExport } //nolint:errorlint // that is what Is is for

// Lookup implements nbd.Exports.
func (e exports) Lookup(ctx context.Context, name string) (nbd.Info, error) {
	ctx, cancel := e.wait(ctx)
	defer cancel()
	t, err := e.await(ctx, name)
	return t.info, err
}

// Open implements nbd.Exports. It waits for a volume that is not open on this
// node yet.
func (e exports) Open(ctx context.Context, name string, c nbd.Client) (nbd.Session, error) {
	wait, cancel := e.wait(ctx)
	defer cancel()
	t, err := e.await(wait, name)
	if err != nil {
		return nil, err
	}
	client := replication.Client{Remote: c.Remote, Local: c.Local, Gone: c.Gone, Kill: func(reason error) {
		if errors.Is(reason, replication.ErrGeneration) {
			reason = nbdError(reason)
		}
		c.Kill(reason)
	}}
	for {
		s, err := e.open(ctx, wait, t, client)
		switch {
		case err == nil:
			return &session{d: e.d, vol: t.volume.ID, s: s, info: t.info}, nil
		case !errors.Is(err, errNotOpen) && !errors.Is(err, replication.ErrClosed), !pause(wait, exportPause):
			return nil, fmt.Errorf("opening %s: %w", name, err)
		}
	}
}

// errNotOpen is returned for a volume that the cluster has and this node has not
// opened yet, or cannot open.
var errNotOpen = errors.New("it is not open on this node: try again, or see blockstep status")

// open opens what t stands for. A volume that has grown hears of it a moment after
// this node has: until then, or until wait ends, no client is let in, who would keep
// the size of before for as long as it stays.
func (e exports) open(ctx, wait context.Context, t target, client replication.Client) (*replication.Session, error) {
	v := e.d.volume(t.volume.ID)
	if v == nil {
		if problem := e.d.problemOf(t.volume.ID); problem != nil {
			return nil, fmt.Errorf("%w: %w", errNotOpen, problem)
		}
		return nil, errNotOpen
	}
	for v.driver.Size() < t.volume.Size && pause(wait, exportPause) {
		continue
	}
	if t.at == "" {
		return v.driver.OpenSession(ctx, client)
	}
	e.d.level(wait, t.volume.ID, t.at)
	return v.driver.OpenReplicaSession(ctx, t.at, client)
}

// session shows a replication.Session as an nbd.Session.
type session struct {
	d    *Daemon
	vol  ident.Volume
	s    *replication.Session
	info nbd.Info
	// dirty are the dirty-since contexts that were negotiated: of id i at i-1.
	// Negotiation is over before the first Submit.
	dirty []*changes
}

// Info implements nbd.Session. The size is the one that requests are held to.
func (s *session) Info() nbd.Info {
	info := s.info
	if size := s.s.Size(); size != 0 { // it has been told
		info.Size = size
	}
	return info
}

// Close implements nbd.Session.
func (s *session) Close() { s.s.Close() }

// MetaContext implements nbd.Session: it asks the primary whether it knows what
// changed since the position in the context's name.
func (s *session) MetaContext(name string) (uint32, error) {
	param, ok := strings.CutPrefix(name, dirtyContext)
	if !ok || s.info.ReadOnly {
		return 0, fmt.Errorf("meta context %q: %w", name, nbd.ErrUnsupported)
	}
	since, err := parsePosition(param)
	if err != nil {
		return 0, fmt.Errorf("meta context %q: %w: %w", name, nbd.ErrInvalid, err)
	}
	c := &changes{since: since}
	if _, err := c.update(s.d, s.vol, s.d.cfg.NBD.HandshakeTimeout/2); err != nil {
		return 0, fmt.Errorf("meta context %q: %w", name, err)
	}
	s.dirty = append(s.dirty, c)
	return uint32(len(s.dirty)), nil
}

// carried takes an nbd.Request through replication; it is pooled, so that a
// request costs no allocation.
type carried struct {
	replication.Request
	from   *nbd.Request
	s      *session
	dirty  []*bitmap.Bitmap // of context id i at i-1, where it was asked for
	status []nbd.Status
	runs   []nbd.Extent
}

var carriers sync.Pool

// Submit implements nbd.Session.
func (s *session) Submit(r *nbd.Request) {
	c, _ := carriers.Get().(*carried)
	if c == nil {
		c = &carried{}
		c.User, c.Complete, c.Queue = c, completeCarried, queueCarried
	}
	c.from, c.s = r, s
	if len(s.dirty) > 0 && r.Op == nbd.OpBlockStatus {
		c.Complete, c.Queue = completeDirty, nil // it does not go back to the pool
	}
	c.Op = replication.Op(r.Op) // the values are the same: a test holds them together
	c.FUA, c.NoHole, c.ReqOne = r.FUA, r.NoHole, r.ReqOne
	c.Offset, c.Length, c.Data = r.Offset, r.Length, r.Data
	c.Extents = c.Extents[:0]
	s.s.Queue(&c.Request)
}

// Uncork implements nbd.Session.
func (s *session) Uncork() { s.s.Flush() }

func completeCarried(rr *replication.Request, err error) {
	r := unload(rr, err)
	r.Complete(r, nbdError(err))
}

func queueCarried(rr *replication.Request, err error) replication.Flusher {
	return unload(rr, err).Queue(nbdError(err))
}

// completeDirty completes a block status of a session with dirty-since contexts: now
// that there is a primary which serves, it says what changed up to here.
func completeDirty(rr *replication.Request, err error) {
	c := rr.User.(*carried) //nolint:forcetypeassert // set by the pool
	if err != nil {
		completeCarried(rr, err)
		return
	}
	go func() {
		c.dirty = make([]*bitmap.Bitmap, len(c.s.dirty))
		for i := range c.dirty {
			if slices.Contains(c.from.Contexts, uint32(i+1)) {
				// Not known any more, or not in time: all of it may have changed.
				c.dirty[i], _ = c.s.dirty[i].update(c.s.d, c.s.vol, changedTime)
			}
		}
		completeCarried(rr, nil)
	}()
}

// unload gives the nbd.Request its result, and the carrier back.
func unload(rr *replication.Request, err error) *nbd.Request {
	c := rr.User.(*carried) //nolint:forcetypeassert // set by the pool
	r := c.from
	if err == nil && r.Op == nbd.OpBlockStatus {
		c.takeStatus(r)
	}
	c.from, c.s, c.Data, c.dirty = nil, nil, nil, nil
	if r.Op != nbd.OpBlockStatus {
		// The result of a block status points into c until the server has sent
		// it: that one is left to the garbage collector.
		carriers.Put(c)
	}
	return r
}

// takeStatus lays the contexts that were asked for side by side.
func (c *carried) takeStatus(r *nbd.Request) {
	covered := uint64(0)
	for _, e := range c.Extents {
		c.runs = append(c.runs, nbd.Extent{Length: uint64(e.Len), Flags: e.Flags})
		covered += uint64(e.Len)
	}
	limit := nbd.ExtentsMax
	if r.ReqOne {
		limit = 1
	}
	for _, id := range r.Contexts {
		switch {
		case id == nbd.ContextAllocation:
			c.status = append(c.status, nbd.Status{Context: id, Extents: c.runs})
		case int(id) <= len(c.dirty):
			// As far as the allocation is told, so that both end alike.
			c.status = append(c.status, nbd.Status{Context: id, Extents: dirtyExtents(c.dirty[id-1], r.Offset, min(covered, r.Length), limit)})
		}
	}
	r.Status = c.status
}

// nbdError translates replication's errors into those that nbd has an errno for.
func nbdError(err error) error {
	if err == nil {
		return nil
	}
	for _, pair := range [...]struct{ from, to error }{
		{replication.ErrNoSpace, nbd.ErrNoSpace},
		{replication.ErrRange, nbd.ErrRange},
		{replication.ErrReadOnly, nbd.ErrReadOnly},
		{replication.ErrUnsupported, nbd.ErrUnsupported},
		{replication.ErrGeneration, nbd.ErrSessionLost},
		{replication.ErrClosed, nbd.ErrShutdown},
	} {
		if errors.Is(err, pair.from) {
			return fmt.Errorf("%w: %w", pair.to, err)
		}
	}
	if errors.Is(err, replication.ErrIO) {
		return ioError{err} // which says so by itself
	}
	return fmt.Errorf("%w: %w", nbd.ErrIO, err)
}

// ioError is an nbd.ErrIO in replication's words.
type ioError struct{ error }

// Unwrap returns replication's error.
func (e ioError) Unwrap() error { return e.error }

// Is makes it an nbd.ErrIO.
func (ioError) Is(target error) bool { return target == nbd.ErrIO } //nolint:errorlint // that is what Is is for
