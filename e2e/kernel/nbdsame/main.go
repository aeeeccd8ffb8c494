// Command nbdsame compares NBD exports byte by byte: nbdsame ADDRESS EXPORT
// ADDRESS EXPORT... The guest of the kernel tests has no other NBD client.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/blockstep/blockstep/nbd/nbdtest"
)

// chunkBytes is how much is read of each export at a time.
const chunkBytes = 1 << 20

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "nbdsame:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 4 || len(args)%2 != 0 {
		return errors.New("usage: nbdsame ADDRESS EXPORT ADDRESS EXPORT, and more such pairs")
	}
	ctx := context.Background()
	var clients []*nbdtest.Client
	var names []string
	for i := 0; i < len(args); i += 2 {
		c, err := nbdtest.Dial(ctx, args[i], args[i+1], nbdtest.Options{})
		if err != nil {
			return fmt.Errorf("%s: %w", args[i+1], err)
		}
		defer c.Close()
		clients, names = append(clients, c), append(names, args[i+1])
	}
	size, other := clients[0].Size(), 0
	first, next := make([]byte, chunkBytes), make([]byte, chunkBytes)
	for at := uint64(0); at < size; at += chunkBytes {
		first, next = first[:min(chunkBytes, size-at)], next[:min(chunkBytes, size-at)]
		for i, c := range clients {
			if c.Size() != size {
				return fmt.Errorf("%s has %d bytes and %s has %d", names[0], size, names[i], c.Size())
			}
			p := next
			if i == 0 {
				p = first
			}
			if err := c.ReadAt(ctx, p, at); err != nil {
				return fmt.Errorf("%s: %w", names[i], err)
			}
			if !bytes.Equal(p, first) {
				return fmt.Errorf("%s and %s differ in the %d bytes at %d", names[0], names[i], len(p), at)
			}
		}
		for _, b := range first {
			if b != 0 {
				other++
				break
			}
		}
	}
	_, err := fmt.Printf("%d exports have the same %d bytes; %d MiB of them are not all zeroes\n", len(names), size, other)
	return err
}
