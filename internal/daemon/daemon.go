package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/blockstep/blockstep/internal/config"
	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/mux"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/nbd/attach"
	"github.com/blockstep/blockstep/raft"
	"github.com/blockstep/blockstep/raft/state"
	"github.com/blockstep/blockstep/replication"
	"github.com/blockstep/blockstep/replication/peer"
)

const (
	// drainTime is how long a stopping daemon waits for the answers to what
	// NBD clients have in flight. Without a quorum they would never come.
	drainTime = 8 * time.Second
	// handOverTime is how long a stopping daemon takes to give its volumes to
	// other nodes, before the clients would notice that it is gone.
	handOverTime = 5 * time.Second
	// heirsGone is how long none of the nodes that could take a volume over may have a link
	// until it stops trying: they stop too.
	heirsGone = 500 * time.Millisecond
)

// Daemon is one running node.
type Daemon struct {
	cfg    *config.Config
	log    *slog.Logger
	self   ident.Node
	fs     vfs.FS
	space  func(dir string) (free, all int64, err error) // spaceOf, or a test's
	quiet  time.Duration                                 // raft.Options.CommitTimeout: its default, or a test's
	bootID string
	live   atomic.Pointer[config.Config] // the configuration as it was read last: only keys that change live are taken from it
	hooks  Hooks
	rlmu   sync.Mutex // one reload at a time
	start  time.Time

	ctx    context.Context // ends when the daemon stops; of everything that wg counts
	cancel context.CancelFunc
	wg     sync.WaitGroup
	fatal  chan error // the first one stops the daemon

	mux      *mux.Mux
	rpc      *rpcClient
	rpcd     *rpcServer
	raft     *raft.Node
	failover *raft.Controller
	links    *peer.Manager
	alive    *replication.AliveClock
	pulse    *replication.Pulse
	nbd      *nbd.Server
	tls      *nbd.TLSFiles // nil without a certificate
	attach   *attach.Manager
	attached atomic.Pointer[attach.Manager] // attach, for those that may ask before it is open
	stopping chan struct{}                  // closed when the daemon begins to stop
	leaving  atomic.Bool                    // set before that, when it begins to hand its volumes over
	beat     atomic.Int64                   // when it was last seen to live, since start
	admin    *adminServer
	metrics  *metricsServer
	local    *localEvents
	remarks  chan state.Event
	verifies *verifyRuns
	sockets  []Socket              // that systemd passes
	joining  atomic.Pointer[error] // why this node's token has not let it in yet
	current  chan struct{}         // closed when the cluster state here is known to be no old one
	resync   atomic.Pointer[config.Resync]
	retune   chan struct{} // capacity 1: every volume is to be looked at
	resized  chan struct{} // capacity 1: a volume may have grown

	vmu  sync.RWMutex // guards what follows
	vols map[ident.Volume]*volume
	up   map[ident.Node]bool // links that are up

	rmu       sync.Mutex // guards what follows
	reporting map[reportKey]bool
	problems  map[ident.Volume]error // why a replica of this node is not open
	readmits  map[ident.Volume]*readmission
	failures  map[ident.Volume]failure
}

// Hooks are what a daemon needs of its process to change while it runs; all may
// be left out.
type Hooks struct {
	// Load reads the configuration again, with the flags of the start.
	Load func() (*config.Config, error)
	// Level is the level of the logger.
	Level *slog.LevelVar
	// Hangup receives when the configuration is to be read again.
	Hangup <-chan os.Signal
	// MemoryLimit is told how much memory the process is to hold at the most,
	// again whenever that changes.
	MemoryLimit func(bytes int64)
}

// Run runs a node until ctx ends, and stops it cleanly. It returns the error
// that kept it from starting or from going on. The sockets are those of
// Inherited.
func Run(ctx context.Context, cfg *config.Config, logger *slog.Logger, hooks Hooks, sockets ...Socket) error {
	return run(ctx, cfg, logger, vfs.OS(), func(d *Daemon) { d.hooks, d.sockets = hooks, sockets })
}

