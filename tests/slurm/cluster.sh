#!/bin/bash
# A real, throw-away Slurm cluster on one Debian or Ubuntu machine: several nodes, accounting, a login node, two users.
#
#   cluster.sh up   [--nodes N] [--gpus G] [--cpus C] [--mem MB] [--dbd|--no-dbd]
#                   [--preempt partition|qos|off] [--grace SEC] [--user-signal]
#                   [--cgroup|--no-cgroup] [--slow] [--gpu-type T] [--conf 'slurm.conf line']... [--fresh]
#   cluster.sh down [--purge]      stop everything (--purge: also delete all state, homes, keys)
#   cluster.sh status              one line per daemon + sinfo; exit 0 only if all is well
#   cluster.sh env                 shell exports for a client on the host (SLURM_CONF, ...)
#   cluster.sh exec [-u USER] CMD  run CMD on the login node (as USER, default root)
#   cluster.sh sh NS CMD           run CMD inside namespace NS (ctl|login|node1|...) as root
#   cluster.sh daemon stop|kill|start|pause|cont munged|mariadbd|slurmdbd|slurmctld|sshd|nodeK
#   cluster.sh poweroff nodeK      the node vanishes with every process on it (no goodbye)
#   cluster.sh poweron  nodeK      boot it again
#   cluster.sh reset               between tests: cancel all jobs, restart what is dead, resume
#                                  nodes and partitions, wait until every node is idle
#
# --cgroup (default where cgroup v1 is writable): jobs are tracked and memory-limited by cgroups, so nothing
# survives its job, OUT_OF_MEMORY is real and CUDA_VISIBLE_DEVICES counts from 0 in every job.
# --no-cgroup: linuxproc tracking; orphans survive, memory is polled, CUDA_VISIBLE_DEVICES is global.
# --slow: Slurm's own timers (requeue after 120 s, KillWait 30 s, node timeout 300 s) instead of fast ones.
#
# Needs: root with CAP_SYS_ADMIN (mount/uts/pid namespaces), and what install.sh installs. No systemd, no cgroup.
# Nothing outside $BASE is written: /etc/{passwd,group,shadow,hosts,slurm} and /run/sshd exist only inside the
# namespaces. Everything listens on 127.0.0.0/8 or a unix socket.
#
# Environment: SLURMTEST_BASE (a short path that everybody may enter: unix sockets end at 108 characters),
# SLURMTEST_PORT_BASE, SLURMTEST_USERS, SLURMTEST_OPEN (folders, separated by ":", that every user must be able to read
# inside the machines although they lie under /root or the like: the checkout, the Python it runs on).
set -u -o pipefail
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
unset SLURM_CONF ${!SLURM_@} ${!SBATCH_@}

SELF=$(readlink -f "$0")
BASE=${SLURMTEST_BASE:-/tmp/tinker-hpc-slurm/cluster}
PB=${SLURMTEST_PORT_BASE:-16800}          # +17 slurmctld +19 slurmdbd +22 sshd +100+K slurmd of nodeK
ETC=$BASE/etc RUN=$BASE/run LOG=$BASE/log
TESTUSERS=${SLURMTEST_USERS:-alice:2001 bob:2002}

say()  { printf '%s\n' "$*" >&2; }
die()  { say "cluster.sh: $*"; exit 1; }
now()  { date +%s.%N; }
lap()  { [ -n "${TIMING:-}" ] && say "  +$(since "$t0") s $1"; return 0; }
since(){ awk -v a="$1" -v b="$(now)" 'BEGIN{printf "%.2f", b-a}'; }

