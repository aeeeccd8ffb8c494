package e2e

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// A register is an aligned extent that clients write and read as a whole. Each
// write fills it with one value, given once, so that a read tells which write it
// saw, and a torn one shows two values (I5).
type register struct {
	off uint64
	len int
}

// fill makes the content that a value has in a register of n bytes. Value 0 is a
// register never written: zeroes.
func fill(value uint64, n int) []byte {
	b := make([]byte, n)
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], value)
	}
	return b
}

// valueOf returns the value of a register's content, or an error when the
// content is of more than one write.
func valueOf(b []byte) (uint64, error) {
	v := binary.LittleEndian.Uint64(b)
	for i := 8; i < len(b); i += 8 {
		if w := binary.LittleEndian.Uint64(b[i:]); w != v {
			return 0, fmt.Errorf("torn: value %d at byte 0, value %d at byte %d", v, w, i)
		}
	}
	return v, nil
}

// op is an operation on a register, as porcupine's Input.
type op struct {
	reg   int
	write bool
	value uint64 // to write
}

// forever is the return time of a write whose outcome nobody knows: it may take
// effect at any later moment, or never.
const forever = math.MaxInt64

// history collects what every client did and saw.
type history struct {
	mu     sync.Mutex
	began  time.Time
	ops    []porcupine.Operation
	torn   []string
	clean  int // operations with a known outcome
	values uint64
}

func newHistory() *history { return &history{began: time.Now()} }

// now is the history's clock in nanoseconds.
func (h *history) now() int64 { return int64(time.Since(h.began)) }

// newValue returns a value that no other write has.
func (h *history) newValue() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.values++
	return h.values
}

// wrote records a write. With err its outcome is unknown.
func (h *history) wrote(client, reg int, value uint64, call int64, err error) {
	ret := h.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		ret = forever
	} else {
		h.clean++
	}
	h.ops = append(h.ops, porcupine.Operation{
		ClientId: client, Input: op{reg: reg, write: true, value: value}, Call: call, Output: uint64(0), Return: ret,
	})
}

// read records a read that was answered. A read that was not says nothing.
func (h *history) read(client, reg int, b []byte, call int64) {
	ret := h.now()
	value, err := valueOf(b)
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.torn = append(h.torn, fmt.Sprintf("client %d, register %d, at %v: %v", client, reg, time.Duration(call), err))
		return
	}
	h.clean++
	h.ops = append(h.ops, porcupine.Operation{
		ClientId: client, Input: op{reg: reg}, Call: call, Output: value, Return: ret,
	})
}

// model is a set of registers. Each is a partition of its own, so that the
// search stays short.
func model() porcupine.Model {
	return porcupine.Model{
		Partition: func(ops []porcupine.Operation) [][]porcupine.Operation {
			byReg := map[int][]porcupine.Operation{}
			for _, o := range ops {
				reg := o.Input.(op).reg
				byReg[reg] = append(byReg[reg], o)
			}
			var out [][]porcupine.Operation
			for _, part := range byReg {
				out = append(out, part)
			}
			return out
		},
		Init: func() any { return uint64(0) },
		Step: func(state, input, output any) (bool, any) {
			if in := input.(op); in.write {
				return true, in.value
			}
			return state.(uint64) == output.(uint64), state
		},
		DescribeOperation: func(input, output any) string {
			if in := input.(op); in.write {
				return fmt.Sprintf("write %d to register %d", in.value, in.reg)
			}
			return fmt.Sprintf("read register %d: %d", input.(op).reg, output)
		},
	}
}

// check judges the history: torn reads, then linearizability. A broken history
// is drawn into an HTML file, if there is a place for it.
func (h *history) check(t *testing.T) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.torn {
		t.Errorf("broke I5, a write is seen whole or not at all: %s", s)
	}
	ops := h.judged()
	began := time.Now()
	res, info := porcupine.CheckOperationsVerbose(model(), ops, 90*time.Second)
	t.Logf("linearizability: %s; %d operations answered, %d of unknown outcome, judged in %v",
		res, h.clean, len(h.ops)-h.clean, time.Since(began).Round(time.Millisecond))
	switch res {
	case porcupine.Ok:
	case porcupine.Unknown:
		t.Error("linearizability was not decided in time: make the history shorter")
	default:
		t.Errorf("broke I3, reads and writes from all nodes are linearizable%s", draw(info))
	}
}

// judged prepares the writes of unknown outcome, each of which would double the
// search. One that no read saw is left out: it may have taken effect after
// everything else, so it decides nothing. One that a read saw had taken effect
// when the first such read returned.
func (h *history) judged() []porcupine.Operation {
	seenAt := map[uint64]int64{}
	for _, o := range h.ops {
		if in := o.Input.(op); !in.write {
			value := o.Output.(uint64)
			if at, ok := seenAt[value]; !ok || o.Return < at {
				seenAt[value] = o.Return
			}
		}
	}
	var out []porcupine.Operation
	for _, o := range h.ops {
		if in := o.Input.(op); in.write && o.Return == forever {
			at, seen := seenAt[in.value]
			if !seen {
				continue
			}
			o.Return = max(at, o.Call)
		}
		out = append(out, o)
	}
	return out
}

func draw(info porcupine.LinearizationInfo) string {
	dir, err := os.MkdirTemp("", "blockstep-history-")
	if err != nil {
		return ""
	}
	name := filepath.Join(dir, "history.html")
	if err := porcupine.VisualizePath(model(), info, name); err != nil {
		return ""
	}
	return "; the history is drawn in " + name
}

// TestHistoryFindsViolations checks the checker: a judge that never says no is
// none.
func TestHistoryFindsViolations(t *testing.T) {
	w := func(value uint64, call, ret int64) porcupine.Operation {
		return porcupine.Operation{Input: op{write: true, value: value}, Call: call, Output: uint64(0), Return: ret}
	}
	r := func(value uint64, call, ret int64) porcupine.Operation {
		return porcupine.Operation{Input: op{}, Call: call, Output: value, Return: ret}
	}
	tests := []struct {
		name string
		ops  []porcupine.Operation
		want porcupine.CheckResult
	}{
		{"read of the last write", []porcupine.Operation{w(1, 0, 1), r(1, 2, 3)}, porcupine.Ok},
		{"lost write", []porcupine.Operation{w(1, 0, 1), w(2, 2, 3), r(1, 4, 5)}, porcupine.Illegal},
		{"stale read after a newer read", []porcupine.Operation{w(1, 0, 1), w(2, 2, 9), r(2, 3, 4), r(1, 5, 6)}, porcupine.Illegal},
		{"unknown write seen late", []porcupine.Operation{w(1, 0, forever), w(2, 2, 3), r(2, 4, 5), r(1, 6, 7)}, porcupine.Ok},
		{"unknown write seen twice, with another between", []porcupine.Operation{w(1, 0, forever), r(1, 2, 3), w(2, 4, 5), r(2, 6, 7), r(1, 8, 9)}, porcupine.Illegal},
		{"unknown write seen and gone again", []porcupine.Operation{w(1, 0, forever), r(1, 2, 3), r(0, 4, 5)}, porcupine.Illegal},
	}
	for _, tt := range tests {
		h := newHistory()
		h.ops = tt.ops
		if got := porcupine.CheckOperationsTimeout(model(), h.judged(), time.Minute); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
	b := fill(7, 4096)
	copy(b[512:], fill(8, 512))
	if _, err := valueOf(b); err == nil {
		t.Error("a register with two values was not found torn")
	}
}
