# A machine with little memory writes more than it has through the daemon that
# it runs itself; two more daemons, one with a replica, use the same memory.
configure
start_all
must modprobe nbd
on alpha volume create db --size 512MiB --replicas alpha,beta
healthy alpha db
on alpha attach db /dev/nbd0
total=$(awk '/MemTotal/ {print $2}' /proc/meminfo)
count=$((total / 1024 + 16))
step "this machine has $total kB of memory; writing $count MiB"
# Not direct: the page cache fills with dirty pages of the device. The text has
# 16 bytes, so that each MiB is the same.
yes 0123456789abcde | dd of=/dev/nbd0 bs=1M count=$count iflag=fullblock conv=fsync 2>/tmp/out || fail "writing: $(cat /tmp/out)"
step "written"
free
dmesg | grep -iE 'I/O error|out of memory|hung|blocked for more' && fail "the kernel saw an error"
# Read again, from the replicas and not from the cache.
echo 3 >/proc/sys/vm/drop_caches
yes 0123456789abcde | dd of=/tmp/want bs=1M count=1 iflag=fullblock 2>/dev/null
for at in 0 1 $((count / 2)) $((count - 1)); do
	dd if=/dev/nbd0 bs=1M skip=$at count=1 2>/dev/null | cmp - /tmp/want || fail "MiB $at is not what was written"
done
on alpha detach db
healthy alpha db
