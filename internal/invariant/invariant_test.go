package invariant

import (
	"errors"
	"testing"
)

func TestAssertPanicsWithAViolation(t *testing.T) {
	Assert(true, "never printed")
	err := caught(func() { Assert(false, "epoch %d fell", 7) })
	var v Violation
	if !errors.As(err, &v) || v.Message != "epoch 7 fell" {
		t.Fatalf("got %v, want a Violation that names the epoch", err)
	}
	if got := v.Error(); got != "invariant violated: epoch 7 fell" {
		t.Fatalf("Error() = %q", got)
	}
}

func TestExpensiveRunsOnlyWhenEnabled(t *testing.T) {
	ran := false
	err := caught(func() {
		Expensive(func() bool { ran = true; return false }, "checked")
	})
	if ran != Enabled || (err != nil) != Enabled {
		t.Fatalf("ran=%v err=%v with Enabled=%v", ran, err, Enabled)
	}
}

func caught(f func()) (err error) {
	defer func() {
		if e, ok := recover().(error); ok {
			err = e
		}
	}()
	f()
	return nil
}
