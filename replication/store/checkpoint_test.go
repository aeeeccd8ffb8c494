package store

import (
	"errors"
	iofs "io/fs"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/vfs"
)

func someCheckpoint() Checkpoint {
	return Checkpoint{
		Generation: 9, Applied: ident.Position{Epoch: 5, Seq: 1234}, DedupFloor: ident.Position{Epoch: 4, Seq: 1000},
		History: []ident.EpochStart{{Epoch: 3, First: 900}, {Epoch: 5, First: 1100}},
		Dedup:   []DedupEntry{{Session: 1, Request: 2, Seq: 1001}, {Session: 0xffffffffffffffff, Request: 3, Seq: 1002}},
		Bitmaps: []Bitmap{
			{Node: "gamma", Replica: 77, Base: ident.Position{Epoch: 4, Seq: 950}, Data: []byte("bits")},
			{Node: "", Replica: 78, Data: []byte{}},
		},
	}
}

func TestCheckpointGolden(t *testing.T) {
	c := someCheckpoint()
	b, err := encodeCheckpoint(nil, &c)
	must(t, err)
	back, err := decodeCheckpoint(b)
	must(t, err)
	if !reflect.DeepEqual(c, back) {
		t.Fatalf("decoded %+v, want %+v", back, c)
	}
	golden(t, "checkpoint-v1.golden", b)
	for n := range b { // each prefix is refused, none panics
		if _, err := decodeCheckpoint(b[:n]); err == nil {
			t.Fatalf("decoded %d bytes of %d", n, len(b))
		}
	}
}

func TestCheckpointFile(t *testing.T) {
	each(t, func(t *testing.T, fs vfs.FS, dir string) {
		path := filepath.Join(dir, "checkpoint")
		if _, err := OpenCheckpoint(fs, path); !errors.Is(err, iofs.ErrNotExist) {
			t.Fatalf("opened nothing: %v", err)
		}
		cf, err := CreateCheckpoint(fs, path, Checkpoint{})
		must(t, err)
		c := someCheckpoint()
		c.Bitmaps[0].Data = make([]byte, 3<<20)
		must(t, cf.Write(c))
		must(t, cf.Write(c))
		c = someCheckpoint()
		must(t, cf.Write(c)) // both slots shrink
		must(t, cf.Write(c))
		must(t, cf.Close())
		cf, err = OpenCheckpoint(fs, path)
		must(t, err)
		c.Generation = cf.Load().Generation
		if got := cf.Load(); !reflect.DeepEqual(got, c) || c.Generation != 6 {
			t.Fatalf("loaded %+v", got)
		}
		must(t, cf.Close())
		f, err := fs.Open(path+".0", vfs.ReadOnly)
		must(t, err)
		if n, err := f.Size(); err != nil || n > 1<<20 {
			t.Fatalf("a slot that has shrunk takes %d bytes: %v", n, err)
		}
		must(t, f.Close())
	})
}

// After any crash the checkpoint is the last one written or the one that was
// being written; with one slot damaged it is at worst the one before.
func TestCheckpointSurvivesCrash(t *testing.T) {
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
		cf, err := CreateCheckpoint(fs, "/cp", Checkpoint{})
		must(t, err)
		left = int(seed % 23)
		applied := ident.Seq(0)
		for err == nil {
			c := someCheckpoint()
			c.Applied.Seq = applied + 1
			c.Bitmaps[0].Data = make([]byte, (seed+uint64(applied)*977)%9000)
			if err = cf.Write(c); err == nil {
				applied++
			}
		}
		if !errors.Is(err, ErrFailed) || !errors.Is(cf.Write(Checkpoint{}), ErrFailed) {
			t.Fatalf("seed %d: %v, want ErrFailed for ever", seed, err)
		}
		mem.Crash()
		cf, err = OpenCheckpoint(mem, "/cp")
		must(t, err)
		got := cf.Load()
		if got.Applied.Seq != applied && got.Applied.Seq != applied+1 {
			t.Fatalf("seed %d: applied %d after a crash, want %d or one more", seed, got.Applied.Seq, applied)
		}
		must(t, cf.Write(got)) // both slots are valid now
		must(t, cf.Write(got))
		for _, slot := range []string{"/cp.0", "/cp.1"} {
			c := mem.Clone(seed)
			must(t, c.Corrupt(slot, 33, []byte{0xff, 0xff}))
			cf, err := OpenCheckpoint(c, "/cp")
			must(t, err)
			if cf.Load().Applied != got.Applied {
				t.Fatalf("seed %d: without %s: %+v", seed, slot, cf.Load().Applied)
			}
			must(t, c.Corrupt("/cp.0", 33, []byte{0xff, 0xff}))
			must(t, c.Corrupt("/cp.1", 33, []byte{0xff, 0xff}))
			if _, err := OpenCheckpoint(c, "/cp"); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("seed %d: two bad slots: %v", seed, err)
			}
		}
		must(t, mem.Remove("/cp.1"))
		if _, err := OpenCheckpoint(mem, "/cp"); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("seed %d: a slot is gone: %v", seed, err)
		}
	}
}

func TestCheckpointNewerIsNotCorrupt(t *testing.T) {
	c := someCheckpoint()
	b, err := encodeCheckpoint(nil, &c)
	must(t, err)
	sealFrame(b, checkpointMagic, checkpointVersion+1, 3)
	if _, err := decodeCheckpoint(b); !errors.Is(err, ErrNewer) || errors.Is(err, ErrCorrupt) {
		t.Fatalf("%v", err)
	}
}

func FuzzCheckpoint(f *testing.F) {
	c := someCheckpoint()
	b, err := encodeCheckpoint(nil, &c)
	must(f, err)
	f.Add(b, false)
	f.Add(b, true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix && len(b) >= frameHeaderSize {
			sealFrame(b, checkpointMagic, checkpointVersion, 1)
		}
		c, err := decodeCheckpoint(b)
		if err != nil {
			return
		}
		again, err := encodeCheckpoint(nil, &c)
		must(t, err)
		c2, err := decodeCheckpoint(again)
		if err != nil || !reflect.DeepEqual(c, c2) {
			t.Fatalf("decoded %+v, then %+v, %v", c, c2, err)
		}
	})
}
