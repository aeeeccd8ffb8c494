package attach

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// BackendPrefix begins the identifier of every device of ours; then come the
// volume's name, its id and a random word, with colons between. The udev rule
// reads the name from it.
const BackendPrefix = "blockstep:"

// Errors of a Manager, besides the kernel's.
var (
	// ErrAttached is returned when the volume has a device on this host already.
	ErrAttached = errors.New("the volume is attached already")
	// ErrNotAttached is returned when the volume has no device on this host.
	ErrNotAttached = errors.New("the volume is attached to no device of this host")
	// ErrUsage is returned when the request itself is wrong.
	ErrUsage = errors.New("not possible")
	// ErrLost is returned by Config.Check when a device must not go on.
	ErrLost = errors.New("the device has ended for good")
)

// driver is the kernel as a Manager uses it; *Kernel is one.
type driver interface {
	Connect(index int, o Options) (int, error)
	Reconfigure(index int, o Options) error
	Disconnect(index int) error
	Status() ([]Device, error)
	Close() error
}

// Config is what a Manager needs of its daemon.
type Config struct {
	// Path is the file in which attachments are kept.
	Path string
	// Serve serves a connection to its end and returns why it ended: nil after
	// the client's disconnect request.
	Serve func(conn net.Conn, readOnly bool) error
	// Check is asked before a device gets sockets again, and when one was lost.
	// An error that is ErrLost ends the attachment; another one is tried again.
	Check func(Record) error
	// Prepare is called before the first device is connected or taken back: it
	// makes the process fit to serve its own host's memory. It may be nil.
	Prepare func()
	// DeadTimeout is how long the kernel holds the I/O of a device that nobody
	// serves, whole seconds.
	DeadTimeout time.Duration
	Logger      *slog.Logger
}

// Manager keeps the devices of one daemon. It is made by NewManager, opened by
// Start and ended by Stop.
type Manager struct {
	cfg  Config
	file file
	host host
	open func() (driver, error)

	ctx     context.Context //nolint:containedctx // of the links, which wg counts
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	prepare sync.Once
	changes sync.Mutex // one attach or detach at a time

	mu      sync.Mutex // guards what follows
	kernel  driver     // nil until it was needed
	devices map[string]*device
	stopped bool
}

// device is one attachment that lives.
type device struct {
	Record
	sizing sync.Mutex      // held while the kernel is told a size; guards size
	size   uint64          // what it was told; it only grows
	gone   context.Context //nolint:containedctx // ends with the attachment
	end    context.CancelFunc
}

// NewManager makes a manager that has done nothing yet.
func NewManager(cfg Config) *Manager {
	m := &Manager{
		cfg: cfg, file: file{cfg.Path}, host: theHost(), devices: map[string]*device{},
		open: func() (driver, error) {
			k, err := OpenKernel()
			if err != nil {
				return nil, err
			}
			return k, nil
		},
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

// Start takes back the devices that an earlier daemon served. It returns when
// each is being taken care of, not when it serves.
func (m *Manager) Start() error {
	list, err := m.file.load()
	if err != nil || len(list) == 0 {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range list {
		index, ok := m.host.find(r.Backend)
		if !ok {
			m.cfg.Logger.Info("an attachment is gone from the kernel", "volume", r.Volume, "device", r.Device())
			continue
		}
		r.Index = index
		d := m.newDevice(r, m.host.size(index))
		m.devices[r.Volume] = d
		kernel, err := m.kernelLocked()
		if err != nil {
			return err
		}
		if r.Lost != "" {
			d.end()
			_ = kernel.Disconnect(index) // again: the daemon may have ended before it did
			continue
		}
		m.cfg.Logger.Info("taking a device back", "volume", r.Volume, "device", r.Device(), "connections", r.Connections)
		m.tune(index, ioTimeout)
		for range r.Connections {
			m.wg.Go(func() { m.runLink(kernel, d, nil) })
		}
	}
	return m.saveLocked()
}

func (m *Manager) newDevice(r Record, size uint64) *device {
	d := &device{Record: r, size: size}
	d.gone, d.end = context.WithCancel(m.ctx)
	return d
}

// kernelLocked opens the driver when it is first needed.
func (m *Manager) kernelLocked() (driver, error) {
	if m.stopped {
		return nil, errors.New("the daemon is stopping")
	}
	if m.kernel == nil {
		k, err := m.open()
		if err != nil {
			return nil, err
		}
		m.kernel = k
	}
	if m.cfg.Prepare != nil {
		m.prepare.Do(m.cfg.Prepare)
	}
	return m.kernel, nil
}

func (m *Manager) saveLocked() error {
	list := make([]Record, 0, len(m.devices))
	for _, d := range m.devices {
		list = append(list, d.Record)
	}
	slices.SortFunc(list, func(a, b Record) int { return strings.Compare(a.Volume, b.Volume) })
	return m.file.save(list)
}

// List returns the attachments, by volume.
func (m *Manager) List() []Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]Record, 0, len(m.devices))
	for _, d := range m.devices {
		out = append(out, d.Record)
	}
	slices.SortFunc(out, func(a, b Record) int { return strings.Compare(a.Volume, b.Volume) })
	return out
}

