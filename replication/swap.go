package replication

import (
	"errors"
	"fmt"
)

// ErrHasReplica is returned by SetReplica when this node's replica runs.
var ErrHasReplica = errors.New("this node has a replica of the volume already: stop it first")

// StopReplica ends this node's replica, which has been given up, as a crash of
// the process would. Clients go on by the other replicas. Until SetReplica the
// node answers nothing for it. It must not be the primary.
func (v *Volume) StopReplica() error {
	v.swap.Lock()
	defer v.swap.Unlock()
	v.cmu.Lock()
	rp := v.rep()
	v.failed = nil
	v.primaryHere.Store(false)
	v.cmu.Unlock()
	if rp == nil {
		return nil
	}
	rp.reopening.Store(false)
	if err := rp.stop(false); err != nil {
		return fmt.Errorf("stop the replica of volume %s: %w", v.opts.Name, err)
	}
	return nil
}

// SetReplica opens a replica (made by CreateReplica) on a node that had none, or
// in the place of one that StopReplica has ended. Sessions go on.
func (v *Volume) SetReplica(ro ReplicaOptions) error {
	v.swap.Lock()
	defer v.swap.Unlock()
	if rp := v.rep(); rp != nil && !rp.stopping.Load() {
		return ErrHasReplica
	}
	rp, err := openReplica(v, ro)
	var failed *failedError
	if errors.As(err, &failed) {
		v.opts.Cluster.MarkFailed(v.opts.Volume, failed.id, failed.reason)
	}
	if err != nil {
		return fmt.Errorf("open the replica of volume %s: %w", v.opts.Name, err)
	}
	v.cmu.Lock()
	stopped := v.stopped
	v.failed, v.opts.Replica = nil, &ro
	v.cmu.Unlock()
	if stopped {
		return errors.Join(ErrClosed, rp.close())
	}
	v.install(rp)
	return nil
}
