// Command nbdsum prints the SHA-256 of an NBD export: nbdsum unix:///PATH EXPORT.
// The guest of the kernel tests has no other NBD client.
package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"

	"github.com/blockstep/blockstep/nbd/nbdtest"
)

const chunkBytes = 1 << 20

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "nbdsum:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return errors.New("usage: nbdsum unix:///PATH EXPORT")
	}
	ctx := context.Background()
	c, err := nbdtest.Dial(ctx, args[0], args[1], nbdtest.Options{})
	if err != nil {
		return err
	}
	defer c.Close()
	sum, p := sha256.New(), make([]byte, chunkBytes)
	for at := uint64(0); at < c.Size(); at += uint64(len(p)) {
		p = p[:min(uint64(chunkBytes), c.Size()-at)]
		if err := c.ReadAt(ctx, p, at); err != nil {
			return err
		}
		sum.Write(p)
	}
	_, err = fmt.Printf("%x\n", sum.Sum(nil))
	return err
}
