package vfs

import (
	"errors"
	"io/fs"
	"maps"
	"math"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// Mem is a file system in memory that can crash. It is as unkind as the
// package comment allows: Crash keeps a random subset of what was not synced,
// sector by sector, also of sizes and of directory entries, and a write over
// unsynced bytes may have let the older ones reach the disk.
//
// All that is random comes from the seed, so the same calls in the same order
// end in the same bytes. Its methods may be called from several goroutines.
type Mem struct {
	mu       sync.Mutex
	rng      *rand.Rand
	boot     uint64 // rises with Crash and Kill: handles of before are dead
	current  map[string]*memNode
	durable  map[string]*memNode
	pending  []dirChange // not in durable yet, in order
	locks    map[string]*memLock
	capacity int64 // bytes of pages; 0: no limit
	pages    int64 // in use
}

// memNode is what a directory entry names: a directory when data is nil.
type memNode struct{ data *memData }

// dirChange is one change of a directory. A rename has both paths, a creation
// only to, a removal only from.
type dirChange struct {
	from, to string
	node     *memNode
}

// NewMem returns an empty file system with the root directories "/" and ".".
func NewMem(seed uint64) *Mem {
	m := &Mem{
		rng:   rand.New(rand.NewPCG(seed, 0x626c6f636b737465)),
		locks: map[string]*memLock{}, current: map[string]*memNode{}, durable: map[string]*memNode{},
	}
	for _, root := range []string{"/", "."} {
		n := &memNode{}
		m.current[root], m.durable[root] = n, n
	}
	return m
}

// SetCapacity limits the bytes that all files together may take: beyond it,
// writes end with ENOSPC. 0 is no limit.
func (m *Mem) SetCapacity(bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.capacity = bytes
}

// Used returns the bytes that the files take.
func (m *Mem) Used() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pages * pageSize
}

// Kill is the end of the process: every handle and lock is gone, and every
// byte is there.
func (m *Mem) Kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.killLocked()
}

func (m *Mem) killLocked() {
	m.boot++
	clear(m.locks)
}

// Crash is a power cut: Kill, and of what was not synced a random part is gone.
func (m *Mem) Crash() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.killLocked()
	luck := m.luck()
	for _, c := range m.pending {
		if m.rng.Float64() < luck {
			c.apply(m.durable)
		}
	}
	m.pending = nil
	// A file whose directory is gone is gone.
	for {
		before := len(m.durable)
		maps.DeleteFunc(m.durable, func(path string, _ *memNode) bool {
			p := m.durable[filepath.Dir(path)]
			return p == nil || p.data != nil
		})
		if len(m.durable) == before {
			break
		}
	}
	m.current = maps.Clone(m.durable)
	m.pages = 0
	// Sorted, so that the same seed ends in the same bytes.
	seen := map[*memData]bool{}
	for _, path := range slices.Sorted(maps.Keys(m.current)) {
		if d := m.current[path].data; d != nil && !seen[d] {
			seen[d] = true
			d.crash(m.rng, m.luck(), 1<<m.rng.IntN(4))
			m.pages += int64(len(d.pages))
		}
	}
}

// luck draws how likely an unsynced change is kept: none and all are likely
// cases in life, and rare ones in a fair coin's.
func (m *Mem) luck() float64 {
	switch m.rng.IntN(4) {
	case 0:
		return 0
	case 1:
		return 1
	}
	return m.rng.Float64()
}

// Clone returns a copy in the same state, with its own randomness and without
// the handles: what a crash at this moment would meet.
func (m *Mem) Clone(seed uint64) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := NewMem(seed)
	c.capacity, c.pages = m.capacity, m.pages
	nodes := map[*memNode]*memNode{}
	node := func(n *memNode) *memNode {
		if n == nil {
			return nil
		}
		if nodes[n] == nil {
			nodes[n] = &memNode{data: n.data.clone()}
		}
		return nodes[n]
	}
	for path, n := range m.current {
		c.current[path] = node(n)
	}
	for path, n := range m.durable {
		c.durable[path] = node(n)
	}
	for _, p := range m.pending {
		p.node = node(p.node)
		c.pending = append(c.pending, p)
	}
	return c
}

// Corrupt overwrites bytes of a file on the disk, as a bad disk does. In a
// hole there is nothing to damage: that is an error.
func (m *Mem) Corrupt(path string, off int64, p []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.fileLocked("corrupt", filepath.Clean(path))
	if err != nil {
		return err
	}
	for i, b := range p {
		at := off + int64(i)
		pg := d.pages[at/pageSize]
		if pg == nil {
			return &fs.PathError{Op: "corrupt", Path: path, Err: errors.New("nothing is stored there")}
		}
		pg.data[at%pageSize], pg.hole = b, false
		if pg.before != nil {
			pg.before[at%pageSize] = b
		}
	}
	return nil
}

func (m *Mem) fileLocked(op, path string) (*memData, error) {
	n := m.current[path]
	switch {
	case n == nil:
		return nil, &fs.PathError{Op: op, Path: path, Err: fs.ErrNotExist}
	case n.data == nil:
		return nil, &fs.PathError{Op: op, Path: path, Err: syscall.EISDIR}
	}
	return n.data, nil
}

func (m *Mem) dirLocked(op, path string) error {
	n := m.current[path]
	switch {
	case n == nil:
		return &fs.PathError{Op: op, Path: path, Err: fs.ErrNotExist}
	case n.data != nil:
		return &fs.PathError{Op: op, Path: path, Err: syscall.ENOTDIR}
	}
	return nil
}

