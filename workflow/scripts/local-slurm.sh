#!/usr/bin/env bash
# A SLURM cluster of this one machine, to try the profile workflow/profiles/slurm before it goes to a real
# one. For Debian and Ubuntu with the packages slurm-wlm and munge; `stop` puts everything back.
set -euo pipefail

# Where SLURM looks by default: the jobs of Snakemake's plugin do not inherit SLURM_CONF.
CONF=/etc/slurm/slurm.conf
GRES=/etc/slurm/gres.conf
STATE=/var/lib/flowtilt-slurm
MARK='# Written by local-slurm.sh of flowtilt, which removes it again at local-slurm.sh stop.'
# The programs of the daemons are not on every user's PATH.
PATH=$PATH:/usr/sbin:/sbin

usage() {
	cat <<-END
		usage: local-slurm.sh start [--gpus N] | stop | status

		start    makes this machine a SLURM cluster of one node, with the partition "local"; needs root.
		         --gpus N: lets it have N GPUs to ask for, in place of those that are found
		stop     cancels all its jobs, ends it, and removes all that start has made; needs root
		status   says whether it runs, and what is in its queue; exit status 3 if it does not

		start writes $CONF (with GPUs also $GRES) and the folder $STATE,
		and starts slurmctld, slurmd and, if it is not running, munged.
	END
}

fail() {
	echo "local-slurm.sh: $*" >&2
	exit 1
}

ours() {
	[[ -f $1 ]] && grep -qxF "$MARK" "$1"
}

answers() {
	scontrol ping 2>/dev/null | grep -q 'is UP'
}

need_root() {
	[[ $EUID -eq 0 ]] || fail "$1 writes to /etc/slurm and starts or ends daemons: run it as root (sudo $0 $1)"
}

# Wait for a command to succeed; by default as long as a busy machine may take.
wait_for() {
	local tries=$1
	shift
	while ((tries-- > 0)); do
		if "$@" >/dev/null 2>&1; then return 0; fi
		sleep 0.5
	done
	return 1
}

gone() {
	! kill -0 "$1" 2>/dev/null
}

check_start() {
	local program file
	for program in slurmctld slurmd scontrol munged munge; do
		command -v "$program" >/dev/null || fail "the program $program is missing; install SLURM:" \
			"apt-get install --no-install-recommends slurm-wlm munge"
	done
	for file in "$CONF" "$GRES"; do
		[[ ! -e $file ]] || ours "$file" || fail "$file is there and was not written by this script, so that" \
			"this machine belongs to a cluster already; nothing has been changed"
	done
	[[ -f /etc/munge/munge.key ]] || fail "/etc/munge/munge.key is missing; make one: mungekey --create"
	if [[ -e $CONF || -e $STATE ]]; then
		! answers || fail "the cluster is running already; end it with: $0 stop"
		echo "removing what an earlier start has left behind"
		stop
	fi
}

start_munge() {
	if munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then return 0; fi
	if [[ ! -d /run/munge ]]; then
		install -d -o munge -g munge -m 0755 /run/munge
		touch "$STATE/made-run-munge"
	fi
	runuser -u munge -- munged --force --pid-file=/run/munge/munged.pid --log-file="$STATE/munge/munged.log" \
		--seed-file="$STATE/munge/munged.seed"
	touch "$STATE/started-munge"
	wait_for 20 munge -n || fail "munged does not answer; its log is $STATE/munge/munged.log"
}

# $1: number of GPUs
write_conf() {
	local node gpus=$1
	# Without UpTime, which slurmd -C prints as well.
	node=$(slurmd -C | grep -o '^NodeName=.*')
	[[ $gpus -eq 0 ]] || node+=" Gres=gpu:$gpus"
	cat >"$CONF.new" <<-END
		$MARK
		ClusterName=local
		SlurmctldHost=$(hostname -s)(127.0.0.1)
		SlurmUser=slurm
		AuthType=auth/munge
		StateSaveLocation=$STATE/slurmctld
		SlurmdSpoolDir=$STATE/slurmd
		SlurmctldPidFile=$STATE/slurmctld/slurmctld.pid
		SlurmdPidFile=$STATE/slurmd/slurmd.pid
		SlurmctldLogFile=$STATE/slurmctld/slurmctld.log
		SlurmdLogFile=$STATE/slurmd/slurmd.log
		# A node that was away, or was started again, is taken back.
		ReturnToService=2
		# Without control groups, which containers seldom have.
		ProctrackType=proctrack/linuxproc
		TaskPlugin=task/none
		# Cores and memory are shared out, and a job that takes more memory than it has asked for is ended.
		SelectType=select/cons_tres
		SelectTypeParameters=CR_Core_Memory
		JobAcctGatherType=jobacct_gather/linux
		JobAcctGatherFrequency=task=5
		JobAcctGatherParams=OverMemoryKill,UsePss
		# There is no accounting database. So that squeue knows of a job until Snakemake has looked, finished
		# jobs are kept for an hour.
		AccountingStorageType=accounting_storage/none
		MinJobAge=3600
		GresTypes=gpu
		$node NodeAddr=127.0.0.1 State=UNKNOWN
		PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
	END
	if [[ $gpus -gt 0 ]]; then
		# SLURM takes any file for a device, but no device without one.
		local devices=/dev/nvidia i
		if [[ $gpus -ne $(found_gpus) ]]; then
			devices=$STATE/gpu
			for ((i = 0; i < gpus; i++)); do touch "$devices$i"; done
		fi
		printf '%s\nName=gpu File=%s[0-%d]\n' "$MARK" "$devices" "$((gpus - 1))" >"$GRES"
	fi
	mv "$CONF.new" "$CONF"
}

