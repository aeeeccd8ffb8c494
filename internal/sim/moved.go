package sim

import (
	"github.com/blockstep/blockstep/internal/ident"
	"github.com/blockstep/blockstep/replication/bitmap"
	"github.com/blockstep/blockstep/replication/wire"
)

// copyID is one stream of a resync: between two nodes, in one epoch.
type copyID struct {
	from, to ident.Node
	epoch    ident.Epoch
	stream   uint64
}

// copied counts, for each block, how often its target has said in this stream
// that it lacks it, and how often it was sent.
type copied struct{ lacks, sent []int }

func (k *checker) copy(s *Sim, id copyID) *copied {
	c := k.copies[id]
	if c == nil {
		c = &copied{make([]int, s.blocksMax()), make([]int, s.blocksMax())}
		k.copies[id] = c
	}
	return c
}

// asked: a target says what it lacks.
func (k *checker) asked(s *Sim, n *node, to ident.Node, m *wire.ResyncState) {
	c := k.copy(s, copyID{to, n.name, m.Epoch, m.Stream})
	b := must(bitmap.Unmarshal(m.Payload.B))
	for i := range c.lacks {
		if b.Touches(uint64(i)*blockSize, blockSize) {
			c.lacks[i]++
		}
	}
}

// moves: a block leaves for a target that must have asked for it (I6: no more
// than the dirty blocks move). A link that doubles messages asks twice.
func (k *checker) moves(s *Sim, n *node, to ident.Node, m *wire.Blocks) {
	c := k.copy(s, copyID{n.name, to, m.Epoch, m.Stream})
	for i := range m.Blocks {
		b := &m.Blocks[i]
		for at := b.Off / blockSize; at < (b.Off+b.Len)/blockSize; at++ {
			k.moved++
			if c.sent[at]++; c.sent[at] > c.lacks[at] && !s.opt.Wild {
				s.fail("I6", "node %s sends block %d to %s for the %d. time, which asked for it %d times", n.name, at, to, c.sent[at], c.lacks[at])
			}
		}
	}
}
