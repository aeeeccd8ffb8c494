package daemon

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/blockstep/blockstep/internal/buf"
	"github.com/blockstep/blockstep/nbd"
)

const (
	// memoryBase is what a node may hold besides its volumes: payloads of its
	// clients' requests (memory.nbd, 32 MiB), buffers of connections and links, the
	// cluster state, and the runtime's own.
	memoryBase = 64 << 20
	// trimEvery is how long a free payload buffer is kept that nobody needs.
	trimEvery = 10 * time.Second
)

// memoryBudget is what this node may hold at the most: memory.volume for each of
// its volumes, over a base.
func (d *Daemon) memoryBudget() int64 {
	d.vmu.RLock()
	n := len(d.vols)
	d.vmu.RUnlock()
	return memoryBase + int64(n)*d.cfg.Memory.Volume
}

// setMemory tells the runtime and the buffers the budget, when a volume comes or
// goes. The bounds of what is in use are those of its holders (replication.Limits,
// nbd.Limits): this one keeps free buffers and garbage from adding to it.
func (d *Daemon) setMemory() {
	budget := d.memoryBudget()
	buf.SetKeep(budget - memoryBase/2)
	if d.hooks.MemoryLimit != nil {
		d.hooks.MemoryLimit(budget)
	}
}

var (
	descBudget = desc("memory_budget_bytes", "What this node may hold in memory: 64 MiB, and memory.volume for each of its volumes.")
	descMemory = desc("memory_bytes", "Payloads in memory by who holds them: requests, overlay, ring, links, free. A payload may have several holders; blockstep_buffer_bytes counts each once.", "kind")
)

// collectMemory shows the budget and who holds what of it.
func (c *collector) collectMemory(ch chan<- prometheus.Metric, st *nbd.Stats) {
	d := c.d
	gauge(ch, descBudget, float64(d.memoryBudget()))
	gauge(ch, descBuffers, float64(buf.InUse()))
	var overlay, ring, links int64
	d.vmu.RLock()
	for _, v := range d.vols {
		o, r := v.driver.Memory()
		overlay, ring = overlay+o, ring+r
	}
	d.vmu.RUnlock()
	for _, l := range d.links.Status() {
		links += int64(l.QueueBytes)
	}
	for kind, n := range map[string]int64{
		"requests": st.PayloadBytes, "overlay": overlay, "ring": ring, "links": links, "free": buf.Idle(),
	} {
		gauge(ch, descMemory, float64(n), kind)
	}
}