// run is Run on a file system; made is told of the daemon before it starts.
func run(ctx context.Context, cfg *config.Config, logger *slog.Logger, files vfs.FS, made func(*Daemon)) error {
	d := &Daemon{
		cfg: cfg, log: logger.With("node", cfg.Node), self: ident.Node(cfg.Node), fs: files, space: spaceOf, start: time.Now(),
		fatal: make(chan error, 1), local: newLocalEvents(), verifies: newVerifyRuns(), remarks: make(chan state.Event, remarksMax),
		current: make(chan struct{}), retune: make(chan struct{}, 1), resized: make(chan struct{}, 1), stopping: make(chan struct{}),
		vols: map[ident.Volume]*volume{}, up: map[ident.Node]bool{}, reporting: map[reportKey]bool{}, problems: map[ident.Volume]error{},
		readmits: map[ident.Volume]*readmission{}, failures: map[ident.Volume]failure{},
	}
	d.resync.Store(&cfg.Resync)
	d.live.Store(cfg)
	d.ctx, d.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer d.cancel()
	made(d)
	if err := d.open(ctx); err != nil {
		d.close()
		return err
	}
	d.log.Info("blockstepd is ready", "cluster", cfg.Cluster, "address", cfg.Self().Address, "data_dir", cfg.DataDir)
	notify(d.log, "READY=1")
	var err error
	select {
	case <-ctx.Done():
		d.log.Info("stopping", "reason", context.Cause(ctx))
	case err = <-d.fatal:
		d.log.Error("stopping", "err", err)
	case <-d.raft.Halted():
		err = d.raft.Err()
		d.log.Error("stopping", "err", err)
	}
	notify(d.log, "STOPPING=1")
	d.close()
	d.log.Info("stopped", "up_for", time.Since(d.start).Round(time.Millisecond))
	return err
}

// open starts the parts in their order. After an error, close stops those that
// run.
func (d *Daemon) open(ctx context.Context) error {
	if err := d.openFiles(); err != nil {
		return err
	}
	if err := d.openMux(); err != nil {
		return err
	}
	if err := d.openCluster(ctx); err != nil {
		return err
	}
	d.setMemory()
	d.openLinks()
	d.alive = replication.NewAliveClock(nil, 0)
	d.pulse = replication.NewPulse(nil, d.cfg.Volume.Heartbeat, d.cfg.Volume.StallTimeout)
	d.wg.Go(func() { d.alive.Run(d.ctx) })
	d.wg.Go(func() { d.pulse.Run(d.ctx) })
	d.wg.Go(func() { d.runCurrent(d.ctx) })
	d.wg.Go(func() { d.runHear(d.ctx) })
	d.wg.Go(func() { d.runVolumes(d.ctx) })
	d.wg.Go(func() { d.runRemarks(d.ctx) })
	d.wg.Go(func() { d.runMembership(d.ctx) })
	if d.cfg.Join.Token != "" {
		d.wg.Go(func() { d.runJoin(d.ctx) })
	}
	if err := d.openNBD(); err != nil {
		return err
	}
	if err := d.openAttach(); err != nil {
		return err
	}
	d.attached.Store(d.attach)
	if err := d.openAdmin(); err != nil {
		return err
	}
	if err := d.openMetrics(); err != nil {
		return err
	}
	d.wg.Go(func() { d.runBeat(d.ctx) })
	d.wg.Go(func() { d.runWatchdog(d.ctx) })
	d.wg.Go(func() { d.runHangups(d.ctx) })
	return nil
}

// openFiles makes the data directory and reads the boot id.
func (d *Daemon) openFiles() error {
	if err := vfs.MakeDir(d.fs, d.cfg.DataDir); err != nil {
		return fmt.Errorf("data_dir: %w; make it writable for this user, or set another data_dir in %s", err, d.cfg.File)
	}
	// Before the port: with another node's configuration that would be in use,
	// which is not what is wrong.
	if err := raft.CheckDir(d.fs, d.cfg.DataDir, d.cfg.Cluster, d.self); err != nil {
		return err
	}
	id, err := readBootID(d.cfg.BootIDFile)
	if err != nil {
		return err
	}
	d.bootID = id
	return nil
}

