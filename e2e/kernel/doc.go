// Package kernel judges the kernel's side of blockstep: it boots Debian's cloud
// kernel in qemu (software emulation: no KVM is needed) with three daemons and
// a real /dev/nbdN, file system on top, and runs the shell scenarios of guest/.
//
// Each machine has an overlay over one disk image. What was written and not
// flushed is lost with its power, as from a disk with a volatile cache; the
// console has a line of its own, so that what the guest says is never torn.
//
// The guest has one processor, and a clock that counts its instructions: however
// busy the host is, nothing in the guest is late, and no time-out fires for that
// reason. Limits of time are the guest's; the host's only end what hangs.
//
// The tests have the build tag kernel, since they need a kernel image that is
// fetched by apt: run them by make test-kernel. With BLOCKSTEP_KERNEL_CACHE the
// image is kept in that directory; BLOCKSTEP_KERNEL_CPUS=2 emulates two processors
// in real time.
package kernel
