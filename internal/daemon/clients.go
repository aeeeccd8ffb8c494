package daemon

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
)

// clientsAnswer is who uses a volume through one node: each NBD connection's
// other end.
type clientsAnswer struct {
	Clients []string `json:"clients"`
	// Writers are those of the volume itself, and not of one replica. Device is the
	// kernel's on that node; its connections are among them.
	Writers []string `json:"writers,omitempty"`
	Device  string   `json:"device,omitempty"`
}

func (d *Daemon) serveClients(_ context.Context, _ ident.Node, c volumeCall) (clientsAnswer, error) {
	out := clientsAnswer{Clients: []string{}}
	sv := d.state().Volumes[c.Volume]
	if sv == nil {
		return out, nil
	}
	for _, o := range d.nbd.Clients() {
		// Who reads one replica, VOLUME@NODE, is a client too.
		if name, _, one := strings.Cut(o.Export, "@"); name == sv.Name {
			out.Clients = append(out.Clients, o.Remote)
			if !one {
				out.Writers = append(out.Writers, o.Remote)
			}
		}
	}
	slices.Sort(out.Clients)
	slices.Sort(out.Writers)
	if len(out.Writers) > 0 {
		out.Device = d.deviceOf(sv.Name)
	}
	return out, nil
}

// clientsOf asks a node, this one too, who has a volume open there.
func (d *Daemon) clientsOf(ctx context.Context, n ident.Node, id ident.Volume) (a clientsAnswer, err error) {
	ctx, cancel := context.WithTimeout(ctx, askNode)
	defer cancel()
	if n == d.self {
		a, err = d.serveClients(ctx, n, volumeCall{id})
	} else {
		err = d.rpc.call(ctx, n, "/node/v1/clients", volumeCall{id}, &a)
	}
	if err != nil {
		return a, fmt.Errorf("it gives no answer: %w", err)
	}
	return a, nil
}

// VolumeClients implements control.Backend. It is no part of a volume's status,
// which asks only the nodes that have a replica.
func (b backend) VolumeClients(ctx context.Context, name string) ([]control.VolumeClients, error) {
	sv, err := b.find(ctx, name)
	if err != nil {
		return nil, err
	}
	names := b.d.state().NodeNames()
	out := make([]control.VolumeClients, len(names))
	var wg sync.WaitGroup
	for i, n := range names {
		wg.Go(func() {
			a, err := b.d.clientsOf(ctx, n, sv.ID)
			out[i] = control.VolumeClients{Node: string(n), Clients: a.Clients}
			if err != nil {
				out[i].Clients, out[i].Error = []string{}, err.Error()
			}
		})
	}
	wg.Wait()
	return out, nil
}
