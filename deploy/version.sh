#!/bin/sh
# version.sh BINARIES: the version of the packages of these binaries, which must rise
# with each build: packages are upgraded by it. A release is its number. So many
# commits after one is "+N.gHASH" behind it. Where no release is known, the version is a
# hash alone: the date of the commit stands before it, and 0~ has all of them below any
# release.
set -eu
bin=$1
here=$(cd "$(dirname "$0")" && pwd)
said=$("$bin/blockstep" version | sed -n 's/^blockstep \([^ ]*\).*/\1/p')
dirty=
case $said in
*-dirty) dirty=+dirty said=${said%-dirty} ;;
esac
release=$(expr "$said" : 'v\{0,1\}\([0-9][0-9]*\.[0-9].*\)') || release=
if [ -n "$release" ]; then
	# A version has no dash in it. ~ sorts before what it leads to: 1.2.0~rc1.
	echo "$(echo "$release" | sed 's/-\([0-9][0-9]*\)-g\([0-9a-f]*\)$/+\1.g\2/; s/-/~/g')$dirty"
	exit
fi
hash=$(expr "${said#devel-}" : '\([0-9a-f]\{7,40\}\)$') || hash=
date=
[ -z "$hash" ] || date=$(TZ=UTC git -C "$here" show -s --format=%cd --date=format-local:%Y%m%d%H%M%S "$hash" -- 2>/dev/null) || date=
# Without the history: when the program was built.
echo "0~git${date:-$(date -u -r "$bin/blockstep" +%Y%m%d%H%M%S)}${hash:+.$hash}$dirty"