# -- processes -------------------------------------------------------------------------------
# A pid file holds "PID STARTTIME": a recycled pid or a zombie never counts as alive
# (PID 1 of a container may not reap, so `kill -0` alone is a trap).
starttime() { awk '{sub(/^.*\) /,""); if($1!="Z" && $1!="X") print $20}' "/proc/$1/stat" 2>/dev/null; }
holder() {                                   # host pid of the init of namespace $1, if alive
  local p s; read -r p s 2>/dev/null <"$RUN/ns-$1" || return 1
  [ -n "$p" ] && [ "$(starttime "$p")" = "$s" ] && echo "$p"
}
ns_list() { local f; for f in "$RUN"/ns-*; do [ -e "$f" ] && basename "${f#*ns-}"; done; }
in_ns() { local p; p=$(holder "$1") || { say "namespace $1 is down"; return 125; }; shift
  nsenter -t "$p" -m -u -p ${NSWD:+--wd="$NSWD"} -- "$@" 9>&-; }

ns_up() {                                    # ns_up NAME: mount+uts+pid namespace with its own init
  local name=$1 upid p
  holder "$name" >/dev/null && return 0
  rm -f "$RUN/ns-$name" "$RUN/ns-$name.ready"
  setsid unshare --mount --uts --pid --fork --kill-child --propagation slave \
      bash "$RUN/nsinit.sh" "$name" </dev/null >>"$LOG/ns-$name.log" 2>&1 9>&- &
  upid=$!
  for _ in $(seq 200); do [ -e "$RUN/ns-$name.ready" ] && break; sleep .02; done
  [ -e "$RUN/ns-$name.ready" ] || die "namespace $name did not start: $(tail -3 "$LOG/ns-$name.log")"
  p=$(cat "/proc/$upid/task/$upid/children"); p=${p%% *}
  echo "$p $(starttime "$p")" >"$RUN/ns-$name"
}
ns_down() {                                  # kills every process in the namespace at once
  local p; if p=$(holder "$1"); then
    kill -9 "$p"; for _ in $(seq 250); do [ -z "$(starttime "$p")" ] && break; sleep .02; done; fi
  rm -f "$RUN/ns-$1" "$RUN/ns-$1.ready"
}
# Folders a user's job must read may lie where only root can go. Inside the machines, and only there, each is shown at
# its own path again: an empty folder over the closed ancestor, then the folder itself bound back. A folder that is
# closed all the way down (a clone made under umask 077) is bound from a readable copy.
open_up() {                                  # prints the lines of nsinit.sh that do it
  local path ancestor part i=0 source closed=()
  local -A source_of=() under=()
  IFS=: read -ra paths <<<"${SLURMTEST_OPEN:-}"
  for path in "${paths[@]}"; do
    path=$(readlink -f "$path") && [ -d "$path" ] || continue
    ancestor='' part=$path
    while [ "$part" != / ]; do [ $(( 0$(stat -c %a "$part") & 1 )) = 0 ] && ancestor=$part; part=$(dirname "$part"); done
    source=$path
    if [ -n "$(find "$path" \( -name .git -o -name .ruff_cache \) -prune -o \
               \( -type d ! -perm -o+rx -o -name '*.py' ! -perm -o+r \) -print -quit)" ]; then
      source=$BASE/open/$((++i)); mkdir -p "$BASE/open"
      [ -d "$source" ] || cp -a --reflink=auto "$path" "$source"; chmod -R a+rX "$source"; ancestor=${ancestor:-$path}
    fi
    [ -n "$ancestor" ] || continue
    source_of[$path]=$source under[$path]=$ancestor; closed+=("$path")
  done
  i=0; for path in "${closed[@]}"; do i=$((i+1))
    printf 'mkdir /run/open/%d; mount --bind %q /run/open/%d\n' $i "${source_of[$path]}" $i; done
  for ancestor in $(printf '%s\n' "${under[@]}" | sort -u); do
    printf 'mount -t tmpfs -o mode=755,size=1m tmpfs %q\n' "$ancestor"; done
  i=0; for path in "${closed[@]}"; do i=$((i+1))
    printf 'mkdir -p %q; mount --bind /run/open/%d %q\n' "$path" $i "$path"; done
}
write_nsinit() { cat >"$RUN/nsinit.sh" <<EOF
# init of one virtual machine; bash as PID 1 reaps orphans
set -e
N=\$1
mount -t proc proc /proc
hostname "\$N"
mkdir -p /etc/slurm 2>/dev/null || true
mount --bind $ETC/slurm /etc/slurm
for f in passwd group shadow hosts; do mount --bind $ETC/\$f /etc/\$f; done
mount -t tmpfs -o mode=755,size=1m tmpfs /run
mkdir -p /run/sshd /run/lock /run/open
$(open_up)
set +e
trap '' HUP INT TERM
: >$RUN/ns-\$N.ready
while :; do sleep 3600 & wait \$!; done
EOF
}

