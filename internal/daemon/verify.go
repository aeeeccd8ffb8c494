package daemon

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication"
)

const (
	// verifyChunk is what is read of each replica at a time, in bytes.
	verifyChunk = 1 << 20
	// verifyBlock is the grain in which a difference is reported and repaired.
	verifyBlock = 4096
	// verifyTries is how often a chunk that differs is read again before new
	// writes are held back for it: clients change it meanwhile.
	verifyTries = 3
	// verifyAgain is the pause between these.
	verifyAgain = 50 * time.Millisecond
	// verifyPause is for how long writes are held back at the most, so that all
	// replicas reach one position.
	verifyPause = time.Second
	// verifyPauses is how often that is tried before the comparison gives up.
	verifyPauses = 10
	// verifyReport is the time between two lines of progress.
	verifyReport = 200 * time.Millisecond
	// verifyFoundMax bounds the ranges that are reported, and that are repaired at a
	// time; one chunk more may come on top of it. A line of the answer has a limit.
	verifyFoundMax = 1000
	// verifyHealTime is how long a repair may take to bring a replica back.
	verifyHealTime = 5 * time.Minute
)

// verifier compares the replicas of one volume.
type verifier struct {
	d        *Daemon
	vol      ident.Volume
	nodes    []ident.Node
	sessions []*replication.Session
	size     uint64
	off      uint64 // up to where it has compared
	found    []control.VerifyExtent
	before   control.VerifyProgress // who is compared, and what earlier rounds have found and repaired
	// undecided: somewhere no majority agrees.
	undecided bool
}

// compare is one comparison. Chunk by chunk it reads what each replica
// holds. Replicas are never at the same position while clients write, so a
// chunk that differs is read again, and at last with new writes held back until
// all replicas are at one position: only what differs then is reported.
func (b backend) compare(ctx context.Context, sv *state.Volume, repair bool, progress func(control.VerifyProgress) error) (p control.VerifyProgress, err error) {
	status := b.d.volumeStatus(ctx, sv)
	vr := &verifier{d: b.d, vol: sv.ID, size: sv.Size}
	for _, rep := range status.Replicas {
		if rep.State != control.InSync {
			vr.before.LeftOut = append(vr.before.LeftOut, rep.Node)
			continue
		}
		vr.nodes = append(vr.nodes, ident.Node(rep.Node))
		vr.before.Compared = append(vr.before.Compared, rep.Node)
	}
	if len(vr.nodes) < 2 {
		next := status.Next
		if len(sv.Replicas) == 1 {
			next = "give it a second one: blockstep volume set " + sv.Name + " --replicas 2"
		}
		return p, control.Errorf(control.CodeRefused, next, "nothing to compare: %s has %d in sync, and two replicas are needed", sv.Name, len(vr.nodes))
	}
	v := b.d.volume(sv.ID)
	if v == nil {
		return p, control.Errorf(control.CodeFailed, "try again", "%s is not open on %s yet", sv.Name, b.d.self)
	}
	for _, n := range vr.nodes {
		s, err := v.driver.OpenReplicaSession(ctx, n, replication.Client{Remote: "verify", Local: true})
		if err != nil {
			return p, fmt.Errorf("reading the replica on %s: %w", n, err)
		}
		defer s.Close()
		vr.sessions = append(vr.sessions, s)
	}
	if err := vr.rounds(ctx, repair, progress); err != nil {
		return p, err
	}
	return vr.progress(), nil
}

// rounds compares to the end of the volume; with repair, what it found is repaired
// whenever that is much. It ends before, where it has found as much as it reports,
// or where a replica does not take what is right.
func (vr *verifier) rounds(ctx context.Context, repair bool, progress func(control.VerifyProgress) error) error {
	for {
		if err := vr.run(ctx, progress); err != nil {
			return err
		}
		if !repair || len(vr.found) == 0 {
			return nil
		}
		if err := vr.repair(ctx); err != nil {
			return err
		}
		kept := slices.ContainsFunc(vr.found, func(f control.VerifyExtent) bool { return !f.Repaired })
		if kept || vr.off == vr.size {
			return nil
		}
		vr.before, vr.found = vr.progress(), nil
	}
}