// change makes a change visible, and durable some day.
func (m *Mem) change(c dirChange) {
	c.apply(m.current)
	m.pending = append(m.pending, c)
}

func (c dirChange) apply(dirs map[string]*memNode) {
	switch {
	case c.from == "":
		dirs[c.to] = c.node
	case dirs[c.from] == nil:
		// What it would move or remove never got there.
	case c.to == "":
		delete(dirs, c.from)
	default:
		n := dirs[c.from]
		delete(dirs, c.from)
		dirs[c.to] = n
		for path, child := range maps.Clone(dirs) {
			if rest, ok := strings.CutPrefix(path, c.from+"/"); ok {
				delete(dirs, path)
				dirs[c.to+"/"+rest] = child
			}
		}
	}
}

// Open implements FS.
func (m *Mem) Open(path string, flags Flag) (File, error) {
	path = filepath.Clean(path)
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.fileLocked("open", path)
	switch {
	case err == nil && flags&Exclusive != 0:
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrExist}
	case errors.Is(err, fs.ErrNotExist) && flags&Create != 0:
		if err := m.dirLocked("open", filepath.Dir(path)); err != nil {
			return nil, err
		}
		d = newMemData()
		m.change(dirChange{to: path, node: &memNode{data: d}})
	case err != nil:
		return nil, err
	}
	return &memFile{m: m, d: d, path: path, boot: m.boot, readOnly: flags&ReadOnly != 0}, nil
}

// MkdirAll implements FS.
func (m *Mem) MkdirAll(path string) error {
	path = filepath.Clean(path)
	m.mu.Lock()
	defer m.mu.Unlock()
	var missing []string
	there := path
	for ; m.current[there] == nil; there = filepath.Dir(there) {
		missing = append(missing, there)
	}
	if err := m.dirLocked("mkdir", there); err != nil {
		return err
	}
	for _, p := range slices.Backward(missing) {
		m.change(dirChange{to: p, node: &memNode{}})
	}
	return nil
}

// Rename implements FS.
func (m *Mem) Rename(oldPath, newPath string) error {
	oldPath, newPath = filepath.Clean(oldPath), filepath.Clean(newPath)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.current[oldPath] == nil {
		return &fs.PathError{Op: "rename", Path: oldPath, Err: fs.ErrNotExist}
	}
	if err := m.dirLocked("rename", filepath.Dir(newPath)); err != nil {
		return err
	}
	if m.current[oldPath].data == nil {
		// What is pending inside a directory moves with it.
		move := func(p string) string {
			if rest, ok := strings.CutPrefix(p, oldPath+"/"); ok {
				return newPath + "/" + rest
			}
			return p
		}
		for i := range m.pending {
			m.pending[i].from, m.pending[i].to = move(m.pending[i].from), move(m.pending[i].to)
		}
	}
	if oldPath != newPath {
		m.change(dirChange{from: oldPath, to: newPath})
	}
	return nil
}

// Remove implements FS.
func (m *Mem) Remove(path string) error {
	path = filepath.Clean(path)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.current[path] == nil {
		return &fs.PathError{Op: "remove", Path: path, Err: fs.ErrNotExist}
	}
	for p := range m.current {
		if p != path && filepath.Dir(p) == path {
			return &fs.PathError{Op: "remove", Path: path, Err: syscall.ENOTEMPTY}
		}
	}
	if d := m.current[path].data; d != nil {
		m.pages -= int64(len(d.pages))
	}
	m.change(dirChange{from: path})
	return nil
}

// List implements FS.
func (m *Mem) List(dir string) ([]string, error) {
	dir = filepath.Clean(dir)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.dirLocked("list", dir); err != nil {
		return nil, err
	}
	var names []string
	for p := range m.current {
		if p != dir && filepath.Dir(p) == dir && p != "." {
			names = append(names, filepath.Base(p))
		}
	}
	slices.Sort(names)
	return names, nil
}

// Total implements FS. Without a capacity it is more than any disk has.
func (m *Mem) Total(dir string) (int64, error) {
	dir = filepath.Clean(dir)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.dirLocked("statfs", dir); err != nil {
		return 0, err
	}
	if m.capacity > 0 {
		return m.capacity, nil
	}
	return math.MaxInt64, nil
}

// SyncDir implements FS.
func (m *Mem) SyncDir(dir string) error {
	dir = filepath.Clean(dir)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.dirLocked("sync", dir); err != nil {
		return err
	}
	m.pending = slices.DeleteFunc(m.pending, func(c dirChange) bool {
		in := c.from != "" && filepath.Dir(c.from) == dir || c.to != "" && filepath.Dir(c.to) == dir
		if in {
			c.apply(m.durable)
		}
		return in
	})
	return nil
}

// memLock is a held lock; the pointer tells its holder.
type memLock struct {
	m    *Mem
	path string
}

// Lock implements FS.
func (m *Mem) Lock(path string) (Unlocker, error) {
	path = filepath.Clean(path)
	f, err := m.Open(path, Create)
	if err != nil {
		return nil, err
	}
	_ = f.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.locks[path] != nil {
		return nil, ErrLocked
	}
	k := &memLock{m: m, path: path}
	m.locks[path] = k
	return k, nil
}

// Close gives the lock back.
func (k *memLock) Close() error {
	k.m.mu.Lock()
	defer k.m.mu.Unlock()
	if k.m.locks[k.path] == k {
		delete(k.m.locks, k.path)
	}
	return nil
}