# -- daemons ---------------------------------------------------------------------------------
ns_of()  { case $1 in node*) echo "$1";; sshd) echo login;; *) echo ctl;; esac; }
dpid()   {                                   # pid of daemon $1 *inside* its namespace
  local f=$RUN/$1.pid comm=$1 p st; case $1 in node*) f=$RUN/slurmd-$1.pid comm=slurmd;; esac
  p=$(cat "$f" 2>/dev/null) && holder "$(ns_of "$1")" >/dev/null || return 1
  st=$(in_ns "$(ns_of "$1")" cat "/proc/$p/stat" 2>/dev/null) || return 1
  case $st in "$p ($comm) Z"*) return 1;; "$p ($comm) "*) echo "$p";; *) return 1;; esac
}
dstart() {
  local d=$1; dpid "$d" >/dev/null && return 0
  case $d in
  munged)    in_ns ctl munged --key-file="$ETC/munge.key" --socket="$RUN/munge.sock" --force \
               --pid-file="$RUN/munged.pid" --log-file="$LOG/munged.log" --seed-file="$RUN/munged.seed" ;;
  mariadbd)  # unix socket only, in a 0700 directory, so no grants are needed; but the system tables are:
             # slurmdbd needs mysql.proc for its stored procedure get_parent_limits
             [ -d "$BASE/mysql/mysql" ] || in_ns ctl mariadb-install-db --no-defaults --user=root --skip-test-db \
               --datadir="$BASE/mysql" >"$LOG/mariadb-install.log" 2>&1 || die "mariadb-install-db failed, see $LOG"
             in_ns ctl setsid -f mariadbd --no-defaults --user=root --datadir="$BASE/mysql" \
               --socket="$RUN/db/mysql.sock" --pid-file="$RUN/mariadbd.pid" --log-error="$LOG/mariadbd.log" \
               --skip-networking --skip-grant-tables --innodb-buffer-pool-size=64M \
               --innodb-log-file-size=16M --innodb-flush-log-at-trx-commit=0 --innodb-flush-method=nosync --innodb-doublewrite=0 --sync-frm=0 --innodb-lock-wait-timeout=900 \
               </dev/null >/dev/null 2>&1
             for _ in $(seq 200); do mariadb -S "$RUN/db/mysql.sock" -e 'CREATE DATABASE IF NOT EXISTS slurm_acct_db' \
               2>/dev/null && return 0; sleep .05; done; die "mariadbd did not start, see $LOG/mariadbd.log" ;;
  slurmdbd)  in_ns ctl env MYSQL_UNIX_PORT="$RUN/db/mysql.sock" slurmdbd ;;
  slurmctld) in_ns ctl slurmctld ;;
  sshd)      in_ns login /usr/sbin/sshd -f "$ETC/sshd_config" -E "$LOG/sshd.log" ;;
  node*)     in_ns "$d" slurmd -N "$d" ;;
  *)         die "no daemon $d" ;;
  esac
}
dsignal() { local p; p=$(dpid "$1") || return 0; in_ns "$(ns_of "$1")" kill "-$2" "$p"; }
dstop() { dsignal "$1" "${2:-TERM}"; for _ in $(seq 400); do dpid "$1" >/dev/null || return 0; sleep .05; done; return 1; }

