package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/nbd/attach"
	"github.com/blockstep/blockstep/replication"
)

// attachmentsFile lists the kernel devices of this node, below data_dir.
const attachmentsFile = "attachments.json"

// openAttach takes back the kernel devices that an earlier process served.
func (d *Daemon) openAttach() error {
	m := attach.NewManager(attach.Config{
		Path:        filepath.Join(d.cfg.DataDir, attachmentsFile),
		DeadTimeout: d.cfg.Attach.DeadTimeout,
		Logger:      d.log,
		Serve: func(c net.Conn, readOnly bool) error {
			err := d.nbd.ServeConn(c, nbd.ListenerOptions{ReadOnly: readOnly, TLS: nbd.TLSOff, Grows: true})
			if errors.Is(err, replication.ErrGeneration) || errors.Is(err, nbd.ErrSessionLost) {
				return fmt.Errorf("%w: %w", attach.ErrLost, err)
			}
			return err
		},
		Check:   d.checkAttachment,
		Prepare: func() { serveOwnHost(d.log) },
	})
	if err := m.Start(); err != nil {
		// The node serves its other clients: an operator can repair this one.
		d.log.Error("the kernel devices of an earlier run are not served", "err", err)
	}
	d.attach = m
	d.wg.Go(func() { d.runSizes(d.ctx) })
	return nil
}

// checkAttachment says whether a device may go on with the volume as it is. The
// cluster state may be older than the device just after a start: then it waits.
func (d *Daemon) checkAttachment(r attach.Record) error {
	st := d.state()
	if st.ClusterID == "" {
		return errors.New("this node does not know its cluster yet")
	}
	for id, sv := range st.Volumes {
		if volumeIDText(id) != r.ID {
			continue
		}
		switch {
		case sv.Deleted:
			return fmt.Errorf("%w: the volume was deleted", attach.ErrLost)
		case sv.Generation > r.Generation && uint64(sv.LossEpoch) <= r.Epoch:
			return fmt.Errorf("%w: the volume was fenced since it was attached (see blockstep events)", attach.ErrLost)
		case sv.Generation > r.Generation:
			return fmt.Errorf("%w: the volume lost writes since it was attached (see blockstep events)", attach.ErrLost)
		case sv.Generation < r.Generation:
			return errors.New("this node's cluster state is not up to date yet")
		}
		return nil
	}
	return errors.New("this node does not know the volume yet")
}

func volumeIDText(id ident.Volume) string { return fmt.Sprintf("%016x", uint64(id)) }

// runSizes tells the kernel when an attached volume grew: as soon as this node
// takes requests for the new end, and not before.
func (d *Daemon) runSizes(ctx context.Context) {
	for {
		for _, r := range d.attach.List() {
			if sv := d.state().Volume(r.Volume); sv != nil && volumeIDText(sv.ID) == r.ID {
				if v := d.volume(sv.ID); v != nil {
					d.attach.Resize(r.Volume, v.driver.Size())
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-d.resized:
		}
	}
}

// Attach implements control.Backend.
func (b backend) Attach(ctx context.Context, name string, r control.Attach) (control.Attachment, error) {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	sv, err := b.find(ctx, name)
	if err != nil {
		return control.Attachment{}, err
	}
	for b.d.volume(sv.ID) == nil { // created a moment ago, or the daemon was started
		if !pause(ctx, applyPause) {
			return control.Attachment{}, control.Errorf(control.CodeFailed, "see blockstep status "+name, "%s is not open on this node", name)
		}
	}
	rec, err := b.d.attach.Attach(ctx, attach.Record{
		Volume: sv.Name, ID: volumeIDText(sv.ID), Generation: sv.Generation, Epoch: uint64(sv.Epoch), Connections: r.Connections, ReadOnly: r.ReadOnly,
	}, r.Device)
	if err != nil {
		return control.Attachment{}, attachError("attaching "+name, err)
	}
	b.d.local.add(control.Event{Node: string(b.d.self), Volume: sv.Name, Kind: "attached", Text: fmt.Sprintf("%s: %s is attached as %s", b.d.self, sv.Name, rec.Device())})
	out := attachmentOf(rec)
	if !r.ReadOnly {
		out.Warnings = attachedElsewhere(sv.Name, b.devices(ctx, sv, func(n ident.Node) bool { return n != b.d.self && b.d.linkUp(n) }))
	}
	return out, nil
}

// attachedElsewhere tells who attaches a volume that other nodes have attached: two
// machines that mount one file system destroy it, and a volume serves them both.
func attachedElsewhere(volume string, devices map[ident.Node]string) []control.Warning {
	if len(devices) == 0 {
		return nil
	}
	where, on := whereAttached(devices)
	return []control.Warning{{
		Volume: volume,
		Text:   fmt.Sprintf("%s is attached as %s too: only the file system of a cluster may be mounted by both", volume, where),
		Next:   fmt.Sprintf("before you mount it here, unmount it there, and run blockstep detach %s on %s", volume, on),
	}}
}

// Detach implements control.Backend. It asks nobody about the volume: a device
// must be freed also when the cluster cannot be reached.
func (b backend) Detach(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	if err := b.d.attach.Detach(ctx, name); err != nil {
		if errors.Is(err, attach.ErrNotAttached) { // a deleted volume may be attached still
			if _, missing := b.find(ctx, name); missing != nil {
				return missing
			}
		}
		return attachError("detaching "+name, err)
	}
	b.d.local.add(control.Event{Node: string(b.d.self), Volume: name, Kind: "detached", Text: fmt.Sprintf("%s: %s is detached", b.d.self, name)})
	return nil
}

// Attachments implements control.Backend.
func (b backend) Attachments(context.Context) ([]control.Attachment, error) {
	out := []control.Attachment{}
	for _, r := range b.d.attach.List() {
		if r.Index >= 0 {
			out = append(out, attachmentOf(r))
		}
	}
	return out, nil
}

func attachmentOf(r attach.Record) control.Attachment {
	return control.Attachment{Volume: r.Volume, Device: r.Device(), Connections: r.Connections, ReadOnly: r.ReadOnly, Lost: r.Lost}
}

// attachError classifies an error of package attach. Its texts name the next
// step themselves.
func attachError(doing string, err error) error {
	code := control.CodeFailed
	switch {
	case errors.Is(err, attach.ErrUsage):
		code = control.CodeUsage
	case errors.Is(err, attach.ErrNotAttached):
		return control.Errorf(control.CodeNotFound, "see blockstep attachments", "%s: %v", doing, err)
	case errors.Is(err, attach.ErrAttached), errors.Is(err, attach.ErrBusy):
		code = control.CodeRefused
	}
	return control.Errorf(code, "", "%s: %v", doing, err)
}
