package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"path/filepath"
	"sync"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
)

const (
	metaVersion = 1
	// metaSlotSize is the room of one slot of the meta file.
	metaSlotSize = 8 << 10
	// failedMax bounds Meta.Failed; a longer reason is cut.
	failedMax = 2 << 10
)

var metaMagic = [8]byte{'B', 'L', 'K', 'S', 'T', 'M', 'E', 'T'}

// Meta is the small durable state of a replica: who it is and what it has
// promised.
type Meta struct {
	Cluster string        `json:"cluster"` // the cluster's name
	Node    ident.Node    `json:"node"`
	Name    string        `json:"name"` // the volume's, for the operator
	Volume  ident.Volume  `json:"volume"`
	Replica ident.Replica `json:"replica"`
	Size    uint64        `json:"size"`           // of the volume, bytes
	Path    string        `json:"path,omitempty"` // of the backing store, when it is not at its usual place

	Incarnation   ident.Incarnation `json:"incarnation"`     // starts so far
	Promise       ident.Epoch       `json:"promise"`         // everything older is refused
	LeaseMaxNanos int64             `json:"lease_max_nanos"` // the longest lease time ever configured
	BootID        string            `json:"boot_id"`         // of the boot in which the log was last written
	Clean         bool              `json:"clean"`           // shut down cleanly since; removed before the first append
	Amnesiac      bool              `json:"amnesiac"`        // may have lost what it had acked
	Inconsistent  bool              `json:"inconsistent"`    // a resync target that is not whole
	Failed        string            `json:"failed,omitempty"`
}

// MetaFile is the file that holds a Meta, twice. Its methods may be called
// from several goroutines.
type MetaFile struct {
	path string
	file vfs.File

	mu         sync.Mutex
	meta       Meta
	generation uint64
	failure    error
}

// CreateMeta makes a meta file, durably. A file that a crash left without a
// single valid slot is written anew; a valid one is fs.ErrExist.
func CreateMeta(fs vfs.FS, path string, m Meta) (*MetaFile, error) {
	f, err := fs.Open(path, vfs.Create)
	if err != nil {
		return nil, fmt.Errorf("store: make the meta file: %w", err)
	}
	mf := &MetaFile{path: path, file: f}
	switch err := mf.load(); {
	case err == nil:
		err = fmt.Errorf("store: %s: %w", path, iofs.ErrExist)
		return nil, errors.Join(err, f.Close())
	case !errors.Is(err, errEmpty) && !errors.Is(err, ErrCorrupt):
		return nil, errors.Join(err, f.Close())
	}
	err = mf.Write(m)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = fs.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("store: make %s: %w", path, err), f.Close())
	}
	return mf, nil
}

// OpenMeta opens a meta file and reads it. It returns ErrCorrupt when no slot
// verifies, ErrNewer when a newer version wrote one, fs.ErrNotExist when there
// is no file.
func OpenMeta(fs vfs.FS, path string) (*MetaFile, error) {
	f, err := fs.Open(path, 0)
	if err != nil {
		return nil, fmt.Errorf("store: open the meta file: %w", err)
	}
	mf := &MetaFile{path: path, file: f}
	if err := mf.load(); err != nil {
		if errors.Is(err, errEmpty) {
			err = fmt.Errorf("store: %s: %w: %w", path, ErrCorrupt, err)
		}
		return nil, errors.Join(err, f.Close())
	}
	return mf, nil
}

// load reads both slots and takes the newer of the valid ones. Both are
// written before Write returns, so one bad slot takes nothing away that was
// promised: either its write was cut short, or the other says the same.
func (mf *MetaFile) load() error {
	var errs [2]error
	found := false
	for i := range errs {
		b, err := readSlot(mf.file, int64(i)*metaSlotSize, metaSlotSize)
		if err != nil {
			return fmt.Errorf("store: read %s: %w", mf.path, err)
		}
		m, generation, err := decodeMeta(b)
		if errors.Is(err, ErrNewer) {
			return fmt.Errorf("store: %s: %w", mf.path, err)
		}
		errs[i] = err
		if err == nil && (!found || generation > mf.generation) {
			mf.meta, mf.generation, found = m, generation, true
		}
	}
	if found {
		return nil
	}
	return fmt.Errorf("store: %s: %w, %w", mf.path, errs[0], errs[1])
}

// Load returns what was read or written last.
func (mf *MetaFile) Load() Meta {
	mf.mu.Lock()
	defer mf.mu.Unlock()
	return mf.meta
}

// Write replaces the meta, durably. After an error nobody knows which of the
// two states the disk has, and every later Write returns ErrFailed.
func (mf *MetaFile) Write(m Meta) error {
	mf.mu.Lock()
	defer mf.mu.Unlock()
	if mf.failure != nil {
		return mf.failure
	}
	b, err := encodeMeta(m, mf.generation+1)
	if err != nil {
		return fmt.Errorf("store: %s: %w", mf.path, err)
	}
	// One slot after the other, so that a crash finds one of them whole.
	first := int64(mf.generation+1) % 2
	for _, slot := range [2]int64{first, 1 - first} {
		if _, err = mf.file.WriteAt(b, slot*metaSlotSize); err == nil {
			err = mf.file.Datasync()
		}
		if err != nil {
			mf.failure = fmt.Errorf("store: %s: %w: %w", mf.path, ErrFailed, err)
			return mf.failure
		}
	}
	mf.meta = m
	mf.generation++
	return nil
}

// Close closes the file.
func (mf *MetaFile) Close() error { return mf.file.Close() }

// encodeMeta makes a slot. The body is JSON: an operator can read it, and a
// field that a later version adds needs no new layout.
func encodeMeta(m Meta, generation uint64) ([]byte, error) {
	if len(m.Failed) > failedMax {
		m.Failed = m.Failed[:failedMax]
	}
	body, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if len(body) > metaSlotSize-frameHeaderSize {
		return nil, fmt.Errorf("meta of %d bytes does not fit into a slot of %d: shorten names and paths", len(body), metaSlotSize)
	}
	// The whole slot is written, so that nothing of an older one stays.
	b := make([]byte, metaSlotSize)
	n := frameHeaderSize + copy(b[frameHeaderSize:], body)
	sealFrame(b[:n], metaMagic, metaVersion, generation)
	return b, nil
}

func decodeMeta(b []byte) (m Meta, generation uint64, err error) {
	body, generation, err := openFrame(b, metaMagic, metaVersion)
	if err != nil {
		return m, 0, err
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return Meta{}, 0, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Meta{}, 0, fmt.Errorf("%w: bytes behind the meta", ErrCorrupt)
	}
	return m, generation, nil
}
