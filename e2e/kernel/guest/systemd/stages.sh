# The stages of TestSystemd, one a boot; the kernel's command line names it.
stage=$(sed -n 's/.*scenario=\([a-z]*\).*/\1/p' /proc/cmdline)

step() { echo "BLOCKSTEP STEP: $(cut -d' ' -f1 /proc/uptime)s $*"; }

fail() {
	echo "BLOCKSTEP FAIL: $*"
	systemctl --no-pager --failed
	systemctl --no-pager list-jobs
	for u in blockstepd beta blockstep-attach@db blockstep-follow@db; do
		journalctl --no-pager -b -n 40 -u $u
	done
	blockstep status
	dmesg | tail -n 30
	sync
	echo o >/proc/sysrq-trigger
	sleep 60
}

must() { "$@" || fail "this failed: $*"; }

until_done() {
	limit=$(($(cut -d. -f1 /proc/uptime) + $1))
	shift
	until "$@" >/tmp/out 2>&1; do
		[ "$(cut -d. -f1 /proc/uptime)" -lt $limit ] || fail "not so after its time: $*: $(cat /tmp/out)"
		sleep 0.5
	done
}

isnt() { ! "$@"; }

# since UNIT: when it became active, microseconds since boot.
since() { systemctl show -P ActiveEnterTimestampMonotonic "$1"; }

ends() {
	step "stage $stage is done"
	echo "BLOCKSTEP STOPPING: $(cut -d' ' -f1 /proc/uptime)"
	echo "BLOCKSTEP PASS"
	systemctl --no-block "$1"
}

stage_install() {
	must systemctl is-active blockstepd.service blockstep.socket
	until_done 240 blockstep volume create db --size 64MiB
	step "the volume is there"
	must systemctl enable --now blockstep-attach@db.service blockstep-follow@db.service
	must test -b /dev/blockstep/db
	must mkfs.ext4 -q /dev/blockstep/db
	echo '/dev/blockstep/db /srv/data ext4 _netdev,x-systemd.requires=blockstep-attach@db.service,x-systemd.device-timeout=6m 0 2' >>/etc/fstab
	must systemctl daemon-reload
	must systemctl enable bound.service
	must systemctl start srv-data.mount
	must mountpoint -q /srv/data
	must sh -c 'seq 10000 >/srv/data/first && sync /srv/data/first'
	ends reboot
}

# write NAME: a file, with fsync, within a time in which nothing fails.
write() { must timeout 240 dd if=/dev/urandom of=/srv/data/$1 bs=64k count=16 conv=fsync; }

stage_use() {
	until_done 240 systemctl is-active srv-data.mount
	must mountpoint -q /srv/data
	must sh -c 'seq 10000 | cmp - /srv/data/first'
	step "mounted at boot: daemon $(since blockstepd), attached $(since blockstep-attach@db), mounted $(since srv-data.mount)"
	must test "$(since blockstepd)" -le "$(since blockstep-attach@db)"
	must test "$(since blockstep-attach@db)" -le "$(since srv-data.mount)"
	must test "$(since srv-data.mount)" -le "$(since remote-fs.target)"
	must test "$(stat -c %G /run/blockstep/nbd.sock)" = blockstep
	must grep -q 'VmLck:.*[1-9]' /proc/$(systemctl show -P MainPID blockstepd)/status
	must test "$(cat /proc/$(systemctl show -P MainPID blockstepd)/oom_score_adj)" = -1000
	dmesg | grep 'recovery complete' | grep nbd && fail "the file system was not clean after reboot"

	# 1 and 2: the target and what is bound to it follow the primary.
	until_done 240 blockstep wait db --for healthy --timeout 30s
	until_done 120 blockstep switchover db --to alpha
	until_done 120 systemctl is-active blockstep-primary@db.target bound.service
	until_done 120 blockstep switchover db --to beta
	until_done 120 isnt systemctl is-active bound.service
	must isnt systemctl is-active blockstep-primary@db.target
	step "the target follows the primary"

	# 3: the daemon below a mounted file system.
	must systemctl restart blockstepd
	write restarted
	step "restarted"
	must systemctl kill -s KILL blockstepd
	write killed
	until_done 120 systemctl is-active blockstepd
	step "killed"
	must dpkg -i /srv/blockstep_0.0.2_*.deb
	write upgraded
	must test "$(dpkg-query -W -f '${Version}' blockstep)" = 0.0.2
	must mountpoint -q /srv/data
	must systemctl is-active blockstepd srv-data.mount blockstep-attach@db
	step "upgraded"
	(cd /srv/data && md5sum first restarted killed upgraded) >/srv/sums
	dmesg | grep -iE 'I/O error|EXT4-fs error' && fail "the kernel saw an error"
	ends poweroff
}

stage_after() {
	until_done 240 systemctl is-active srv-data.mount
	dmesg | grep 'recovery complete' | grep nbd && fail "the file system was not clean after poweroff"
	(cd /srv/data && must md5sum -c /srv/sums)
	# Stopping the attachment alone unmounts first, and needs no hand.
	must systemctl stop blockstep-attach@db
	must isnt mountpoint -q /srv/data
	must isnt test -e /dev/blockstep/db
	must systemctl start srv-data.mount
	must mountpoint -q /srv/data
	must systemctl stop blockstep-attach@db
	must blockstep attach db /dev/nbd1 --read-only
	must e2fsck -fn /dev/nbd1
	# udev still reads what it was told of: under a detach that is an error in the
	# kernel's log, which the test looks for.
	must udevadm settle --timeout=60
	must blockstep detach db
	must systemctl start srv-data.mount
	ends poweroff
}

"stage_$stage"
