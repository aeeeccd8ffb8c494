package daemon

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/vfs"
)

// TestDeleteWhileZeroing: a device that is being zeroed for a volume that is
// deleted meanwhile is zeroed no further, and free when the delete returns.
func TestDeleteWhileZeroing(t *testing.T) {
	t.Parallel()
	const size, parts = 64 << 30, 1024
	nodes := newCluster(t, "")
	alpha, beta := nodes["alpha"], nodes["beta"]
	disk := alpha.dir + ".disk"
	f, err := os.Create(disk)
	if err != nil {
		t.Fatal(err)
	}
	err = f.Truncate(size)
	for i := range int64(parts) {
		_, werr := f.WriteAt([]byte("junk"), i*size/parts)
		err = errors.Join(err, werr)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	var zeroed atomic.Int64
	begun, goOn := make(chan struct{}), make(chan struct{})
	alpha.faults.mu.Lock()
	alpha.faults.rule = func(c vfs.Call) error {
		if c.Op == vfs.OpZero && c.Path == disk {
			if zeroed.Add(1) == 1 {
				close(begun)
			}
			<-goOn
			time.Sleep(10 * time.Millisecond) // the device's speed
		}
		return nil
	}
	alpha.faults.held = make(chan struct{})
	alpha.faults.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	created := make(chan error, 1)
	go func() {
		_, err := beta.client.CreateVolume(ctx, control.CreateVolume{Name: "db", Size: size, Replicas: []string{"alpha"}, Devices: map[string]string{"alpha": disk}})
		created <- err
	}()
	<-begun
	cancel()
	<-created
	close(goOn)
	if err := beta.client.DeleteVolume(t.Context(), "db"); err != nil {
		t.Fatal(err)
	}
	if n := zeroed.Load(); n > parts/2 {
		t.Errorf("the delete took until %d of %d parts were zeroed", n, parts)
	}
	if err := alpha.daemon.Load().checkDevice(disk, size); err != nil {
		t.Errorf("after the delete the device is: %v", err)
	}
}