// link is a pair of which the handshake is done.
type link struct {
	theirs *os.File
	export export
	ended  chan error // why our end ended; one value
}

// openLink makes a pair, serves one end and negotiates on the other.
func (m *Manager) openLink(r Record) (*link, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	l := &link{theirs: theirs, ended: make(chan error, 1)}
	m.wg.Go(func() { l.ended <- m.cfg.Serve(ours, r.ReadOnly) })
	if l.export, err = negotiate(theirs, r.Volume); err != nil {
		l.drop()
		return nil, err
	}
	return l, nil
}

// handed closes our reference to the kernel's end.
func (l *link) handed() { l.theirs.Close() }

// drop ends a link that the kernel did not take.
func (l *link) drop() {
	l.theirs.Close()
	<-l.ended //nolint:errcheck // nobody was served
}

// Attach connects a volume. r needs Volume, ID, Generation, Connections and
// ReadOnly; device is a path, or "" for a free one.
func (m *Manager) Attach(ctx context.Context, r Record, device string) (Record, error) {
	m.changes.Lock()
	defer m.changes.Unlock()
	index, err := parseDevice(device)
	if err == nil && index >= 0 {
		err = m.host.checkNode(index)
	}
	if r.Connections == 0 {
		r.Connections = 1
	}
	if err == nil && (r.Connections < 1 || r.Connections > connectionsMax) {
		err = fmt.Errorf("%d connections: allowed are 1 to %d", r.Connections, connectionsMax)
	}
	if err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrUsage, err)
	}
	kernel, err := m.begin(&r)
	if err != nil {
		return Record{}, err
	}
	d, err := m.connect(ctx, kernel, r, index)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		delete(m.devices, r.Volume)
		return Record{}, errors.Join(err, m.saveLocked())
	}
	m.devices[r.Volume] = d
	if err := m.saveLocked(); err != nil {
		// It is found by its identifier all the same: the index is for people.
		m.cfg.Logger.Warn("attachment", "volume", r.Volume, "err", err)
	}
	m.cfg.Logger.Info("volume attached", "volume", r.Volume, "device", d.Device(), "connections", r.Connections, "read_only", r.ReadOnly)
	return d.Record, nil
}

// begin records the intent, durably, before the kernel is asked: a daemon that
// is killed between the two finds the device by its identifier.
func (m *Manager) begin(r *Record) (driver, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if d := m.devices[r.Volume]; d != nil {
		return nil, fmt.Errorf("%w as %s: use that, or run blockstep detach %s first", ErrAttached, d.Device(), r.Volume)
	}
	kernel, err := m.kernelLocked()
	if err != nil {
		return nil, err
	}
	r.Backend = BackendPrefix + r.Volume + ":" + r.ID + ":" + rand.Text()
	r.Index = -1
	m.devices[r.Volume] = m.newDevice(*r, 0)
	if err := m.saveLocked(); err != nil {
		delete(m.devices, r.Volume)
		return nil, err
	}
	return kernel, nil
}

