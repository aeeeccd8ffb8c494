package replication

import (
	"errors"
	iofs "io/fs"
	"testing"

	"github.com/blockstep/blockstep/internal/vfs"
	"github.com/blockstep/blockstep/replication/store"
)

// oneReplica makes a replica whose backing store is at path ("" is the usual
// place), and returns the options to open it with.
func oneReplica(t *testing.T, c *testCluster, mem *vfs.Mem, path string) Options {
	t.Helper()
	n := &testNode{c: c, name: "n1", mem: mem, fs: mem, boot: "boot-1"}
	o := n.options()
	o.Replica.Store = path
	if err := mem.MkdirAll("/mnt"); err != nil {
		t.Fatal(err)
	}
	if _, err := CreateReplica(t.Context(), o, 8<<20); err != nil {
		t.Fatal(err)
	}
	return o
}

// metaOf reads a replica's meta.
func metaOf(t *testing.T, mem *vfs.Mem) store.Meta {
	t.Helper()
	mf, err := store.OpenMeta(mem, "/v/meta")
	if err != nil {
		t.Fatal(err)
	}
	defer mf.Close()
	return mf.Load()
}

// A replica whose backing device is not there, or not as it was, has not started:
// however often it is tried, its meta stays what it was, mark of the clean stop
// included, and it opens whole when the device is there again.
func TestDeviceThatComesLate(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := &testCluster{t: t, size: 8 << 20}
		mem := vfs.NewMem(1)
		o := oneReplica(t, c, mem, "/mnt/disk")
		v, err := Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if err := v.Stop(); err != nil {
			t.Fatal(err)
		}
		was := metaOf(t, mem)
		if !was.Clean || was.Incarnation != 1 {
			t.Fatalf("after a clean stop: %+v", was)
		}
		o.Replica.BootID = "boot-2" // without the mark it would be amnesiac from now on
		for what, step := range map[string]struct {
			spoil, mend func() error
			cause       error
		}{
			"not there": {
				func() error { return mem.Rename("/mnt/disk", "/mnt/away") },
				func() error { return mem.Rename("/mnt/away", "/mnt/disk") }, iofs.ErrNotExist,
			},
			"too small": {
				func() error { return truncate(mem, "/mnt/disk", 4<<20) },
				func() error { return truncate(mem, "/mnt/disk", 8<<20) }, store.ErrSize,
			},
		} {
			if err := step.spoil(); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if v, err := Open(t.Context(), o); !errors.Is(err, ErrDevice) || !errors.Is(err, step.cause) {
					t.Fatalf("%s: %v, %v", what, v, err)
				}
			}
			if got := metaOf(t, mem); got != was {
				t.Errorf("%s: the meta is %+v, was %+v", what, got, was)
			}
			if err := step.mend(); err != nil {
				t.Fatal(err)
			}
		}
		if v, err = Open(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		if st := v.Status().Core; st.State == "Failed" || metaOf(t, mem).Amnesiac {
			t.Errorf("with its device: %+v, %+v", st, metaOf(t, mem))
		}
		if err := v.Stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// The sparse file in the replica's own directory comes from nowhere else: when it
// is gone, or has lost its end, the replica has failed and stays so.
func TestSparseFileThatIsGone(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		for what, spoil := range map[string]func(*vfs.Mem) error{
			"gone":      func(mem *vfs.Mem) error { return mem.Remove("/v/data") },
			"truncated": func(mem *vfs.Mem) error { return truncate(mem, "/v/data", 4<<20) },
		} {
			c := &testCluster{t: t, size: 8 << 20}
			mem := vfs.NewMem(1)
			o := oneReplica(t, c, mem, "")
			if err := spoil(mem); err != nil {
				t.Fatal(err)
			}
			v, err := Open(t.Context(), o)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if st := v.Status(); st.Core.State != "Failed" || metaOf(t, mem).Failed == "" || len(c.fails) != 1 {
				t.Errorf("%s: %+v, failed %q, told %d times", what, st, metaOf(t, mem).Failed, len(c.fails))
			}
			if err := v.Stop(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// A replica that failed is taken back at an operator's word: as amnesiac, and with
// its log and checkpoint written anew, since after an fsync that failed the page
// cache may show of them what no disk has. One that does not verify stays failed.
func TestReadmit(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := &testCluster{t: t, size: 8 << 20}
		mem := vfs.NewMem(1)
		o := oneReplica(t, c, mem, "")
		old, copied := map[string]bool{}, "" // files that were there, and were not replaced yet
		o.Replica.FS = vfs.Inject(mem, func(call vfs.Call) error {
			switch {
			case call.Op == vfs.OpOpen && old[call.Path]:
				copied = call.Path
			case call.Op == vfs.OpRename:
				delete(old, copied)
			}
			return nil
		})
		fail := func() {
			t.Helper()
			mf, err := store.OpenMeta(mem, "/v/meta")
			if err != nil {
				t.Fatal(err)
			}
			m := mf.Load()
			m.Failed = "fsync the log: no more sectors"
			if err := errors.Join(mf.Write(m), mf.Close()); err != nil {
				t.Fatal(err)
			}
		}
		fail()
		v, err := Open(t.Context(), o)
		if err != nil || v.Status().Core.State != "Failed" {
			t.Fatalf("a failed replica opens as %+v, %v", v.Status().Core, err)
		}
		logs, err := mem.List("/v/log")
		if err != nil || len(logs) == 0 {
			t.Fatalf("%v, %v", logs, err)
		}
		for _, n := range logs {
			old["/v/log/"+n] = true
		}
		old["/v/checkpoint.0"], old["/v/checkpoint.1"] = true, true
		if err := v.Readmit(*o.Replica); err != nil {
			t.Fatal(err)
		}
		if m := metaOf(t, mem); v.Status().Core.State == "Failed" || m.Failed != "" || !m.Amnesiac {
			t.Errorf("taken back: %+v, %+v", v.Status().Core, m)
		}
		if len(old) > 0 {
			t.Errorf("not written anew: %v", old)
		}
		v.Kill()
		fail()
		if v, err = Open(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		if err := mem.Remove("/v/data"); err != nil {
			t.Fatal(err)
		}
		if err := v.Readmit(*o.Replica); err == nil || metaOf(t, mem).Failed == "" {
			t.Errorf("without its content it is taken back: %v, %+v", err, metaOf(t, mem))
		}
		if err := v.Stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func truncate(fs vfs.FS, path string, size int64) error {
	f, err := fs.Open(path, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}
