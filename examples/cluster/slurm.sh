#!/usr/bin/env bash
# A search on nodes that Slurm gives: one Ray cluster per job, which ends with it.
#
#     sbatch examples/cluster/slurm.sh sdca --trials 40            # what follows is handed to `segadapt search`
#     sbatch examples/cluster/slurm.sh --resume sdca-streets       # after a time limit
#
# Change before use: the partition and the three paths. The first node runs the search and its share of the trials.
#SBATCH --job-name=segadapt
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --partition=gpu
#SBATCH --signal=B:TERM@300
#SBATCH --output=segadapt-%j.log
set -euo pipefail

environment=$HOME/segadapt            # a virtual environment with segadapt, on a file system that all nodes see
storage=/scratch/$USER/segadapt/runs  # likewise
private=$HOME/.segadapt-$SLURM_JOB_ID # likewise, for nobody else

export PATH="$environment/bin:$PATH"
export RAY_USAGE_STATS_ENABLED=0

# Others run jobs on the same nodes and reach their ports: without this token Ray answers nobody.
umask 077
mkdir -p "$private" "$storage"
python -c 'import secrets; print(secrets.token_hex(32))' > "$private/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/token"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_PER_TASK:-0}" --temp-dir="/tmp/ray-$SLURM_JOB_ID")

started=()
finish() {
    kill "${started[@]}" 2>/dev/null || true
    wait "${started[@]}" 2>/dev/null || true
    rm -rf "$private"
}
trap finish EXIT

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --block --node-ip-address="$head_ip" --port="$port" --dashboard-host=127.0.0.1 "${resources[@]}" &
started+=($!)
for _ in $(seq 60); do
    ray health-check --address "$head_ip:$port" 2>/dev/null && break
    sleep 2
done
if ((${#nodes[@]} > 1)); then
    workers=$(IFS=,; echo "${nodes[*]:1}")
    srun --overlap --nodes=$((${#nodes[@]} - 1)) --ntasks-per-node=1 --nodelist="$workers" \
        ray start --block --address="$head_ip:$port" "${resources[@]}" &
    started+=($!)
fi

# The search begins when all nodes have joined: it plans for those that it finds.
python - "$head_ip:$port" "${#nodes[@]}" <<'PYTHON'
import sys, time, ray

ray.init(address=sys.argv[1], log_to_driver=False)
deadline = time.monotonic() + 300
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    if time.monotonic() > deadline:
        sys.exit("not all nodes joined within 300 s")
    time.sleep(2)
PYTHON

# Slurm sends TERM 300 s before the time limit: the search closes its records, and `--resume` goes on.
segadapt search --address "$head_ip:$port" --storage "$storage" "$@" &
search=$!
trap 'kill -TERM "$search"' TERM
wait "$search" || { status=$?; wait "$search" || true; exit "$status"; }
