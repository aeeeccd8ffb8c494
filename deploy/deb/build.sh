#!/bin/sh
# build.sh BINARIES OUTPUT: the Debian package, by dpkg-deb alone.
set -eu
bin=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
version=${VERSION:-$("$here/../version.sh" "$bin")}
arch=$(dpkg --print-architecture)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 0755 "$root"

"$here/../stage.sh" "$bin" "$root" lib
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
dpkg-deb --root-owner-group "-Z${COMPRESS:-xz}" --build "$root" "$deb" >/dev/null
echo "$deb"
