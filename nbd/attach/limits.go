package attach

import "time"

const (
	// connectionsMax bounds the sockets of one device: the kernel uses one
	// hardware queue for each, and more than processors gain nothing.
	connectionsMax = 16
	// logicalBlock is the device's sector, bytes. 512 and not 4096: partition
	// tables and images made elsewhere, and databases with direct I/O on
	// 512-byte sectors, go on working. File systems choose 4 KiB themselves.
	logicalBlock = 512
	// sectorBytes is the unit of sizes in sysfs, whatever the device's block is.
	sectorBytes = 512
	// handshakeTime bounds the handshake with our own server.
	handshakeTime = 10 * time.Second
	// ioTimeout is how old a request must be before the kernel asks whether its
	// socket has been replaced, and if so sends it again. It bounds the pause
	// after kill -9; the price is a line in the kernel's log for each request
	// that waits longer.
	ioTimeout = 10 * time.Second
	// ioTimeoutStopping is the same while the daemon stops: what is sent from
	// then on is sent again soon after the next daemon took over.
	ioTimeoutStopping = time.Second
	// retryMin and retryMax are the pauses between attempts to reconnect.
	retryMin = 50 * time.Millisecond
	retryMax = 2 * time.Second
	// goneTime is how long a device may take to go after a disconnect.
	goneTime = 5 * time.Second
	// gonePoll is how often sysfs is looked at meanwhile: it has no events.
	gonePoll = 20 * time.Millisecond
	// socketBytes is what each direction of a socket pair may hold: a few of
	// the largest requests that the kernel makes.
	socketBytes = 4 << 20
	// devicesMax bounds the search for a device by its identifier.
	devicesMax = 4096
	// recordsMax bounds the file of attachments.
	recordsMax = 1 << 20
)