// connect makes the links and has the kernel take them.
func (m *Manager) connect(ctx context.Context, kernel driver, r Record, index int) (*device, error) {
	var links []*link
	dropAll := func() {
		for _, l := range links {
			l.drop()
		}
	}
	o := Options{Backend: r.Backend, DeadTimeout: m.cfg.DeadTimeout}
	for range r.Connections {
		l, err := m.openLink(r)
		if err != nil {
			dropAll()
			return nil, err
		}
		links = append(links, l)
		o.Sockets = append(o.Sockets, l.theirs)
		o.Size, o.ServerFlags = l.export.size, l.export.flags
	}
	if err := ctx.Err(); err != nil {
		dropAll()
		return nil, err
	}
	got, err := kernel.Connect(index, o)
	if err != nil {
		dropAll()
		if errors.Is(err, ErrBusy) && index >= 0 {
			err = fmt.Errorf("%s: %w; leave it out to get a free one, or free it with blockstep detach or nbd-client -d", m.host.path(index), err)
		}
		return nil, err
	}
	r.Index = got
	d := m.newDevice(r, o.Size)
	m.tune(got, ioTimeout)
	if m.host.backend(got) != r.Backend {
		m.cfg.Logger.Warn("the kernel keeps no backend identifier (it is older than 5.14): after a restart of the daemon the device cannot be taken back", "device", d.Device())
	}
	if err := m.host.announce(got); err != nil {
		m.cfg.Logger.Debug("device", "device", d.Device(), "err", err)
	}
	for _, l := range links {
		l.handed()
		m.wg.Go(func() { m.runLink(kernel, d, l) })
	}
	return d, nil
}

func (m *Manager) tune(index int, d time.Duration) {
	if err := m.host.setIOTimeout(index, d); err != nil {
		m.cfg.Logger.Warn("after a crash of the daemon requests in flight pause for up to 30 s instead of 10 s", "device", "/dev/"+deviceName(index), "err", err)
	}
}

// runLink keeps one socket of a device served: it waits for the end of l and
// gives the kernel another, until the attachment or the manager ends. A nil l
// is one that has ended.
func (m *Manager) runLink(kernel driver, d *device, l *link) {
	wait := retryMin
	said := ""
	for {
		if l != nil {
			began := time.Now()
			reason := <-l.ended
			if d.gone.Err() != nil {
				return
			}
			if reason == nil {
				m.lose(kernel, d, errors.New("it was disconnected by another program (nbd-client -d?)"))
				return
			}
			m.cfg.Logger.Warn("a connection of the kernel ended; making another", "volume", d.Volume, "device", d.Device(), "reason", reason)
			if time.Since(began) > retryMax {
				wait = retryMin
			}
		}
		if l = m.reopen(kernel, d, &said); l != nil && said != "" {
			m.cfg.Logger.Info("the device is served again", "volume", d.Volume, "device", d.Device())
			said = ""
		}
		if l == nil || len(l.ended) > 0 {
			// Not taken, or dropped at once: the kernel has not noticed yet that
			// its old socket is dead.
			select {
			case <-d.gone.Done():
				return
			case <-time.After(wait):
				wait = min(2*wait, retryMax)
			}
		}
	}
}

// reopen makes one attempt to give the kernel a new socket.
func (m *Manager) reopen(kernel driver, d *device, said *string) *link {
	err := m.cfg.Check(d.Record)
	var l *link
	if err == nil {
		l, err = m.openLink(d.Record)
	}
	if err == nil {
		// Asked again, now that a session is open: one of a later generation
		// must not reach the device.
		if err = m.cfg.Check(d.Record); err == nil && l.export.size < d.told() {
			// The end of the device would fail its I/O.
			err = errors.New("this node's cluster state is not up to date yet: the volume has been larger")
		}
		if err == nil {
			err = d.tell(kernel, l.export.size, Options{Sockets: []*os.File{l.theirs}, DeadTimeout: m.cfg.DeadTimeout})
		}
		if err == nil {
			l.handed()
			return l
		}
		l.drop()
	}
	switch {
	case d.gone.Err() != nil:
	case errors.Is(err, ErrLost):
		m.lose(kernel, d, err)
	case errors.Is(err, ErrNotConnected) && m.host.backend(d.Index) != d.Backend:
		m.lose(kernel, d, errors.New("the kernel has let go of it"))
	case *said != err.Error():
		*said = err.Error()
		m.cfg.Logger.Warn("the device waits", "volume", d.Volume, "device", d.Device(), "err", err)
	}
	return nil
}