// openMux listens on the node's one port.
func (d *Daemon) openMux() error {
	address := d.cfg.Self().Address
	l, err := net.Listen("tcp", address)
	if err != nil {
		return listenError("nodes."+d.cfg.Node+".address", address, err)
	}
	d.mux = mux.New(l, d.log)
	d.wg.Go(func() {
		if err := d.mux.Serve(); err != nil {
			d.fail(fmt.Errorf("serving %s: %w", address, err))
		}
	})
	d.rpc = newRPCClient(d.cfg.Cluster, d.self, d.addressOf)
	d.rpcd = newRPCServer(d.cfg.Cluster, d.self, d.log)
	return nil
}

// listenError says which key names an address that cannot be listened on.
func listenError(key, address string, err error) error {
	next := "check the address in the configuration"
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		next = "stop the process that uses it (ss -ltnp shows it), or choose another address"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		next = "it is no address of this host: correct node or the address"
	case errors.Is(err, syscall.ENOENT):
		next = "make its directory, or choose another path"
	case errors.Is(err, syscall.EACCES):
		next = "choose a port above 1023, or a directory that this user may write"
	}
	return fmt.Errorf("%s: cannot listen on %s: %w; %s", key, address, err, next)
}

// openCluster opens raft and the failover controller, and begins to serve the
// other nodes' calls.
func (d *Daemon) openCluster(ctx context.Context) error {
	founders := make([]raft.Founder, 0, len(d.cfg.Nodes))
	for _, n := range d.cfg.Nodes {
		founders = append(founders, raft.Founder{Name: ident.Node(n.Name), Address: n.Address, Witness: n.Witness})
	}
	var err error
	d.raft, err = raft.Open(ctx, raft.Options{
		Dir: d.cfg.DataDir, Node: d.self, Cluster: d.cfg.Cluster, Founders: founders, Address: d.cfg.Self().Address,
		Listener: d.mux.Listener(mux.PrefaceRaft),
		Dial: func(ctx context.Context, address string) (net.Conn, error) {
			return mux.Dial(ctx, address, mux.PrefaceRaft)
		},
		Peers: d, Logger: d.log, FS: d.fs,
		HeartbeatTimeout: d.cfg.Raft.Heartbeat, ElectionTimeout: d.cfg.Raft.Election, StallTimeout: d.cfg.Volume.StallTimeout,
		CommitTimeout: d.quiet,
	})
	if err != nil {
		return err
	}
	if why, next := d.displaced(d.cfg); why != "" {
		d.log.Error("the others do not find this node", "err", why, "next", next)
	}
	d.openFailover()
	d.addCalls()
	d.wg.Go(func() {
		// It ends with the mux's listener.
		_ = d.rpcd.http.Serve(d.mux.Listener(mux.PrefaceNode))
	})
	return nil
}

// displaced says that a configuration has this node listen elsewhere than where the
// cluster knows it, and what to do; "" when it does not. (It is no error: one of the
// two may be a name of the other.)
func (d *Daemon) displaced(c *config.Config) (why, next string) {
	known, own := d.raft.KnownAddress(), c.Self().Address
	if known == "" || known == own {
		return "", ""
	}
	return fmt.Sprintf("the cluster knows node %s at %s, and nodes.%[1]s.address is %[3]s", d.self, known, own),
		fmt.Sprintf("put nodes.%s.address back to %s and restart blockstepd; to move the node: blockstep node drain and node remove, then node add with its new address and an empty data_dir", d.self, known)
}

// Founding implements raft.Peers.
func (d *Daemon) Founding(ctx context.Context, node ident.Node, address string) (info raft.FoundInfo, err error) {
	err = d.rpc.callAddress(ctx, node, address, pathFounding, struct{}{}, &info)
	var e *control.Error
	if errors.As(err, &e) && e.Code == control.CodeRefused {
		err = fmt.Errorf("%w: %s", raft.ErrDisagrees, e.Message)
	}
	return info, err
}

// state is the cluster state as far as this node knows it.
func (d *Daemon) state() *state.State { return d.raft.State() }

