package replication

import (
	"testing"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/internal/vfs"
)

// TestOverwritesAreCheckpointed: a load that overwrites a few blocks again and again
// writes little to the backing store and all of it to the log, which is bounded all the
// same.
func TestOverwritesAreCheckpointed(t *testing.T) {
	const block = 64 << 10
	v, s := openLoneWith(t, 1<<20, Options{
		Replica: &ReplicaOptions{FS: vfs.OS(), LogSegment: 1 << 20, LogRetention: 1 << 20},
		Limits:  Limits{CheckpointMax: 4 << 20, UnappliedMax: 4 << 20},
	})
	most := int64(0)
	done := make(chan error, 1) // Complete must not block
	for range 1024 {            // 64 MiB
		r := &Request{Op: OpWrite, Length: block, Data: buf.Get(block), Complete: func(r *Request, err error) {
			r.Data.Release()
			done <- err
		}}
		s.Submit(r)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		most = max(most, v.rep().log.Bytes())
	}
	if most > 32<<20 {
		t.Errorf("the log has grown to %d MiB, with a checkpoint after 4 MiB and 4 MiB that may wait to be applied", most>>20)
	}
}
