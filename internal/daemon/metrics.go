package daemon

import (
	"fmt"
	"net"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/internal/version"
	"github.com/blockstep/blockstep/nbd"
	"github.com/blockstep/blockstep/replication"
)

// metricsServer serves /metrics, /healthz and /readyz.
type metricsServer struct{ http *http.Server }

// close may be called on nil.
func (m *metricsServer) close() {
	if m != nil {
		_ = m.http.Close() // scrapes come again
	}
}

func (d *Daemon) openMetrics() error {
	address := d.cfg.Metrics.Listen
	if address == "" {
		return nil
	}
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return listenError("metrics.listen", address, err)
	}
	// A registry of its own: the demo runs three daemons in one process.
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), &collector{d: d})
	h := http.NewServeMux()
	h.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	h.HandleFunc("GET /healthz", answer("ok", d.dead))
	h.HandleFunc("GET /readyz", answer("ready", d.notReady))
	d.metrics = &metricsServer{newHTTPServer(h, d.log)}
	d.wg.Go(func() {
		_ = d.metrics.http.Serve(ln) // it ends with close
	})
	return nil
}

// answer makes a handler that says fine, or why it is not, with 503.
func answer(fine string, wrong func() string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if why := wrong(); why != "" {
			http.Error(w, why, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, fine)
	}
}

// notReady says why clients had better use another node; "" when this one is as
// good as any.
func (d *Daemon) notReady() string {
	if d.leaving.Load() {
		return "this node is stopping"
	}
	if d.state().ClusterID == "" && d.raft.Founding().Done {
		return "this node has not heard the cluster state since its start"
	}
	if d.state().ClusterID == "" {
		return "the cluster is not founded yet: " + d.raft.Founding().Waiting
	}
	if leader, _ := d.raft.Leader(); leader == "" {
		return "this node knows no Raft leader"
	}
	for _, sv := range d.state().Live() {
		if d.volume(sv.ID) == nil {
			return "volume " + sv.Name + " is not open yet"
		}
	}
	return ""
}

// collector reads the figures when they are scraped, so that no request pays.
type collector struct{ d *Daemon }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("blockstep_"+name, help, labels, nil)
}

var (
	descInfo       = desc("build_info", "The version that runs; always 1.", "version")
	descLeader     = desc("raft_leader", "1 on the node that leads the cluster state.")
	descBuffers    = desc("buffer_bytes", "Payload buffers in use.")
	descLink       = desc("link_up", "1 when the link to the peer is up.", "peer")
	descLinkRTT    = desc("link_rtt_seconds", "Round trip of the last ping to the peer.", "peer")
	descLinkSent   = desc("link_sent_bytes_total", "Bytes sent to the peer.", "peer")
	descLinkRecv   = desc("link_received_bytes_total", "Bytes received from the peer.", "peer")
	descLinkQueue  = desc("link_queue_bytes", "Bytes that wait to be sent to the peer.", "peer")
	descConns      = desc("nbd_connections", "NBD connections now.")
	descOpBytes    = desc("nbd_bytes_total", "Bytes of successful NBD requests.", "op")
	descOpErrors   = desc("nbd_errors_total", "NBD requests that ended with an error.", "op")
	descOpLatency  = desc("nbd_request_seconds", "Time from request to reply.", "op")
	descPrimary    = desc("volume_primary", "1 on the node that serves the volume; 0 on all while it is suspended.", "volume")
	descEpoch      = desc("volume_epoch", "The volume's epoch.", "volume")
	descSize       = desc("volume_size_bytes", "The volume's size.", "volume")
	descStage      = desc("stage_seconds", "Time that a stage of a request's way takes on this node: log_write, log_sync, commit, forward, apply, store_sync, read.", "volume", "stage")
	descSeq        = desc("volume_log_seq", "Seq of this replica: last, committed, durable, applied.", "volume", "what")
	descWaiting    = desc("volume_waiting_requests", "Requests that are held.", "volume")
	descLag        = desc("replica_lag_bytes", "How far a replica is behind, on the primary.", "volume", "replica")
	descDirty      = desc("replica_dirty_bytes", "What a replica misses, on the primary.", "volume", "replica")
	descInSync     = desc("replica_in_sync", "1 when the replica is in the in-sync set.", "volume", "replica")
	descReplicaBad = desc("replica_failed", "1 when the replica is marked failed.", "volume", "replica")
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) { ch <- descInfo }