# -- configuration ---------------------------------------------------------------------------
defaults() { NODES=3 GPUS=4 CPUS=8 MEM=8000 DBD=1 PREEMPT=partition GRACE=5 USERSIG=0 CGROUP=auto SLOW=0 GPUTYPE=a100 EXTRA=(); }
cgroup_ok() {                                # cgroup v1 with the controllers we use, writable
  local c t; for c in freezer memory devices; do t=/sys/fs/cgroup/$c/slurmtest.$$
    [ -e "/sys/fs/cgroup/$c/tasks" ] && mkdir "$t" 2>/dev/null && rmdir "$t" || return 1; done
}
cgroup_taken() { pgrep -x slurmd >/dev/null; }   # slurm_nodeK names would collide with another cluster's
cgroup_clean() { local c; for c in /sys/fs/cgroup/*/slurm_node*; do
  [ -d "$c" ] && find "$c" -depth -type d -exec rmdir {} + 2>/dev/null; done; return 0; }
write_conf() {
  local i u name uid nl="node[1-$NODES]"; [ "$NODES" = 1 ] && nl=node1
  umask 022
  mkdir -p "$ETC/slurm" "$RUN" "$LOG" "$BASE/state" "$BASE/spool" "$BASE/home" "$BASE/keys" "$BASE/dev" "$BASE/shared"
  mkdir -p -m 700 "$RUN/db" "$BASE/mysql"; chmod 700 "$BASE/keys" "$BASE/state"; chmod 1777 "$BASE/shared"
  [ -s "$ETC/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$ETC/munge.key"); chmod 400 "$ETC/munge.key"
  # users: the host's accounts plus the test users; written in place (a bind mount pins the inode)
  { grep -vE '^(alice|bob):' /etc/passwd; for u in $TESTUSERS; do name=${u%%:*} uid=${u##*:}
      echo "$name:x:$uid:$uid:$name:$BASE/home/$name:/bin/bash"; done; } >"$ETC/passwd"
  { cat /etc/group; for u in $TESTUSERS; do echo "${u%%:*}:x:${u##*:}:"; done; } >"$ETC/group"
  [ -e "$ETC/shadow" ] || (umask 077; : >"$ETC/shadow"); chmod 600 "$ETC/shadow"
  { cat /etc/shadow; for u in $TESTUSERS; do echo "${u%%:*}:*:20000:0:99999:7:::"; done; } >"$ETC/shadow"
  # one address for all: a step daemon connects back to the *source address* of srun's request, which the
  # kernel makes 127.0.0.1 for all of 127/8, while srun under NoInAddrAny listens on its hostname's address
  { echo "127.0.0.1 localhost ctl login"; for i in $(seq "$NODES"); do echo "127.0.0.1 node$i"; done; } >"$ETC/hosts"
  for u in $TESTUSERS; do name=${u%%:*} uid=${u##*:}
    [ -d "$BASE/home/$name" ] || { mkdir -m 700 "$BASE/home/$name"; chown "$uid:$uid" "$BASE/home/$name"; }
    [ -e "$BASE/keys/$name" ] || ssh-keygen -q -t ed25519 -N '' -C "$name@laptop" -f "$BASE/keys/$name"
    mkdir -p -m 700 "$BASE/home/$name/.ssh"; cp "$BASE/keys/$name.pub" "$BASE/home/$name/.ssh/authorized_keys"
    chmod 600 "$BASE/home/$name/.ssh/authorized_keys"; chown -R "$uid:$uid" "$BASE/home/$name/.ssh"
  done
  [ -e "$ETC/ssh_host_ed25519_key" ] || ssh-keygen -q -t ed25519 -N '' -f "$ETC/ssh_host_ed25519_key"
  echo "[127.0.0.1]:$((PB+22)) $(cut -d' ' -f1,2 "$ETC/ssh_host_ed25519_key.pub")" >"$BASE/keys/known_hosts"
  cat >"$ETC/sshd_config" <<EOF
Port $((PB+22))
ListenAddress 127.0.0.1
HostKey $ETC/ssh_host_ed25519_key
PidFile $RUN/sshd.pid
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
AllowUsers $(for u in $TESTUSERS; do printf '%s ' "${u%%:*}"; done)
Subsystem sftp internal-sftp
UseDNS no
PrintMotd no
MaxStartups 50:30:200
MaxSessions 50
EOF
  # fake GPUs: char devices with nvidia's major and no driver behind; a distinct file per GPU gives each an index
  for i in $(seq 0 $((GPUS-1))); do [ -c "$BASE/dev/gpu$i" ] || mknod -m 666 "$BASE/dev/gpu$i" c 195 "$i"; done
  local gres='' last=$((GPUS-1)); : >"$ETC/slurm/gres.conf"
  if [ "$GPUS" -gt 0 ]; then gres="Gres=gpu:$GPUTYPE:$GPUS"
    local files="gpu[0-$last]"; [ "$GPUS" = 1 ] && files=gpu0
    echo "NodeName=$nl Name=gpu Type=$GPUTYPE File=$BASE/dev/$files" >"$ETC/slurm/gres.conf"; fi
  local sched="batch_sched_delay=0,sched_min_interval=0,sched_interval=5,bf_interval=2"
  local timers="SlurmdTimeout=10 SlurmctldTimeout=10 KillWait=20 MinJobAge=120 BatchStartTimeout=10 MessageTimeout=10 CompleteWait=0"
  local cred=,cred_expire=10
  [ "$SLOW" = 1 ] && { sched="" timers="" cred=""; }       # Slurm's own production defaults
  local usersig=''; [ "$USERSIG" = 1 ] && usersig=SlurmctldParameters=preempt_send_user_signal   # 22.05 spelling
  local proctrack=proctrack/linuxproc task=task/none jag=jobacct_gather/linux jagp='JobAcctGatherParams=OverMemoryKill'
  if [ "$CGROUP" = 1 ]; then proctrack=proctrack/cgroup task=task/cgroup jag=jobacct_gather/linux jagp=''; fi
  { cat <<EOF
ClusterName=testcluster
SlurmctldHost=ctl(127.0.0.1)
SlurmctldPort=$((PB+17))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.sock$cred
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$BASE/state
SlurmdSpoolDir=$BASE/spool/%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd-%n.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd-%n.log
ProctrackType=$proctrack
TaskPlugin=$task
MpiDefault=none
MailProg=/bin/true
ReturnToService=1
JobRequeue=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
${sched:+SchedulerParameters=$sched}
JobAcctGatherType=$jag
JobAcctGatherFrequency=task=1
$jagp
$usersig
EOF
    printf '%s\n' $timers
    case $PREEMPT in
      partition) echo PreemptType=preempt/partition_prio; echo PreemptMode=REQUEUE ;;
      qos)       echo PreemptType=preempt/qos; echo PreemptMode=REQUEUE ;;
      off)       echo PreemptType=preempt/none ;;
      *) die "--preempt partition|qos|off" ;;
    esac
    if [ "$DBD" = 1 ]; then cat <<EOF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PB+19))
AccountingStoragePass=$RUN/munge.sock
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu${GPUTYPE:+,gres/gpu:$GPUTYPE}
EOF
    else echo AccountingStorageType=accounting_storage/none; fi
    [ "$GPUS" -gt 0 ] && echo GresTypes=gpu
    for i in $(seq "$NODES"); do
      echo "NodeName=node$i NodeAddr=127.0.0.1 Port=$((PB+100+i)) CPUs=$CPUS RealMemory=$MEM $gres State=UNKNOWN"; done
    local pm_low='' pm_off=''
    [ "$PREEMPT" = partition ] && { pm_low="PreemptMode=REQUEUE GraceTime=$GRACE"; pm_off=PreemptMode=OFF; }
    cat <<EOF
PartitionName=main  Nodes=ALL Default=YES PriorityTier=10 DefaultTime=60 MaxTime=INFINITE DefMemPerCPU=256 $pm_off
PartitionName=low   Nodes=ALL PriorityTier=1 DefaultTime=60 DefMemPerCPU=256 $pm_low
PartitionName=high  Nodes=ALL PriorityTier=100 DefaultTime=60 DefMemPerCPU=256 $pm_off
PartitionName=short Nodes=ALL PriorityTier=10 DefaultTime=1 MaxTime=2 MaxNodes=1 DefMemPerCPU=256 $pm_off
PartitionName=closed Nodes=ALL State=DOWN DefMemPerCPU=256 $pm_off
EOF
    [ ${#EXTRA[@]} -gt 0 ] && printf '%s\n' "${EXTRA[@]}"
  } >"$ETC/slurm/slurm.conf"
  cat >"$ETC/slurm/cgroup.conf" <<EOF
CgroupPlugin=cgroup/v1
ConstrainRAMSpace=$([ "$CGROUP" = 1 ] && echo yes || echo no)
ConstrainSwapSpace=no
ConstrainCores=no
ConstrainDevices=$([ "$CGROUP" = 1 ] && echo yes || echo no)
EOF
  (umask 077; cat >"$ETC/slurm/slurmdbd.conf" <<EOF
DbdHost=ctl
DbdAddr=127.0.0.1
DbdPort=$((PB+19))
CommunicationParameters=NoInAddrAny
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.sock
PidFile=$RUN/slurmdbd.pid
LogFile=$LOG/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
EOF
  ); chmod 600 "$ETC/slurm/slurmdbd.conf"
  write_nsinit
}

seed_accounts() {                            # once per database; each sacctmgr request costs 40-500 ms
  [ -e "$BASE/mysql/.seeded" ] && return 0
  local u first=${TESTUSERS%%:*} all=root q=normal,scavenger,urgent,one
  for u in $TESTUSERS; do all=$all,${u%%:*}; done
  { echo "add qos scavenger Priority=1 PreemptMode=requeue GraceTime=$GRACE"
    echo "add qos urgent Priority=100 Preempt=scavenger"
    echo "add qos one MaxJobsPerUser=1 MaxSubmitJobsPerUser=3"
    echo "add account lab,poor Description=test Organization=test qos=$q"
    echo "add user $all Account=lab DefaultAccount=lab"
    echo "add user $first Account=poor MaxJobs=1$([ "$GPUS" -gt 0 ] && echo ' GrpTRES=gres/gpu=1')"
    echo exit; } >"$RUN/accounts.cmd"
  in_ns ctl sacctmgr -i -Q <"$RUN/accounts.cmd" >>"$LOG/sacctmgr.log" 2>&1
  [ "$(in_ns ctl sacctmgr -n -P show assoc where account=lab user="$first" format=user)" = "$first" ] \
    || die "accounts were not created, see $LOG/sacctmgr.log"
  : >"$BASE/mysql/.seeded"
}

# -- verbs -----------------------------------------------------------------------------------
up() {
  defaults; local fresh=0 t0 d i k; t0=$(now)
  while [ $# -gt 0 ]; do case $1 in
    --nodes) NODES=$2; shift;; --gpus) GPUS=$2; shift;; --cpus) CPUS=$2; shift;; --mem) MEM=$2; shift;;
    --dbd) DBD=1;; --no-dbd) DBD=0;; --preempt) PREEMPT=$2; shift;; --grace) GRACE=$2; shift;;
    --user-signal) USERSIG=1;; --cgroup) CGROUP=1;; --no-cgroup) CGROUP=0;; --slow) SLOW=1;; --gpu-type) GPUTYPE=$2; shift;;
    --conf) EXTRA+=("$2"); shift;; --fresh) fresh=1;; *) die "up: unknown option $1";; esac; shift; done
  [ "$(id -u)" = 0 ] || die "must be root"
  for d in munged slurmctld slurmd sshd unshare nsenter ssh-keygen; do command -v $d >/dev/null || die "missing: $d"; done
  [ "$DBD" = 0 ] || for d in slurmdbd mariadbd; do command -v $d >/dev/null || die "missing: $d (or use --no-dbd)"; done
  [ "$fresh" = 1 ] && down --purge
  mkdir -p "$RUN"; exec 9>"$BASE/.lock"; flock -w 60 9 || die "another cluster.sh is at work"
  local own=0; [ "$(cut -d' ' -f9 "$RUN/params" 2>/dev/null)" = 1 ] && holder ctl >/dev/null && own=1   # we hold the cgroups
  if [ "$CGROUP" = auto ]; then CGROUP=0; if cgroup_ok && { [ $own = 1 ] || ! cgroup_taken || holder node1 >/dev/null; }; then CGROUP=1; fi
  elif [ "$CGROUP" = 1 ]; then cgroup_ok || die "--cgroup: cgroup v1 freezer, memory, devices are not all writable here"; fi
  local want="$NODES $GPUS $CPUS $MEM $DBD $PREEMPT $GRACE $USERSIG $CGROUP $SLOW $GPUTYPE ${EXTRA[*]-} $(cksum <"$SELF")"
  if [ "$(cat "$RUN/params" 2>/dev/null)" = "$want" ] && status >/dev/null 2>&1; then say "already up"; return 0; fi
  if [ -n "$(ns_list)" ]; then stop_all; fi
  [ "$CGROUP" = 1 ] && cgroup_taken && die "another Slurm node daemon runs on this host: use --no-cgroup"
  # Slurm refuses to mix a saved state with another node layout only mildly: keep it, it recovers jobs
  write_conf; echo "$want" >"$RUN/params"; lap config
  ns_up ctl; dstart munged; lap munged
  if [ "$DBD" = 1 ]; then dstart mariadbd; lap mariadbd; dstart slurmdbd
    for _ in $(seq 400); do (exec 3<>/dev/tcp/127.0.0.1/$((PB+19))) 2>/dev/null && break; sleep .05; done
    in_ns ctl sacctmgr -i -Q add cluster testcluster >"$LOG/sacctmgr.log" 2>&1; lap slurmdbd; fi
  dstart slurmctld || die "slurmctld did not start: $(tail -3 "$LOG/slurmctld.log")"; lap slurmctld
  local pids=(); for i in $(seq "$NODES"); do { ns_up "node$i"; dstart "node$i"; } & pids+=($!); done
  ns_up login; dstart sshd; wait "${pids[@]}"; lap slurmds
  if [ "$DBD" = 1 ]; then   # only once slurmctld answers, or it misses slurmdbd's push ("update cluster: Connection refused")
    for k in $(seq 300); do in_ns ctl scontrol ping 2>/dev/null | grep -q ' UP' && break; sleep .05; done
    seed_accounts; lap accounts; fi
  for k in $(seq 300); do
    [ "$(in_ns login sinfo -h -N -p main -o '%t' 2>/dev/null | grep -cE '^(idle|mix|alloc|comp)$')" = "$NODES" ] && break; sleep .1; done
  status >&2 || die "cluster is not healthy"
  say "up in $(since "$t0") s; ssh: -i $BASE/keys/alice -p $((PB+22)) alice@127.0.0.1"
}
stop_all() {
  local d n
  if holder ctl >/dev/null; then for d in slurmctld slurmdbd mariadbd munged; do dstop $d >/dev/null 2>&1; done; fi
  for n in $(ns_list | grep -v '\.ready$'); do ns_down "$n"; done
  [ "$(cut -d' ' -f9 "$RUN/params" 2>/dev/null)" = 1 ] && cgroup_clean
  rm -f "$RUN"/*.pid "$RUN"/munge.sock*
}
down() {
  local t0; t0=$(now); [ -d "$BASE" ] || { say "nothing to stop"; return 0; }
  stop_all
  if [ "${1:-}" = --purge ]; then
    case $BASE in */cluster*) rm -rf --one-file-system "$BASE";; *) die "refusing to purge $BASE";; esac; fi
  say "down in $(since "$t0") s"
}
status() {
  local bad=0 d p n i; read -r n _ <"$RUN/params" 2>/dev/null || { echo "not configured"; return 3; }
  local ds="munged slurmctld sshd"; [ "$(cut -d' ' -f5 "$RUN/params")" = 1 ] && ds="munged mariadbd slurmdbd slurmctld sshd"
  for d in $ds $(for i in $(seq "$n"); do echo "node$i"; done); do
    if p=$(dpid "$d"); then printf '%-10s up   (pid %s in ns %s)\n' "$d" "$p" "$(ns_of "$d")"; else printf '%-10s DOWN\n' "$d"; bad=1; fi; done
  echo "mode: $(awk '{print ($5==1?"slurmdbd":"no accounting") ", preempt " $6 (($8==1)?" + user signal":"") ", " (($9==1)?"cgroup v1":"linuxproc") ", " (($10==1)?"production":"fast") " timers"}' "$RUN/params")"
  [ "$bad" = 0 ] && { in_ns login sinfo -o '%.9P %.5a %.10l %.6D %.10t %N %G' || bad=1; }
  return $bad
}

