package daemon

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/blockstep/blockstep/internal/control"
	"github.com/blockstep/blockstep/internal/ident"
)

func recoverAt(t *testing.T, n *testNode, o RecoverOptions) (control.Recovery, error) {
	t.Helper()
	return Recover(t.Context(), n.config(), o, slog.New(slog.DiscardHandler))
}

// TestRecoverFromALostMajority: two of three nodes burn down. Nothing is
// recovered while it need not be; then the third goes on alone, its volume's
// data is there, and new machines take the places of the others.
func TestRecoverFromALostMajority(t *testing.T) {
	nodes := newCluster(t, "")
	alpha, beta, gamma := nodes["alpha"], nodes["beta"], nodes["gamma"]
	alpha.create("db", 4<<20)
	alpha.healthy("db")
	content := bytes.Repeat([]byte("all of it"), 1000)
	c := alpha.open("db")
	if err := c.WriteAt(t.Context(), content, 4096); err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	alpha.healthy("db")

	if _, err := recoverAt(t, alpha, RecoverOptions{}); err == nil || !strings.Contains(err.Error(), "in use by another blockstepd: stop it first") {
		t.Errorf("beside a running daemon: %v", err)
	}
	alpha.halt()
	if _, err := recoverAt(t, alpha, RecoverOptions{}); err == nil || !strings.Contains(err.Error(), "beta, gamma of 3 nodes answer(s)") {
		t.Errorf("with a majority that is up: %v", err)
	}
	if _, err := recoverAt(t, alpha, RecoverOptions{Keep: []string{"beta"}}); err == nil || !strings.Contains(err.Error(), "not among those that are kept") {
		t.Errorf("without itself: %v", err)
	}
	for _, n := range []*testNode{beta, gamma} {
		n.halt()
		if err := os.Rename(n.dir, n.dir+".old"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := recoverAt(t, beta, RecoverOptions{}); err == nil || !strings.Contains(err.Error(), "blockstep node replace beta") {
		t.Errorf("of an empty data_dir: %v", err)
	}
	look, err := recoverAt(t, alpha, RecoverOptions{Preview: true})
	if err != nil {
		t.Fatal(err)
	}
	done, err := recoverAt(t, alpha, RecoverOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(look) != fmt.Sprint(done) || fmt.Sprint(done.Keep, done.Lost) != "[alpha] [beta gamma]" || len(done.Volumes) != 1 ||
		done.Volumes[0].Next != "blockstep failover db --force --accept-data-loss" {
		t.Errorf("seen before %+v, done %+v", look, done)
	}

	alpha.start()
	alpha.eventually(30*time.Second, "it leads alone", func(ctx context.Context) error {
		s, err := alpha.client.Status(ctx)
		if err == nil && s.Leader != "alpha" {
			err = fmt.Errorf("the leader is %q", s.Leader)
		}
		return err
	})
	// Both of the others come back with what they had, which is a second cluster: it
	// does not lead this one back to where it was, and nobody sends for them.
	for _, n := range []*testNode{beta, gamma} {
		if err := os.Rename(n.dir+".old", n.dir); err != nil {
			t.Fatal(err)
		}
		n.start()
	}
	beta.eventually(30*time.Second, "the others lead themselves", func(ctx context.Context) error {
		s, err := beta.client.Status(ctx)
		if err == nil && s.Leader != "beta" && s.Leader != "gamma" {
			err = fmt.Errorf("the leader is %q", s.Leader)
		}
		return err
	})
	if s, err := alpha.client.Status(t.Context()); err != nil || s.Leader != "alpha" {
		t.Errorf("beside those who were given up: %+v, %v", s, err)
	}
	for _, n := range []*testNode{beta, gamma} {
		n.halt()
		if err := os.RemoveAll(n.dir); err != nil {
			t.Fatal(err)
		}
	}
	if st := alpha.status("db"); st.Next != "blockstep failover db --force --accept-data-loss" {
		t.Errorf("the next step is %q", st.Next)
	}
	for _, r := range alpha.status("db").Replicas {
		if r.Node != "alpha" && r.Reason != lostReason {
			t.Errorf("%+v is absent for another reason", r)
		}
	}
	list, err := alpha.client.Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range list {
		if lost := n.Name != "alpha"; n.Voter == lost || strings.Contains(n.Error, "blockstep node replace "+n.Name) != lost {
			t.Errorf("%+v", n)
		}
	}
	alpha.eventually(30*time.Second, "the volume has a primary", func(ctx context.Context) error {
		_, err := alpha.client.Failover(ctx, "db", control.Failover{Force: true, AcceptDataLoss: true})
		return err
	})
	// With min_copies 2 it answers nothing before there is a second copy.
	for _, n := range []*testNode{beta, gamma} {
		n.start()
		alpha.eventually(30*time.Second, n.name+" is replaced", func(ctx context.Context) error {
			_, err := alpha.client.ChangeNode(ctx, n.name, "replace")
			return err
		})
	}
	alpha.healthy("db")
	if got := alpha.read("db", 4096, len(content)); !bytes.Equal(got, content) {
		t.Error("the content is another one")
	}
	for _, n := range []*testNode{beta, gamma} {
		if got := n.read("db@"+n.name, 4096, len(content)); !bytes.Equal(got, content) {
			t.Errorf("%s has another content", n.name)
		}
	}
	alpha.hasEvent("cluster-recovered", "lost are beta, gamma")
}

// TestWhoWasGivenUpIsNoPeer: the nodes that a recovery gave up come back with what they
// had, and serve it, in newer epochs than the survivor's. They do not reach its replica:
// neither when they start, before they have heard their cluster's state, nor after.
func TestWhoWasGivenUpIsNoPeer(t *testing.T) {
	nodes := newCluster(t, "")
	alpha, beta, gamma := nodes["alpha"], nodes["beta"], nodes["gamma"]
	alpha.create("db", 4<<20)
	alpha.healthy("db")
	for _, n := range nodes {
		n.halt()
	}
	if _, err := recoverAt(t, alpha, RecoverOptions{}); err != nil {
		t.Fatal(err)
	}
	write := func(n *testNode, content []byte) {
		t.Helper()
		c := n.open("db")
		defer c.Close()
		if err := c.WriteAt(t.Context(), content, 4096); err != nil {
			t.Fatal(err)
		}
	}
	serve := func() {
		t.Helper()
		beta.start()
		gamma.start()
		beta.eventually(30*time.Second, "those who were given up serve what they had", func(ctx context.Context) error {
			v, err := beta.client.VolumeStatus(ctx, "db")
			if err == nil && v.Primary == "" {
				err = fmt.Errorf("%+v", v)
			}
			return err
		})
	}
	serve()
	write(beta, bytes.Repeat([]byte("of the others"), 1000))
	for _, to := range []string{"gamma", "beta", "gamma", "beta", "gamma", "beta"} {
		beta.eventually(30*time.Second, "a switchover among them", func(ctx context.Context) error {
			_, err := beta.client.Switchover(ctx, "db", control.Switchover{To: to})
			return err
		})
	}
	beta.halt()
	gamma.halt()

	alpha.start()
	alpha.eventually(30*time.Second, "the volume has a primary", func(ctx context.Context) error {
		_, err := alpha.client.Failover(ctx, "db", control.Failover{Force: true, AcceptDataLoss: true})
		return err
	})
	one := 1
	if _, err := alpha.client.SetOptions(t.Context(), "db", control.SetOptions{MinCopies: &one}); err != nil {
		t.Fatal(err)
	}
	content := bytes.Repeat([]byte("of the survivor"), 1000)
	write(alpha, content)
	serve()
	write(beta, bytes.Repeat([]byte("of the others again"), 1000))
	if v := alpha.status("db"); v.Primary != "alpha" || v.Replicas[0].State != control.InSync {
		t.Errorf("%+v", v)
	}
	if got := alpha.read("db", 4096, len(content)); !bytes.Equal(got, content) {
		t.Errorf("the survivor has %.30q", got)
	}
	if links := alpha.daemon.Load().links.Status(); len(links) != 0 {
		t.Errorf("alpha wants links: %+v", links)
	}
	for _, n := range []*testNode{beta, gamma} {
		if alpha.daemon.Load().linkUp(ident.Node(n.name)) || n.daemon.Load().linkUp("alpha") {
			t.Errorf("alpha and %s have a link", n.name)
		}
	}
}
