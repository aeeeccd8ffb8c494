// Package attach connects exports of an NBD server in this process to the
// kernel's /dev/nbdN, by the generic netlink family "nbd".
//
// The kernel gets one end of a socket pair after this package has done the
// handshake on it as a client; the other end is served like any connection. No
// request leaves the host by that socket, and no port is needed.
//
// # A daemon that goes away
//
// When the daemon ends, also by kill -9, its ends of the sockets close. The
// kernel then holds all I/O of the device for the dead-connection time and
// waits for new sockets. The next daemon finds the device by the backend
// identifier, a random name that the kernel keeps since 5.14 and demands back
// before it takes another socket (NBD_CMD_RECONFIGURE), so no daemon can take a
// device that is another volume's. Requests that had been sent and not answered
// are sent again by the kernel once they are older than the queue's io_timeout:
// it is kept short for that reason, and it fails nothing, since the timeout
// attribute of the connection stays 0.
//
// Old kernels without netlink are refused. The ioctl interface is no fallback:
// through it nothing could be taken back after a restart.
package attach
