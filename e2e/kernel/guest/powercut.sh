# What fsync returned for is there after the power of the whole machine was cut.
# This is booted twice: the host cuts the power when it has read enough sums.
configure
start_all
must modprobe nbd
must modprobe xfs
mkdir -p /mnt/db /mnt/files
if [ ! -e /data/second ]; then
	on alpha volume create db --size 32MiB
	on alpha volume create files --size 48MiB
	on alpha attach db /dev/nbd0
	on alpha attach files /dev/nbd1
	must /bin/mke2fs -q -t ext4 /dev/nbd0
	make_xfs /dev/nbd1
	must mount -t ext4 /dev/nbd0 /mnt/db
	must mount -t xfs /dev/nbd1 /mnt/files
	touch /data/second
	must sync /data/second /data
	step "writing"
	write() {
		for i in $(seq 60); do
			must dd if=/dev/urandom of=/mnt/$1/f$i bs=16k count=4 conv=fsync 2>/dev/null
			echo "BLOCKSTEP SUM: $(cd /mnt && md5sum $1/f$i)"
		done
	}
	write db &
	write files
	wait
	fail "the power was not cut"
fi
step "second boot"
for m in db files; do
	serves alpha $m
done
step "the volumes serve"
must test -z "$(bs alpha attachments --json | tr -d '[] \n')"
on alpha attach db /dev/nbd0
on alpha attach files /dev/nbd1
must mount -t ext4 /dev/nbd0 /mnt/db
must mount -t xfs /dev/nbd1 /mnt/files
(cd /mnt && md5sum db/f* files/f*) | sed 's/^/BLOCKSTEP FOUND: /'
must umount /mnt/db
must umount /mnt/files
must /bin/e2fsck -fn /dev/nbd0
must /bin/xfs_repair -n /dev/nbd1 >/tmp/out 2>&1
on alpha detach db
on alpha detach files
same db
same files
