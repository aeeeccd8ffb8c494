//go:build !race

package nbd_test

const raced = false
