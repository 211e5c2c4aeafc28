#!/usr/bin/env bash
# A real SLURM on one machine: munged, slurmctld and two slurmd. Debian: slurmctld slurmd slurm-client munge.
#
#   cluster.sh start DIR PORT    nodes n0 and n1 (partition local), and fake[1-16] of 8 GPUs that never come up, for
#                                sbatch --test-only (partition fake); takes the ports PORT to PORT+2
#   cluster.sh stop DIR          ends the jobs and what start began
#
# DIR/environment holds the variables that lead sbatch and the others there. All files are in DIR.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
NODES=(n0 n1)

die() { echo "cluster.sh: $*" >&2; exit 1; }
[[ $# -ge 2 ]] || die "usage: cluster.sh start DIR PORT | stop DIR"
mkdir -p "$2"
DIR=$(cd "$2" && pwd -P)
# The address of a unix socket holds 107 characters.
[[ ${#DIR} -le 70 ]] || die "the path is too long for sockets: $DIR"
export SLURM_CONF=$DIR/etc/slurm.conf

# A pid file holds the process's number and birth: a number that was given again is never signalled.
birth() { sed -E 's/.*\) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
alive() { # NAME -> its pid
    local pid born
    read -r pid born 2>/dev/null <"$DIR/run/$1.pid" || return 1
    [[ $(birth "$pid") == "$born" ]] && ! grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null && echo "$pid"
}
spawn() { # NAME COMMAND...
    local name=$1
    shift
    setsid "$@" >>"$DIR/log/$name.out" 2>&1 </dev/null &
    echo "$! $(birth $!)" >"$DIR/run/$name.pid"
}
finish() { # NAME
    local pid
    pid=$(alive "$1") && kill -KILL "$pid"
    rm -f "$DIR/run/$1.pid"
}

# Whether each node can have its own host name, /etc/hosts and process table.
isolates() { unshare --mount --uts --pid --fork --kill-child --mount-proc true 2>/dev/null; }

configure() { # PORT
    local me host
    me=$(id -un) host=$(hostname -s)
    mkdir -p "$DIR"/{etc,munge,run,log,state,spool,tmp}
    chmod 755 "$DIR" "$DIR/munge"
    (umask 077; head -c 128 /dev/urandom >"$DIR/munge/munge.key")
    # CPUs and memory are claims (config_overrides): what a launcher for large nodes asks for must be there.
    # cred_expire: as many seconds waits a requeued job; two minutes for anything below 5.
    cat >"$SLURM_CONF" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$1
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
TmpFS=$DIR/tmp
SlurmctldPidFile=$DIR/run/slurmctld.own
SlurmdPidFile=$DIR/run/slurmd.%n.own
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
PlugStackConfig=$DIR/etc/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MailProg=/bin/true
ReturnToService=2
MessageTimeout=100
MinJobAge=86400
KillWait=5
JobRequeue=1
SuspendProgram=/bin/true
ResumeProgram=/bin/true
GresTypes=gpu
NodeName=DEFAULT CPUs=128 RealMemory=1900000
NodeName=n0 NodeHostname=$([[ $ISOLATED ]] && echo n0 || echo "$host") NodeAddr=127.0.1.1 Port=$(($1 + 1)) State=UNKNOWN
NodeName=n1 NodeHostname=$([[ $ISOLATED ]] && echo n1 || echo "$host") NodeAddr=127.0.1.2 Port=$(($1 + 2)) State=UNKNOWN
NodeName=fake[1-16] NodeAddr=127.0.2.1 Gres=gpu:8 State=CLOUD
PartitionName=local Nodes=n[0-1] Default=YES
PartitionName=fake Nodes=fake[1-16]
END
    : >"$DIR/etc/plugstack.conf"
    printf 'AutoDetect=off\nNodeName=fake[1-16] Name=gpu Count=8\n' >"$DIR/etc/gres.conf"
    { cat /etc/hosts; echo 127.0.1.1 n0; echo 127.0.1.2 n1; } >"$DIR/etc/hosts"
    echo "SLURM_CONF=$SLURM_CONF" >"$DIR/environment"
    # Nobody knows the nodes by name then.
    [[ $ISOLATED ]] || echo MASTER_ADDR=127.0.0.1 >>"$DIR/environment"
}

start_node() { # NAME
    if [[ $ISOLATED ]]; then
        # The node's first process is this bash: it reaps orphans, and all of the node ends with it.
        # shellcheck disable=SC2016
        spawn "$1" unshare --mount --uts --pid --fork --kill-child=KILL --mount-proc \
            bash -c 'hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts
                     slurmd -D -N "$1" & trap "kill -TERM $!" TERM; while kill -0 $! 2>/dev/null; do wait $!; done' node "$1" "$DIR"
    else
        spawn "$1" slurmd -D -N "$1"
    fi
}

ready() { [[ $(sinfo -h -p local -N -t idle --responding -o %N 2>/dev/null | sort -u | wc -l) == "${#NODES[@]}" ]]; }

case $1 in
start)
    ISOLATED=$(isolates && echo yes || true)
    configure "${3:?PORT}"
    spawn munged munged --foreground --force --key-file="$DIR/munge/munge.key" --socket="$DIR/munge/socket" \
        --pid-file="$DIR/munge/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed"
    for ((i = 0; i < 100; i++)); do [[ -S $DIR/munge/socket ]] && break; sleep 0.1; done
    spawn slurmctld slurmctld -D -c
    for node in "${NODES[@]}"; do start_node "$node"; done
    for ((i = 0; i < 300; i++)); do ready && exit; sleep 0.1; done
    tail -n 5 "$DIR"/log/* >&2
    "$0" stop "$DIR"
    die "the nodes did not register in 30 s"
    ;;
stop)
    if alive slurmctld >/dev/null; then
        timeout 30 scancel --full --signal=KILL -u "$(id -un)" || true
        timeout 30 scancel -u "$(id -un)" || true
        for ((i = 0; i < 100; i++)); do [[ -z $(timeout 30 squeue -h -p local -t R,CG) ]] && break; sleep 0.1; done
    fi
    for name in "${NODES[@]}" slurmctld munged; do finish "$name"; done
    ;;
*) die "no command $1" ;;
esac