found_gpus() {
	find /dev -maxdepth 1 -name 'nvidia[0-9]*' | wc -l
}

start() {
	need_root start
	local gpus
	gpus=$(found_gpus)
	if [[ $# -gt 0 ]]; then
		[[ $1 = --gpus && ${2:-} =~ ^[0-9]+$ && $# -eq 2 ]] || fail "start takes --gpus N alone; see: $0 --help"
		gpus=$2
	fi
	check_start
	# From here on a failure leaves the machine as it was.
	trap 'trap - EXIT; echo "local-slurm.sh: not started; removing what was made" >&2; stop >&2' EXIT
	install -d -m 0755 "$STATE" "$STATE/slurmd"
	install -d -o slurm -g slurm -m 0755 "$STATE/slurmctld"
	install -d -o munge -g munge -m 0700 "$STATE/munge"
	if [[ ! -d /etc/slurm ]]; then
		install -d -m 0755 /etc/slurm
		touch "$STATE/made-etc-slurm"
	fi
	start_munge
	write_conf "$gpus"
	slurmctld
	slurmd
	if ! wait_for 120 ready; then
		tail -n 5 "$STATE"/slurmctld/slurmctld.log "$STATE"/slurmd/slurmd.log >&2 || true
		fail "SLURM did not come up; the last lines of its logs are above"
	fi
	trap - EXIT
	echo "wrote $CONF and $STATE, and started slurmctld and slurmd; $0 stop puts everything back"
	sinfo --noheader --format='partition %P, node %N, %c cores, %m MB, generic resources %G'
}

ready() {
	answers && [[ $(sinfo --noheader --format=%T) =~ ^(idle|mixed|allocated)$ ]]
}

empty() {
	[[ -z $(squeue --noheader) ]]
}

# End a daemon by the number in a file of its own, if it is there.
end() {
	local pid
	[[ -f $1 ]] || return 0
	pid=$(<"$1")
	kill "$pid" 2>/dev/null || return 0
	wait_for 40 gone "$pid" || kill -KILL "$pid" 2>/dev/null || true
}

stop() {
	need_root stop
	if [[ ! -e $STATE ]] && ! ours "$CONF"; then
		echo "nothing to stop: no cluster of this script is here"
		return 0
	fi
	if ours "$CONF" && answers; then
		squeue --noheader --format=%i | xargs -r scancel || true
		wait_for 60 empty || echo "some jobs did not end in time" >&2
	fi
	end "$STATE/slurmd/slurmd.pid"
	end "$STATE/slurmctld/slurmctld.pid"
	if [[ -e $STATE/started-munge ]]; then end /run/munge/munged.pid; fi
	if [[ -e $STATE/made-run-munge ]]; then rm -rf /run/munge; fi
	if ours "$CONF"; then rm -f "$CONF"; fi
	if ours "$GRES"; then rm -f "$GRES"; fi
	if [[ -e $STATE/made-etc-slurm ]]; then rmdir --ignore-fail-on-non-empty /etc/slurm; fi
	rm -rf "$CONF.new" "$STATE"
	echo "ended the cluster, and removed its configuration and $STATE"
}

status() {
	if ! ours "$CONF"; then
		echo "not running: $CONF was not written by this script"
		return 3
	fi
	if ! answers; then
		echo "not running: $CONF is there, but slurmctld does not answer; clean up with: $0 stop"
		return 3
	fi
	sinfo
	squeue --format='%.8i %.10P %.60k %.10T %.10M'
}

case ${1:-} in
start | stop | status) "$@" ;;
-h | --help | help) usage ;;
*)
	usage >&2
	exit 2
	;;
esac
