#!/usr/bin/env bash
#SBATCH --job-name=ssmax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
# Train one model of the paper's size on several machines. A requeued job continues from the last checkpoint, also on another
# number of machines.
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
    --rdzv-endpoint "$head:29500" -m ssmax train "${OUT:-runs/paper-b}" --recipe paper --variant b --shard \
    --corpus "${CORPUS:?a folder of text, or a data set on a hub}" "$@"
