package replication

import (
	"fmt"
	"log/slog"
	"slices"
	"testing"

	"github.com/blockstep/blockstep/internal/vfs"
)

// TestTheOldestDiscardedFilesGo: by their numbers, not as text, where epoch 10
// comes before epoch 9.
func TestTheOldestDiscardedFilesGo(t *testing.T) {
	fs := vfs.NewMem(1)
	if err := fs.MkdirAll("/r"); err != nil {
		t.Fatal(err)
	}
	rp := &replica{opt: ReplicaOptions{FS: fs, Dir: "/r"}, logger: slog.New(slog.DiscardHandler)}
	for epoch := range discardFilesMax + 2 {
		f, err := fs.Open(fmt.Sprintf("/r/%s%d-%d", discardPrefix, epoch+1, 100-epoch), vfs.Create)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	rp.pruneDiscarded()
	names, err := fs.List("/r")
	if err != nil {
		t.Fatal(err)
	}
	if len(names) != discardFilesMax-1 || slices.Contains(names, "discarded-3-98") || !slices.Contains(names, "discarded-10-91") {
		t.Errorf("left are %v", names)
	}
}
