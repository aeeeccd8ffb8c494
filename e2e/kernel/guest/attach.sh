# Attach, file system, kill -9 of the primary and of the daemon that serves the
# device, detach, fsck, compare.
configure
start_all
step "daemons started"
on alpha volume create db --size 48MiB
healthy alpha db
step "volume is healthy"

mustfail "is attached to no device" bs alpha detach db
mustfail "no NBD device" bs alpha attach db /dev/sda
must bs alpha attach db /dev/nbd3
step "attached"
must test "$(cat /sys/block/nbd3/size)" = 98304
must test "$(cat /sys/block/nbd3/queue/logical_block_size)" = 512
must test "$(cat /sys/block/nbd3/queue/write_cache)" = "write back"
must test "$(cat /sys/block/nbd3/queue/fua)" = 1
must test "$(cat /sys/block/nbd3/queue/io_timeout)" = 10000
must test "$(cat /sys/block/nbd3/queue/discard_max_bytes)" -gt 0
echo "backend: $(cat /sys/block/nbd3/backend)"
mustfail "attached already as /dev/nbd3" bs alpha attach db
mustfail "in use" bs beta attach db /dev/nbd3
for t in /proc/$(cat /run/alpha.pid)/task/*; do
	# Field 9 of stat: PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE.
	flags=$(awk '{print $9}' $t/stat)
	must test $((flags & 0x00180000)) = $((0x00180000))
done
must grep -q 'VmLck:.*[1-9]' /proc/$(cat /run/alpha.pid)/status
step "every thread is an I/O flusher, memory is locked"

must /bin/mke2fs -q -t ext4 /dev/nbd3
must mount -t ext4 -o discard /dev/nbd3 /mnt
step "mounted"
mustfail "it is mounted; run umount /mnt" bs alpha detach db
must sh -c 'echo before >/mnt/before && sync /mnt/before'

step "the primary is moved to beta, then killed"
on alpha switchover db --to beta
pounding 25
sleep 5
crash beta
pounded
start beta

step "the daemon that serves the device is killed and started again"
healthy alpha db
pounding 40
sleep 5
crash alpha
sleep 2
start alpha
pounded
must test "$(cat /mnt/before)" = before
on alpha attachments

step "the same daemon is upgraded: SIGTERM, start"
healthy alpha db
pounding 25
sleep 5
stop alpha
start alpha
pounded
dmesg | grep -i nbd | tail -n 10

step "unmount, detach, fsck"
md5sum /mnt/* >/tmp/sums
must umount /mnt
on alpha detach db
must test ! -e /sys/block/nbd3/pid
must test -z "$(bs alpha attachments --json | tr -d '[] \n')"
must bs beta attach db --connections 2 --read-only
dev=$(bs beta attachments --json | tr ',{' '\n\n' | sed -n 's/.*"device": *"\([^"]*\)".*/\1/p')
must test "$(cat /sys/block/${dev#/dev/}/ro)" = 1
must mount -t ext4 -o ro,noload $dev /mnt
(cd / && must md5sum -c /tmp/sums >/dev/null)
must umount /mnt
must /bin/e2fsck -fn $dev
must bs beta detach db
step "compare"
compare db
