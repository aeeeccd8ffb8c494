# testroot.sh, read by the packages' tests: a root directory with what the
# maintainer scripts use, from this system's own programs.

# program NAME PATH: a program and its libraries, below $r.
program() {
	path=$(command -v "$1")
	install -D "$path" "$r$2"
	ldd "$path" 2>/dev/null | grep -o '/[^ ]*' | while read -r lib; do
		[ -e "$r$lib" ] || install -D "$lib" "$r$lib"
	done
}

make_root() {
	mkdir -p "$r/etc" "$r/bin" "$r/usr/bin" "$r/usr/sbin" "$r/var/lib/blockstep" "$r/dev" "$r/tmp"
	echo root:x:0:0:root:/root:/bin/sh >"$r/etc/passwd"
	echo root:x:0: >"$r/etc/group"
	: >"$r/dev/null"
	program sh /bin/sh
	for p in getent mkdir rmdir systemd-sysusers systemd-tmpfiles; do program "$p" "/usr/bin/$p"; done
}

check() { test "$@" || { echo "$0: not so: $*" >&2; exit 1; }; }
