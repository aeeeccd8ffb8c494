package vfs

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// What FS_IOC_FIEMAP takes and returns (include/uapi/linux/fiemap.h).
const (
	fsIocFiemap           = 0xC020660B
	fiemapExtentUnwritten = 0x800
	fiemapExtents         = 16
)

type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

type fiemap struct {
	start, length        uint64
	flags, mapped, count uint32
	_                    uint32
	extents              [fiemapExtents]fiemapExtent
}

func (f *osFile) Unwritten(off, n int64) (at, length int64, err error) {
	end := off + n
	for off < end {
		q := fiemap{start: uint64(off), length: uint64(end - off), count: fiemapExtents}
		err := f.do("fiemap", func(fd int) error {
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsIocFiemap, uintptr(unsafe.Pointer(&q))); errno != 0 {
				return errno
			}
			return nil
		})
		if unsupported(err) {
			return 0, 0, nil
		}
		if err != nil || q.mapped == 0 {
			return 0, 0, err
		}
		for _, e := range q.extents[:q.mapped] {
			from, to := max(int64(e.logical), off), min(int64(e.logical+e.length), end)
			if e.flags&fiemapExtentUnwritten != 0 && from < to {
				return from, to - from, nil
			}
		}
		last := &q.extents[q.mapped-1]
		next := int64(last.logical + last.length)
		if next <= off {
			return 0, 0, nil
		}
		off = next
	}
	return 0, 0, nil
}