reset() {
  local n p d; read -r n _ <"$RUN/params" || die "not up"
  for d in munged mariadbd slurmdbd slurmctld sshd; do
    case $d in mariadbd|slurmdbd) [ "$(cut -d' ' -f5 "$RUN/params")" = 1 ] || continue;; esac
    dsignal $d CONT 2>/dev/null; dstart $d; done
  for d in $(seq -f node%.0f "$n"); do ns_up "$d"; dsignal "$d" CONT 2>/dev/null; dstart "$d"; done
  for _ in $(seq 100); do in_ns ctl scontrol ping | grep -q ' UP' && break; sleep .05; done
  for p in main low high short; do in_ns ctl scontrol update PartitionName=$p State=UP; done
  in_ns ctl scontrol update PartitionName=closed State=DOWN
  in_ns ctl squeue -h -o %A -t PD,R,S,CF | sort -u | xargs -r "$SELF" sh ctl scancel -f -s KILL 2>/dev/null
  in_ns ctl squeue -h -o %A -t PD,R,S,CF | sort -u | xargs -r "$SELF" sh ctl scancel 2>/dev/null
  for _ in $(seq 400); do
    in_ns ctl sinfo -h -N -p main -o '%N %t' | awk '$2 ~ /drain|drng|down|fail|maint/ {print $1}' | while read -r d; do
      in_ns ctl scontrol update NodeName="$d" State=RESUME 2>/dev/null; done
    [ "$(in_ns ctl sinfo -h -N -p main -o '%t' | grep -c '^idle$')" = "$n" ] && return 0; sleep .1; done
  status; return 1
}

