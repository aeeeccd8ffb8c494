#!/bin/sh
# stage.sh BINARIES ROOT LIB: what a package installs, below ROOT. LIB is where
# the distribution keeps units and udev rules: lib or usr/lib.
set -eu
bin=$1 root=$2 lib=$3
top=$(cd "$(dirname "$0")/.." && pwd)

put() { install -D -m "$1" "$2" "$root/$3"; }
put 0755 "$bin/blockstepd" usr/sbin/blockstepd
put 0755 "$bin/blockstep" usr/bin/blockstep
for unit in "$top"/systemd/*.service "$top"/systemd/*.target "$top"/systemd/*.socket; do
	put 0644 "$unit" "$lib/systemd/system/$(basename "$unit")"
done
put 0644 "$top/systemd/blockstep.sysusers.conf" usr/lib/sysusers.d/blockstep.conf
put 0644 "$top/systemd/blockstep.tmpfiles.conf" usr/lib/tmpfiles.d/blockstep.conf
put 0644 "$top/systemd/blockstep.modules-load.conf" usr/lib/modules-load.d/blockstep.conf
put 0644 "$top/systemd/60-blockstep.rules" "$lib/udev/rules.d/60-blockstep.rules"
put 0644 "$top/systemd/blockstepd.default" etc/default/blockstepd
put 0644 "$top/systemd/blockstep.yaml" usr/share/doc/blockstep/examples/blockstep.yaml
# The documentation as it lies here: the pages, the alerts and the messages name one
# another by these paths.
for page in README.md CHANGELOG.md CONTRIBUTING.md raft/DESIGN.md replication/DESIGN.md; do
	put 0644 "$top/$page" "usr/share/doc/blockstep/$page"
done
(cd "$top" && find docs deploy/prometheus deploy/grafana deploy/ansible deploy/container -type f) | while read -r page; do
	mode=0644
	[ ! -x "$top/$page" ] || mode=0755
	put $mode "$top/$page" "usr/share/doc/blockstep/$page"
done

# From the commands themselves.
mkdir -p "$root/usr/share/bash-completion/completions" "$root/usr/share/zsh/vendor-completions"
"$bin/blockstep" completion bash >"$root/usr/share/bash-completion/completions/blockstep"
"$bin/blockstep" completion zsh >"$root/usr/share/zsh/vendor-completions/_blockstep"
"$bin/blockstep" man --dir "$root/man.new" >/dev/null
for page in "$root"/man.new/*; do
	name=$(basename "$page")
	gzip -9n "$page"
	put 0644 "$page.gz" "usr/share/man/man${name##*.}/$name.gz"
done
rm -r "$root/man.new"