// lose ends an attachment that must not go on: the kernel fails its I/O.
func (m *Manager) lose(kernel driver, d *device, why error) {
	m.mu.Lock()
	if m.devices[d.Volume] != d || d.gone.Err() != nil {
		m.mu.Unlock()
		return
	}
	d.end()
	d.Lost = why.Error()
	mine := m.host.backend(d.Index) == d.Backend
	if err := m.saveLocked(); err != nil {
		m.cfg.Logger.Warn("attachment", "volume", d.Volume, "err", err)
	}
	m.mu.Unlock()
	m.cfg.Logger.Error("the device fails all I/O: unmount it, detach it, attach it again and check what is on it", "volume", d.Volume, "device", d.Device(), "reason", why)
	if !mine {
		return
	}
	if err := kernel.Disconnect(d.Index); err != nil && !errors.Is(err, ErrNotConnected) {
		m.cfg.Logger.Error("disconnecting", "device", d.Device(), "err", err)
	}
}

// Detach frees the device of a volume. It refuses one that is mounted.
func (m *Manager) Detach(ctx context.Context, volume string) error {
	m.changes.Lock()
	defer m.changes.Unlock()
	m.mu.Lock()
	d := m.devices[volume]
	kernel, err := m.kernelLocked()
	m.mu.Unlock()
	switch {
	case d == nil:
		return ErrNotAttached
	case err != nil:
		return err
	}
	if m.host.backend(d.Index) == d.Backend {
		if err := m.free(ctx, kernel, d); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d.end()
	delete(m.devices, volume)
	if err := m.saveLocked(); err != nil {
		return err
	}
	m.cfg.Logger.Info("volume detached", "volume", volume, "device", d.Device())
	return nil
}

// free disconnects a device that nothing uses.
func (m *Manager) free(ctx context.Context, kernel driver, d *device) error {
	claim, err := m.host.claim(ctx, d.Index, !d.ReadOnly && d.Lost == "")
	if err != nil {
		return err
	}
	d.end() // the links see a disconnect that was asked for
	err = kernel.Disconnect(d.Index)
	claim.Close() // the kernel lets go of the device when it is closed
	if err != nil && !errors.Is(err, ErrNotConnected) {
		return err
	}
	if !m.host.waitGone(ctx, d.Index) {
		m.mu.Lock()
		d.Lost = "a detach was begun while it was still open"
		err := m.saveLocked()
		m.mu.Unlock()
		if err != nil {
			m.cfg.Logger.Warn("attachment", "volume", d.Volume, "err", err)
		}
		return fmt.Errorf("%s: %w: it is still open somewhere, and now fails all I/O; close it (fuser -v %s shows by whom), then run this again", d.Device(), ErrBusy, d.Device())
	}
	if err := m.host.announce(d.Index); err != nil {
		m.cfg.Logger.Debug("device", "device", d.Device(), "err", err)
	}
	return nil
}

// Resize tells the kernel a volume's new size, if it is attached and grew.
func (m *Manager) Resize(volume string, size uint64) {
	m.mu.Lock()
	d, kernel := m.devices[volume], m.kernel
	m.mu.Unlock()
	if d == nil || d.Lost != "" || kernel == nil || d.Index < 0 || d.told() >= size {
		return
	}
	if err := d.tell(kernel, size, Options{}); err != nil {
		m.cfg.Logger.Warn("the kernel did not take the new size", "volume", volume, "device", d.Device(), "err", err)
	}
}

// tell reconfigures the device, with a size that is no smaller than it has been
// told before: a handshake may be older than the news that the volume grew.
func (d *device) tell(kernel driver, size uint64, o Options) error {
	d.sizing.Lock()
	defer d.sizing.Unlock()
	o.Backend, o.Size = d.Backend, max(size, d.size)
	err := kernel.Reconfigure(d.Index, o)
	if err == nil {
		d.size = o.Size
	}
	return err
}

// told returns the size that the kernel has been told; 0: not yet.
func (d *device) told() uint64 {
	d.sizing.Lock()
	defer d.sizing.Unlock()
	return d.size
}

// Stopping is called before the daemon drains its connections, so that what the
// kernel sends from now on is sent again soon.
func (m *Manager) Stopping() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped {
		return
	}
	m.stopped = true
	for _, d := range m.devices {
		if d.Lost == "" && d.Index >= 0 {
			m.tune(d.Index, ioTimeoutStopping)
		}
	}
	m.cancel()
}

// Stop ends the manager after its connections have ended. The devices stay, and
// the kernel holds their I/O until the next daemon.
func (m *Manager) Stop() {
	m.Stopping()
	m.wg.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.kernel != nil {
		_ = m.kernel.Close() // nothing is asked of it any more
	}
}
