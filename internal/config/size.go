package config

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// unitBytes are the suffixes of a size. Only powers of 1024, as lsblk and
// qemu-img count them: with K, M and G next to KiB, MiB and GiB a disk would be
// 7 % smaller than its owner thinks.
var unitBytes = []struct {
	suffix string
	bytes  int64
}{
	{"EiB", 1 << 60},
	{"PiB", 1 << 50},
	{"TiB", 1 << 40},
	{"GiB", 1 << 30},
	{"MiB", 1 << 20},
	{"KiB", 1 << 10},
	{"E", 1 << 60},
	{"P", 1 << 50},
	{"T", 1 << 40},
	{"G", 1 << 30},
	{"M", 1 << 20},
	{"K", 1 << 10},
	{"B", 1},
	{"", 1},
}

// ErrSizeRange is returned, wrapped, of a size that 63 bits do not hold. Whoever
// asked for one knows what is allowed.
var ErrSizeRange = errors.New("is out of range")

// ParseSize reads a size in bytes: 1048576, 512MiB, 10GiB, 1.5T (units are
// powers of 1024). It is an error when the size has a sign, is no whole number of
// bytes, or 8 EiB and more.
func ParseSize(s string) (int64, error) {
	t := strings.TrimSpace(s)
	if strings.HasPrefix(t, "+") || strings.HasPrefix(t, "-") {
		return 0, fmt.Errorf("size %q has a sign, and sizes are absolute: write the whole size, like 10GiB", s)
	}
	for _, u := range unitBytes {
		num, found := cutSuffixFold(t, u.suffix)
		if !found {
			continue
		}
		num = strings.TrimSpace(num)
		if n, err := strconv.ParseInt(num, 10, 64); err == nil {
			if n > math.MaxInt64/u.bytes {
				return 0, fmt.Errorf("size %q %w", s, ErrSizeRange)
			}
			return n * u.bytes, nil
		}
		f, err := strconv.ParseFloat(num, 64)
		if errors.Is(err, strconv.ErrRange) && digits(num) {
			return 0, fmt.Errorf("size %q %w", s, ErrSizeRange)
		}
		if err != nil || strings.ContainsAny(num, "+-eExXnNiI_") {
			break
		}
		b := f * float64(u.bytes)
		if b >= math.MaxInt64 {
			return 0, fmt.Errorf("size %q %w", s, ErrSizeRange)
		}
		if b != math.Trunc(b) {
			break
		}
		return int64(b), nil
	}
	return 0, fmt.Errorf("size %q is not a number of bytes; write it like 1073741824, 512MiB, 10GiB or 2TiB", s)
}

func cutSuffixFold(s, suffix string) (string, bool) {
	if len(s) < len(suffix) || !strings.EqualFold(s[len(s)-len(suffix):], suffix) {
		return s, false
	}
	return s[:len(s)-len(suffix)], true
}

// RoundSize prints bytes with one decimal of the largest unit that fits, for
// figures that are read and not typed again.
func RoundSize(n int64) string {
	for _, u := range unitBytes[:6] {
		if n >= u.bytes {
			return strconv.FormatFloat(float64(n)/float64(u.bytes), 'f', 1, 64) + u.suffix
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}

// FormatSize prints bytes with the largest unit of which they are a whole
// number, or with one decimal from the largest unit that fits.
func FormatSize(n int64) string {
	for _, u := range unitBytes[:6] {
		if n >= u.bytes && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.suffix
		}
	}
	for _, u := range unitBytes[:6] {
		if n >= u.bytes {
			return strconv.FormatFloat(float64(n)/float64(u.bytes), 'f', 1, 64) + u.suffix
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}
