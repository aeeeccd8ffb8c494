package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
)

// TestOnWithFewer: a volume that may not go on without any of its two replicas is named
// by doctor. When one of them is gone, be it the primary, status names the command with
// which the other goes on, and that is enough.
func TestOnWithFewer(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	gamma := nodes["gamma"]
	if _, err := gamma.client.CreateVolume(t.Context(), control.CreateVolume{Name: "db", Size: 8 << 20, Replicas: []string{"alpha", "beta"}, MinCopy: 2}); err != nil {
		t.Fatal(err)
	}
	for _, primary := range []string{"alpha", "beta"} {
		gamma.healthy("db")
		if _, err := gamma.client.Switchover(t.Context(), "db", control.Switchover{To: primary}); err != nil {
			t.Fatal(err)
		}
		two := 2
		if _, err := gamma.client.SetOptions(t.Context(), "db", control.SetOptions{MinCopies: &two}); err != nil {
			t.Fatal(err)
		}
		list, err := gamma.client.Doctor(t.Context())
		if err != nil || !slices.ContainsFunc(list, func(f control.Finding) bool {
			return f.Check == "copies of db" && f.State == control.FindingWarn && strings.Contains(f.Next, "blockstep volume set db --min-copies 1")
		}) {
			t.Errorf("%+v, %v", list, err)
		}
		nodes["beta"].halt()
		gamma.eventually(30*time.Second, "the way on is named", func(ctx context.Context) error {
			v, err := gamma.client.VolumeStatus(ctx, "db")
			if err == nil && (v.Health != control.Suspended || !strings.Contains(v.Reason, "to go on with alpha alone: blockstep volume set db --min-copies 1")) {
				err = fmt.Errorf("%s: %s", v.Health, v.Reason)
			}
			return err
		})
		one := 1
		if _, err := gamma.client.SetOptions(t.Context(), "db", control.SetOptions{MinCopies: &one}); err != nil {
			t.Fatal(err)
		}
		gamma.eventually(30*time.Second, "it goes on", func(ctx context.Context) error {
			v, err := gamma.client.VolumeStatus(ctx, "db")
			if err == nil && (v.Health != control.Degraded || v.Primary != "alpha") {
				err = fmt.Errorf("%s: %s", v.Health, v.Reason)
			}
			return err
		})
		nodes["beta"].start()
	}
}

// TestStatusOfAResyncThatIsWaitedFor: one of two good replicas goes while the third is
// copied. The primary that is left serves nobody until that is done, and status says so,
// with the progress; it does not send the operator to the node that is gone.
func TestStatusOfAResyncThatIsWaitedFor(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "volume: {log_retention: 1MiB}\n")
	alpha, beta := nodes["alpha"], nodes["beta"]
	alpha.create("db", 64<<20)
	if _, err := alpha.client.Switchover(t.Context(), "db", control.Switchover{To: "alpha"}); err != nil {
		t.Fatal(err)
	}
	alpha.healthy("db")
	c, content, r := beta.open("db"), make([]byte, 1<<20), rand.New(rand.NewPCG(3, 4))
	for i := range content {
		content[i] = byte(1 + r.IntN(255)) // no zeroes, which travel as such
	}
	// More than is applied before a checkpoint: then the log does not have it all.
	for i := range uint64(96) {
		if err := c.WriteAt(t.Context(), content, i%24<<20); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	alpha.healthy("db")
	rate := func(bytes int64) {
		t.Helper()
		beta.eventually(30*time.Second, "the rate is set", func(ctx context.Context) error {
			_, err := beta.client.SetOptions(ctx, "db", control.SetOptions{ResyncRateMax: &bytes, ResyncRateMin: &bytes})
			return err
		})
	}
	rate(256 << 10)
	gamma := func(v control.VolumeStatus) control.ReplicaStatus {
		for _, r := range v.Replicas {
			if r.Node == "gamma" {
				return r
			}
		}
		return control.ReplicaStatus{}
	}
	beta.eventually(60*time.Second, "gamma is resynced", func(ctx context.Context) error {
		v := beta.status("db")
		switch r := gamma(v); {
		case r.State == control.Resyncing && r.Resync != nil && r.Resync.TotalBytes > 0:
			return nil
		case v.Health == control.Healthy: // once the log does not have it all, it is
			return errors.Join(errors.New("it is in sync"), beta.client.Invalidate(ctx, "db", control.Invalidate{Node: "gamma"}))
		default:
			return fmt.Errorf("%+v", r)
		}
	})

	alpha.halt()
	beta.eventually(30*time.Second, "it says what it waits for", func(context.Context) error {
		v := beta.status("db")
		if v.Health != control.Suspended || !strings.Contains(v.Reason, "; it serves once the resync of gamma is done (") || !strings.Contains(v.Reason, "% of ") ||
			v.Next != "wait: it serves once gamma is in sync (blockstep wait db --for primary), or sooner when blockstepd runs on alpha again" {
			return fmt.Errorf("%s: %s; next: %s", v.Health, v.Reason, v.Next)
		}
		if r := gamma(v); r.Resync == nil || r.Resync.TotalBytes == 0 || r.DirtyBytes == 0 {
			t.Errorf("gamma: %+v", r)
		}
		return nil
	})
	rate(0)
	beta.eventually(60*time.Second, "it serves", func(context.Context) error {
		if v := beta.status("db"); v.Primary == "" {
			return errors.New(v.Reason)
		}
		return nil
	})
	if got := nodes["gamma"].read("db@gamma", 23<<20, 1<<20); string(got) != string(content) {
		t.Error("gamma has another content")
	}
}