// progress is how far the comparison is. More ranges than are reported have been
// repaired, all but those of the last round.
func (vr *verifier) progress() control.VerifyProgress {
	p := vr.before
	p.DoneBytes, p.TotalBytes = int64(vr.off), int64(vr.size)
	if len(p.Found) > 0 && len(p.Found)+len(vr.found) > verifyFoundMax {
		n := max(verifyFoundMax-len(vr.found), 0)
		p.More += int64(len(p.Found) - n)
		p.Found = p.Found[:n]
	}
	p.Found = append(slices.Clip(p.Found), vr.found...)
	return p
}

// run compares on from where it is, until it has found much, or to the end.
func (vr *verifier) run(ctx context.Context, progress func(control.VerifyProgress) error) error {
	said := time.Now()
	for vr.off < vr.size && len(vr.found) < verifyFoundMax {
		skip, err := vr.zeroes(ctx, vr.off)
		if err != nil {
			return err
		}
		if skip == 0 {
			skip = min(verifyChunk, vr.size-vr.off)
			if err := vr.chunk(ctx, vr.off, skip); err != nil {
				return err
			}
		}
		vr.off += skip
		if time.Since(said) >= verifyReport {
			said = time.Now()
			if err := progress(vr.progress()); err != nil {
				return err
			}
		}
	}
	return nil
}

// each asks every replica at once; request makes what replica i is asked for.
func (vr *verifier) each(ctx context.Context, request func(i int) *replication.Request) error {
	errs := make([]error, len(vr.sessions))
	var wg sync.WaitGroup
	for i, s := range vr.sessions {
		wg.Add(1)
		r := request(i)
		r.Complete = func(_ *replication.Request, err error) {
			errs[i] = err
			wg.Done()
		}
		s.Submit(r)
	}
	// A request always completes: with an error, if its session ends.
	stop := context.AfterFunc(ctx, func() {
		for _, s := range vr.sessions {
			s.Close()
		}
	})
	defer stop()
	wg.Wait()
	for i, err := range errs {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return control.Errorf(control.CodeFailed, "run it again when all replicas are in sync", "reading the replica on %s: %v", vr.nodes[i], err)
		}
	}
	return nil
}

// zeroes returns how many bytes from off on read as zeroes at every replica
// without being read: holes.
func (vr *verifier) zeroes(ctx context.Context, off uint64) (uint64, error) {
	reqs := make([]replication.Request, len(vr.sessions))
	if err := vr.each(ctx, func(i int) *replication.Request {
		reqs[i] = replication.Request{Op: replication.OpBlockStatus, Offset: off, Length: vr.size - off, ReqOne: true}
		return &reqs[i]
	}); err != nil {
		return 0, err
	}
	skip := vr.size - off
	for i := range reqs {
		if len(reqs[i].Extents) == 0 || reqs[i].Extents[0].Flags&extentZero == 0 {
			return 0, nil
		}
		skip = min(skip, reqs[i].Extents[0].Len)
	}
	if skip < vr.size-off {
		skip -= skip % verifyBlock
	}
	return skip, nil
}

// extentZero is NBD_STATE_ZERO, which block status and NBD share.
const extentZero = 2

// read reads the range of every replica; the caller releases the buffers.
func (vr *verifier) read(ctx context.Context, off, length uint64) ([]*buf.Buf, error) {
	data := make([]*buf.Buf, len(vr.sessions))
	for i := range data {
		data[i] = buf.Get(int(length))
	}
	reqs := make([]replication.Request, len(vr.sessions))
	err := vr.each(ctx, func(i int) *replication.Request {
		reqs[i] = replication.Request{Op: replication.OpRead, Offset: off, Length: length, Data: data[i]}
		return &reqs[i]
	})
	if err != nil {
		releaseAll(data)
		return nil, err
	}
	return data, nil
}

func releaseAll(data []*buf.Buf) {
	for _, d := range data {
		d.Release()
	}
}

func equalAll(data []*buf.Buf) bool {
	for _, d := range data[1:] {
		if !bytes.Equal(d.B, data[0].B) {
			return false
		}
	}
	return true
}

// chunk compares one chunk until it is equal, or known to differ.
func (vr *verifier) chunk(ctx context.Context, off, length uint64) error {
	for range verifyTries {
		data, err := vr.read(ctx, off, length)
		if err != nil {
			return err
		}
		same := equalAll(data)
		releaseAll(data)
		if same {
			return nil
		}
		if !pause(ctx, verifyAgain) {
			return ctx.Err()
		}
	}
	for range verifyPauses {
		done, err := vr.settled(ctx, off, length)
		if done || err != nil {
			return err
		}
	}
	return control.Errorf(control.CodeFailed, "run it again when the volume is healthy", "the replicas did not come to one position to compare %d bytes at %d", length, off)
}

