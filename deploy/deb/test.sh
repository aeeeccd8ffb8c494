#!/bin/sh
# test.sh BINARIES: builds two versions of the package, and installs, upgrades,
# removes and purges them in a root directory of their own.
set -eu
[ "$(id -u)" = 0 ] || { echo "test.sh: run as root: it uses chroot" >&2; exit 1; }
bin=$1
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
old=$(VERSION=0.0.1~test1 "$here/build.sh" "$bin" "$work")
new=$(VERSION=0.0.1~test2 "$here/build.sh" "$bin" "$work")

# A root with what the maintainer scripts use, from this system's own programs.
r=$work/root
mkdir -p "$r/var/lib/dpkg/info" "$r/var/lib/dpkg/updates" "$r/etc" "$r/bin" "$r/usr/bin" "$r/usr/sbin" "$r/var/lib/blockstep" "$r/dev" "$r/tmp"
: >"$r/var/lib/dpkg/status"
: >"$r/var/lib/dpkg/available"
echo root:x:0:0:root:/root:/bin/sh >"$r/etc/passwd"
echo root:x:0: >"$r/etc/group"
: >"$r/dev/null"
program() {
	path=$(command -v "$1")
	install -D "$path" "$r$2"
	ldd "$path" 2>/dev/null | grep -o '/[^ ]*' | while read -r lib; do
		[ -e "$r$lib" ] || install -D "$lib" "$r$lib"
	done
}
program sh /bin/sh
for p in getent mkdir rmdir systemd-sysusers systemd-tmpfiles; do program "$p" "/usr/bin/$p"; done

do_dpkg() { dpkg --root="$r" --force-depends --log=/dev/null "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }
check() { test "$@" || { echo "test.sh: not so: $*" >&2; exit 1; }; }

do_dpkg -i "$old"
check -x "$r/usr/sbin/blockstepd"
check -f "$r/lib/systemd/system/blockstepd.service"
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
