#!/bin/sh
# build.sh BINARIES OUTPUT: the RPM package, by rpmbuild.
set -eu
bin=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
command -v rpmbuild >/dev/null || { echo "build.sh: rpmbuild is missing: apt-get install --no-install-recommends rpm" >&2; exit 1; }
version=${VERSION:-$("$here/../version.sh" "$bin")}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 0755 "$work"
mkdir -p "$work/stage" "$out"
"$here/../stage.sh" "$bin" "$work/stage" usr/lib
out=$(cd "$out" && pwd)
rpmbuild -bb --quiet --target "$(uname -m)" --define "_topdir $work/top" --define "_binary_payload ${PAYLOAD:-w6.xzdio}" --define "_rpmdir $out" --define "_rpmfilename %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm" \
	--define "version $version" --define "stage $work/stage" "$here/blockstep.spec" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
echo "$out/blockstep-$version-1.$(uname -m).rpm"
