package store

import (
	"encoding/hex"
	"errors"
	"flag"
	iofs "io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

// golden compares bytes with a hex dump in testdata. A difference means that
// the format has changed: that needs a new version, not a new golden file.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	text := hex.Dump(got)
	if *rewrite {
		must(t, os.WriteFile(path, []byte(text), 0o644))
	}
	want, err := os.ReadFile(path)
	must(t, err)
	if text != string(want) {
		t.Fatalf("%s: the bytes differ:\n%s", name, text)
	}
}

func someMeta() Meta {
	return Meta{
		Cluster: "prod", Node: "alpha", Name: "db", Volume: 0xfedcba9876543210, Replica: 0xffffffffffffffff,
		Size: 10 << 30, Path: "/dev/vdb", Incarnation: 7, Promise: 42, LeaseMaxNanos: 5e9,
		BootID: "6c1f2c0e-8f3e-4d5b-9a53-1b1f6c0f7a11", Clean: true, Amnesiac: true, Inconsistent: true, Failed: "fdatasync: EIO",
	}
}

func TestMetaGolden(t *testing.T) {
	b, err := encodeMeta(someMeta(), 9)
	must(t, err)
	m, generation, err := decodeMeta(b)
	must(t, err)
	if generation != 9 || m != someMeta() {
		t.Fatalf("decoded %d, %+v", generation, m)
	}
	golden(t, "meta-v1.golden", b[:len(b)-len(trailingZeros(b))])
}

func trailingZeros(b []byte) []byte {
	i := len(b)
	for i > 0 && b[i-1] == 0 {
		i--
	}
	return b[i:]
}

func TestMetaFile(t *testing.T) {
	each(t, func(t *testing.T, fs vfs.FS, dir string) {
		path := filepath.Join(dir, "meta")
		if _, err := OpenMeta(fs, path); !errors.Is(err, iofs.ErrNotExist) {
			t.Fatalf("opened nothing: %v", err)
		}
		mf, err := CreateMeta(fs, path, someMeta())
		must(t, err)
		m := mf.Load()
		for range 5 {
			m.Promise++
			must(t, mf.Write(m))
		}
		must(t, mf.Close())
		if _, err := CreateMeta(fs, path, Meta{}); !errors.Is(err, iofs.ErrExist) {
			t.Fatalf("made over another: %v", err)
		}
		mf, err = OpenMeta(fs, path)
		must(t, err)
		if mf.Load() != m {
			t.Fatalf("loaded %+v, want %+v", mf.Load(), m)
		}
		m.Failed = strings.Repeat("x", 1<<20)
		must(t, mf.Write(m))
		m.Path = strings.Repeat("x", 1<<20)
		if err := mf.Write(m); err == nil {
			t.Fatal("wrote what does not fit")
		}
		m.Path = ""
		must(t, mf.Write(m)) // that was no failure of the disk
		must(t, mf.Close())
	})
}

// A promise that Write has returned for survives the loss of either slot, and
// any crash ends in the old or the new one.
func TestMetaSurvivesCrashAndOneBadSlot(t *testing.T) {
	for seed := range uint64(300) {
		mem := vfs.NewMem(seed)
		off, left := errors.New("off"), -1
		fs := vfs.Inject(mem, func(c vfs.Call) error {
			if c.Op.Mutates() && left >= 0 {
				if left--; left < 0 {
					left = 0
					return off
				}
			}
			return nil
		})
		mf, err := CreateMeta(fs, "/meta", Meta{Promise: 1})
		must(t, err)
		left = int(seed % 23)
		promised := ident.Epoch(1)
		for err == nil {
			if err = mf.Write(Meta{Promise: promised + 1}); err == nil {
				promised++
			}
		}
		if !errors.Is(err, ErrFailed) || !errors.Is(mf.Write(Meta{}), ErrFailed) {
			t.Fatalf("seed %d: %v, want ErrFailed for ever", seed, err)
		}
		mem.Crash()
		mf, err = OpenMeta(mem, "/meta")
		must(t, err)
		if got := mf.Load().Promise; got != promised && got != promised+1 {
			t.Fatalf("seed %d: promise %d after a crash, want %d or one more", seed, got, promised)
		}
		// Now each slot alone.
		m := Meta{Promise: promised + 5}
		must(t, mf.Write(m))
		for slot := range int64(2) {
			c := mem.Clone(seed)
			must(t, c.Corrupt("/meta", slot*metaSlotSize+40, []byte{0xff}))
			mf, err := OpenMeta(c, "/meta")
			must(t, err)
			if mf.Load() != m {
				t.Fatalf("seed %d: without slot %d: %+v", seed, slot, mf.Load())
			}
		}
		must(t, mem.Corrupt("/meta", 40, []byte{0xff}))
		must(t, mem.Corrupt("/meta", metaSlotSize+40, []byte{0xff}))
		if _, err := OpenMeta(mem, "/meta"); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("seed %d: two bad slots: %v", seed, err)
		}
	}
}

func TestMetaNewerIsNotCorrupt(t *testing.T) {
	b, err := encodeMeta(Meta{}, 3)
	must(t, err)
	body := b[:len(b)-len(trailingZeros(b))]
	sealFrame(body, metaMagic, metaVersion+1, 3)
	if _, _, err := decodeMeta(b); !errors.Is(err, ErrNewer) || errors.Is(err, ErrCorrupt) {
		t.Fatalf("%v", err)
	}
}

func FuzzMeta(f *testing.F) {
	b, err := encodeMeta(someMeta(), 9)
	must(f, err)
	f.Add(b, false)
	f.Add(b, true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if n := len(trailingZeros(b)); fix && len(b)-n >= frameHeaderSize {
			sealFrame(b[:len(b)-n], metaMagic, metaVersion, 1)
		}
		m, generation, err := decodeMeta(b)
		if err != nil {
			return
		}
		again, err := encodeMeta(m, generation)
		if err != nil {
			return // a name that fits only when it is not escaped
		}
		m2, g2, err := decodeMeta(again)
		if err != nil || g2 != generation || len(m.Failed) <= failedMax && !reflect.DeepEqual(m, m2) {
			t.Fatalf("decoded %+v, then %+v, %v", m, m2, err)
		}
	})
}
