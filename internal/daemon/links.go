package daemon

import (
	"context"
	"fmt"
	"net"
	"slices"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/mux"
	"github.com/blockstep/blockstep/replication/peer"
	"github.com/blockstep/blockstep/replication/wire"
)

// openLinks starts the links to the other nodes, which carry replication and
// forwarding.
func (d *Daemon) openLinks() {
	d.links = peer.NewManager(peer.Options{
		Self: d.self, Cluster: d.cfg.Cluster, Logger: d.log, Handler: d,
		Dial: func(ctx context.Context, n ident.Node) (net.Conn, error) {
			address, ok := d.addressOf(n)
			if !ok {
				return nil, fmt.Errorf("linking to %s: %w", n, errNoNode)
			}
			return mux.Dial(ctx, address, mux.PrefacePeer)
		},
	})
	d.wg.Go(func() {
		l := d.mux.Listener(mux.PrefacePeer)
		for {
			conn, err := l.Accept()
			if err != nil {
				return // the mux is closed
			}
			d.links.Accept(conn)
		}
	})
	d.setPeers()
}

// setPeers keeps links to all members; before they are known, to those of the
// configuration.
func (d *Daemon) setPeers() {
	st := d.state()
	// One that a recovery gave up is another cluster's, until it is replaced; an older
	// release does not say so by itself.
	nodes := slices.DeleteFunc(st.NodeNames(), func(n ident.Node) bool { return st.Nodes[n].Lost })
	if st.ClusterID == "" {
		nodes = nil
		for _, n := range d.cfg.Nodes {
			nodes = append(nodes, ident.Node(n.Name))
		}
	}
	// Also before the state is known: strangers of that name are to be told at once.
	if id := d.raft.ClusterID(); id != "" {
		d.links.SetClusterID(id)
		d.rpc.id.Store(&id)
		d.rpcd.id.Store(&id)
	}
	d.links.SetPeers(nodes)
}

// Messages implements peer.Handler.
func (d *Daemon) Messages(from ident.Node, batch []wire.Envelope) {
	for len(batch) > 0 {
		// Runs for one volume go together: their answers leave together too.
		id := batch[0].Volume
		n := 1
		for n < len(batch) && batch[n].Volume == id {
			n++
		}
		if v := d.volume(id); v != nil {
			v.driver.HandleBatch(from, batch[:n])
		} else {
			d.refuse(from, batch[:n])
		}
		batch = batch[n:]
	}
}

// Settle implements peer.Handler.
func (d *Daemon) Settle(_ ident.Node, vols []ident.Volume) {
	for _, id := range vols {
		if v := d.volume(id); v != nil {
			v.driver.SettleQuiet()
		}
	}
	d.links.Flush()
}

// refuse frees messages for a volume that is not open yet, or deleted. Replicas
// send again by themselves; a client's request is waited for, so its node is
// told to try again.
func (d *Daemon) refuse(from ident.Node, batch []wire.Envelope) {
	for i := range batch {
		if f, ok := batch[i].Msg.(*wire.Forward); ok && f.Op != wire.OpForget {
			d.links.Send(from, batch[i].Volume, &wire.Reply{ID: f.ID, Status: wire.StatusRetry})
		}
		batch[i].Free()
	}
}

// Up implements peer.Handler.
func (d *Daemon) Up(n ident.Node) { d.setUp(n, true) }

// Down implements peer.Handler.
func (d *Daemon) Down(n ident.Node) { d.setUp(n, false) }

func (d *Daemon) setUp(n ident.Node, up bool) {
	// The lock is held over the calls, so that a volume that opens meanwhile
	// hears of each change once and in order.
	d.vmu.Lock()
	defer d.vmu.Unlock()
	d.up[n] = up
	for _, v := range d.vols {
		v.tellPeer(n, up)
	}
}

// nodeUp reports whether a node is this one, or was heard lately: a process that
// stands still keeps its link.
func (d *Daemon) nodeUp(n ident.Node) bool {
	if n == d.self {
		return true
	}
	for _, l := range d.links.Status() {
		if l.Node == n {
			return l.Connected && l.Heard
		}
	}
	return false
}

func (d *Daemon) linkUp(n ident.Node) bool {
	d.vmu.RLock()
	defer d.vmu.RUnlock()
	return d.up[n]
}
