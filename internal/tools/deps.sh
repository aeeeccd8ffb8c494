#!/bin/sh
# deps.sh: are the programs there that the tests drive blockstep with?
#
# As root on a machine with apt-get it installs what is missing; otherwise it
# says exactly what to install and fails. It never goes on without: a test that
# is skipped silently is a promise that nobody checks.
#
# usage: deps.sh GROUP...     groups: test story bench kernel systemd rpm deploy
set -eu

# command:package, one pair a line.
test_pairs='
gcc:gcc
qemu-img:qemu-utils
qemu-io:qemu-utils
nbdinfo:libnbd-bin
nbdcopy:libnbd-bin
nbdsh:python3-libnbd
nbdfuse:libnbd-bin
fusermount3:fuse3
fio:fio
ip:iproute2
mkfs.ext4:e2fsprogs
fsck.ext4:e2fsprogs
'
story_pairs='
mkfs.ext4:e2fsprogs
fsck.ext4:e2fsprogs
'

bench_pairs='
fio:fio
nbdkit:nbdkit
qemu-storage-daemon:qemu-system-common
'
kernel_pairs='
qemu-system-x86_64:qemu-system-x86
qemu-img:qemu-utils
busybox:busybox-static
cpio:cpio
depmod:kmod
mkfs.ext4:e2fsprogs
mkfs.xfs:xfsprogs
'

systemd_pairs='
debootstrap:debootstrap
systemctl:systemd
'
rpm_pairs='
rpmbuild:rpm
'
deploy_pairs='
promtool:prometheus
ansible-playbook:ansible-core
'
# mkfs and fsck live in sbin, which is not in every user's PATH.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

pairs=''
for group in "$@"; do
	case "$group" in
	test) pairs="$pairs $test_pairs" ;;
	story) pairs="$pairs $story_pairs" ;;
	bench) pairs="$pairs $bench_pairs" ;;
	kernel) pairs="$pairs $kernel_pairs" ;;
	systemd) pairs="$pairs $systemd_pairs" ;;
	rpm) pairs="$pairs $rpm_pairs" ;;
	deploy) pairs="$pairs $deploy_pairs" ;;
	*)
		echo "deps.sh: unknown group '$group'; use: test story bench kernel systemd rpm deploy" >&2
		exit 2
		;;
	esac
done

missing() {
	packages=''
	for pair in $pairs; do
		command -v "${pair%%:*}" >/dev/null 2>&1 || packages="$packages ${pair##*:}"
	done
	# fio may come without its NBD engine (Debian's has it).
	case "$pairs" in
	*fio:*)
		if command -v fio >/dev/null 2>&1 && ! fio --enghelp 2>/dev/null | grep -qw nbd; then
			echo "deps.sh: the fio found has no nbd engine; install Debian's fio in its place" >&2
			packages="$packages fio"
		fi
		;;
	esac
	printf '%s\n' $packages | sort -u | tr '\n' ' '
}

need="$(missing)"
[ -n "${need% }" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
	echo "deps.sh: installing $need"
	export DEBIAN_FRONTEND=noninteractive
	apt-get -q update
	# shellcheck disable=SC2086 # a list of packages
	apt-get -q install -y --no-install-recommends $need
	need="$(missing)"
	[ -n "${need% }" ] || exit 0
	echo "deps.sh: still missing after the installation: $need" >&2
	exit 1
fi

echo "deps.sh: some programs that are needed are not here. On Debian:" >&2
echo "    sudo apt-get update && sudo apt-get install --no-install-recommends $need" >&2
exit 1