// settled compares the chunk while new writes are held back. It reports false
// when the replicas did not reach one position in that time.
func (vr *verifier) settled(ctx context.Context, off, length uint64) (bool, error) {
	sv := vr.d.state().Volumes[vr.vol]
	if sv == nil || sv.Deleted {
		return false, control.Errorf(control.CodeNotFound, "", "the volume was deleted meanwhile")
	}
	if err := vr.d.pauseWrites(ctx, sv, verifyPause); err != nil {
		return false, err
	}
	defer func() { _ = vr.d.pauseWrites(ctx, sv, 0) }() // it ends by itself
	end := time.Now().Add(verifyPause - verifyPause/4)
	for time.Now().Before(end) {
		if !vr.onePosition(ctx, sv) {
			if !pause(ctx, verifyAgain) {
				return false, ctx.Err()
			}
			continue
		}
		data, err := vr.read(ctx, off, length)
		if err != nil {
			return false, err
		}
		defer releaseAll(data)
		if equalAll(data) {
			return true, nil
		}
		// Still one position, and still held back: they differ.
		if !vr.onePosition(ctx, sv) || time.Now().After(end) {
			return false, nil
		}
		vr.differs(sv, off, data)
		return true, nil
	}
	return false, nil
}

// onePosition reports whether every replica that is compared has committed the
// whole of the primary's log, and nothing is under way.
func (vr *verifier) onePosition(ctx context.Context, sv *state.Volume) bool {
	reports := vr.d.reports(ctx, sv)
	p := reports[sv.Primary]
	if !p.serving() || p.Core.Commit != p.Core.Last.Seq {
		return false
	}
	for _, n := range vr.nodes {
		if r := reports[n]; !r.Reached || r.Core.Commit != p.Core.Commit || r.Core.Last != p.Core.Last {
			return false
		}
	}
	return true
}

// differs notes, block by block, who differs from the majority. Without a
// majority everybody but the primary is noted, and nobody is repaired.
func (vr *verifier) differs(sv *state.Volume, off uint64, data []*buf.Buf) {
	for at := 0; at < len(data[0].B); at += verifyBlock {
		end := min(at+verifyBlock, len(data[0].B))
		best, votes := 0, 0
		for i := range data {
			n := 0
			for j := range data {
				if bytes.Equal(data[i].B[at:end], data[j].B[at:end]) {
					n++
				}
			}
			if n > votes {
				best, votes = i, n
			}
		}
		if votes == len(data) {
			continue
		}
		if 2*votes <= len(data) {
			vr.undecided = true
			best = max(slices.Index(vr.nodes, sv.Primary), 0)
		}
		for i := range data {
			if !bytes.Equal(data[i].B[at:end], data[best].B[at:end]) {
				vr.note(vr.nodes[i], off+uint64(at), uint64(end-at))
			}
		}
	}
}

// note adds a range, to the last one where they meet.
func (vr *verifier) note(n ident.Node, off, length uint64) {
	for i := len(vr.found) - 1; i >= 0 && i >= len(vr.found)-len(vr.nodes); i-- {
		if f := &vr.found[i]; f.Node == string(n) && f.Offset+f.Length == off {
			f.Length += length
			return
		}
	}
	vr.found = append(vr.found, control.VerifyExtent{Node: string(n), Offset: off, Length: length})
}