func gauge(ch chan<- prometheus.Metric, d *prometheus.Desc, v float64, labels ...string) {
	ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

func counter(ch chan<- prometheus.Metric, d *prometheus.Desc, v float64, labels ...string) {
	ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
}

func flag(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	d := c.d
	gauge(ch, descInfo, 1, version.String())
	gauge(ch, descLeader, flag(d.raft.IsLeader()))
	for _, l := range d.links.Status() {
		n := string(l.Node)
		gauge(ch, descLink, flag(l.Connected && l.Heard), n)
		gauge(ch, descLinkRTT, l.RTT.Seconds(), n)
		gauge(ch, descLinkQueue, float64(l.QueueBytes), n)
		counter(ch, descLinkSent, float64(l.SentBytes), n)
		counter(ch, descLinkRecv, float64(l.RecvBytes), n)
	}
	c.collectNBD(ch)
	for _, sv := range d.state().Live() {
		gauge(ch, descEpoch, float64(sv.Epoch), sv.Name)
		gauge(ch, descSize, float64(sv.Size), sv.Name)
		for _, r := range sv.Replicas {
			gauge(ch, descInSync, flag(sv.InSet(r.Node)), sv.Name, string(r.Node))
			gauge(ch, descReplicaBad, flag(r.Failed), sv.Name, string(r.Node))
		}
		if v := d.volume(sv.ID); v != nil {
			c.collectVolume(ch, v, sv.Epoch)
		}
	}
}

func (c *collector) collectVolume(ch chan<- prometheus.Metric, v *volume, epoch ident.Epoch) {
	st := v.driver.Status()
	r := volumeReport{Reached: true, Replica: v.replica.Load(), Core: st.Core}
	gauge(ch, descPrimary, flag(r.servingAt(epoch)), v.name)
	gauge(ch, descWaiting, float64(st.Held+st.Core.Waiting), v.name)
	collectStages(ch, v)
	if !v.replica.Load() {
		return
	}
	gauge(ch, descSeq, float64(st.Core.Last.Seq), v.name, "last")
	gauge(ch, descSeq, float64(st.Core.Commit), v.name, "committed")
	gauge(ch, descSeq, float64(st.Core.Durable), v.name, "durable")
	gauge(ch, descSeq, float64(st.Core.Applied), v.name, "applied")
	for _, p := range st.Core.Peers {
		gauge(ch, descLag, float64(p.LagBytes), v.name, string(p.Node))
		gauge(ch, descDirty, float64(p.DirtyBytes), v.name, string(p.Node))
	}
}

// collectStages gives every second bucket: a node with a hundred volumes has a
// thousand such histograms.
func collectStages(ch chan<- prometheus.Metric, v *volume) {
	for stage, s := range v.driver.Stages() {
		buckets, sum := map[float64]uint64{}, uint64(0)
		for i := range replication.StageBuckets - 1 {
			sum += s.Buckets[i]
			if i%2 == 0 {
				buckets[float64(uint64(1)<<i)/1e6] = sum
			}
		}
		ch <- prometheus.MustNewConstHistogram(descStage, s.Count, s.Sum.Seconds(), buckets, v.name, stage.String())
	}
}

func (c *collector) collectNBD(ch chan<- prometheus.Metric) {
	st := c.d.nbd.Stats()
	c.collectMemory(ch, &st)
	gauge(ch, descConns, float64(st.Connections))
	for op, o := range st.Ops {
		counter(ch, descOpBytes, float64(o.Bytes), op.String())
		counter(ch, descOpErrors, float64(o.Errors), op.String())
		buckets, sum := map[float64]uint64{}, uint64(0)
		for i := range nbd.LatencyBuckets - 1 {
			sum += o.Latency[i]
			buckets[float64(uint64(1)<<i)/1e6] = sum
		}
		ch <- prometheus.MustNewConstHistogram(descOpLatency, o.Count, o.LatencySum.Seconds(), buckets, op.String())
	}
}

var _ prometheus.Collector = (*collector)(nil)
