# What is refused, then two file systems through the death of the primary, of
# the daemon that serves the devices, and its upgrade; detach, fsck, compare.
configure
start_all
on alpha volume create db --size 32MiB
on alpha volume create files --size 48MiB
healthy alpha db
healthy alpha files
step "the volumes are healthy"

mustfail "modprobe nbd" bs alpha attach db
must modprobe nbd nbds_max=4
must modprobe xfs
mustfail "is attached to no device" bs alpha detach db
mustfail "no NBD device" bs alpha attach db /dev/sda
mustfail "allowed are 1 to 16" bs alpha attach db --connections 17
mustfail "nosuch" bs alpha attach nosuch
must bs alpha attach db /dev/nbd3
step "attached"
must test "$(cat /sys/block/nbd3/size)" = 65536
must test "$(cat /sys/block/nbd3/queue/logical_block_size)" = 512
must test "$(cat /sys/block/nbd3/queue/write_cache)" = "write back"
must test "$(cat /sys/block/nbd3/queue/fua)" = 1
must test "$(cat /sys/block/nbd3/queue/io_timeout)" = 10000
must test "$(cat /sys/block/nbd3/queue/discard_max_bytes)" -gt 0
case "$(cat /sys/block/nbd3/backend)" in
blockstep:db:*) ;;
*) fail "the backend is '$(cat /sys/block/nbd3/backend)'" ;;
esac
mustfail "attached already as /dev/nbd3" bs alpha attach db
mustfail "in use" bs beta attach db /dev/nbd3
bs beta attach db /dev/nbd0 2>&1 | grep -q "db is attached as /dev/nbd3 on alpha too" || fail "a second node attaches db, and is not warned"
must bs beta detach db
mustfail "in use" bs alpha attach files /dev/nbd3
must bs alpha attach files /dev/nbd1 --connections 2
for t in /proc/$(cat /run/alpha.pid)/task/*; do
	# Field 9 of stat: PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE.
	flags=$(awk '{print $9}' $t/stat)
	must test $((flags & 0x00180000)) = $((0x00180000))
done
must grep -q 'VmLck:.*[1-9]' /proc/$(cat /run/alpha.pid)/status
step "every thread is an I/O flusher, memory is locked"

mkdir /mnt/db /mnt/files
must /bin/mke2fs -q -t ext4 /dev/nbd3
make_xfs /dev/nbd1
must mount -t ext4 -o discard /dev/nbd3 /mnt/db
must mount -t xfs -o discard /dev/nbd1 /mnt/files
step "mounted"
mustfail "it is mounted; run umount /mnt/db" bs alpha detach db
mustfail "it is mounted; run umount /mnt/files" bs alpha detach files
for m in db files; do
	must sh -c "seq 1000 >/mnt/$m/before && sync /mnt/$m/before"
done

step "the primary is moved to beta, then killed"
on alpha switchover db --to beta
on alpha switchover files --to beta
pounding db files
crash beta
progress
start beta
healthy alpha db
healthy alpha files

step "the daemon that serves the devices, primary of both, is killed and started again"
on alpha switchover db --to alpha
on alpha switchover files --to alpha
progress
crash alpha
start alpha
progress
healthy beta db
healthy beta files

step "the same daemon is upgraded: SIGTERM, start"
stop alpha
start alpha
progress
pounding_ends
on alpha attachments

step "unmount, detach, fsck"
for m in db files; do
	must sh -c "seq 1000 | cmp - /mnt/$m/before"
	(cd /mnt/$m && md5sum before pound.*) >/tmp/$m.sums
	must umount /mnt/$m
done
# One that is open, but not mounted, cannot be told from one that nobody uses.
exec 9</dev/nbd1
mustfail "still open" bs alpha detach files
bs alpha attachments | grep -q '/dev/nbd1.*lost: a detach was begun' || fail "it fails all I/O, and is shown as: $(bs alpha attachments)"
exec 9<&-
until_done 60 test ! -e /sys/block/nbd1/pid || fail "the kernel keeps /dev/nbd1"
on alpha detach files
on alpha detach db
must test ! -e /sys/block/nbd3/pid
must test -z "$(bs alpha attachments --json | tr -d '[] \n')"
for m in db files; do
	must bs beta attach $m --connections 2 --read-only
	dev=$(bs beta attachments --json | tr ',{' '\n\n' | sed -n 's/.*"device": *"\([^"]*\)".*/\1/p')
	must test "$(cat /sys/block/${dev#/dev/}/ro)" = 1
	if [ $m = db ]; then
		must mount -t ext4 -o ro,noload $dev /mnt/db
	else
		must mount -t xfs -o ro,norecovery $dev /mnt/files
	fi
	(cd /mnt/$m && must md5sum -c /tmp/$m.sums >/dev/null)
	must umount /mnt/$m
	if [ $m = db ]; then
		must /bin/e2fsck -fn $dev
	else
		must /bin/xfs_repair -n $dev >/tmp/out 2>&1
	fi
	must bs beta detach $m
done
step "compare"
same db
same files
