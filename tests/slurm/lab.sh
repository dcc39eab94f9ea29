#!/usr/bin/env bash
# A real SLURM on this machine, for tests: two simulated nodes of two CPUs, partitions "debug" and, before it, "hi".
#   lab.sh start FOLDER    needs root, and Debian's slurmctld, slurmd, slurm-client and munge
#   lab.sh stop FOLDER
# SLURM_CONF=FOLDER/slurm.conf is then what sbatch and srun need.
set -euo pipefail
LAB=$(realpath -m "$2")
case "$1" in
stop)
    for pid in "$LAB"/run/*.pid; do kill "$(cat "$pid")" 2>/dev/null || true; done
    exit 0
    ;;
start) ;;
*) echo "lab.sh start|stop FOLDER" >&2; exit 2 ;;
esac
PORT=$((41000 + 3 * ($$ % 6000)))
mkdir -p "$LAB"/{run,log,state,spool/n1,spool/n2}
chmod 755 "$LAB" "$LAB"/run
cat > "$LAB/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$LAB/run/munge.sock,cred_expire=5
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=5,batch_sched_delay=0
ReturnToService=2
StateSaveLocation=$LAB/state
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdPidFile=$LAB/run/slurmd.%n.pid
SlurmdLogFile=$LAB/log/slurmd.%n.log
SlurmdSpoolDir=$LAB/spool/%n
SlurmdParameters=config_overrides
SlurmdTimeout=60
KillWait=10
MinJobAge=300
InactiveLimit=0
JobRequeue=1
NodeName=n[1-2] NodeAddr=127.0.1.[1-2] Port=[$((PORT + 1))-$((PORT + 2))] CPUs=2 RealMemory=8000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=hi Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
{ cat /etc/hosts; printf '127.0.1.1 n1\n127.0.1.2 n2\n'; } > "$LAB/hosts"
head -c 1024 /dev/urandom > "$LAB/run/munge.key"
chmod 600 "$LAB/run/munge.key"
export SLURM_CONF=$LAB/slurm.conf LAB
# In a mount namespace of their own, so that the machine's names of hosts stay as they are.
unshare -m --propagation private bash -euc '
    mount --bind "$LAB/hosts" /etc/hosts
    munged --force --key-file="$LAB/run/munge.key" --socket="$LAB/run/munge.sock" --pid-file="$LAB/run/munged.pid" \
        --log-file="$LAB/log/munged.log" --seed-file="$LAB/run/munged.seed"
    slurmctld
    for node in n1 n2; do unshare -u bash -c "hostname $node; exec slurmd -N $node"; done
'
for _ in $(seq 100); do
    [ "$(sinfo -h -o %T -N 2>/dev/null | grep -c idle)" = 4 ] && exit 0
    sleep 0.2
done
echo "SLURM does not start; $LAB/log says why" >&2
exit 1
