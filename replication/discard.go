package replication

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/wire"
)

const (
	// discardPrefix begins the names of files with entries that were cut:
	// discarded-EPOCH-SEQ, of the first entry in it.
	discardPrefix = "discarded-"
	// discardMagic begins such a file. Behind it each entry has a header of
	// discardHeader bytes, little endian (epoch, seq, offset, length, session,
	// request: 8 bytes each; CRC-32C of the payload: 4; kind, flags: 1 each; two
	// of zero; bytes of payload: 4), and then its payload.
	discardMagic  = "blockstep discarded entries 1\n"
	discardHeader = 6*8 + 4 + 4 + 4
	// discardFilesMax is how many of these files are kept, discardBytesMax how
	// much of one tail is saved.
	discardFilesMax = 16
	discardBytesMax = 1 << 30
	discardChunk    = 4 << 20
)

// saveDiscarded writes the entries after seq, which are about to be cut, to a
// file and returns its path, "" when there are none.
func (rp *replica) saveDiscarded(seq ident.Seq) (file string, err error) {
	last := rp.log.Last()
	if last.Seq <= seq {
		return "", nil
	}
	fs := rp.opt.FS
	epoch, _ := rp.log.EpochAt(seq + 1)
	file = filepath.Join(rp.opt.Dir, fmt.Sprintf("%s%d-%d", discardPrefix, epoch, seq+1))
	rp.pruneDiscarded()
	f, err := fs.Open(file, vfs.Create)
	if err != nil {
		return "", fmt.Errorf("make %s: %w", file, err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.WriteAt([]byte(discardMagic), 0); err != nil {
		return "", err
	}
	at := int64(len(discardMagic))
	for next := seq + 1; next <= last.Seq && at < discardBytesMax; {
		entries, err := rp.log.Read(next, discardChunk, nil)
		if err != nil {
			return "", fmt.Errorf("read the entries: %w", err)
		}
		if len(entries) == 0 {
			break
		}
		for i := range entries {
			if err == nil {
				at, err = writeDiscarded(f, at, &entries[i])
			}
			entries[i].Payload.Release()
		}
		if err != nil {
			return "", err
		}
		next += ident.Seq(len(entries))
	}
	return file, f.Sync()
}

func writeDiscarded(f vfs.File, at int64, e *wire.Entry) (int64, error) {
	h := make([]byte, 0, discardHeader)
	for _, v := range []uint64{uint64(e.Pos.Epoch), uint64(e.Pos.Seq), e.Off, e.Len, e.Session, e.Request} {
		h = binary.LittleEndian.AppendUint64(h, v)
	}
	h = binary.LittleEndian.AppendUint32(h, e.PayloadCRC)
	h = append(h, byte(e.Kind), e.Flags, 0, 0)
	h = binary.LittleEndian.AppendUint32(h, uint32(e.PayloadLen()))
	bufs := [][]byte{h}
	if e.Payload != nil {
		bufs = append(bufs, e.Payload.B)
	}
	n, err := f.WritevAt(bufs, at)
	return at + int64(n), err
}

// pruneDiscarded removes files so that one more is within the limit: those of
// the oldest positions first.
func (rp *replica) pruneDiscarded() {
	names, err := rp.opt.FS.List(rp.opt.Dir)
	if err != nil {
		return
	}
	var found []string
	for _, n := range names {
		if strings.HasPrefix(n, discardPrefix) {
			found = append(found, n)
		}
	}
	slices.SortFunc(found, func(a, b string) int {
		pa, pb := discardedAt(a), discardedAt(b)
		if pa.Less(pb) {
			return -1
		}
		return 1
	})
	for len(found) >= discardFilesMax {
		if err := rp.opt.FS.Remove(filepath.Join(rp.opt.Dir, found[0])); err != nil {
			rp.logger.Warn("remove an old file of discarded entries", "file", found[0], "error", err)
		}
		found = found[1:]
	}
}

// discardedAt returns the position that a file is named after; the zero one for
// a name that is not ours.
func discardedAt(name string) (p ident.Position) {
	if _, err := fmt.Sscanf(name, discardPrefix+"%d-%d", &p.Epoch, &p.Seq); err != nil {
		return ident.Position{}
	}
	return p
}
