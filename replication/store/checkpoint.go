package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	iofs "io/fs"
	"path/filepath"
	"slices"
	"sync"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
)

const (
	checkpointVersion = 1
	// checkpointMax bounds a slot: bitmaps of several absent replicas of a
	// 16 TiB volume at their worst.
	checkpointMax = 4 << 30
	nodeNameMax   = 255
)

var checkpointMagic = [8]byte{'B', 'L', 'K', 'S', 'T', 'C', 'K', 'P'}

// Checkpoint says up to where the log is applied and durable in the backing
// store, and what must be known at that point.
type Checkpoint struct {
	Generation uint64 // rises by one with each Write, which sets it
	Applied    ident.Position
	History    []ident.EpochStart // of the replica, older than the log's own
	Dedup      []DedupEntry       // in the order of Seq
	DedupFloor ident.Position     // the table reaches back to just after this
	Bitmaps    []Bitmap
}

// DedupEntry remembers that an entry answered a request.
type DedupEntry struct {
	Session, Request uint64
	Seq              ident.Seq
}

// Bitmap is the encoded dirty bitmap for one absent replica.
type Bitmap struct {
	Node    ident.Node
	Replica ident.Replica
	Base    ident.Position // all changes after it are in the bitmap
	Data    []byte
}

// CheckpointFile is the pair of files that hold the checkpoints. Its methods
// may be called from several goroutines.
type CheckpointFile struct {
	path  string
	files [2]vfs.File

	mu      sync.Mutex
	current Checkpoint
	scratch []byte
	failure error
}

// slotPaths are the two files of a checkpoint.
func slotPaths(path string) [2]string { return [2]string{path + ".0", path + ".1"} }

// CreateCheckpoint makes the pair of files path.0 and path.1 with a first
// checkpoint, durably. Files that are there are overwritten: who calls it has
// decided that there is no replica yet.
func CreateCheckpoint(fs vfs.FS, path string, c Checkpoint) (*CheckpointFile, error) {
	cf, err := openSlots(fs, path, vfs.Create)
	if err != nil {
		return nil, err
	}
	for _, f := range cf.files {
		if err == nil {
			err = f.Truncate(0)
		}
	}
	// Both, so that from now on a slot that does not verify is a write that
	// was cut short, or damage.
	for range cf.files {
		if err == nil {
			err = cf.Write(c)
		}
	}
	if err == nil {
		err = fs.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("store: make %s: %w", path, err), cf.Close())
	}
	return cf, nil
}

// OpenCheckpoint opens the pair of files and reads the newest checkpoint that
// verifies. It returns ErrCorrupt when none does, ErrNewer when a newer
// version wrote one, fs.ErrNotExist when the files are not there.
func OpenCheckpoint(fs vfs.FS, path string) (*CheckpointFile, error) {
	cf, err := openSlots(fs, path, 0)
	if err != nil {
		return nil, err
	}
	if err := cf.load(); err != nil {
		return nil, errors.Join(err, cf.Close())
	}
	return cf, nil
}

func openSlots(fs vfs.FS, path string, flags vfs.Flag) (*CheckpointFile, error) {
	cf := &CheckpointFile{path: path}
	for i, p := range slotPaths(path) {
		f, err := fs.Open(p, flags)
		if errors.Is(err, iofs.ErrNotExist) && i == 1 {
			// The one is there: Create had made both durable.
			err = fmt.Errorf("%w: %s is not there, but the other slot is", ErrCorrupt, p)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("store: open a checkpoint: %w", err), cf.Close())
		}
		cf.files[i] = f
	}
	return cf, nil
}

func (cf *CheckpointFile) load() error {
	var errs [2]error
	found := false
	for i, f := range cf.files {
		b, err := readSlot(f, 0, checkpointMax)
		if err != nil {
			return fmt.Errorf("store: read %s: %w", slotPaths(cf.path)[i], err)
		}
		c, err := decodeCheckpoint(b)
		if errors.Is(err, ErrNewer) {
			return fmt.Errorf("store: %s: %w", slotPaths(cf.path)[i], err)
		}
		errs[i] = err
		if err == nil && (!found || c.Generation > cf.current.Generation) {
			cf.current, found = c, true
		}
	}
	if !found {
		return fmt.Errorf("store: %w: no slot of %s verifies: %w, %w", ErrCorrupt, cf.path, errs[0], errs[1])
	}
	return nil
}

// Load returns the checkpoint that was read or written last. Its slices are
// shared: they must not be changed.
func (cf *CheckpointFile) Load() Checkpoint {
	cf.mu.Lock()
	defer cf.mu.Unlock()
	return cf.current
}

// Write replaces the older of the two checkpoints, durably. The caller has
// fsynced the backing store before. An error is final: the next Write returns
// ErrFailed. The file keeps c's slices for Load; they must not change.
func (cf *CheckpointFile) Write(c Checkpoint) error {
	cf.mu.Lock()
	defer cf.mu.Unlock()
	if cf.failure != nil {
		return cf.failure
	}
	c.Generation = cf.current.Generation + 1
	b, err := encodeCheckpoint(cf.scratch[:0], &c)
	if err != nil {
		return fmt.Errorf("store: %s: %w", cf.path, err)
	}
	cf.scratch = b
	if err := cf.writeSlot(cf.files[c.Generation%2], b); err != nil {
		cf.failure = fmt.Errorf("store: %s: %w: %w", cf.path, ErrFailed, err)
		return cf.failure
	}
	if cap(cf.scratch) > 1<<20 {
		cf.scratch = nil // a large one is rare: do not hold it
	}
	cf.current = c
	return nil
}