verb=${1:-}; shift || true
case $verb in
  up)     up "$@" ;;
  down)   down "$@" ;;
  status) status ;;
  reset)  reset ;;
  env)    echo "export SLURM_CONF=$ETC/slurm/slurm.conf"
          echo "export SLURMTEST_SSH_PORT=$((PB+22)) SLURMTEST_KEYS=$BASE/keys SLURMTEST_HOME=$BASE/home" ;;
  exec)   NSWD=$PWD u=root; [ "${1:-}" = -u ] && { u=$2; shift 2; }
          if [ "$u" = root ]; then in_ns login "$@"; else in_ns login runuser -u "$u" -- env HOME="$BASE/home/$u" USER="$u" LOGNAME="$u" "$@"; fi ;;
  sh)     n=$1; shift; in_ns "$n" "$@" ;;
  daemon) case $1 in start) dstart "$2";; stop) dstop "$2";; kill) dstop "$2" KILL;; pause) dsignal "$2" STOP;; cont) dsignal "$2" CONT;; *) die "daemon stop|kill|start|pause|cont NAME";; esac ;;
  poweroff) ns_down "$1" ;;
  poweron)  rm -f "$RUN/slurmd-$1.pid"; ns_up "$1"; dstart "$1" ;;
  *) sed -n '2,27p' "$SELF"; exit 2 ;;
esac
