# What an operator does, and meets, with a kernel device: four connections, trim
# and zeroes, a volume that grows, one that has no quorum for a minute, one that
# is to be deleted, one that lost writes, and a daemon that does not come back.
echo first >/run/boot_id
configure "attach: {dead_timeout: 20s}
boot_id_file: /run/boot_id"
start_all
must modprobe nbd nbds_max=2
must modprobe xfs
on alpha volume create db --size 96MiB
on alpha volume create raw --size 16MiB
healthy alpha db
healthy alpha raw
on alpha switchover db --to alpha
must bs alpha attach db /dev/nbd0 --connections 4
# A device beyond those that the module made: the kernel makes it.
must bs alpha attach raw /dev/nbd7
step "attached"

queue() { cat "/sys/block/nbd0/queue/$1"; }
is() {
	[ "$2" "$3" "$4" ] || fail "/dev/nbd0: $1 is $2; want $3 $4"
}
is rotational "$(queue rotational)" = 0
is logical_block_size "$(queue logical_block_size)" = 512
is physical_block_size "$(queue physical_block_size)" = 512
is discard_granularity "$(queue discard_granularity)" = 512
bs alpha attachments --json | tr -d ' \n' | grep -q '"device":"/dev/nbd0","connections":4' || fail "not four connections: $(bs alpha attachments --json)"

step "zeroes and trim are zeroes to read, and give back the room"
stored() { du -k /data/$1/volumes/*/data | awk '{s += $1} END {print s}'; }
more() { [ "$(stored $1)" -ge $2 ]; }
less() { [ "$(stored $1)" -lt $2 ]; }
# sum FILE SKIP COUNT, in MiB.
sum() { dd if=$1 bs=1M skip=$2 count=$3 2>/dev/null | md5sum; }
must sh -c 'yes 0123456789abcde | dd of=/dev/nbd7 bs=1M count=12 iflag=fullblock conv=fsync 2>/dev/null'
must /bin/blkdiscard -z -o 4194304 -l 4194304 /dev/nbd7
echo 3 >/proc/sys/vm/drop_caches
must test "$(sum /dev/nbd7 4 4)" = "$(sum /dev/zero 0 4)"
must test "$(sum /dev/nbd7 3 1)" = "$(yes 0123456789abcde | dd bs=1M count=1 iflag=fullblock 2>/dev/null | md5sum)"
must test "$(sum /dev/nbd7 8 1)" = "$(sum /dev/nbd7 3 1)"
for n in alpha beta gamma; do
	until_done 60 more $n 8192 || fail "the replicas on $n take $(stored $n) KiB"
done
must /bin/blkdiscard /dev/nbd7
must test "$(sum /dev/nbd7 0 16)" = "$(sum /dev/zero 0 16)"
for n in alpha beta gamma; do
	until_done 60 less $n 1024 || fail "after blkdiscard the replicas on $n take $(stored $n) KiB"
done

make_xfs /dev/nbd0
mkdir -p /mnt/db
must mount -t xfs /dev/nbd0 /mnt/db
must dd if=/dev/urandom of=/mnt/db/large bs=1M count=6 conv=fsync 2>/dev/null
must rm /mnt/db/large
must sync
must /bin/fstrim -v /mnt/db
must umount /mnt/db
must /bin/mke2fs -q -t ext4 /dev/nbd0 48M
must mount -t ext4 /dev/nbd0 /mnt/db
must dd if=/dev/urandom of=/mnt/db/large bs=1M count=6 conv=fsync 2>/dev/null
must rm /mnt/db/large
must sync
must /bin/fstrim -v /mnt/db

step "it grows, below a mounted file system, and while the daemon is away"
sectors() { [ "$(cat /sys/block/nbd0/size)" = $1 ]; }
must bs beta volume resize db 112MiB
until_done 60 sectors $((112 * 2048)) || fail "the kernel's device has $(cat /sys/block/nbd0/size) sectors"
must /bin/resize2fs /dev/nbd0 104M
crash alpha
until_done 120 bs beta volume resize db 128MiB || fail "resize"
start alpha
until_done 120 sectors $((128 * 2048)) || fail "after a restart the kernel's device has $(cat /sys/block/nbd0/size) sectors"
must /bin/resize2fs /dev/nbd0
must sh -c '[ "$(df -k /mnt/db | tail -n 1 | awk "{print \$2}")" -gt 110000 ]'

step "what is attached is not deleted, from no node"
healthy beta db
mustfail "attached as" bs alpha volume delete db --yes
mustfail "attached as" bs beta volume delete db --yes

step "no quorum for a minute: held, and no error"
pounding db
for n in beta gamma; do kill -STOP "$(cat /run/$n.pid)"; done
began=$(cut -d. -f1 /proc/uptime)
# A detach does not wait for ever, and says why.
mustfail "its I/O is held" bs alpha detach raw
is_past() { [ "$(cut -d. -f1 /proc/uptime)" -ge $1 ]; }
until_done 120 is_past $((began + 60))
[ ! -e /tmp/pound.failed ] || fail "a write failed under a file system: $(cat /tmp/pound.failed)"
for n in beta gamma; do kill -CONT "$(cat /run/$n.pid)"; done
progress
pounding_ends
on alpha detach raw
healthy alpha db

step "a daemon that does not come back: errors after dead_timeout, and no process that hangs"
crash alpha
timeout 120 dd if=/dev/urandom of=/mnt/db/never bs=64k count=4 conv=fsync 2>/tmp/out && fail "a write without a daemon has succeeded"
cat /tmp/out
until_done 60 umount /mnt/db || fail "umount"
must test -e /sys/block/nbd0/pid
start alpha
on alpha attachments
until_done 120 dd if=/dev/nbd0 of=/dev/null bs=4096 count=1 iflag=direct || fail "the device is not served again"
/bin/e2fsck -fy /dev/nbd0
[ $? -le 1 ] || fail "e2fsck"
must mount -t ext4 /dev/nbd0 /mnt/db
must sh -c 'seq 1000 >/mnt/db/again && sync /mnt/db/again'
healthy alpha db

step "a volume that lost writes: the device fails for good, until it is attached anew"
for n in alpha beta gamma; do crash $n; done
echo second >/run/boot_id # as after a power cut that took the guests of this kernel, and not the kernel
start_all
serves alpha db
lost() { bs alpha attachments | grep -q 'lost:'; }
until_done 60 lost || fail "the attachment goes on: $(bs alpha attachments)"
timeout 120 dd if=/dev/nbd0 of=/dev/null bs=4096 count=1 iflag=direct 2>/tmp/out && fail "a device that lost writes was read"
mustfail "it is mounted" bs alpha detach db
until_done 60 umount /mnt/db || fail "umount"
on alpha detach db
must bs alpha attach db /dev/nbd0
must mount -t ext4 /dev/nbd0 /mnt/db
must sh -c 'seq 1000 | cmp - /mnt/db/again'
must umount /mnt/db
must /bin/e2fsck -fn /dev/nbd0
on alpha detach db
on alpha volume delete raw --yes
