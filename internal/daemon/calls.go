package daemon

import (
	"context"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/raft"
)

// addCalls registers what other nodes may ask of this one.
func (d *Daemon) addCalls() {
	handle(d.rpcd, pathFounding, func(context.Context, ident.Node, struct{}) (raft.FoundInfo, error) {
		return d.raft.FoundInfo(), nil
	})
	handle(d.rpcd, "/node/v1/join", d.serveJoin)
	handle(d.rpcd, "/node/v1/apply", d.serveApply)
	handle(d.rpcd, "/node/v1/tell", d.serveTell)
	handle(d.rpcd, "/node/v1/report", d.serveReport)
	handle(d.rpcd, "/node/v1/seal", d.serveSeal)
	handle(d.rpcd, "/node/v1/drain", d.serveDrain)
	handle(d.rpcd, "/node/v1/readmit", d.serveReadmit)
	handle(d.rpcd, "/node/v1/operate", d.serveOperate)
	handle(d.rpcd, "/node/v1/fence", d.serveOperate)
	handle(d.rpcd, "/node/v1/volume", d.serveReportOf)
	handle(d.rpcd, "/node/v1/clients", d.serveClients)
	handle(d.rpcd, "/node/v1/member", d.serveMember)
	handle(d.rpcd, "/node/v1/pause", d.servePause)
	handle(d.rpcd, "/node/v1/doubt", d.serveDoubt)
	handle(d.rpcd, "/node/v1/verify", d.serveVerify)
	handle(d.rpcd, "/node/v1/grow", d.serveGrow)
	handle(d.rpcd, "/node/v1/room", d.serveRoom)
	handle(d.rpcd, "/node/v1/device", d.serveDevice)
	handle(d.rpcd, "/node/v1/changed", d.serveChanged)
	handle(d.rpcd, "/node/v1/doctor", d.serveDoctor)
	handle(d.rpcd, "/node/v1/committed", d.serveCommitted)
	handle(d.rpcd, "/node/v1/invalidate", func(ctx context.Context, _ ident.Node, c volumeCall) (struct{}, error) {
		ctx, cancel := context.WithTimeout(ctx, invalidateTime)
		defer cancel()
		sv := d.state().Volumes[c.Volume]
		if sv != nil && sv.Deleted {
			return struct{}{}, control.Errorf(control.CodeNotFound, "", "the volume %q was deleted meanwhile", sv.Name)
		}
		if sv == nil {
			return struct{}{}, control.Errorf(control.CodeFailed, "run this again in some seconds; if it stays so: blockstep doctor", "%s has not heard of the volume yet", d.self)
		}
		return struct{}{}, d.invalidateHere(ctx, sv)
	})
}
