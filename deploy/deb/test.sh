#!/bin/sh
# test.sh BINARIES: builds two versions of the package, and installs, upgrades,
# removes and purges them in a root directory of their own.
set -eu
[ "$(id -u)" = 0 ] || { echo "test.sh: run as root: it uses chroot" >&2; exit 1; }
bin=$1
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
old=$(COMPRESS=none VERSION=0.0.1~test1 "$here/build.sh" "$bin" "$work")
new=$(COMPRESS=none VERSION=0.0.1~test2 "$here/build.sh" "$bin" "$work")

r=$work/root
# shellcheck source=../testroot.sh
. "$here/../testroot.sh"
make_root
mkdir -p "$r/var/lib/dpkg/info" "$r/var/lib/dpkg/updates"
: >"$r/var/lib/dpkg/status"
: >"$r/var/lib/dpkg/available"

do_dpkg() { dpkg --root="$r" --force-depends --log=/dev/null "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }

do_dpkg -i "$old"
check -x "$r/usr/sbin/blockstepd"
check -f "$r/lib/systemd/system/blockstepd.service"
check -f "$r/lib/systemd/system/blockstep.socket"
check -s "$r/usr/share/bash-completion/completions/blockstep"
"$r/usr/sbin/blockstepd" --check-config --config "$r/usr/share/doc/blockstep/examples/blockstep.yaml" --node alpha
check -x "$r/usr/share/doc/blockstep/docs/examples/blockstep-backup"
check -f "$r/usr/share/doc/blockstep/docs/runbooks/disk-failed.md"
check -n "$(grep '^blockstep:' "$r/etc/group")"
"$r/usr/bin/blockstep" version >/dev/null
(cd "$r" && grep -v '^$' var/lib/dpkg/info/blockstep.md5sums | md5sum -c --quiet -)
echo '# mine' >>"$r/etc/default/blockstepd"
mkdir -p "$r/var/lib/blockstep/volumes"
do_dpkg -i "$new"
check "$(dpkg-query --admindir="$r/var/lib/dpkg" -W -f '${Version}' blockstep)" = 0.0.1~test2
check -n "$(grep '# mine' "$r/etc/default/blockstepd")"
do_dpkg -r blockstep
check ! -e "$r/usr/sbin/blockstepd"
check -f "$r/etc/default/blockstepd"
do_dpkg -P blockstep
check ! -e "$r/etc/default/blockstepd"
check -d "$r/var/lib/blockstep/volumes"
echo "deb: installed, upgraded, removed and purged; the replicas stayed"