// addressOf finds a node's address: in the cluster state, or, before that is
// known, in the configuration.
func (d *Daemon) addressOf(n ident.Node) (string, bool) {
	if d.raft != nil {
		if m := d.state().Nodes[n]; m != nil {
			return m.Address, true
		}
		if d.state().ClusterID != "" {
			return "", false
		}
	}
	c, ok := d.cfg.Find(string(n))
	return c.Address, ok
}

// fail stops the daemon with an error.
func (d *Daemon) fail(err error) {
	select {
	case d.fatal <- err:
	default: // an earlier one stops it already
	}
}

// close stops what runs, clients first. It may be called on a daemon that was
// opened in part.
func (d *Daemon) close() {
	d.leaving.Store(true)
	if d.attach != nil {
		d.attach.Stopping()
	}
	d.handOver()
	if d.nbd != nil {
		ctx, cancel := context.WithTimeout(context.Background(), drainTime)
		if err := d.nbd.Shutdown(ctx); err != nil {
			d.log.Warn("not every NBD request was answered", "err", err)
		}
		cancel()
	}
	if d.attach != nil {
		d.attach.Stop()
	}
	close(d.stopping) // who follows the events gets the last ones and goes
	d.admin.close()
	d.metrics.close()
	d.cancel()
	d.stopVolumes()
	if d.raft != nil {
		if err := d.raft.Shutdown(); err != nil {
			d.log.Warn("the cluster layer did not stop cleanly", "err", err)
		}
	}
	if d.links != nil {
		d.links.Close()
	}
	if d.rpcd != nil {
		_ = d.rpcd.http.Close() // calls of others that are under way are asked again
		d.rpc.close()
	}
	if d.mux != nil {
		if err := d.mux.Close(); err != nil {
			d.log.Debug("closing the port", "err", err)
		}
	}
	d.wg.Wait()
}

// handOver moves the volumes whose primary is here to other nodes, so that a
// planned stop costs clients elsewhere a switchover and no lapsed lease.
func (d *Daemon) handOver() {
	if d.raft == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), handOverTime)
	defer cancel()
	var wg sync.WaitGroup
	st := d.state()
	has := st.Primaries()
	for _, v := range st.Live() {
		if v.Primary != d.self || len(v.InSync) < 2 {
			continue
		}
		heirs := heirsOf(v, has)
		if i := slices.IndexFunc(heirs, d.linkUp); i >= 0 {
			has[heirs[i]]++ // it will be, most likely
		}
		wg.Go(func() {
			if err := d.handOverOne(ctx, v, heirs); err != nil {
				d.log.Warn("a volume was not handed over; its lease has to lapse", "volume", v.Name, "err", err)
			}
		})
	}
	wg.Wait()
}

// heirsOf are the nodes that a volume's primary may be moved to, those first that are
// primary of the fewest.
func heirsOf(v *state.Volume, has map[ident.Node]int) []ident.Node {
	heirs := slices.DeleteFunc(slices.Clone(v.InSync), func(n ident.Node) bool { return n == v.Primary })
	slices.SortStableFunc(heirs, func(a, b ident.Node) int { return has[a] - has[b] })
	return heirs
}

func (d *Daemon) handOverOne(ctx context.Context, v *state.Volume, heirs []ident.Node) error {
	ctx, done := d.whileLinked(ctx, heirs)
	defer done()
	err := error(control.Errorf(control.CodeRefused, "", "no other in-sync replica is reached"))
	for _, n := range heirs {
		if !d.linkUp(n) {
			continue
		}
		if err = d.switchover(ctx, v.ID, n); err == nil {
			return nil
		}
	}
	return err
}

// whileLinked gives a context that ends when none of the nodes has had a link here for
// heirsGone. Whoever asks calls done.
func (d *Daemon) whileLinked(ctx context.Context, nodes []ident.Node) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer cancel()
		for linked := time.Now(); time.Since(linked) < heirsGone; {
			if slices.ContainsFunc(nodes, d.linkUp) {
				linked = time.Now()
			}
			if !pause(ctx, applyPause) {
				return
			}
		}
	})
	return ctx, func() { cancel(); wg.Wait() }
}
