package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestAloneAfterARestart: a node that is started while the others are down knows
// that it is a member, and does not say that there is no cluster as yet.
func TestAloneAfterARestart(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, "")
	alpha := nodes["alpha"]
	alpha.create("db", 8<<20)
	for _, n := range nodes {
		n.halt()
	}
	alpha.start()
	alpha.eventually(20*time.Second, "it says what it waits for", func(ctx context.Context) error {
		_, err := alpha.client.Status(ctx)
		if err == nil {
			return errors.New("it knows all")
		}
		if !strings.Contains(err.Error(), "has not heard the cluster state since its start") || !strings.Contains(err.Error(), "start the nodes that are down") {
			return fmt.Errorf("it says: %w", err)
		}
		return nil
	})
}
