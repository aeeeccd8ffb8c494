package e2e

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// journal is what one client wrote to a volume, in order, one request after the
// other: after a power cut the volume must be the journal up to some entry that
// is not before the last one flushed.
type journal struct {
	writes  []register // number i+1 wrote the value i+1
	flushed int        // as many are durable by contract
}

const sector = 512

// write puts random writes on the volume, some of them flushed, of one sector
// to a quarter of a MiB, until one fails: the power is gone.
func (j *journal) write(d *disk, rng *rand.Rand) {
	for {
		sectors := []int{1, 3, 8, 8, 8, 64, 129, 512}[rng.IntN(8)]
		r := register{off: uint64(rng.IntN(int(d.size)/sector-sectors)) * sector, len: sectors * sector}
		value := uint64(len(j.writes) + 1)
		fua := rng.IntN(40) == 0
		j.writes = append(j.writes, r) // sent: it may be there, answered or not
		if err := d.write(fill(value, r.len), r.off, fua); err != nil {
			return
		}
		if fua {
			// It speaks for this write alone, but one log orders them all.
			j.flushed = len(j.writes)
		}
		if rng.IntN(60) == 0 {
			if err := d.flush(); err != nil {
				return
			}
			j.flushed = len(j.writes)
		}
	}
}

// check reads the whole volume and finds the entry that it ends with: every
// sector must be what the journal up to there says. What came after is gone for
// good.
func (j *journal) check(t *testing.T, d *disk) {
	t.Helper()
	got := make([]uint64, d.size/sector)
	buf := make([]byte, 1<<20)
	end := 0
	for off := uint64(0); off < d.size; off += uint64(len(buf)) {
		if err := d.read(buf, off); err != nil {
			t.Fatalf("read at %d: %v", off, err)
		}
		for i := 0; i < len(buf); i += sector {
			v, err := valueOf(buf[i : i+sector])
			if err != nil {
				t.Fatalf("broke I5, a write is there whole or not at all: sector at byte %d: %v", off+uint64(i), err)
			}
			got[(off+uint64(i))/sector] = v
			end = max(end, int(v))
		}
	}
	if end < j.flushed {
		// An entry may be wholly overwritten by no other, so the last flushed shows.
		t.Fatalf("broke I2, a flushed write survives a power cut: %d writes were flushed, and the newest there is %d", j.flushed, end)
	}
	want := make([]uint64, len(got))
	for i, r := range j.writes[:end] {
		for s := r.off / sector; s < (r.off+uint64(r.len))/sector; s++ {
			want[s] = uint64(i + 1)
		}
	}
	for s := range got {
		if got[s] != want[s] {
			t.Fatalf("broke I5 or I2, after a power cut the volume is what was written up to one moment: it has write %d of %d (%d flushed), and sector %d is of write %d, want %d",
				end, len(j.writes), j.flushed, s, got[s], want[s])
		}
	}
	t.Logf("written %d, flushed %d, there after the power cut %d", len(j.writes), j.flushed, end)
	// What is there now has been read from a majority: it stays.
	j.writes, j.flushed = j.writes[:end], end
}

// TestPowerCutLosesUnsynced: again and again all machines lose power under
// load, and their disks lose what was not fsynced, sector by sector. What was
// flushed is there, and what is there is the log up to one entry.
func TestPowerCutLosesUnsynced(t *testing.T) {
	t.Parallel()
	s := seed(t)
	c := newCluster(t, options{crashDisks: s, config: map[string]string{"volume.power_loss_grace": "2s"}})
	c.volume("db", "16MiB")
	rng, cuts := rand.New(rand.NewPCG(s, 3)), rand.New(rand.NewPCG(s, 5))
	var j journal
	for round := range 4 {
		d := mustDial(t, c.nodes[round%3], "db")
		var writing sync.WaitGroup
		writing.Go(func() { j.write(d, rng) })
		time.Sleep(time.Duration(100+cuts.IntN(1500)) * time.Millisecond)
		powerCut(c.nodes...)
		writing.Wait()
		d.close()
		for _, n := range c.nodes {
			n.start()
		}
		c.nodes[0].waitReady()
		c.waitHealthy("db")
		d = mustDial(t, c.nodes[(round+1)%3], "db")
		j.check(t, d)
		// The checked content is durable only once it is flushed again: a
		// majority may have it in memory alone.
		if err := d.flush(); err != nil {
			t.Fatal(err)
		}
		d.close()
		c.replicasEqual("db")
	}
}

// TestPowerCutOfOneLosesUnsynced: one machine after the other loses power under
// the load of all clients, and its disk what was not fsynced. The others hold
// every answered write, flushed or not: the device stays linearizable.
func TestPowerCutOfOneLosesUnsynced(t *testing.T) {
	t.Parallel()
	s := seed(t)
	c := newCluster(t, options{crashDisks: s})
	c.volume("db", "16MiB")
	rng := rand.New(rand.NewPCG(s, 4))
	l := startLoad(t, "db", s, loadOptions{nodes: c.nodes, writes: 0.7, flushes: 0.05, opTimeout: 30 * time.Second})
	for round := range 5 {
		time.Sleep(time.Duration(500+rng.IntN(1000)) * time.Millisecond)
		victim := c.nodes[rng.IntN(3)]
		if round%2 == 0 {
			victim = c.primary("db")
		}
		powerCut(victim)
		time.Sleep(time.Duration(rng.IntN(1500)) * time.Millisecond)
		victim.start()
		c.others(victim.name)[0].cli("wait", "db", "--for", "healthy", "--timeout", "60s")
	}
	l.finish(c)
	c.replicasEqual("db")
}
