package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
)

// The pages of a bbolt file, as bbolt's internal/common has them: numbers are the
// host's, which is little endian on what we build for.
const (
	boltMagic      = 0xED0CDAED
	boltMetaBytes  = 64 // magic, version, page size, flags: 4 each; root, sequence, freelist, pages, transaction, checksum: 8 each
	boltPageHeader = 16 // id: 8; flags, count: 2 each; overflow: 4
	boltElement    = 16
	boltBranch     = 1
	boltLeaf       = 2
	boltBucket     = 1 // flag of a leaf's element
)

// boltTree is a walk over the pages that bbolt would walk over.
type boltTree struct {
	b    []byte // the file
	page uint64 // bytes of a page
	high uint64 // pages in use
	seen map[uint64]bool
}

// checkPages looks whether the pages of a bbolt file are a tree with rising keys,
// so that bbolt can open it. What is not even a bbolt file it leaves to bbolt.
func checkPages(path string) error {
	b, err := os.ReadFile(path) //nolint:forbidigo // the Raft log is bbolt's, on the real file system
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the Raft log: %w", err)
	}
	meta := newestMeta(b)
	if meta == nil {
		return nil
	}
	le := binary.LittleEndian
	t := &boltTree{b: b, page: uint64(le.Uint32(meta[8:])), high: le.Uint64(meta[40:]), seen: map[uint64]bool{}}
	_, err = t.walk(le.Uint64(meta[16:]), nil, nil)
	return err
}

// newestMeta returns the meta of the last transaction that verifies.
func newestMeta(b []byte) (newest []byte) {
	le := binary.LittleEndian
	for size := 1 << 9; size <= 1<<16; size <<= 1 { // the first page is that of every page size
		for _, off := range []int{boltPageHeader, size + boltPageHeader} {
			if len(b) < off+boltMetaBytes {
				continue
			}
			m := b[off : off+boltMetaBytes]
			h := fnv.New64a()
			_, _ = h.Write(m[:56]) // a hash takes everything
			good := le.Uint32(m) == boltMagic && h.Sum64() == le.Uint64(m[56:]) && (off == boltPageHeader || int(le.Uint32(m[8:])) == size)
			if good && (newest == nil || le.Uint64(m[48:]) > le.Uint64(newest[48:])) {
				newest = m
			}
		}
	}
	return newest
}

// walk checks the pages below one, whose keys are at least low and below end,
// and returns the last key.
func (t *boltTree) walk(id uint64, low, end []byte) ([]byte, error) {
	le := binary.LittleEndian
	size := uint64(len(t.b)) / t.page
	if id < 2 || id >= t.high || id >= size {
		return nil, fmt.Errorf("page %d is none of %d", id, min(t.high, size))
	}
	p := t.b[id*t.page:]
	flags, count, more := le.Uint16(p[8:]), int(le.Uint16(p[10:])), uint64(le.Uint32(p[12:]))
	if le.Uint64(p) != id || (flags != boltBranch && flags != boltLeaf) || id+more >= min(t.high, size) || (flags == boltBranch && count == 0) {
		return nil, fmt.Errorf("page %d has id %d, flags %x, %d elements, %d more pages", id, le.Uint64(p), flags, count, more)
	}
	for i := id; i <= id+more; i++ {
		if t.seen[i] {
			return nil, fmt.Errorf("page %d is used twice", i)
		}
		t.seen[i] = true
	}
	p = p[:(more+1)*t.page]
	last := low
	for i := range count {
		key, err := boltKey(p, flags, i)
		if err != nil {
			return nil, fmt.Errorf("page %d: %w", id, err)
		}
		order := bytes.Compare(last, key)
		if (last != nil && (order > 0 || (order == 0 && i > 0))) || (end != nil && bytes.Compare(key, end) >= 0) {
			return nil, fmt.Errorf("page %d: the keys do not rise", id)
		}
		if last, err = t.below(p, flags, count, i, key, end); err != nil {
			return nil, err
		}
	}
	return last, nil
}

// below checks what an element leads to, and returns the last key so far.
func (t *boltTree) below(p []byte, flags uint16, count, i int, key, end []byte) ([]byte, error) {
	le := binary.LittleEndian
	e := p[boltPageHeader+boltElement*i:]
	if flags == boltBranch {
		if i+1 < count {
			next, err := boltKey(p, flags, i+1)
			if err != nil {
				return nil, err
			}
			end = next
		}
		return t.walk(le.Uint64(e[8:]), key, end)
	}
	if le.Uint32(e)&boltBucket == 0 {
		return key, nil
	}
	at := uint64(le.Uint32(e[4:])) + uint64(len(key))
	if root := le.Uint64(e[at:]); root != 0 { // else its page is within the value
		if _, err := t.walk(root, nil, nil); err != nil {
			return nil, err
		}
	}
	return key, nil
}

// boltKey returns the key of an element.
func boltKey(p []byte, flags uint16, i int) ([]byte, error) {
	le := binary.LittleEndian
	off := uint64(boltPageHeader + boltElement*i)
	if off+boltElement > uint64(len(p)) {
		return nil, fmt.Errorf("element %d lies outside", i)
	}
	e := p[off:]
	pos, size, value := uint64(le.Uint32(e)), uint64(le.Uint32(e[4:])), uint64(0)
	if flags == boltLeaf {
		pos, size, value = uint64(le.Uint32(e[4:])), uint64(le.Uint32(e[8:])), uint64(le.Uint32(e[12:]))
	}
	if pos+size+value > uint64(len(e)) || (flags == boltLeaf && le.Uint32(e)&boltBucket != 0 && value < 16) {
		return nil, fmt.Errorf("element %d lies outside", i)
	}
	return e[pos : pos+size : pos+size], nil
}
