package raft

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	hraft "github.com/hashicorp/raft"
)

// Wherever a bit of the Raft log's file flips, it opens or says what is wrong:
// it does not panic.
func TestADamagedRaftLogIsAnError(t *testing.T) {
	dir := t.TempDir()
	file := func(dir string) string { return filepath.Join(dir, raftDir, boltFile) }
	if err := os.MkdirAll(filepath.Join(dir, raftDir), 0o700); err != nil {
		t.Fatal(err)
	}
	bolt, err := openBolt(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := uint64(1); i <= 300; i++ {
		if i == 150 {
			i = 200 // as behind a snapshot that was installed
		}
		if err := bolt.StoreLog(&hraft.Log{Index: i, Term: 2, Data: []byte(strings.Repeat("x", int(i)))}); err != nil {
			t.Fatal(err)
		}
	}
	if err := bolt.Close(); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(file(dir))
	if err != nil {
		t.Fatal(err)
	}
	if bolt, err = openBolt(dir); err != nil {
		t.Fatalf("with nothing wrong: %v", err)
	}
	if err := bolt.Close(); err != nil {
		t.Fatal(err)
	}
	damaged := 0
	for seed := range uint64(150) {
		rng := rand.New(rand.NewPCG(seed, 1))
		b := append([]byte(nil), good...)
		for range 1 + rng.IntN(20) {
			b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
		}
		dir := filepath.Join(dir, fmt.Sprint(seed))
		if err := os.MkdirAll(filepath.Join(dir, raftDir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file(dir), b, 0o600); err != nil {
			t.Fatal(err)
		}
		bolt, err := openBolt(dir)
		switch {
		case err == nil:
			err = bolt.Close()
		case strings.Contains(err.Error(), "damaged") && strings.Contains(err.Error(), "node replace"):
			damaged++
			err = nil
		}
		if err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
	if damaged == 0 {
		t.Error("none of them was found damaged")
	}
	t.Logf("%d of 150 are damaged", damaged)
}

// TestTheRaftLogHasRoom: what fills the disk leaves the Raft log its room, which its
// file does not show, and which is there still when the log has grown into it.
func TestTheRaftLogHasRoom(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, raftDir), 0o700); err != nil {
		t.Fatal(err)
	}
	taken := func() (size, blocks int64) {
		t.Helper()
		var s syscall.Stat_t
		if err := syscall.Stat(filepath.Join(dir, raftDir, boltFile), &s); err != nil {
			t.Fatal(err)
		}
		return s.Size, s.Blocks * 512
	}
	for round := range uint64(3) {
		bolt, err := openBolt(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := reserveBolt(dir); err != nil {
			t.Fatal(err)
		}
		size, blocks := taken()
		if round == 0 && blocks < size {
			t.Skip("the file system of the temporary directory has no fallocate that keeps the size")
		}
		if size >= boltReserve || blocks < boltReserve {
			t.Errorf("round %d: %d bytes, and %d on the disk, want %d", round, size, blocks, boltReserve)
		}
		for i := round * 100; i < round*100+100; i++ {
			if err := bolt.StoreLog(&hraft.Log{Index: i + 1, Term: 1, Data: make([]byte, 4096)}); err != nil {
				t.Fatal(err)
			}
		}
		if grown, blocks := taken(); grown < size || blocks > boltReserve+boltReserve/8 {
			t.Errorf("round %d: %d bytes, %d before, and %d on the disk", round, grown, size, blocks)
		}
		if err := bolt.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
