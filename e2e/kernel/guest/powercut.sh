# What fsync returned for is there after the power of the whole machine was cut.
# The test boots this twice: the host cuts the power when it reads CUT NOW.
configure
start_all
if [ ! -e /data/second ]; then
	on alpha volume create db --size 48MiB
	healthy alpha db
	must bs alpha attach db /dev/nbd0
	must /bin/mke2fs -q -t ext4 /dev/nbd0
	must mount -t ext4 /dev/nbd0 /mnt
	touch /data/second
	sync
	step "writing"
	for i in $(seq 20); do
		must dd if=/dev/urandom of=/mnt/f$i bs=16k count=4 conv=fsync 2>/dev/null
		echo "BLOCKSTEP SUM: $(md5sum /mnt/f$i)"
	done
	must sync /mnt
	echo "BLOCKSTEP CUT NOW"
	sleep 600
fi
step "second boot"
for _ in $(seq 90); do
	bs alpha wait db --for primary --timeout 2s >/dev/null 2>&1 && break
	sleep 1
done
must bs alpha wait db --for primary --timeout 10s
step "the volume serves"
must test -z "$(bs alpha attachments --json | tr -d '[] \n')"
must bs alpha attach db /dev/nbd0
must mount -t ext4 /dev/nbd0 /mnt
for i in $(seq 20); do
	echo "BLOCKSTEP FOUND: $(md5sum /mnt/f$i)"
done
must umount /mnt
must /bin/e2fsck -fn /dev/nbd0
must bs alpha detach db
compare db