func (cf *CheckpointFile) writeSlot(f vfs.File, b []byte) error {
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	// A slot that has shrunk a lot gives its room back.
	if size, err := f.Size(); err == nil && size > 2*int64(len(b))+(1<<20) {
		if err := f.Truncate(int64(len(b))); err != nil {
			return err
		}
	}
	return f.Datasync()
}

// Close closes the files.
func (cf *CheckpointFile) Close() error {
	var errs []error
	for _, f := range cf.files {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// encodeCheckpoint appends a slot to b, which is empty but for its capacity.
func encodeCheckpoint(b []byte, c *Checkpoint) ([]byte, error) {
	le := binary.LittleEndian
	size := frameHeaderSize + 64 + 16*len(c.History) + 24*len(c.Dedup)
	for i := range c.Bitmaps {
		size += 64 + len(c.Bitmaps[i].Node) + len(c.Bitmaps[i].Data)
	}
	b = slices.Grow(b, size) // a megabyte or more: grown as it comes, it would be copied ten times
	b = append(b, make([]byte, frameHeaderSize)...)
	b = appendPosition(b, c.Applied)
	b = appendPosition(b, c.DedupFloor)
	b = le.AppendUint32(b, uint32(len(c.History)))
	b = le.AppendUint32(b, uint32(len(c.Dedup)))
	b = le.AppendUint32(b, uint32(len(c.Bitmaps)))
	for _, h := range c.History {
		b = le.AppendUint64(b, uint64(h.Epoch))
		b = le.AppendUint64(b, uint64(h.First))
	}
	for _, d := range c.Dedup {
		b = le.AppendUint64(b, d.Session)
		b = le.AppendUint64(b, d.Request)
		b = le.AppendUint64(b, uint64(d.Seq))
	}
	for i := range c.Bitmaps {
		m := &c.Bitmaps[i]
		if len(m.Node) > nodeNameMax {
			return nil, fmt.Errorf("node name of %d bytes, the limit is %d", len(m.Node), nodeNameMax)
		}
		b = append(b, uint8(len(m.Node)))
		b = append(b, m.Node...)
		b = le.AppendUint64(b, uint64(m.Replica))
		b = appendPosition(b, m.Base)
		b = le.AppendUint64(b, uint64(len(m.Data)))
		b = append(b, m.Data...)
	}
	if len(b) > checkpointMax {
		return nil, fmt.Errorf("checkpoint of %d bytes, the limit is %d", len(b), checkpointMax)
	}
	sealFrame(b, checkpointMagic, checkpointVersion, c.Generation)
	return b, nil
}

func appendPosition(b []byte, p ident.Position) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(p.Epoch))
	return binary.LittleEndian.AppendUint64(b, uint64(p.Seq))
}

// decodeCheckpoint reads a slot. Bitmap data are parts of b.
func decodeCheckpoint(b []byte) (c Checkpoint, err error) {
	body, generation, err := openFrame(b, checkpointMagic, checkpointVersion)
	if err != nil {
		return c, err
	}
	d := decoder{b: body}
	c.Generation = generation
	c.Applied, c.DedupFloor = d.position(), d.position()
	histories, dedups, bitmaps := d.count(16), d.count(24), d.count(33)
	if d.short {
		return Checkpoint{}, errShort(len(body))
	}
	// Each count alone fits into the body; that all together do, the reads find.
	c.History = make([]ident.EpochStart, 0, histories)
	for range histories {
		c.History = append(c.History, ident.EpochStart{Epoch: ident.Epoch(d.uint64()), First: ident.Seq(d.uint64())})
	}
	c.Dedup = make([]DedupEntry, 0, dedups)
	for range dedups {
		c.Dedup = append(c.Dedup, DedupEntry{Session: d.uint64(), Request: d.uint64(), Seq: ident.Seq(d.uint64())})
	}
	c.Bitmaps = make([]Bitmap, 0, bitmaps)
	for range bitmaps {
		m := Bitmap{Node: ident.Node(d.take(uint64(d.uint8())))}
		m.Replica, m.Base = ident.Replica(d.uint64()), d.position()
		m.Data = d.take(d.uint64())
		c.Bitmaps = append(c.Bitmaps, m)
	}
	if d.short {
		return Checkpoint{}, errShort(len(body))
	}
	if len(d.b) > 0 {
		return Checkpoint{}, fmt.Errorf("%w: %d bytes behind the checkpoint", ErrCorrupt, len(d.b))
	}
	return c, nil
}

func errShort(n int) error {
	return fmt.Errorf("%w: the counts of the checkpoint exceed its %d bytes", ErrCorrupt, n)
}

// decoder takes numbers from a slice, and notes when there are too few bytes.
type decoder struct {
	b     []byte
	short bool
}

func (d *decoder) take(n uint64) []byte {
	if n > uint64(len(d.b)) {
		d.short, d.b = true, nil
		return nil
	}
	b := d.b[:n:n]
	d.b = d.b[n:]
	return b
}

func (d *decoder) uint8() uint8 {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) uint64() uint64 {
	if b := d.take(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

func (d *decoder) position() ident.Position {
	return ident.Position{Epoch: ident.Epoch(d.uint64()), Seq: ident.Seq(d.uint64())}
}

// count reads how many items of at least size bytes follow, and refuses more
// than there is room for.
func (d *decoder) count(size int) int {
	b := d.take(4)
	if b == nil {
		return 0
	}
	n := binary.LittleEndian.Uint32(b)
	if uint64(n)*uint64(size) > uint64(len(d.b)) {
		d.short = true
		return 0
	}
	return int(n)
}
