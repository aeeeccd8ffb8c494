package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/blockstep/blockstep/internal/control"
)

// TestEventColumns: the texts of all kinds of events stand below one another.
func TestEventColumns(t *testing.T) {
	var out bytes.Buffer
	a := &app{out: &out}
	for _, kind := range control.EventKinds {
		if err := a.printEvent(control.Event{Kind: kind, Text: "THE TEXT"}); err != nil {
			t.Fatal(err)
		}
	}
	at := -1
	for line := range strings.Lines(out.String()) {
		if i := strings.Index(line, " THE TEXT\n"); at >= 0 && i != at {
			t.Errorf("the text is in column %d, and in column %d before: %s", i, at, line)
		} else {
			at = i
		}
	}
	if at < 0 {
		t.Error("there is no text")
	}
}
