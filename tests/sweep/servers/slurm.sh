#!/bin/bash
# A throw-away Slurm of one node with four pretend GPUs, as root, without systemd or cgroups. Jobs of the partition "urgent"
# preempt those of "main", which are queued again.
#
#   slurm.sh install        Debian's packages
#   slurm.sh start FOLDER   then: export SLURM_CONF=FOLDER/slurm.conf
#   slurm.sh stop FOLDER
set -euo pipefail
verb=${1:?install, start FOLDER or stop FOLDER}
folder=${2:-}
case $verb in
install)
  apt-get update -q
  apt-get install -y -q --no-install-recommends slurm-wlm munge
  ;;
start)
  host=$(hostname -s)
  mkdir -p "$folder"/{state,spool,log,munge,dev}
  chmod 700 "$folder/munge"
  if [ ! -s "$folder/munge/munge.key" ]; then
    head -c 128 /dev/urandom >"$folder/munge/munge.key"
    chmod 400 "$folder/munge/munge.key"
  fi
  for gpu in 0 1 2 3; do # a GPU must be a device node
    [ -e "$folder/dev/nvidia$gpu" ] || mknod "$folder/dev/nvidia$gpu" c 1 3
  done
  : >"$folder/cgroup.conf"
  echo "NodeName=$host Name=gpu File=$folder/dev/nvidia[0-3]" >"$folder/gres.conf"
  cat >"$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/munge.socket,cred_expire=30
CredType=cred/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,requeue_setup_env_fail
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=15
OverTimeLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MailProg=/bin/true
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 RealMemory=8000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  export SLURM_CONF=$folder/slurm.conf
  munged --key-file="$folder/munge/munge.key" --socket="$folder/munge/munge.socket" --pid-file="$folder/munge/munged.pid" \
    --log-file="$folder/munge/munged.log" --seed-file="$folder/munge/munge.seed" --num-threads=2 --force
  chmod 755 "$folder/munge"
  slurmctld -c
  sleep 2
  slurmd
  sleep 3
  sinfo --Node --long
  ;;
stop)
  for name in slurmd slurmctld munge/munged; do
    if [ -s "$folder/$name.pid" ]; then
      kill "$(cat "$folder/$name.pid")" || true
    fi
  done
  ;;
*)
  echo "slurm.sh install | start FOLDER | stop FOLDER" >&2
  exit 2
  ;;
esac
