#!/bin/sh
# build.sh BINARIES OUTPUT: the Debian package, by dpkg-deb alone.
set -eu
bin=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
version=$("$bin/blockstep" version 2>/dev/null | sed -n 's/^blockstep v\{0,1\}\([0-9][^ ]*\).*/\1/p' | tr -- - '~')
version=${VERSION:-${version:-0.0.1}}
arch=$(dpkg --print-architecture)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 0755 "$root"

put() { install -D -m "$1" "$2" "$root/$3"; }
put 0755 "$bin/blockstepd" usr/sbin/blockstepd
put 0755 "$bin/blockstep" usr/bin/blockstep
for unit in "$top"/systemd/*.service "$top"/systemd/*.target; do
	put 0644 "$unit" "lib/systemd/system/$(basename "$unit")"
done
put 0644 "$top/systemd/blockstep.sysusers.conf" usr/lib/sysusers.d/blockstep.conf
put 0644 "$top/systemd/blockstep.tmpfiles.conf" usr/lib/tmpfiles.d/blockstep.conf
put 0644 "$top/systemd/blockstep.modules-load.conf" usr/lib/modules-load.d/blockstep.conf
put 0644 "$top/systemd/60-blockstep.rules" lib/udev/rules.d/60-blockstep.rules
put 0644 "$top/systemd/blockstepd.default" etc/default/blockstepd
put 0644 "$top/systemd/blockstep.yaml" usr/share/doc/blockstep/examples/blockstep.yaml
put 0644 "$top/README.md" usr/share/doc/blockstep/README.md
mkdir -p "$root/DEBIAN"
for script in postinst prerm postrm; do
	install -m 0755 "$here/$script" "$root/DEBIAN/$script"
done
echo /etc/default/blockstepd >"$root/DEBIAN/conffiles"
cat >"$root/DEBIAN/control" <<END
Package: blockstep
Version: $version
Architecture: $arch
Maintainer: The blockstep authors <blockstep@localhost>
Installed-Size: $(du -ks "$root" | cut -f1)
Recommends: kmod, udev
Section: admin
Priority: optional
Description: block devices replicated between Linux nodes
 Each node runs blockstepd. A volume is written to a majority of its replicas
 before a write is answered, is served over NBD by every node, and is attached
 to the kernel as /dev/blockstep/VOLUME. Any node may fail.
END
(cd "$root" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | LC_ALL=C sort -z | xargs -0 md5sum >DEBIAN/md5sums)
mkdir -p "$out"
deb="$out/blockstep_${version}_${arch}.deb"
dpkg-deb --root-owner-group -Zxz --build "$root" "$deb" >/dev/null
echo "$deb"