// repair has the replicas that differ copy the ranges anew. A primary that
// differs hands over first, to one that does not.
func (vr *verifier) repair(ctx context.Context) error {
	if vr.undecided {
		return control.Errorf(control.CodeRefused, "find out which one is right, then: blockstep invalidate VOLUME --node another, one after the other",
			"%d replicas differ in %d ranges, and there is no majority to tell which is right", len(vr.nodes), len(vr.found))
	}
	bad := map[ident.Node]bool{}
	for _, f := range vr.found {
		bad[ident.Node(f.Node)] = true
	}
	good := slices.DeleteFunc(slices.Clone(vr.nodes), func(n ident.Node) bool { return bad[n] })
	sv := vr.d.state().Volumes[vr.vol]
	switch {
	case sv == nil || sv.Deleted:
		return control.Errorf(control.CodeNotFound, "", "the volume was deleted meanwhile")
	case len(good) == 0:
		return control.Errorf(control.CodeRefused, "invalidate them one at a time", "every replica differs somewhere from the majority")
	case bad[sv.Primary]:
		if err := vr.d.switchover(ctx, vr.vol, good[0]); err != nil {
			return err
		}
	}
	for i := range vr.found {
		f := &vr.found[i]
		if err := vr.d.doubt(ctx, ident.Node(f.Node), doubtCall{Volume: vr.vol, Offset: f.Offset, Length: f.Length}); err != nil {
			return err
		}
	}
	if err := vr.healed(ctx, bad); err != nil {
		return err
	}
	for i := range vr.found {
		f := &vr.found[i]
		before := len(vr.found)
		for off := f.Offset; off < f.Offset+f.Length; off += verifyChunk {
			if err := vr.chunk(ctx, off, min(verifyChunk, f.Offset+f.Length-off)); err != nil {
				return err
			}
		}
		vr.found[i].Repaired = len(vr.found) == before
		vr.found = vr.found[:before]
	}
	return nil
}

// healed waits until the repaired replicas have left the in-sync set and are
// back in it.
func (vr *verifier) healed(ctx context.Context, bad map[ident.Node]bool) error {
	ctx, cancel := context.WithTimeout(ctx, verifyHealTime)
	defer cancel()
	left := map[ident.Node]bool{}
	for {
		sv := vr.d.state().Volumes[vr.vol]
		if sv == nil || sv.Deleted {
			return control.Errorf(control.CodeNotFound, "", "the volume was deleted meanwhile")
		}
		waiting := ""
		status := vr.d.volumeStatus(ctx, sv)
		for _, r := range status.Replicas {
			n := ident.Node(r.Node)
			if !bad[n] {
				continue
			}
			left[n] = left[n] || r.State != control.InSync
			if !left[n] || r.State != control.InSync {
				waiting = r.Node
			}
		}
		if waiting == "" {
			return nil
		}
		if !pause(ctx, verifyAgain) {
			return control.Errorf(control.CodeTimeout, "look at blockstep status "+sv.Name, "%s is not back in sync yet", waiting)
		}
	}
}

// pauseCall asks a primary to hold new writes back.
type pauseCall struct {
	Volume ident.Volume  `json:"volume"`
	For    time.Duration `json:"for"`
}

func (d *Daemon) pauseWrites(ctx context.Context, sv *state.Volume, t time.Duration) error {
	c := pauseCall{Volume: sv.ID, For: t}
	if sv.Primary == d.self {
		_, err := d.servePause(ctx, d.self, c)
		return err
	}
	return d.rpc.call(ctx, sv.Primary, "/node/v1/pause", c, nil)
}

func (d *Daemon) servePause(ctx context.Context, _ ident.Node, c pauseCall) (struct{}, error) {
	v := d.volume(c.Volume)
	if v == nil || c.For > verifyPause {
		return struct{}{}, control.Errorf(control.CodeFailed, "", "the volume is not open on %s", d.self)
	}
	return struct{}{}, v.driver.Pause(ctx, c.For)
}

// doubtCall names a range that a replica shall copy anew.
type doubtCall struct {
	Volume ident.Volume `json:"volume"`
	Offset uint64       `json:"offset"`
	Length uint64       `json:"length"`
}

func (d *Daemon) doubt(ctx context.Context, n ident.Node, c doubtCall) error {
	if n == d.self {
		_, err := d.serveDoubt(ctx, n, c)
		return err
	}
	return d.rpc.call(ctx, n, "/node/v1/doubt", c, nil)
}

func (d *Daemon) serveDoubt(ctx context.Context, _ ident.Node, c doubtCall) (struct{}, error) {
	v := d.volume(c.Volume)
	if v == nil {
		return struct{}{}, control.Errorf(control.CodeFailed, "", "the volume is not open on %s", d.self)
	}
	ok, err := v.driver.Doubt(ctx, c.Offset, c.Length)
	if err == nil && !ok {
		err = control.Errorf(control.CodeRefused, "run verify again", "%s is the primary now", d.self)
	}
	return struct{}{}, err
}
