# What the scenarios share. Nodes: alpha, beta, gamma; their data lies on the
# virtual disk at /data, their logs at /tmp.

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

configure() {
	port=7700
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
raft: {heartbeat: 6s, election: 6s}
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

# on NODE VERB...: a verb, tried again while the daemon starts.
on() {
	n=$1
	shift
	for _ in $(seq 60); do
		bs $n "$@" >/tmp/out 2>&1 && { cat /tmp/out; return 0; }
		kill -0 "$(cat /run/$n.pid)" || break
		sleep 1
	done
	cat /tmp/out
	fail "blockstep $* on $n"
}

healthy() { bs $1 wait $2 --for healthy --timeout 90s >/tmp/out 2>&1 || { cat /tmp/out; fail "$2 is not healthy"; }; }

# primary_not NODE: moves the volume's primary away from the node.
primary() { bs $1 status $2 --json | tr ',{' '\n\n' | sed -n 's/^ *"primary": *"\([a-z]*\)".*/\1/p' | head -n 1; }

# pound FILE SECONDS: writes with fsync until the time is over; any error fails.
# Each round leaves its number in FILE.rounds after the fsync has returned.
pound() {
	end=$(($(date +%s) + $2))
	i=0
	while [ "$(date +%s)" -lt $end ]; do
		i=$((i + 1))
		dd if=/dev/urandom of=$1.$((i % 8)) bs=64k count=4 conv=fsync 2>/tmp/dd.err || { echo "round $i: $(cat /tmp/dd.err)" >/tmp/pound.failed; return 1; }
		echo $i >/tmp/pound.rounds
	done
}

# pounding SECONDS: the same in the background; pounded waits for its end.
pounding() {
	rm -f /tmp/pound.failed
	pound /mnt/pound $1 &
	pounder=$!
}

pounded() {
	wait $pounder || fail "a write failed under the file system: $(cat /tmp/pound.failed)"
	step "$(cat /tmp/pound.rounds) rounds of writing with fsync, no error"
	dmesg | grep -iE 'I/O error|EXT4-fs error|remount' && fail "the kernel saw an error"
	return 0
}

# compare VOLUME: the replicas hold the same bytes.
compare() {
	healthy beta $1
	first=
	for n in alpha beta gamma; do
		sum=$(nbdsum unix:///run/$n-nbd.sock $1@$n) || fail "reading $1@$n"
		echo "$1@$n $sum"
		[ -z "$first" ] && first=$sum
		[ "$sum" = "$first" ] || fail "the replicas of $1 differ"
	done
}
