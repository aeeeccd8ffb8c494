# A machine with little memory writes more than it has through its own daemon.
configure
start_all
on alpha volume create db --size 512MiB
healthy alpha db
must bs alpha attach db /dev/nbd0
step "$(grep MemTotal /proc/meminfo)"
# Not direct: the page cache fills with dirty pages of the device.
must dd if=/dev/zero of=/dev/nbd0 bs=1M count=500 conv=fsync
step "written"
free
must bs alpha detach db
