#!/bin/bash
# A real Slurm queue of two nodes on this machine, for the tests of slurm/: as root, on Debian (`make slurm-here`).
set -euo pipefail
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge > /dev/null
mkdir -p /run/munge /etc/slurm /var/spool/slurmctld /var/spool/slurmd.n1 /var/spool/slurmd.n2
chown munge: /run/munge
pgrep -x munged > /dev/null || runuser -u munge -- /usr/sbin/munged
host=$(hostname -s)
cat > /etc/slurm/slurm.conf << CONF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=5
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd.%n
SlurmdPidFile=/run/slurmd.%n.pid
SlurmctldLogFile=/var/log/slurmctld.log
SlurmdLogFile=/var/log/slurmd.%n.log
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
pgrep -x slurmctld > /dev/null || slurmctld
for node in n1 n2; do
    pgrep -f "slurmd -N $node" > /dev/null || slurmd -N "$node"
done
for _ in $(seq 30); do
    sinfo --noheader --format=%t | grep -qx idle && break
    sleep 1
done
sinfo
