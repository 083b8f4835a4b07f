#!/bin/bash
# Record what this Slurm version prints for jobs of every fate, for tests/unit/launch/test_slurm_output.py.
#
#   tests/slurm/cluster.sh up && tests/golden/record_slurm.sh tests/golden/slurm-22.05      (about 2.5 minutes)
#
# The commands are launch/'s own: their argument lists come from squeue.ARGV, sacct.argv and scontrol.query.
set -euo pipefail
out=$(realpath "$1"); here=$(dirname "$(readlink -f "$0")"); repo=$(realpath "$here/../..")
cluster() { "$repo/tests/slurm/cluster.sh" "$@"; }
alice() { cluster exec -u alice env SLURM_TIME_FORMAT=%s LC_ALL=C bash -c "cd; $1"; }
submit() { alice "sbatch --parsable -o /dev/null $1"; }

cluster reset
limit=$(submit "-J limit -t 1 --wrap 'srun sleep 300'")
ok=$(submit "-J two-nodes -N2 --gres=gpu:2 --wrap 'srun sleep 4'")
code=$(submit "-J exit-3 --wrap 'exit 3'")
code143=$(submit "-J exit-143 --wrap 'exit 143'")
cancelled=$(submit "-J cancelled -N2 --wrap 'srun sleep 300'")
pending=$(submit "-J begin-later --begin=now+1hour --wrap true")
never=$(submit "-J too-many-nodes -N99 --wrap true")
dropped=$(submit "-J cancelled-pending --begin=now+1hour --wrap true")
memory=$(submit "-J step-oom --mem=100 --wrap 'srun python3 -c \"x = b\\\"a\\\" * (300 << 20)\"'")
requeued=$(submit "-J requeued --requeue --wrap 'sleep 1'")
lost=$(submit "-J node-fail --no-requeue -w node3 --wrap 'srun sleep 300'")
sleep 5; alice "scancel $cancelled $dropped; scontrol requeue $requeued"; cluster poweroff node3
sleep 100
ids=$ok,$code,$code143,$cancelled,$pending,$never,$dropped,$memory,$requeued,$lost,$limit
mapfile -t queue < <("$repo/.venv/bin/python" -c 'from launch import squeue; print(*squeue.ARGV, sep="\n")')
mapfile -t account < <("$repo/.venv/bin/python" -c "from launch import sacct; print(*sacct.argv('$ids'.split(','), submitted_since=$(date +%s)), sep='\n')")
cluster exec -u alice env SLURM_TIME_FORMAT=%s LC_ALL=C "${queue[@]}" >"$out/squeue.txt"
cluster exec -u alice env SLURM_TIME_FORMAT=%s LC_ALL=C "${account[@]}" >"$out/sacct.txt"
for job in ${ids//,/ }; do
  cluster exec -u alice env SLURM_TIME_FORMAT=%s LC_ALL=C scontrol show job --oneliner "$job"; done >"$out/scontrol.txt"
cluster poweron node3; alice "scancel $pending $never"; cluster reset
