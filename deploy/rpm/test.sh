#!/bin/sh
# test.sh BINARIES: builds two versions of the package, and installs, upgrades
# and erases them in a root directory of their own.
set -eu
[ "$(id -u)" = 0 ] || { echo "test.sh: run as root: it uses chroot" >&2; exit 1; }
bin=$1
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
old=$(PAYLOAD=w0.ufdio VERSION=0.0.1~test1 "$here/build.sh" "$bin" "$work")
new=$(PAYLOAD=w0.ufdio VERSION=0.0.1~test2 "$here/build.sh" "$bin" "$work")

r=$work/root
# shellcheck source=../testroot.sh
. "$here/../testroot.sh"
make_root
do_rpm() { rpm --root="$r" --nodeps "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }

rpm --root="$r" --initdb
do_rpm -i "$old"
check -x "$r/usr/sbin/blockstepd"
check -f "$r/usr/lib/systemd/system/blockstepd.service"
check -f "$r/usr/lib/systemd/system/blockstep.socket"
check -n "$(grep '^blockstep:' "$r/etc/group")"
check -d "$r/etc/blockstep"
"$r/usr/bin/blockstep" version >/dev/null
do_rpm -V --nogroup --nouser blockstep
echo '# mine' >>"$r/etc/default/blockstepd"
mkdir -p "$r/var/lib/blockstep/volumes"
do_rpm -U "$new"
check "$(rpm --root="$r" -q --qf '%{VERSION}' blockstep)" = 0.0.1~test2
check -n "$(grep '# mine' "$r/etc/default/blockstepd")"
do_rpm -e blockstep
check ! -e "$r/usr/sbin/blockstepd"
check ! -e "$r/usr/lib/systemd/system/blockstepd.service"
check -f "$r/etc/default/blockstepd.rpmsave"
check -d "$r/var/lib/blockstep/volumes"
echo "rpm: installed, upgraded and erased; the replicas stayed"
