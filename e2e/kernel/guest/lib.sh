# What the scenarios share. Nodes: alpha, beta, gamma; their data lies on the
# virtual disk at /data, their logs at /tmp. No time in here is a promise of the
# product's: an emulated machine on a busy host is slow, so that each wait ends
# with what it waits for, and its limit only ends what hangs.

step() { echo "BLOCKSTEP STEP: $(cut -d' ' -f1 /proc/uptime)s $*"; }

fail() {
	echo "BLOCKSTEP FAIL: $*"
	for n in alpha beta gamma; do
		echo "--- log of $n"
		tail -n 60 /tmp/$n.log
	done
	bs alpha status || bs beta status || bs gamma status
	bs alpha attachments
	echo "--- kernel"
	dmesg | tail -n 40
	poweroff -f
	sleep 60
}

must() { "$@" || fail "this failed: $*"; }

# mustfail TEXT COMMAND...: the command fails and says TEXT.
mustfail() {
	text=$1
	shift
	out=$("$@" 2>&1) && fail "this should have failed: $*: $out"
	case "$out" in
	*"$text"*) echo "as it should: $out" ;;
	*) fail "$*: said '$out', which does not name '$text'" ;;
	esac
}

bs() {
	node=$1
	shift
	blockstep --admin "unix:///run/$node.sock" "$@"
}

# configure [LINE]: the three configurations, with a line more.
configure() {
	mkdir -p /etc/blockstep
	for n in alpha beta gamma; do
		mkdir -p /data/$n
		cat >/etc/blockstep/$n.yaml <<END
cluster: kernel
node: $n
data_dir: /data/$n
nodes:
  alpha: {address: "127.0.0.1:7701"}
  beta: {address: "127.0.0.1:7702"}
  gamma: {address: "127.0.0.1:7703"}
nbd: {listen: ["unix:///run/$n-nbd.sock"]}
admin: {listen: "unix:///run/$n.sock"}
volume: {log_retention: 16MiB, lease: 3s, heartbeat: 500ms, power_loss_grace: 3s}
raft: {heartbeat: 4s, election: 4s}
$1
END
	done
}

start() {
	blockstepd --config /etc/blockstep/$1.yaml >>/tmp/$1.log 2>&1 &
	echo $! >/run/$1.pid
}

crash() { kill -9 "$(cat /run/$1.pid)" && wait "$(cat /run/$1.pid)" 2>/dev/null; rm -f /run/$1.pid; }

stop() {
	[ -f /run/$1.pid ] || return 0
	kill -TERM "$(cat /run/$1.pid)"
	wait "$(cat /run/$1.pid)" || fail "$1 did not stop cleanly"
	rm -f /run/$1.pid
}

stop_all() { for n in alpha beta gamma; do stop $n; done; }

start_all() { for n in alpha beta gamma; do start $n; done; }

# until_done SECONDS COMMAND...: the command is tried until it succeeds.
until_done() {
	limit=$(($(cut -d. -f1 /proc/uptime) + $1))
	shift
	until "$@" >/tmp/out 2>&1; do
		[ "$(cut -d. -f1 /proc/uptime)" -lt $limit ] || { cat /tmp/out; return 1; }
		sleep 0.3
	done
}

# on NODE VERB...: a verb, tried again while the daemons start and elect.
on() { until_done 400 bs "$@" || fail "blockstep $*"; cat /tmp/out; }

healthy() { until_done 400 bs $1 wait $2 --for healthy --timeout 30s || fail "$2 is not healthy"; }

serves() { until_done 400 bs $1 wait $2 --for primary --timeout 30s || fail "$2 has no primary"; }

# pound DIRECTORY NAME: writes with fsync until /tmp/pound.stop is there. The
# number of rounds for which fsync has returned is in /tmp/pound.NAME.
pound() {
	i=0
	while [ ! -e /tmp/pound.stop ]; do
		i=$((i + 1))
		dd if=/dev/urandom of=$1/pound.$((i % 8)) bs=64k count=2 conv=fsync 2>/tmp/dd.$2 || { echo "$2, round $i: $(cat /tmp/dd.$2)" >/tmp/pound.failed; return 1; }
		echo $i >/tmp/pound.$2
	done
}

# pounding NAME...: the same in the background, for each /mnt/NAME.
pounding() {
	rm -f /tmp/pound.*
	pounders=
	pounded="$*"
	for name in "$@"; do
		echo 0 >/tmp/pound.$name
		pound /mnt/$name $name &
		pounders="$pounders $!"
	done
	progress
}

at_least() { [ -e /tmp/pound.failed ] || [ "$(cat /tmp/pound.$1)" -ge $2 ] 2>/dev/null; }

# progress: fsync returns on each of them, of writes that began from now on.
progress() {
	for name in $pounded; do
		rounds=$(cat /tmp/pound.$name)
		until_done 300 at_least $name $((${rounds:-0} + 3)) || fail "/mnt/$name stands still since round $rounds"
		[ ! -e /tmp/pound.failed ] || fail "a write failed under a file system: $(cat /tmp/pound.failed)"
	done
}

# pounding_ends: it stops, and neither it nor the kernel has seen an error.
pounding_ends() {
	touch /tmp/pound.stop
	for p in $pounders; do
		wait $p || fail "a write failed under a file system: $(cat /tmp/pound.failed)"
	done
	for name in $pounded; do
		step "/mnt/$name: $(cat /tmp/pound.$name) rounds of writing with fsync, no error"
	done
	dmesg | grep -iE 'I/O error|EXT4-fs error|remount|XFS.*(shut ?down|corrupt)' && fail "the kernel saw an error"
	return 0
}

# same VOLUME: the replicas hold the same bytes.
same() {
	healthy beta $1
	must nbdsame unix:///run/alpha-nbd.sock $1@alpha unix:///run/beta-nbd.sock $1@beta unix:///run/gamma-nbd.sock $1@gamma
}

# Smaller than mkfs.xfs likes it, so that comparing is quick.
make_xfs() { must /bin/mkfs.xfs -q --unsupported "$1"; }
